"""What a data set is: images and labels by index, and a view that augments them by key.

Three layers, each ignorant of the next. *Images* (`TensorImages`, `recipes.data.image_folder.FolderImages`)
hold or find images, with no randomness. A *transform* turns a batch of them and one generator for each into
one float tensor. `KeyedImages` joins the two: it is indexed with pairs (epoch, index) that the sampler makes,
so that a worker process needs no state at all to know which randomness a sample has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from recipes.data.keyed import sample_generator

Key = tuple[int, int]
Transform = Callable[[Any, Sequence[np.random.Generator]], Tensor]


class Images(Protocol):
    """Images and labels by index.

    Attributes:
        labels: int64 array, one class index for each image.
        classes: the classes' names, in the order of their indices.
        mean: mean of each channel over the training images, in [0, 1].
        std: standard deviation of each channel, in [0, 1].
    """

    labels: np.ndarray
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def load(self, indices: Sequence[int]) -> Any:
        """Return the images of these indices in the form that the matching transform takes."""
        ...


@dataclass(frozen=True, eq=False)
class TensorImages:
    """Hold small images of one size in memory; a batch of them is one tensor.

    Args:
        pixels: uint8 tensor (N, channels, height, width).
        white: the value of `pixels` that means 1.0.
        labels: int64 array (N,).
        classes: the classes' names.
        mean: mean of each channel in [0, 1].
        std: standard deviation of each channel in [0, 1].
    """

    pixels: Tensor
    white: int
    labels: np.ndarray
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, indices: Sequence[int]) -> Tensor:
        """Return a float32 tensor (B, channels, height, width) in [0, 1]."""
        return self.pixels[torch.as_tensor(indices, dtype=torch.int64)].float() / self.white

    def subset(self, indices: Sequence[int] | np.ndarray) -> TensorImages:
        """Return the images of these indices, in their order, as a data set of its own."""
        chosen = np.asarray(indices, dtype=np.int64)
        return replace(self, pixels=self.pixels[torch.from_numpy(chosen)], labels=self.labels[chosen])


class KeyedImages(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Augment images by key: (epoch, index) alone decides what comes out, for one seed.

    Args:
        images: where the images come from.
        transform: what is done to a batch of them.
        seed: the run's seed.
    """

    def __init__(self, images: Images, transform: Transform, seed: int) -> None:
        self.images = images
        self.transform = transform
        self.seed = seed
        self._labels = torch.from_numpy(np.ascontiguousarray(images.labels, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor]:
        """Return one image (channels, size, size) and its label (a scalar tensor)."""
        images, labels = self.__getitems__([key])
        return images[0], labels[0]

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor]:
        """Return a batch (B, channels, size, size) float32 and its labels (B,) int64.

        PyTorch's loader calls this with the keys of a whole batch, which lets small images be augmented all
        at once.
        """
        indices = [index for _, index in keys]
        generators = [sample_generator(self.seed, epoch, index) for epoch, index in keys]
        return self.transform(self.images.load(indices), generators), self._labels[indices]
