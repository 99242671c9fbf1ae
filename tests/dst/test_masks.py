"""Selection against a sort of (score, index), on every dtype, layout and edge of k; storage against numpy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from dst.masks import draw, grow, pack, prune, unpack

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
DTYPES = FLOATS + INTEGERS
LAYOUTS = ("contiguous", "transposed", "strided", "channels_last")
# Few values, so that ties are the rule; both zeros, both infinities, the ends of the range, NaN.
FLOAT_POOL = (0.0, -0.0, 1.0, -1.0, 2.0, 1e-7, math.inf, -math.inf, math.nan, -math.nan)


# --- The oracle: a plain sort ------------------------------------------------------------------


def rank(value: float) -> tuple[bool, float]:
    """Order scores as documented: NaN below everything, -0 equal to +0."""
    if isinstance(value, float) and math.isnan(value):
        return (False, 0)
    return (True, value + 0)


def flat(tensor: Tensor) -> list:
    """Read the values row by row, whatever the memory layout, exactly."""
    return [tensor[i].item() for i in np.ndindex(*tensor.shape)] if tensor.numel() else []


def oracle_prune(scores: Tensor, mask: Tensor, k: int) -> list[bool]:
    order = sorted((rank(s), i) for i, (s, m) in enumerate(zip(flat(scores), flat(mask), strict=True)) if m)
    leaving = {i for _, i in order[:k]}
    return [m and i not in leaving for i, m in enumerate(flat(mask))]


def oracle_grow(scores: Tensor, mask: Tensor, k: int) -> list[bool]:
    inactive = [i for i, m in enumerate(flat(mask)) if not m]
    values = flat(scores)
    # Python's sort is stable, with reverse too: equal scores stay in the order of their indices.
    coming = set(sorted(inactive, key=lambda i: rank(values[i]), reverse=True)[:k])
    return [m or i in coming for i, m in enumerate(flat(mask))]


# --- What is generated ---------------------------------------------------------------------------


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """Return the same values in another memory layout."""
    if layout == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided" and tensor.dim() >= 1:
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


def value_pool(dtype: torch.dtype) -> list:
    if dtype in FLOATS:
        info = torch.finfo(dtype)
        return [*FLOAT_POOL, info.max, info.min, info.tiny, info.smallest_normal / 2]
    if dtype == torch.bool:
        return [False, True]
    info = torch.iinfo(dtype)
    return [v for v in (0, 1, 2, -1, info.min, info.max, info.max - 1) if info.min <= v]


@st.composite
def selections(draw_from: st.DrawFn) -> tuple[Tensor, Tensor]:
    dtype = draw_from(st.sampled_from(DTYPES))
    shape = draw_from(st.lists(st.integers(0, 4), max_size=4))
    size = math.prod(shape)
    pool = st.sampled_from(value_pool(dtype))
    scores = torch.tensor(draw_from(st.lists(pool, min_size=size, max_size=size)), dtype=dtype)
    mask = torch.tensor(draw_from(st.lists(st.booleans(), min_size=size, max_size=size)), dtype=torch.bool)
    layouts = st.sampled_from(LAYOUTS)
    return (
        laid_out(scores.reshape(shape), draw_from(layouts)),
        laid_out(mask.reshape(shape), draw_from(layouts)),
    )


def bits(tensor: Tensor) -> bytes:
    """Read the whole memory under a tensor, gaps included."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy().tobytes()


# --- Exact selection ---------------------------------------------------------------------------


@given(selections(), st.integers(0, 256))
def test_prune_is_the_sort(case: tuple[Tensor, Tensor], k: int):
    scores, mask = case
    k %= int(mask.count_nonzero()) + 1
    kept = prune(scores, mask, k)
    assert kept.dtype == torch.bool
    assert kept.shape == mask.shape
    assert flat(kept) == oracle_prune(scores, mask, k)


