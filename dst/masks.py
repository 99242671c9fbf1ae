"""Exact selection on boolean masks: who leaves, who comes, and how a mask is stored.

Every function here is pure: it returns new tensors and writes to none of its arguments. A selection
is exact on every device: it has k members, equal scores go by lowest index, and NaN never wins.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor

_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}
_SAMPLE_FROM = 1 << 16  # smaller tensors are searched whole
_SAMPLE_STRIDE = 61  # a prime, so that a sample does not run along the rows of common shapes
_MAGNITUDE_BITS = {torch.int32: 0x7FFFFFFF, torch.int64: 0x7FFFFFFFFFFFFFFF}


def prune(scores: Tensor, mask: Tensor, k: int) -> Tensor:
    """Take the k active entries with the smallest scores out of a mask.

    Among equal scores the lowest index leaves first. NaN counts as smaller than every number, so a
    broken entry leaves before a sound one. Only active entries are looked at: an active weight that
    is exactly zero is not an inactive one.

    Args:
        scores: Floating point, signed integer, bool or uint8; the mask's shape; larger means keep.
        mask: bool; True is active.
        k: How many leave, 0 to the number of active entries.

    Returns:
        bool, the mask's shape, a new tensor with k fewer True.

    Raises:
        ValueError: If the shapes differ, the mask is not bool or k is out of range.

    Examples:
        >>> prune(torch.tensor([3.0, 1.0, 2.0, 1.0]), torch.tensor([True, True, True, False]), 1)
        tensor([ True, False,  True, False])

    Source:
        RigL (arXiv 1911.11134), section 3: drop ArgTopK(-|theta|, k).
    """
    keys = _ordered(scores, mask)
    # Bitwise not reverses the order of integers without overflow.
    return mask ^ _top(keys.bitwise_not(), mask, k, "active")


def grow(scores: Tensor, mask: Tensor, k: int) -> Tensor:
    """Add the k inactive entries with the largest scores to a mask.

    Among equal scores the lowest index comes first. NaN counts as smaller than every number.

    Args:
        scores: Floating point, signed integer, bool or uint8; the mask's shape; larger means grow first.
        mask: bool; True is active.
        k: How many come, 0 to the number of inactive entries.

    Returns:
        bool, the mask's shape, a new tensor with k more True.

    Raises:
        ValueError: If the shapes differ, the mask is not bool or k is out of range.

    Examples:
        >>> grow(torch.tensor([9.0, 1.0, 2.0, 2.0]), torch.tensor([True, False, False, False]), 1)
        tensor([ True, False,  True, False])

    Source:
        RigL (arXiv 1911.11134), section 3: grow ArgTopK(|gradient|, k) over what is not active.
    """
    keys = _ordered(scores, mask)
    return mask | _top(keys, ~mask, k, "inactive")


def draw(keys: Tensor, k: int) -> Tensor:
    """Return a fresh mask of exactly k active entries: those with the largest keys.

    Args:
        keys: Floating point, signed integer, bool or uint8; random keys give a uniformly random mask.
        k: How many are active, 0 to the number of entries.

    Returns:
        bool, the shape of the keys.

    Raises:
        ValueError: If k is out of range.

    Examples:
        >>> draw(torch.tensor([5, 7, 1]), 2)
        tensor([ True,  True, False])
    """
    return grow(keys, torch.zeros_like(keys, dtype=torch.bool), k)


def pack(mask: Tensor) -> Tensor:
    """Store a mask at one bit an entry, lowest bit first, in row-major order.

    Args:
        mask: bool, any shape.

    Returns:
        uint8, one-dimensional, ceil(entries / 8) bytes; unused bits are zero.

    Examples:
        >>> pack(torch.tensor([True, False, True, False, False, False, False, False, True]))
        tensor([5, 1], dtype=torch.uint8)
    """
    flat = mask.reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    packed = torch.zeros(len(padded), dtype=torch.uint8, device=mask.device)
    for bit in range(8):
        packed |= padded[:, bit].to(torch.uint8) << bit
    return packed


def unpack(packed: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Read a mask back from `pack`.

    Args:
        packed: uint8, one-dimensional.
        shape: The mask's shape.

    Returns:
        bool, of that shape.

    Raises:
        ValueError: If the bytes are not as many as the shape needs, or not uint8.

    Examples:
        >>> unpack(torch.tensor([5], dtype=torch.uint8), (3,))
        tensor([ True, False,  True])
    """
    entries = torch.Size(shape).numel()
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != (entries + 7) // 8:
        raise ValueError(
            f"a packed mask of shape {tuple(shape)} is {(entries + 7) // 8} uint8 bytes in one dimension, "
            f"got {packed.dtype} of shape {tuple(packed.shape)}"
        )
    mask = torch.empty(packed.numel(), 8, dtype=torch.bool, device=packed.device)
    for bit in range(8):
        mask[:, bit] = (packed >> bit) & 1
    return mask.view(-1)[:entries].reshape(shape)


