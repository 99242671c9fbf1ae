"""Batches of images for the training loop, as a function of the position alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor

from recipes.data import (
    Augmentation,
    EpochSampler,
    Mixing,
    evaluation_loader,
    open_data,
    train_loader,
    transforms,
)
from recipes.engine.config import DataConfig, OptimConfig
from recipes.engine.errors import UserError

Batch = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Count what a data set holds."""

    train: int
    held_out: int
    classes: int


IMAGENET = Sizes(1_281_167, 50_000, 1000)


class NominalFeed:
    """Stand for a data set of which only the size is known, for a dry run."""

    def __init__(self, sizes: Sizes, optim: OptimConfig, device: torch.device) -> None:
        self.sizes = sizes
        self.device = device
        self.steps_per_epoch = sizes.train // (optim.batch_size * optim.accumulation)


class ImageFeed:
    """Open a data set and give its batches; the `Feed` of image classification.

    The images of a step, how each is varied, and how they are mixed depend on the seed and the position
    only: not on the number of workers, and not on where a run was resumed.

    Args:
        data: the data set and the size of the input.
        augmentation: how training images are varied.
        optim: batch size, accumulation and label smoothing.
        seed: the run's seed.
        device: where batches go.

    Raises:
        DataError: if the data cannot be used.
        UserError: if they do not fill a single step.
    """

    def __init__(
        self,
        data: DataConfig,
        augmentation: Augmentation,
        optim: OptimConfig,
        seed: int,
        device: torch.device,
    ) -> None:
        self.device = device
        self.accumulation = optim.accumulation
        self.images, self.held_out_images = open_data(data.source, data.split, data.held_out, seed)
        if len(self.images) < optim.batch_size * optim.accumulation:
            raise UserError(
                f"{data.source}: {len(self.images):,} training images do not fill one step of"
                f" {optim.batch_size} x {optim.accumulation}; lower optim.batch_size or optim.accumulation"
            )
        varied, plain = transforms(self.images, data.size, augmentation, data.channels)
        pinned = device.type == "cuda"
        self._train = train_loader(
            self.images,
            varied,
            batch_size=optim.batch_size,
            seed=seed,
            workers=data.workers,
            pin_memory=pinned,
        )
        self._sampler = cast("EpochSampler", self._train.batch_sampler)
        self._held_out = evaluation_loader(
            self.held_out_images,
            plain,
            batch_size=data.evaluation_batch,
            workers=data.workers,
            pin_memory=pinned,
        )
        self._mixing = Mixing(
            classes=len(self.images.classes),
            seed=seed,
            mixup=data.mixup,
            cutmix=data.cutmix,
            smoothing=optim.label_smoothing,
        )
        self.sizes = Sizes(len(self.images), len(self.held_out_images), len(self.images.classes))
        self.steps_per_epoch = len(self._train) // optim.accumulation

    def train(self, epoch: int, first_step: int) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each step of an epoch, from `first_step` on."""
        self._sampler.set_position(epoch, first_step * self.accumulation)
        batches = iter(self._train)
        for step in range(epoch * self.steps_per_epoch + first_step, (epoch + 1) * self.steps_per_epoch):
            micro_batches = [self._to_device(next(batches)) for _ in range(self.accumulation)]
            yield [self._mixing(*batch, step=step, part=part) for part, batch in enumerate(micro_batches)]

    def held_out(self) -> Iterator[Batch]:
        """Yield the held-out images, each once, with class indices."""
        return map(self._to_device, self._held_out)

    def first_batch(self, images: int) -> Batch:
        """Return the first training images, unmixed, with class indices; for SNIP."""
        self._sampler.set_position(0, 0)
        pixels, labels = next(iter(self._train))
        return self._to_device((pixels[:images], labels[:images]))

    def state_dict(self, step: int) -> dict[str, int]:
        """Return the sampler's position after so many steps, and what it is a position in."""
        epoch, steps = divmod(step, self.steps_per_epoch)
        self._sampler.set_position(epoch, steps * self.accumulation)
        return self._sampler.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Check that a saved position is one in these images, this order and this batch size.

        Raises:
            ValueError: if it is not. The position itself follows from the step.
        """
        self._sampler.load_state_dict(state_dict)

    def _to_device(self, batch: Batch) -> Batch:
        pixels, labels = batch
        return pixels.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