@given(selections(), st.integers(0, 256))
def test_grow_is_the_sort(case: tuple[Tensor, Tensor], k: int):
    scores, mask = case
    k %= int((~mask).count_nonzero()) + 1
    grown = grow(scores, mask, k)
    assert grown.dtype == torch.bool
    assert grown.shape == mask.shape
    assert flat(grown) == oracle_grow(scores, mask, k)


@given(selections(), st.integers(0, 256))
def test_draw_is_grow_from_nothing(case: tuple[Tensor, Tensor], k: int):
    scores, _ = case
    k %= scores.numel() + 1
    nothing = torch.zeros(scores.shape, dtype=torch.bool)
    assert flat(draw(scores, k)) == oracle_grow(scores, nothing, k)


@given(selections())
def test_every_k_of_a_mask_nests(case: tuple[Tensor, Tensor]):
    # The set that leaves for k is part of the set that leaves for k + 1; the ends are all and nothing.
    scores, mask = case
    active, inactive = int(mask.count_nonzero()), int((~mask).count_nonzero())
    kept = [prune(scores, mask, k) for k in range(active + 1)]
    grown = [grow(scores, mask, k) for k in range(inactive + 1)]
    assert torch.equal(kept[0], mask)
    assert torch.equal(grown[0], mask)
    assert not kept[-1].any()
    assert grown[-1].all()
    for more, fewer in [*itertools.pairwise(kept), *zip(grown[1:], grown, strict=False)]:
        assert int(more.count_nonzero()) == int(fewer.count_nonzero()) + 1
        assert not (fewer & ~more).any()


# Large tensors are searched by a sample; what it sees at every 61st entry must never change the result.
LARGE = 70_003
POSITION = torch.arange(LARGE)
NOISE = torch.randn(LARGE, generator=torch.Generator().manual_seed(0))
COIN = torch.rand(LARGE, generator=torch.Generator().manual_seed(1))
SPREADS = {
    "normal": NOISE,
    "magnitudes of a trained tensor": NOISE.abs() * (COIN < 0.6),
    "rising": POSITION.float(),
    "falling": -POSITION.float(),
    "equal": torch.ones(LARGE),
    "seven values and NaN": (NOISE.clamp(-1, 1) * 3).round().masked_fill(COIN < 0.01, torch.nan),
    "sampled entries are the largest": NOISE + 100 * (POSITION % 61 == 0),
    "sampled entries are the smallest": NOISE - 100 * (POSITION % 61 == 0),
    "sampled entries are NaN": NOISE.masked_fill(POSITION % 61 == 0, torch.nan),
    "sampled entries are equal": NOISE.masked_fill(POSITION % 61 == 0, 0.1),
    "one is large": (POSITION == 40_000).float(),
}
LARGE_MASKS = {
    "at random": COIN < 0.4,
    "the front": POSITION < 5000,
    "only sampled entries": POSITION % 61 == 0,
    "no sampled entry": POSITION % 61 != 0,
}


@pytest.mark.parametrize("active", LARGE_MASKS)
@pytest.mark.parametrize("spread", SPREADS)
def test_a_large_tensor_is_searched_exactly(spread: str, active: str):
    scores, mask = SPREADS[spread], LARGE_MASKS[active]
    broken, values = scores.isnan().numpy(), np.nan_to_num(scores.numpy())
    order = np.lexsort((POSITION, np.where(broken, 0.0, values), ~broken))  # smallest first, NaN before all
    leaving = order[mask.numpy()[order]]
    order = np.lexsort((POSITION, np.where(broken, 0.0, -values), broken))  # largest first, NaN after all
    coming = order[~mask.numpy()[order]]
    for share in (0.0, 0.001, 0.05, 0.3, 0.5, 0.9, 1.0):
        k = min(max(round(share * len(leaving)), 1), len(leaving) - 1)
        expected = mask.numpy().copy()
        expected[leaving[:k]] = False
        assert np.array_equal(prune(scores, mask, k).numpy(), expected)
        k = min(max(round(share * len(coming)), 1), len(coming) - 1)
        expected = mask.numpy().copy()
        expected[coming[:k]] = True
        assert np.array_equal(grow(scores, mask, k).numpy(), expected)


