"""Keyed random numbers: the hash by hand, golden values, uniformity and independence of everything else."""

from __future__ import annotations

import hashlib
import math
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dst.masks import draw
from dst.sync import average_over_ranks, random_keys, several_ranks

CHUNK = 1 << 18


def keys(size: int, seed: int = 0, step: int = 0, name: str = "w") -> torch.Tensor:
    return random_keys(seed, step, name, torch.arange(size))


# --- The same numbers for ever -----------------------------------------------------------------

# Changing any of these breaks the resumption of every saved run: random growth after the resume would
# differ from that of the uninterrupted run.
GOLDEN = {
    (0, 0, "w"): [2129726715, 419181632, -1617627464, -1482558374, 1263431860, -863477698],
    (0, 100, "stages.0.0.dwconv.weight"): [
        818729663,
        819651935,
        -987033958,
        -1859389031,
        -2101775435,
        -1231587810,
    ],
    (-1, 2**40, "größe"): [-1274457219, 686255727, 313774375, 6977630, 329898143, -1030056173],
}


@pytest.mark.parametrize("key", GOLDEN, ids=str)
def test_golden_values(key: tuple[int, int, str]):
    positions = torch.tensor([0, 1, 2, 1_000_003, 2**31 - 1, 2**32 - 1])
    assert random_keys(*key, positions).tolist() == GOLDEN[key]


