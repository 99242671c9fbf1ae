from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dst.algorithms import rigl, set_, slak
from dst.metrics import churn, exploration_rate, mask_overlap
from dst.optimizer import SparseOptimizer

bits = st.lists(st.booleans(), min_size=4, max_size=4)
pairs = st.dictionaries(st.text("ab", min_size=1, max_size=2), st.tuples(bits, bits), min_size=1, max_size=3)


def masks(values: dict[str, list[bool]]) -> dict[str, Tensor]:
    return {name: torch.tensor(value).view(2, 2) for name, value in values.items()}


def members(values: dict[str, list[bool]]) -> set[tuple[str, int]]:
    return {(name, i) for name, value in values.items() for i, bit in enumerate(value) if bit}


@given(pairs)
def test_churn_and_overlap_equal_set_arithmetic(values: dict[str, tuple[list[bool], list[bool]]]) -> None:
    first = {name: a for name, (a, _) in values.items()}
    second = {name: b for name, (_, b) in values.items()}
    a, b = members(first), members(second)
    assert churn(masks(first), masks(second)) == (len(b - a) / len(b) if b else 0.0)
    overlap = mask_overlap(masks(first), masks(second))
    assert overlap.total == (len(a & b) / len(a | b) if a | b else 1.0)
    assert overlap == mask_overlap(masks(second), masks(first))
    for name in values:
        a, b = members({name: first[name]}), members({name: second[name]})
        assert overlap.tensors[name] == (len(a & b) / len(a | b) if a | b else 1.0)


def test_counts_are_exact_beyond_float32() -> None:
    ones = torch.ones(2**24 + 1, dtype=torch.bool)
    fewer = ones.clone()
    fewer[-1] = False
    assert churn({"w": fewer}, {"w": ones}) == 1 / (2**24 + 1)
    assert mask_overlap({"w": fewer}, {"w": ones}).total == 2**24 / (2**24 + 1)


def test_masks_that_do_not_fit_raise() -> None:
    mask = torch.ones(2, dtype=torch.bool)
    for function in (churn, mask_overlap):
        with pytest.raises(ValueError, match="1 names are in one only, the first is 'b'"):
            function({"a": mask}, {"a": mask, "b": mask})
        with pytest.raises(ValueError, match=r"bool of one shape, got .*\(2,\).*\(1,\)"):
            function({"a": mask}, {"a": mask[:1]})
        with pytest.raises(ValueError, match=r"got torch\.bool .* torch\.float32"):
            function({"a": mask}, {"a": mask.float()})
        with pytest.raises(ValueError, match="must be bool"):
            function({"a": mask.float()}, {"a": mask.float()})


@pytest.mark.parametrize(
    "algorithm",
    [set_(total_steps=99, interval=1), rigl(total_steps=99, interval=2), slak(total_steps=99, interval=3)],
    ids=["set", "rigl", "slak"],
)
def test_exploration_counts_what_was_ever_active(algorithm: object) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 6))
    optimizer = SparseOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, sparsity=0.75, algorithm=algorithm
    )
    ever = members({name: mask.flatten().tolist() for name, mask in optimizer.masks.items()})
    assert exploration_rate(optimizer) == len(ever) / 216 == 0.25
    last = 0.25
    for _ in range(9):
        before = {name: mask.clone() for name, mask in optimizer.masks.items()}
        optimizer.zero_grad()
        model(torch.randn(4, 12)).square().mean().backward()
        optimizer.step()
        ever |= members({name: mask.flatten().tolist() for name, mask in optimizer.masks.items()})
        assert exploration_rate(optimizer) == len(ever) / 216 >= last
        last = exploration_rate(optimizer)
        changed = sum(int((m & ~before[name]).sum()) for name, m in optimizer.masks.items())
        assert churn(before, optimizer.masks) == changed / 54
    assert 0.25 < last <= 1