@pytest.mark.parametrize("size", [2**16 - 1, 2**16, 2**16 + 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32], ids=str)
def test_the_search_does_not_depend_on_the_size(size: int, dtype: torch.dtype):
    scores = (1000 * NOISE[:size]).to(dtype)
    order = np.lexsort((POSITION[:size], -scores.double().numpy()))
    for k in (1, 100, size // 3, size - 1):
        assert set(order[:k]) == set(draw(scores, k).nonzero().squeeze(1).tolist())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_equal_scores_go_by_index(dtype: torch.dtype):
    scores = torch.ones(2, 5, dtype=dtype)
    mask = torch.tensor([[1, 0, 1, 0, 1], [0, 1, 0, 1, 0]], dtype=torch.bool)
    assert flat(prune(scores, mask, 2)) == [False, False, False, False, True, False, True, False, True, False]
    assert flat(grow(scores, mask, 2)) == [True, True, True, True, True, False, True, False, True, False]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_is_below_minus_infinity(dtype: torch.dtype):
    scores = torch.tensor([-math.inf, math.nan, -math.nan, 0.0], dtype=dtype)
    everything = torch.ones(4, dtype=torch.bool)
    assert prune(scores, everything, 2).tolist() == [True, False, False, True]
    assert prune(scores, everything, 3).tolist() == [False, False, False, True]
    assert grow(scores, ~everything, 2).tolist() == [True, False, False, True]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_minus_zero_ties_with_zero(dtype: torch.dtype):
    scores = torch.tensor([0.0, -0.0, 0.0], dtype=dtype)
    everything = torch.ones(3, dtype=torch.bool)
    assert prune(scores, everything, 1).tolist() == [False, True, True]
    assert grow(scores, ~everything, 2).tolist() == [True, True, False]
    assert grow(scores.flip(0), ~everything, 1).tolist() == [True, False, False]


def test_denormals_are_told_apart():
    scores = torch.tensor([2, 1, 3], dtype=torch.int32).view(torch.float32)  # units of 2**-149
    assert prune(scores, torch.ones(3, dtype=torch.bool), 1).tolist() == [True, False, True]


def test_integers_beyond_the_exact_floats_are_told_apart():
    scores = torch.tensor([2**53 + 1, 2**53, 2**53 + 2])
    assert draw(scores, 1).tolist() == [False, False, True]
    assert prune(scores, torch.ones(3, dtype=torch.bool), 1).tolist() == [True, False, True]
    assert draw(torch.tensor([2**24 + 1, 2**24], dtype=torch.int32), 1).tolist() == [True, False]


def test_an_active_zero_is_not_an_inactive_weight():
    weight = torch.tensor([0.0, 0.0, 0.0, 5.0])
    mask = torch.tensor([True, False, True, True])
    assert prune(weight.abs(), mask, 1).tolist() == [False, False, True, True]
    assert grow(weight.abs(), mask, 1).tolist() == [True, True, True, True]


@given(selections())
@example((torch.tensor(1.0), torch.tensor(True)))
def test_nothing_is_written_and_no_generator_moves(case: tuple[Tensor, Tensor]):
    scores, mask = case
    before = bits(scores), bits(mask), torch.get_rng_state().numpy().tobytes()
    k = int(mask.count_nonzero())
    results = [prune(scores, mask, k // 2), prune(scores, mask, 0), prune(scores, mask, k)]
    results += [grow(scores, mask, (mask.numel() - k + 1) // 2), grow(scores, mask, 0), draw(scores, k)]
    results += [unpack(pack(mask), mask.shape)]
    for result in results:
        result.logical_not_()  # a result is a tensor of its own
    assert before == (bits(scores), bits(mask), torch.get_rng_state().numpy().tobytes())


def test_scores_that_require_a_gradient_are_taken():
    scores = torch.tensor([1.0, 2.0], requires_grad=True)
    assert draw(scores * 2, 1).tolist() == [False, True]


# --- Errors ------------------------------------------------------------------------------------

SCORES, MASK = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, False, True])


@pytest.mark.parametrize("k", [np.int64(1), np.int32(1), np.uint8(1), torch.tensor(1), True])
def test_k_may_be_any_integer(k: object):
    assert prune(SCORES, MASK, k).tolist() == [False, False, True]
    assert grow(SCORES, MASK, k).tolist() == [True, True, True]


@pytest.mark.parametrize("k", [1.0, "1", None, np.float32(1.0)])
def test_k_must_be_an_integer(k: object):
    for select in (prune, grow):
        with pytest.raises(TypeError):
            select(SCORES, MASK, k)


def test_k_out_of_range_says_what_is_there():
    with pytest.raises(ValueError, match="between 0 and the 2 active entries, got 3"):
        prune(SCORES, MASK, 3)
    with pytest.raises(ValueError, match="between 0 and the 1 inactive entries, got 2"):
        grow(SCORES, MASK, 2)
    with pytest.raises(ValueError, match="got 4"):
        draw(SCORES, 4)
    for select in (prune, grow):
        with pytest.raises(ValueError, match="got -1"):
            select(SCORES, MASK, -1)


@pytest.mark.parametrize("select", [prune, grow])
def test_shapes_and_dtypes_that_do_not_fit_raise(select):
    with pytest.raises(ValueError, match=r"one shape.*\(3,\).*\(2,\)"):
        select(SCORES, MASK[:2], 1)
    with pytest.raises(ValueError, match="one shape"):  # never broadcast
        select(torch.ones(3, 3), MASK, 1)
    with pytest.raises(ValueError, match=r"float32 mask"):
        select(SCORES, MASK.float(), 1)
    with pytest.raises(ValueError, match="must be real"):
        select(SCORES.to(torch.complex64), MASK, 1)


# --- Storage -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [*range(66), 1000, 4097])
def test_pack_is_numpys_little_endian_packbits(size: int):
    mask = torch.rand(size, generator=torch.Generator().manual_seed(size)) < 0.5
    packed = pack(mask)
    assert packed.dtype == torch.uint8
    assert np.array_equal(packed.numpy(), np.packbits(mask.numpy(), bitorder="little"))
    assert torch.equal(unpack(packed, (size,)), mask)


@given(selections())
def test_pack_and_unpack_return_the_mask(case: tuple[Tensor, Tensor]):
    _, mask = case
    packed = pack(mask)
    assert (
        packed.numpy().tolist() == np.packbits(np.array(flat(mask), dtype=bool), bitorder="little").tolist()
    )
    back = unpack(packed, mask.shape)
    assert back.dtype == torch.bool
    assert torch.equal(back, mask)
    assert torch.equal(unpack(packed, tuple(mask.shape)), mask)


def test_unpack_gives_real_booleans_and_ignores_unused_bits():
    assert unpack(torch.tensor([0xFF], dtype=torch.uint8), (2, 2)).view(torch.uint8).tolist() == [[1, 1]] * 2
    assert pack(unpack(torch.tensor([0xFF], dtype=torch.uint8), (3,))).tolist() == [7]


@pytest.mark.parametrize(
    "packed",
    [
        torch.zeros(1, dtype=torch.uint8),
        torch.zeros(3, dtype=torch.uint8),
        torch.zeros(2, 1, dtype=torch.uint8),
        torch.zeros(2, dtype=torch.int8),
        torch.zeros(2, dtype=torch.bool),
    ],
)
def test_unpack_refuses_other_bytes(packed: Tensor):
    with pytest.raises(ValueError, match=r"shape \(3, 4\) is 2 uint8 bytes"):
        unpack(packed, (3, 4))
