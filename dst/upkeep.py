"""Keep inactive entries at exactly +0.0, in place and without new storage for the tensor."""

from __future__ import annotations

import torch
from torch import Tensor

# About one megabyte of int32: the mask is widened chunk by chunk inside a core's cache.
_CHUNK = 1 << 18
_SMALL = 1 << 14  # below, one call of torch.where costs less than the calls of the loop
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def zero_inactive_(tensor: Tensor, mask: Tensor) -> None:
    """Set the inactive entries of a tensor to +0.0 in place; NaN, infinities and -0.0 go too.

    Multiplying by the mask would keep NaN and make -0.0. On a CPU the bits of every float are and-ed
    with all ones or all zeros instead, which is also the fastest exact way that was measured
    (docs/decisions/0003-masking-in-place.md).

    Args:
        tensor: Floating point, dense, any memory layout; written to.
        mask: bool, the same shape and device; True is active. Fastest in the tensor's memory layout.

    Examples:
        >>> weight = torch.tensor([1.0, float("nan"), -2.0])
        >>> zero_inactive_(weight, torch.tensor([True, False, False]))
        >>> weight
        tensor([1., 0., 0.])
    """
    integer = _INTEGER.get(tensor.element_size())
    large = tensor.device.type == "cpu" and tensor.numel() >= _SMALL
    flat = _in_memory_order(tensor) if large else None
    if flat is None or integer is None:
        zero = torch.zeros((), dtype=tensor.dtype, device=tensor.device)
        torch.where(mask, tensor, zero, out=tensor)
        return
    if not same_layout(mask, tensor):
        mask = torch.empty_like(tensor, dtype=torch.bool).copy_(mask)
    bits = flat.view(integer)
    active = mask.as_strided((mask.numel(),), (1,), mask.storage_offset())
    scratch = torch.empty(min(_CHUNK, bits.numel()), dtype=integer, device=bits.device)
    for chunk, keep in zip(bits.split(_CHUNK), active.split(_CHUNK), strict=True):
        ones = scratch[: chunk.numel()].copy_(keep).neg_()
        chunk.bitwise_and_(ones)


def same_layout(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors of one shape have their entries in the same order in memory.

    Strides of dimensions of size 1 mean nothing and differ freely, as between a depthwise kernel
    (C, 1, h, w) and its gradient.
    """
    strides = zip(one.stride(), other.stride(), one.shape, strict=True)
    return all(a == b or size == 1 for a, b, size in strides)


def _in_memory_order(tensor: Tensor) -> Tensor | None:
    """Return a one-dimensional view of a tensor without gaps or overlaps, else None."""
    by_stride = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    expected = 1
    for stride, size in by_stride:
        if size != 1 and stride != expected:
            return None
        expected *= size
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
