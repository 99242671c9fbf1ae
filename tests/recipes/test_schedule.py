"""The learning rate: against the formula written out once more, and through a real scheduler."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recipes.engine.schedule import WarmupCosine, warmup_cosine


def optimizer(lr=0.4):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


@given(st.integers(1, 200), st.floats(0, 1), st.floats(0, 1))
def test_the_factor_climbs_to_one_then_falls_to_the_floor(total, share, floor):
    warmup = int(share * total)
    factors = [WarmupCosine(total, warmup, floor)(step) for step in range(total + 1)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert factors[:warmup] == [(step + 1) / warmup for step in range(warmup)]
    rest = factors[warmup:]
    assert rest == sorted(rest, reverse=True)
    assert rest[0] == 1 or warmup == total
    assert math.isclose(factors[-1], floor if warmup < total else 1, abs_tol=1e-12)


def test_the_scheduler_sets_the_rate_of_each_step():
    opt = optimizer()
    scheduler = warmup_cosine(opt, total_steps=8, warmup_steps=2, min_lr=0.04)
    rates = []
    for _ in range(8):
        rates.append(opt.param_groups[0]["lr"])
        opt.step()
        scheduler.step()
    cosine = [0.04 + 0.36 * (1 + math.cos(math.pi * t / 6)) / 2 for t in range(6)]
    assert rates == pytest.approx([0.2, 0.4, *cosine])
    assert opt.param_groups[0]["lr"] == pytest.approx(0.04)


def test_a_saved_scheduler_goes_on_where_it_was():
    one, other = optimizer(), optimizer()
    first = warmup_cosine(one, total_steps=10, warmup_steps=3, min_lr=0.0)
    for _ in range(5):
        one.step()
        first.step()
    second = warmup_cosine(other, total_steps=10, warmup_steps=3, min_lr=0.0)
    second.load_state_dict(first.state_dict())
    other.load_state_dict(one.state_dict())
    for _ in range(5):
        assert one.param_groups[0]["lr"] == other.param_groups[0]["lr"]
        for opt, scheduler in ((one, first), (other, second)):
            opt.step()
            scheduler.step()


@pytest.mark.parametrize(
    "wrong", [{"total_steps": 1}, {"min_lr": 1.0}, {"min_lr": -1.0}, {"warmup_steps": -1}]
)
def test_impossible_schedules_raise(wrong):
    with pytest.raises(ValueError, match=r"warm-up|min_lr"):
        warmup_cosine(optimizer(), **{"total_steps": 8, "warmup_steps": 2, "min_lr": 0.0} | wrong)