def _ordered(scores: Tensor, mask: Tensor) -> Tensor:
    """Return integers in the order of the scores: -0 equals +0, NaN comes below -inf."""
    if mask.dtype != torch.bool or scores.shape != mask.shape:
        raise ValueError(
            f"scores and mask must have one shape and the mask must be bool, got scores of shape "
            f"{tuple(scores.shape)} and a {mask.dtype} mask of shape {tuple(mask.shape)}"
        )
    if scores.is_complex():
        raise ValueError(f"scores must be real, got {scores.dtype}; take the absolute value first")
    if not scores.is_floating_point():
        return scores.to(torch.int64) if scores.dtype in (torch.bool, torch.uint8) else scores
    if scores.dtype not in _INTEGER:
        scores = scores.float()  # exact: every narrower float is a float32
    # Adding zero turns -0 into +0. The bits of a float order like an integer once the magnitude
    # bits of the negative ones are flipped.
    bits = (scores + 0.0).view(_INTEGER[scores.dtype])
    magnitude = _MAGNITUDE_BITS[bits.dtype]
    keys = bits ^ ((bits >> (8 * bits.element_size() - 1)) & magnitude)
    return keys.masked_fill_(scores.isnan(), torch.iinfo(bits.dtype).min)


def _top(keys: Tensor, candidates: Tensor, k: int, kind: str) -> Tensor:
    """Return the k candidates with the largest integer keys, the lowest index first among equals."""
    k, size = operator.index(k), int(candidates.count_nonzero())
    if not 0 <= k <= size:
        raise ValueError(f"k must lie between 0 and the {size} {kind} entries, got {k}")
    if k == 0:
        return torch.zeros_like(candidates)
    if k == size:
        return candidates.clone()
    keys, flat = keys.reshape(-1), candidates.reshape(-1)
    threshold = _kth_largest(keys, flat, k, size)
    chosen = (keys > threshold) & flat
    ties = ((keys == threshold) & flat).nonzero().squeeze(1)
    chosen[ties[: k - int(chosen.count_nonzero())]] = True
    return chosen.view(candidates.shape)


def _kth_largest(keys: Tensor, candidates: Tensor, k: int, size: int) -> Tensor:
    """Return the k-th largest key of the candidates, of which there are `size`.

    In a large tensor a sample brackets it, a count below and a selection inside the bracket make it
    exact, and where the sample misleads the whole is searched: the result never depends on the sample.
    """
    if keys.numel() >= _SAMPLE_FROM:
        sample = keys[::_SAMPLE_STRIDE].masked_select(candidates[::_SAMPLE_STRIDE])
        rank = round((1 - k / size) * sample.numel())  # of the threshold, counted from below
        margin = 4 * round((sample.numel() * k / size * (1 - k / size)) ** 0.5) + 4
        if sample.numel() > 2 * margin:
            low = _kth_smallest(sample, max(rank - margin, 1))
            high = _kth_smallest(sample, min(rank + margin, sample.numel()))
            above = int(((keys > high) & candidates).count_nonzero())
            inside = keys.masked_select((keys >= low) & (keys <= high) & candidates)
            if above < k <= above + inside.numel():
                return _kth_smallest(inside, inside.numel() - (k - above) + 1)
    pool = keys.masked_select(candidates)
    return _kth_smallest(pool, size - k + 1)


def _kth_smallest(values: Tensor, k: int) -> Tensor:
    # On CUDA kthvalue refuses torch's deterministic mode, for the sake of an index that is not read here.
    return values.sort().values[k - 1] if values.is_cuda else values.kthvalue(k).values
