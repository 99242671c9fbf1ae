from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from recipes.data.sampler import EpochSampler, EvaluationSampler

sizes = st.tuples(st.integers(1, 60), st.integers(1, 8), st.integers(1, 4))


def epoch_of(sampler: EpochSampler, epoch: int, batch: int = 0) -> list[list[tuple[int, int]]]:
    sampler.set_position(epoch, batch)
    return list(sampler)


@given(sizes=sizes, seed=st.integers(0, 3), epoch=st.integers(0, 5))
def test_the_ranks_share_an_epoch_without_overlap(sizes, seed, epoch):
    length, batch_size, world_size = sizes
    assume(length >= batch_size * world_size)
    ranks = [
        epoch_of(
            EpochSampler(length, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size), epoch
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    keys = [key for batches in ranks for batch in batches for key in batch]
    assert all(len(batch) == batch_size for batches in ranks for batch in batches)
    assert {e for e, _ in keys} == {epoch}
    indices = [index for _, index in keys]
    assert len(set(indices)) == len(indices) == length - length % (batch_size * world_size)
    assert set(indices) <= set(range(length))


@given(length=st.integers(8, 60), share=st.sampled_from([1, 2, 4]), epoch=st.integers(0, 3))
def test_a_global_batch_is_the_same_for_every_number_of_ranks(length, share, epoch):
    alone = epoch_of(EpochSampler(length, batch_size=8, seed=1), epoch)
    ranks = [
        epoch_of(EpochSampler(length, batch_size=8 // share, seed=1, rank=rank, world_size=share), epoch)
        for rank in range(share)
    ]
    shared = [sorted(key for part in parts for key in part) for parts in zip(*ranks, strict=True)]
    assert shared == [sorted(batch) for batch in alone]


@given(sizes=sizes, epoch=st.integers(0, 4), data=st.data())
def test_a_position_resumes_with_exactly_what_is_left(sizes, epoch, data):
    length, batch_size, world_size = sizes
    assume(length >= batch_size * world_size)
    arguments = {"batch_size": batch_size, "seed": 0, "rank": world_size - 1, "world_size": world_size}
    whole = epoch_of(EpochSampler(length, **arguments), epoch)
    batch = data.draw(st.integers(0, len(whole)))
    saved = EpochSampler(length, **arguments)
    saved.set_position(epoch, batch)
    resumed = EpochSampler(length, **arguments)
    resumed.load_state_dict(saved.state_dict())
    assert list(resumed) == whole[batch:]
    assert resumed.state_dict() == saved.state_dict()


def test_iterating_does_not_move_the_position_and_moving_it_does_not_disturb_an_iteration():
    sampler = EpochSampler(12, batch_size=3, seed=0)
    whole = list(sampler)
    assert list(sampler) == whole
    running = iter(sampler)
    first = next(running)
    sampler.set_position(epoch=7, batch=2)
    assert [first, *running] == whole


def test_epochs_and_seeds_are_different_orders():
    orders = [
        tuple(
            index
            for batch in epoch_of(EpochSampler(64, batch_size=8, seed=seed), epoch)
            for _, index in batch
        )
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4


def test_every_sample_is_left_out_of_some_epoch():
    seen = np.zeros(10)
    for epoch in range(40):
        for batch in epoch_of(EpochSampler(10, batch_size=4, seed=0), epoch):
            seen[[index for _, index in batch]] += 1
    assert seen.min() > 20
    assert seen.max() < 40


@pytest.mark.parametrize("position", [(-1, 0), (0, -1), (0, 5)])
def test_a_position_outside_is_refused(position):
    with pytest.raises(ValueError, match="epochs start at 0 and have 4 batches"):
        EpochSampler(12, batch_size=3, seed=0).set_position(*position)


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (EpochSampler(13, batch_size=3, seed=0), "length 13, this one 12"),
        (EpochSampler(12, batch_size=3, seed=1), "seed 1, this one 0"),
        (EpochSampler(12, batch_size=4, seed=0), "global_batch_size 4, this one 3"),
    ],
)
def test_a_state_of_other_data_or_another_batch_size_is_refused(other, name):
    with pytest.raises(ValueError, match=name):
        EpochSampler(12, batch_size=3, seed=0).load_state_dict(other.state_dict())


def test_a_state_from_another_number_of_ranks_with_the_same_global_batch_is_taken():
    one = EpochSampler(24, batch_size=4, seed=0)
    one.set_position(2, 3)
    two = EpochSampler(24, batch_size=2, seed=0, rank=1, world_size=2)
    two.load_state_dict(one.state_dict())
    assert (two.epoch, two.batch) == (2, 3)


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="7 samples do not fill one batch of 4 on each of 2 ranks"):
        EpochSampler(7, batch_size=4, seed=0, world_size=2)


@pytest.mark.parametrize(
    "arguments",
    [(0, 1, 0, 1), (5, 0, 0, 1), (5, 1, 1, 1), (5, 1, -1, 1), (5, 1, 0, 0)],
)
def test_numbers_out_of_range_are_refused(arguments):
    length, batch_size, rank, world_size = arguments
    with pytest.raises(ValueError, match="must be at least 1"):
        EpochSampler(length, batch_size=batch_size, seed=0, rank=rank, world_size=world_size)
    with pytest.raises(ValueError, match="must be at least 1"):
        EvaluationSampler(length, batch_size=batch_size, rank=rank, world_size=world_size)


@given(sizes=sizes)
def test_evaluation_counts_every_sample_exactly_once_over_all_ranks(sizes):
    length, batch_size, world_size = sizes
    found = []
    for rank in range(world_size):
        sampler = EvaluationSampler(length, batch_size=batch_size, rank=rank, world_size=world_size)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert all(1 <= len(batch) <= batch_size for batch in batches)
        found += [key for batch in batches for key in batch]
    assert sorted(found) == [(0, index) for index in range(length)]
