"""Counts on the way to the final sparsity: exact in total, monotone in each tensor, close to proportional."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dst.counts import partial_counts

TENSORS = st.lists(st.tuples(st.integers(1, 400), st.integers(0, 400)), min_size=1, max_size=8).map(
    lambda pairs: {f"t{i}": (size, min(target, size)) for i, (size, target) in enumerate(pairs)}
)


def webster(final: dict[str, int], seats: int) -> dict[str, int]:
    """Give out one seat after the other to the largest R_l / (2 n_l + 1): the definition, slowly."""
    given_out = dict.fromkeys(final, 0)
    for _ in range(seats):
        name = max(final, key=lambda n: (Fraction(final[n], 2 * given_out[n] + 1), n))
        given_out[name] += 1
    return given_out


@given(TENSORS, st.floats(0, 1))
def test_equals_the_definition(tensors: dict[str, tuple[int, int]], reached: float) -> None:
    sizes = {name: size for name, (size, _) in tensors.items()}
    targets = {name: target for name, (_, target) in tensors.items()}
    final = {name: sizes[name] - targets[name] for name in sizes}
    seats = round(Fraction(reached) * sum(final.values()))
    expected = webster(final, seats)
    counts = partial_counts(sizes, targets, reached)
    assert {name: sizes[name] - counts[name] for name in sizes} == expected
    assert all(targets[name] <= counts[name] <= sizes[name] for name in sizes)


@given(TENSORS, st.floats(0, 1), st.floats(0, 1))
def test_no_tensor_gains_weights_while_the_sparsity_rises(
    tensors: dict[str, tuple[int, int]], one: float, other: float
) -> None:
    sizes = {name: size for name, (size, _) in tensors.items()}
    targets = {name: target for name, (_, target) in tensors.items()}
    before, after = (partial_counts(sizes, targets, reached) for reached in sorted((one, other)))
    assert all(after[name] <= before[name] for name in sizes)


@given(TENSORS)
def test_the_ends_are_dense_and_final(tensors: dict[str, tuple[int, int]]) -> None:
    sizes = {name: size for name, (size, _) in tensors.items()}
    targets = {name: target for name, (_, target) in tensors.items()}
    assert partial_counts(sizes, targets, 0) == sizes
    assert partial_counts(sizes, targets, 1) == targets


@pytest.mark.parametrize("reached", [-0.1, 1.1, float("nan")])
def test_what_is_no_part_is_refused(reached: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        partial_counts({"a": 2}, {"a": 1}, reached)