def by_hand(seed: int, step: int, name: str, index: int) -> int:
    """Compute the hash in Python's integers: two rounds of lowbias32 around two words of BLAKE2b."""

    def lowbias32(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
        x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
        return x ^ (x >> 16)

    digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest()
    first, second = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
    x = lowbias32((lowbias32(index % 2**32 ^ first) + second) % 2**32)
    return x - 2**32 if x >= 2**31 else x


@given(
    st.integers(),
    st.integers(0, 2**50),
    st.text(max_size=20),
    st.lists(st.integers(0, 2**32 - 1), max_size=20),
)
def test_the_hash_by_hand(seed: int, step: int, name: str, index: list[int]):
    expected = [by_hand(seed, step, name, i) for i in index]
    assert random_keys(seed, step, name, torch.tensor(index, dtype=torch.int64)).tolist() == expected


def test_another_process_with_another_hash_seed_agrees():
    code = (
        "import torch; from dst.sync import random_keys; "
        "print(random_keys(3, 7, 'a.b', torch.arange(64)).tolist())"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    assert printed.strip() == str(random_keys(3, 7, "a.b", torch.arange(64)).tolist())


# --- A function of the position alone ----------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 17])
def test_chunks_do_not_show(size: int):
    result = keys(size)
    assert result.shape == (size,)
    assert result.dtype == torch.int32
    for position in {0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, size - 1} & set(range(size)):
        assert result[position] == by_hand(0, 0, "w", position)


def test_a_shard_gets_its_part_of_the_whole():
    whole = keys(3 * CHUNK).view(12, -1)
    index = torch.arange(3 * CHUNK).view(12, -1)
    for part in (np.s_[3:7], np.s_[:, 1000:70_000], np.s_[::5, ::7], np.s_[11, 5]):
        assert torch.equal(random_keys(0, 0, "w", index[part]), whole[part])
    assert torch.equal(random_keys(0, 0, "w", index.t()), whole.t())
    shuffled = torch.randperm(index.numel(), generator=torch.Generator().manual_seed(0))
    assert torch.equal(random_keys(0, 0, "w", shuffled), whole.view(-1)[shuffled])


def test_the_dtype_and_shape_of_the_index_do_not_show():
    expected = keys(60)
    for dtype in (torch.int32, torch.int64, torch.int16, torch.uint8):
        assert torch.equal(random_keys(0, 0, "w", torch.arange(60, dtype=dtype)), expected)
    shaped = random_keys(0, 0, "w", torch.arange(60).view(3, 4, 5))
    assert shaped.shape == (3, 4, 5)
    assert torch.equal(shaped.reshape(-1), expected)
    assert random_keys(0, 0, "w", torch.tensor(7)) == expected[7]


def test_nothing_is_written_and_no_generator_moves():
    index = torch.arange(1000, dtype=torch.int32)
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    random_keys(0, 0, "w", index)
    random_keys(0, 0, "w", index.view(10, 100).t())
    assert torch.equal(index, torch.arange(1000, dtype=torch.int32))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert str(np.random.get_state()) == str(numpy_state)  # noqa: NPY002


# --- Good as chance ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w", "layers.11.weight"])
def test_no_two_of_a_million_positions_share_a_key(name: str):
    result = keys(1 << 20, seed=5, step=300, name=name)
    assert result.unique().numel() == 1 << 20


def test_keys_fill_the_range_evenly():
    result = keys(1 << 20).long() + 2**31
    counts = torch.bincount(result >> 22, minlength=1024).double()
    chi_square = ((counts - 1024) ** 2 / 1024).sum().item()
    assert 1023 - 5 * math.sqrt(2 * 1023) < chi_square < 1023 + 5 * math.sqrt(2 * 1023)
    for bit in range(32):
        ones = int(((result >> bit) & 1).sum())
        assert abs(ones - 2**19) < 5 * 2**9


@pytest.mark.parametrize("k", [1, 8, 32])
def test_every_position_is_drawn_equally_often(k: int):
    size, repeats = 64, 2000
    counts = sum(draw(keys(size, seed=seed), k).double() for seed in range(repeats))
    expected = repeats * k / size
    # Without replacement a draw's entries are correlated; the chi-square shrinks by (1 - k / size) N/(N-1).
    chi_square = ((counts - expected) ** 2 / expected).sum().item() / (1 - k / size) * (size - 1) / size
    freedom = size - 1
    assert freedom - 5 * math.sqrt(2 * freedom) < chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_every_pair_of_positions_is_drawn_equally_often():
    # Neighbours, positions a power of two apart, and the ends of rows: what a weak hash ties together.
    size, k, repeats = 64, 16, 4000
    drawn = torch.stack([draw(keys(size, step=step), k) for step in range(1, repeats + 1)]).double()
    together = drawn.t() @ drawn
    expected = repeats * k * (k - 1) / (size * (size - 1))
    pairs = together[torch.triu(torch.ones(size, size, dtype=torch.bool), 1)]
    assert (pairs - expected).abs().max() < 5.5 * math.sqrt(expected)
    assert abs(pairs.std().item() / math.sqrt(expected) - 1) < 0.15


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"seed": 0}, {"seed": 1}),
        ({"step": 100}, {"step": 200}),
        ({"name": "layers.0.weight"}, {"name": "layers.1.weight"}),
        ({"seed": 1, "step": 0}, {"seed": 0, "step": 1}),
    ],
    ids=str,
)
def test_draws_of_other_seeds_steps_and_names_overlap_by_chance(one: dict, other: dict):
    size, k = 200_000, 20_000
    overlap = int((draw(keys(size, **one), k) & draw(keys(size, **other), k)).count_nonzero())
    mean = k * k / size
    deviation = math.sqrt(mean * (1 - k / size) ** 2)  # hypergeometric
    assert abs(overlap - mean) < 5 * deviation


def test_arguments_are_not_run_together():
    assert not torch.equal(keys(8, seed=1, step=11), keys(8, seed=11, step=1))
    assert not torch.equal(keys(8, seed=1, step=0, name="1/w"), keys(8, seed=1, step=1, name="w"))


# --- Averages ----------------------------------------------------------------------------------


def test_alone_an_average_is_the_tensor_itself():
    tensor = torch.tensor([1.0, float("nan"), -0.0])
    before = tensor.clone().view(torch.int32)
    assert average_over_ranks(tensor) is tensor
    assert torch.equal(tensor.view(torch.int32), before)
    assert not several_ranks()
