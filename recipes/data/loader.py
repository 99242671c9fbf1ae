"""Loaders for training and evaluation: PyTorch's, with keyed randomness and a position that resumes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from recipes.data.images import Images, KeyedImages, Transform
from recipes.data.sampler import EpochSampler, EvaluationSampler


def train_loader(
    images: Images,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Return a loader of augmented training batches.

    Its `batch_sampler` is the `EpochSampler`: call `loader.batch_sampler.set_position(epoch, batch)` before
    each epoch. The batches do not depend on `workers`.

    Args:
        images: the training images.
        transform: the augmentation that fits them.
        batch_size: samples a batch on this rank.
        seed: the run's seed.
        rank: this process.
        world_size: number of processes.
        workers: loader processes; 0 loads in this one, which is the fastest for `TensorImages`.
        pin_memory: copy batches to page-locked memory, for a GPU.

    Returns:
        Batches of float32 (batch_size, channels, size, size) and int64 (batch_size,).
    """
    sampler = EpochSampler(len(images), batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
    return _loader(KeyedImages(images, transform, seed), sampler, workers, pin_memory)


def evaluation_loader(
    images: Images,
    transform: Transform,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Return a loader that gives every image exactly once over all ranks, in order.

    Args:
        images: the held-out images.
        transform: the evaluation transform that fits them.
        batch_size: samples a batch on this rank; the last may be smaller.
        rank: this process.
        world_size: number of processes.
        workers: loader processes.
        pin_memory: copy batches to page-locked memory, for a GPU.
    """
    sampler = EvaluationSampler(len(images), batch_size=batch_size, rank=rank, world_size=world_size)
    return _loader(KeyedImages(images, transform, seed=0), sampler, workers, pin_memory)


def _loader(
    dataset: KeyedImages, sampler: EpochSampler | EvaluationSampler, workers: int, pin_memory: bool
) -> DataLoader[tuple[Tensor, Tensor]]:
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=_as_it_is,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        # The loader draws a seed for its workers at every start. Nothing here uses it, and drawn from the
        # global generator it would shift the model's own randomness (drop path) with every restart.
        generator=torch.Generator(),
    )


def _as_it_is(batch: Any) -> Any:
    return batch
