from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recipes.data.keyed import Stream, generator, sample_generator

words = st.integers(0, 2**64 - 1)


@given(seed=words, stream=st.sampled_from(Stream), first=words, second=words)
def test_it_is_philox_with_seed_and_stream_as_key_and_the_rest_as_counter(seed, stream, first, second):
    oracle = np.random.Philox(key=seed + (int(stream) << 64), counter=(first << 128) + (second << 192))
    drawn = generator(seed, stream, first, second).bit_generator.random_raw(8)
    np.testing.assert_array_equal(drawn, oracle.random_raw(8))


@given(st.lists(st.tuples(words, st.sampled_from(Stream), words, words), min_size=2, max_size=2, unique=True))
def test_different_keys_give_different_numbers(keys):
    first, second = (generator(*key).bit_generator.random_raw(4) for key in keys)
    assert not np.array_equal(first, second)


def test_the_numbers_of_neighbouring_keys_are_uniform_and_uncorrelated():
    draws = np.array(
        [[sample_generator(0, epoch, index).random() for index in range(100)] for epoch in range(100)]
    )
    assert abs(draws.mean() - 0.5) < 0.015  # five standard errors of 10,000 uniform numbers
    for shifted in (draws[1:] * draws[:-1], draws[:, 1:] * draws[:, :-1]):
        assert abs(shifted.mean() - 0.25) < 0.015


def test_global_generators_are_left_alone():
    numpy_before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    generator(0, Stream.MIXING, 5).normal(size=100)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_before)


@pytest.mark.parametrize("key", [(-1, 0, 0), (0, -1, 0), (0, 0, -1), (2**64, 0, 0), (0, 2**64, 0)])
def test_a_number_that_does_not_fit_is_refused(key):
    seed, first, second = key
    with pytest.raises(ValueError, match=r"between 0 and 2\^64 - 1"):
        generator(seed, Stream.SAMPLE, first, second)
