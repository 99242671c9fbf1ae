"""Where a tensor lies: whole in this process, or as a DTensor in shards over the ranks of a mesh.

Everything else is written once for both: what touches single entries works on the `local` part, what
compares entries with each other works on the `whole` tensor, and what was chosen from the whole comes back
as `part_of` it. For a plain tensor all of them return the tensor itself.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is a DTensor, without importing what only sharded training needs."""
    return hasattr(tensor, "to_local")


def check_placements(name: str, tensor: Tensor) -> None:
    """Refuse a DTensor of which the ranks hold summands instead of pieces or copies.

    Args:
        name: Named in the error.
        tensor: Any tensor; one that is no DTensor passes.

    Raises:
        ValueError: If a placement is `Partial`.

    Examples:
        >>> check_placements("fc.weight", torch.ones(2))
    """
    if not is_sharded(tensor):
        return
    placements = cast("Any", tensor).placements
    if any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"{name!r} is a DTensor placed as {placements}, of which every rank holds a summand only; masks "
            "are kept for parameters in the placements Shard and Replicate"
        )


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, detached, in the same memory.

    Examples:
        >>> local(torch.ones(2))
        tensor([1., 1.])
    """
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return cast("Tensor", cast("Any", tensor).to_local())


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor; if it is sharded, all ranks of its mesh must call this together.

    Examples:
        >>> whole(torch.ones(2))
        tensor([1., 1.])
    """
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return cast("Tensor", cast("Any", tensor).full_tensor())


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of a whole tensor that every rank holds; nothing is sent.

    Args:
        tensor: Whole, or already sharded as `like` is.
        like: Tensor of the same shape whose shards decide.

    Examples:
        >>> part_of(torch.tensor([True, False]), torch.ones(2))
        tensor([ True, False])
    """
    if is_sharded(tensor) or not is_sharded(like):
        return local(tensor)
    from torch.distributed.tensor import distribute_tensor

    layout = cast("Any", like)
    return local(distribute_tensor(tensor, layout.device_mesh, layout.placements, src_data_rank=None)).to(
        like.device
    )


def placed_like(part: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part as a tensor of the shape and the shards of another; nothing is sent.

    Examples:
        >>> placed_like(torch.tensor([True]), torch.ones(1))
        tensor([True])
    """
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    layout = cast("Any", like)
    return DTensor.from_local(
        part,
        layout.device_mesh,
        layout.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
