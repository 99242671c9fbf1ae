from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from recipes.data import splits


@given(
    counts=st.lists(st.integers(2, 40), min_size=1, max_size=8),
    held_out=st.sampled_from([0.1, 0.2, 0.25, 1 / 3, 0.5]),
    seed=st.integers(0, 5),
)
def test_stratified_is_a_partition_in_proportion(counts, held_out, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    total = round(held_out * len(labels))
    assume(0 < total < len(labels))
    train, test = splits.stratified(labels, held_out, seed)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(len(labels)))
    assert len(test) == total
    for label, count in enumerate(counts):
        held = int((labels[test] == label).sum())
        assert abs(Fraction(held) - Fraction(held_out) * count) < 1
        assert held < count


@given(seed=st.integers(0, 2**64 - 1))
def test_stratified_depends_on_the_seed_alone(seed):
    labels = np.arange(200) % 10
    first, again = splits.stratified(labels, 0.2, seed), splits.stratified(labels, 0.2, seed)
    np.testing.assert_array_equal(first[1], again[1])
    other = splits.stratified(labels, 0.2, (seed + 1) % 2**64)
    assert not np.array_equal(first[1], other[1])


def test_every_sample_is_held_out_about_equally_often():
    labels = np.array([0] * 20 + [1] * 10)
    times = np.zeros(30)
    for seed in range(400):
        times[splits.stratified(labels, 0.2, seed)[1]] += 1
    assert np.abs(times / 400 - 0.2).max() < 0.1  # five standard deviations


def test_a_class_with_one_sample_keeps_it():
    train, test = splits.stratified(np.array([0, 1, 1, 1, 1]), 0.4, seed=0)
    assert 0 in train
    assert len(test) == 2


def test_file_order_takes_the_end():
    train, test = splits.file_order(1797, 0.2)
    np.testing.assert_array_equal(train, np.arange(1438))
    np.testing.assert_array_equal(test, np.arange(1438, 1797))


@pytest.mark.parametrize("held_out", [-0.2, 0.0, 0.001, 0.999, 1.0, 3.0])
def test_nothing_on_one_side_is_refused(held_out):
    with pytest.raises(ValueError, match="leaves nothing on one side"):
        splits.file_order(100, held_out)
    with pytest.raises(ValueError, match="leaves nothing on one side"):
        splits.stratified(np.arange(100) % 2, held_out, seed=0)


def test_a_fraction_that_empties_a_class_is_refused():
    with pytest.raises(ValueError, match="leaves a class without a training sample"):
        splits.stratified(np.arange(10), 0.5, seed=0)
