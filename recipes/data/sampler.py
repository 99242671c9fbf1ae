"""Which samples make up which batch: a function of (seed, epoch, batch), so that training resumes anywhere.

Both samplers yield whole batches of keys (epoch, index) and belong in `DataLoader(batch_sampler=...)`. With B
samples a batch and W ranks, global batch b of an epoch is `order[b*B*W : (b+1)*B*W]` and rank r takes every
W-th of them from the r-th on. The samples of a global batch therefore do not depend on how many ranks share
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from recipes.data.images import Key
from recipes.data.keyed import Stream, generator


class EpochSampler(torch.utils.data.Sampler[list[Key]]):
    """Yield the training batches of one epoch for one rank, from a position on.

    Each epoch is a new permutation; what does not fill a global batch is left out of that epoch. The position
    says where the next iteration starts. Iterating does not move it, because a loader with workers asks for
    batches long before they are trained on: the training loop, which alone knows what was used, sets it.

    Args:
        length: number of samples.
        batch_size: samples a batch on this rank, at least 1.
        seed: the run's seed.
        rank: this process, 0 to world_size - 1.
        world_size: number of processes.

    Raises:
        ValueError: if a number is out of range, or the samples do not fill one global batch.

    Example:
        >>> sampler = EpochSampler(10, batch_size=4, seed=0)
        >>> first = list(sampler)
        >>> sampler.set_position(epoch=0, batch=1)
        >>> list(sampler) == first[1:]
        True
    """

    def __init__(
        self, length: int, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        _check(length, batch_size, rank, world_size)
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.batch = 0
        if not len(self):
            raise ValueError(
                f"{length} samples do not fill one batch of {batch_size} on each of {world_size} ranks "
                f"({self.global_batch_size}): lower the batch size"
            )

    @property
    def global_batch_size(self) -> int:
        """Samples a batch over all ranks."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch."""
        return self.length // self.global_batch_size

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """Let the next iteration start at this batch of this epoch.

        Args:
            epoch: from 0.
            batch: how many batches of the epoch were already used, 0 to `len(self)`.
        """
        if epoch < 0 or not 0 <= batch <= len(self):
            raise ValueError(f"epoch {epoch}, batch {batch}: epochs start at 0 and have {len(self)} batches")
        self.epoch, self.batch = epoch, batch

    def __iter__(self) -> Iterator[list[Key]]:
        return self._batches(self.epoch, self.batch)

    def _batches(self, epoch: int, start: int) -> Iterator[list[Key]]:
        order = generator(self.seed, Stream.ORDER, epoch).permutation(self.length)
        for batch in range(start, len(self)):
            first = batch * self.global_batch_size
            mine = order[first + self.rank : first + self.global_batch_size : self.world_size]
            yield [(epoch, index) for index in mine.tolist()]

    def state_dict(self) -> dict[str, int]:
        """Return the position and what it is a position in."""
        return {**self._identity(), "epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the position from a saved state.

        Raises:
            ValueError: if it was saved with other data, another seed or another global batch size: the same
                position would then be another place in another order.
        """
        for name, mine in self._identity().items():
            if state_dict.get(name) != mine:
                raise ValueError(f"the saved sampler has {name} {state_dict.get(name)}, this one {mine}")
        self.set_position(state_dict["epoch"], state_dict["batch"])

    def _identity(self) -> dict[str, int]:
        return {"length": self.length, "seed": self.seed, "global_batch_size": self.global_batch_size}


class EvaluationSampler(torch.utils.data.Sampler[list[Key]]):
    """Yield every sample exactly once over all ranks, in order.

    Ranks may get one batch more or less than others, so nothing inside the evaluation loop may wait for
    another rank.

    Args:
        length: number of samples.
        batch_size: samples a batch on this rank; the last one may be smaller.
        rank: this process.
        world_size: number of processes.

    Example:
        >>> list(EvaluationSampler(5, batch_size=2, rank=1, world_size=2))
        [[(0, 1), (0, 3)]]
    """

    def __init__(self, length: int, *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        _check(length, batch_size, rank, world_size)
        self.indices = range(rank, length, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[start : start + self.batch_size]]


def _check(length: int, batch_size: int, rank: int, world_size: int) -> None:
    if length < 1 or batch_size < 1 or not 0 <= rank < world_size:
        given = f"length {length}, batch_size {batch_size}, rank {rank}, world_size {world_size}"
        raise ValueError(f"{given}: lengths and sizes must be at least 1, and rank less than world_size")
