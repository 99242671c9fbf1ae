"""Check that all ranks hold the same masks and weights, and name the first tensor that differs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from .optimizer import SparseOptimizer
from .shards import whole
from .sync import several_ranks


def assert_same_on_all_ranks(optimizer: SparseOptimizer) -> None:
    """Compare step, masks and weights of all ranks by their hashes; alone, do nothing.

    A debugging aid: all ranks must call it together, after a step. It reads every masked tensor once
    (sharded ones are gathered one at a time) and sends 8 bytes a tensor, so call it every few hundred steps.

    Args:
        optimizer: The one whose masks and masked weights are compared.

    Raises:
        RuntimeError: On every rank, naming the first tensor that differs and the ranks where it does.

    Examples:
        >>> import dst
        >>> layer = torch.nn.Linear(4, 2)
        >>> optimizer = dst.SparseOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), layer,
        ...                                 sparsity=0.5, algorithm=dst.static())
        >>> assert_same_on_all_ranks(optimizer)
    """
    if not several_ranks():
        return
    engine = optimizer.sparsifier
    device = next(iter(engine.params.values())).device
    # Ranks with other tensors would wait for each other for ever: the names are compared on their own.
    names = "\n".join(f"{name} {tuple(parameter.shape)}" for name, parameter in engine.params.items())
    _compare({"the list of masked tensors": _digest(names.encode())}, device)
    _compare(dict(_digests(optimizer)), device)


def _digests(optimizer: SparseOptimizer) -> Iterator[tuple[str, int]]:
    engine = optimizer.sparsifier
    yield "the step", engine.step
    for name, parameter in engine.params.items():
        yield f"the mask of {name!r}", _digest(_bytes(whole(engine.masks[name])))
        yield f"the weight {name!r}", _digest(_bytes(whole(parameter)))


def _compare(digests: dict[str, int], device: torch.device) -> None:
    mine = torch.tensor(list(digests.values()), dtype=torch.int64, device=device)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    by_rank = [theirs.tolist() for theirs in gathered]
    for place, what in enumerate(digests):
        others = [rank for rank, theirs in enumerate(by_rank) if theirs[place] != by_rank[0][place]]
        if others:
            where = f"rank {others[0]}" if len(others) == 1 else f"ranks {', '.join(map(str, others))}"
            raise RuntimeError(
                f"{what} on {where} differs from that on rank 0: something outside the "
                "optimizer writes to it on some ranks only, or the ranks started from different weights"
            )


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)  # in row-major order, whatever the layout
    return flat.view(torch.uint8).cpu().numpy().tobytes()


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)
