"""Why ranks, devices and shards agree: keyed random numbers and averaged gradients.

A random choice here is a function of (seed, step, tensor name, position) and of nothing else. No
generator is advanced, so a choice does not depend on the device, on the order of the tensors, on the
number of ranks or on what else the program draws, and no message is needed to agree on it.
"""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor

# About one megabyte of int32: the passes of the hash then stay inside a core's cache.
_CHUNK = 1 << 18


def random_keys(seed: int, step: int, name: str, index: Tensor) -> Tensor:
    """Return one pseudo-random key for every flat index of a tensor.

    For a fixed (seed, step, name) the key is a permutation of the 32-bit integers, so no two of the
    first 2**32 positions share a key and the k largest keys are a uniformly random set of k positions.

    Args:
        seed: Any integer.
        step: The optimizer step of the choice; 0 is the initial mask.
        name: The tensor's name in the plain model.
        index: Integer tensor of row-major positions in the whole (unsharded) tensor.

    Returns:
        int32, the shape of `index`, on its device; the same numbers on every device.

    Examples:
        >>> random_keys(0, 100, "fc.weight", torch.arange(3)).tolist() == [
        ...     random_keys(0, 100, "fc.weight", torch.tensor([i])).item() for i in range(3)]
        True

    Source:
        The mixing rounds are the 32-bit finaliser "lowbias32" (C. Wellons, hash-prospector, 2018);
        the two key words are BLAKE2b (RFC 7693) of the arguments.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest()
    first = int.from_bytes(digest[:4], "little", signed=True)
    second = int.from_bytes(digest[4:], "little", signed=True)
    keys = index.to(torch.int32, copy=True).reshape(-1)
    for chunk in keys.split(_CHUNK):
        _mix(chunk.bitwise_xor_(first))
        _mix(chunk.add_(second))
    return keys.view(index.shape)


def average_over_ranks(tensor: Tensor) -> Tensor:
    """Average a tensor over all ranks in place; alone, do nothing.

    Gradient criteria read the average of the gradients before the absolute value is taken, so that k
    ranks choose as one process with the joined batch would.

    Args:
        tensor: Floating point; the same shape on every rank.

    Returns:
        The same tensor.

    Examples:
        >>> average_over_ranks(torch.ones(2))
        tensor([1., 1.])

    Source:
        RigL (arXiv 1911.11134), appendix M: criteria that were not averaged cost up to 1 % accuracy.
    """
    if several_ranks():
        # Half precision is divided first: a sum over ranks may leave its range.
        first = tensor.dtype == torch.float16
        if first:
            tensor.div_(dist.get_world_size())
        dist.all_reduce(tensor)
        if not first:
            tensor.div_(dist.get_world_size())
    return tensor


def several_ranks() -> bool:
    """Tell whether this process trains together with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _mix(x: Tensor) -> None:
    # The shift of a signed integer copies the sign; the mask makes it the logical shift of the source.
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(0x846CA68B - (1 << 32))
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))
