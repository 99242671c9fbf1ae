"""Schedules and triggers: published formulas, exact ends, bounds, order, counts; they are values."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dst.schedules import Constant, Cosine, Cubic, Every, InversePower, Linear, Never

fractions = st.floats(0, 1)
lengths = st.integers(1, 10_000)
offsets = st.integers(0, 1000)
BETWEEN = (Linear, Cosine, Cubic)
VALUES = (
    Constant(0.3),
    Linear(1.0, 10),
    Cosine(0.3, 100, 0.005),
    Cubic(0.0, 10, 0.8, 5),
    InversePower(0.4, 4, 1.0),
    Every(100, 50, 300),
    Never(),
)


# --- Published formulas --------------------------------------------------------------------------


@given(st.integers(0, 400))
def test_cosine_is_rigls_decay(step: int):
    # f_decay(t) = alpha / 2 (1 + cos(pi t / T_end)), RigL section 3.
    expected = 0.3 / 2 * (1 + math.cos(math.pi * step / 400))
    assert Cosine(0.3, steps=400)(step) == pytest.approx(expected, abs=1e-15)


@given(st.integers(0, 400))
def test_cosine_with_a_floor_is_slaks_decay(step: int):
    # Cosine annealing (Loshchilov and Hutter, arXiv 1608.03983, equation 5) down to 0.005.
    expected = 0.005 + (0.5 - 0.005) * (1 + math.cos(math.pi * step / 400)) / 2
    assert Cosine(0.5, steps=400, end=0.005)(step) == pytest.approx(expected, abs=1e-15)
    assert Cosine(0.5, steps=400, end=0.005)(400 + step) == 0.005


@given(st.integers(0, 1000))
def test_cubic_is_zhu_and_guptas(step: int):
    # s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))**3 for t_0 <= t <= t_0 + n dt, equation 1.
    t0, n, dt = 100, 8, 100
    inside = min(max(step, t0), t0 + n * dt)
    expected = 0.9 + (0.2 - 0.9) * (1 - (inside - t0) / (n * dt)) ** 3
    assert Cubic(0.2, steps=n * dt, end=0.9, offset=t0)(step) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("power", [1, 3])
def test_inverse_power_is_rigls_variant(power: int):
    # alpha (1 - t / T_end)**k, RigL appendix G.
    for step in range(41):
        expected = 0.4 * (1 - step / 40) ** power
        assert InversePower(0.4, steps=40, power=power)(step) == pytest.approx(expected, abs=1e-15)


def test_linear_is_a_straight_line():
    assert [Linear(0.0, steps=4, end=1.0)(t) for t in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]


def test_constant_is_constant():
    assert {Constant(0.3)(t) for t in range(0, 10**6, 999)} == {0.3}


# --- Ends, bounds, order --------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", BETWEEN, ids=lambda s: s.__name__)
@given(start=fractions, end=fractions, steps=lengths, offset=offsets)
def test_both_ends_are_exact_and_held(schedule: type, start: float, end: float, steps: int, offset: int):
    value = schedule(start, steps, end, offset)
    assert value(offset) == value(0) == value(offset - 1) == start
    assert value(offset + steps) == value(offset + steps + 1) == value(10**9) == end


@pytest.mark.parametrize("schedule", BETWEEN, ids=lambda s: s.__name__)
@given(
    start=fractions,
    end=fractions,
    steps=lengths,
    offset=offsets,
    at=st.lists(st.integers(0, 12_000), max_size=20),
)
def test_the_way_is_monotone_and_stays_between_the_ends(
    schedule: type, start: float, end: float, steps: int, offset: int, at: list[int]
):
    way = [schedule(start, steps, end, offset)(step) for step in sorted(at)]
    assert all(min(start, end) <= value <= max(start, end) for value in way)
    assert way == sorted(way, reverse=start > end)


@given(start=fractions, steps=lengths, power=st.floats(0.1, 8), offset=offsets)
def test_inverse_power_falls_from_start_to_zero(start: float, steps: int, power: float, offset: int):
    schedule = InversePower(start, steps, power, offset)
    assert schedule(0) == schedule(offset) == start
    assert schedule(offset + steps) == schedule(10**9) == 0
    way = [schedule(offset + steps * i // 20) for i in range(21)]
    assert way == sorted(way, reverse=True)


@pytest.mark.parametrize("schedule", BETWEEN, ids=lambda s: s.__name__)
@given(steps=lengths, offset=offsets, step=st.integers(0, 12_000))
def test_an_offset_only_shifts(schedule: type, steps: int, offset: int, step: int):
    assert schedule(0.7, steps, 0.1, offset)(offset + step) == schedule(0.7, steps, 0.1)(step)


def test_cosine_is_halfway_at_half_time_and_cubic_is_early():
    assert Cosine(0.3, 100, 0.1)(50) == pytest.approx(0.2, abs=1e-15)
    assert Cubic(0.0, 100, 0.8)(50) == pytest.approx(0.7, abs=1e-15)


def test_steps_may_be_numpy_integers():
    assert Cosine(0.3, 100)(np.int64(30)) == Cosine(0.3, 100)(30)
    assert Every(10)(np.int64(30))
    assert not Every(10)(np.int64(31))


# --- Triggers ----------------------------------------------------------------------------------


@given(st.integers(1, 50), st.integers(0, 120), st.none() | st.integers(0, 300))
def test_every_is_its_definition(interval: int, start: int, stop: int | None):
    due = [t for t in range(-3, 301) if Every(interval, start, stop)(t)]
    end = 301 if stop is None else min(stop, 301)
    assert due == [t for t in range(1, end) if t >= start and (t - start) % interval == 0]


@given(st.integers(1, 50), st.integers(0, 120), st.integers(0, 300))
def test_how_often_every_is_due(interval: int, start: int, stop: int):
    # Multiples of the interval in [start, stop), without step 0.
    first = start or interval
    expected = max(0, math.ceil((stop - first) / interval))
    assert sum(Every(interval, start, stop)(t) for t in range(400)) == expected


def test_rigl_on_imagenet_updates_249_times():
    # Every 100 steps before 25,000 of 32,000, RigL section 4.1: not at 0 and not at T_end.
    due = [t for t in range(32_001) if Every(100, stop=25_000)(t)]
    assert (len(due), due[0], due[-1]) == (249, 100, 24_900)


def test_step_zero_is_never_due():
    assert not Every(1)(0)
    assert Every(1)(1)


def test_never_is_never_due():
    assert not any(Never()(t) for t in range(-1, 1000))


# --- Values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_schedule_is_a_value(value: object):
    namespace = {type(v).__name__: type(v) for v in VALUES}
    assert eval(repr(value), namespace) == value
    for twin in (pickle.loads(pickle.dumps(value)), copy.deepcopy(value)):
        assert twin == value
        assert hash(twin) == hash(value)
        assert repr(twin) == repr(value)
    with pytest.raises(FrozenInstanceError):
        value.steps = 3  # type: ignore[attr-defined]


def test_other_numbers_and_other_kinds_differ():
    assert len({*VALUES, *VALUES}) == len(VALUES)
    assert Linear(0.3, 10, 0.1) != Cosine(0.3, 10, 0.1)
    assert Cosine(0.3, 10) != Cosine(0.3, 11)
    assert Every(100) != Every(100, stop=10**9)


# --- Errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, -1, math.nan])
def test_a_way_of_no_steps_raises(steps: float):
    for schedule in (*BETWEEN, InversePower):
        with pytest.raises(ValueError, match=f"at least 1 step, got steps={steps}"):
            schedule(0.3, steps=steps, **({"end": 0.0} if schedule is Cubic else {}))


@pytest.mark.parametrize("power", [0, -1, math.nan])
def test_a_power_of_nothing_raises(power: float):
    with pytest.raises(ValueError, match="power must be above 0"):
        InversePower(0.3, steps=10, power=power)


@pytest.mark.parametrize("arguments", [{"interval": 0}, {"interval": -5}, {"interval": 5, "start": -1}])
def test_an_interval_of_nothing_raises(arguments: dict[str, int]):
    with pytest.raises(ValueError, match="interval must be at least 1 and start at least 0"):
        Every(**arguments)
