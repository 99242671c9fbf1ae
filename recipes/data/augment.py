"""The ImageNet transforms of Pillow images: crop, flip and RandAugment to train, the centre to evaluate.

Source: the published SLaK recipe is ConvNeXt's (Z. Liu et al., "A ConvNet for the 2020s", arXiv:2201.03545,
table 5), carried out by timm; `docs/reproduction/augmentation.md` says what is equal and what differs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from recipes.data.erasing import RandomErasing
from recipes.data.random_augment import RandAugment

BICUBIC = Image.Resampling.BICUBIC
INTERPOLATIONS = {"bicubic": BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_ATTEMPTS = 10


@dataclass(frozen=True)
class TrainTransform:
    """Crop at random, flip, augment, normalise and erase: what a training image goes through.

    Args:
        size: side of the result in pixels.
        mean: mean of each channel in [0, 1].
        std: standard deviation of each channel in [0, 1].
        scale: smallest and largest area of the crop, as fractions of the image's.
        ratio: smallest and largest width over height of the crop.
        flip: probability of a left-right flip.
        random_augment: RandAugment, or None for none.
        erasing: random erasing, or None for none.
        interpolation: how the crop is resized.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    random_augment: RandAugment | None = None
    erasing: RandomErasing | None = None
    interpolation: Image.Resampling = BICUBIC

    def __call__(self, images: Sequence[Image.Image], generators: Sequence[np.random.Generator]) -> Tensor:
        """Return a float32 tensor (B, 3, size, size) of RGB images, each with its generator."""
        return torch.stack([self._one(image, rng) for image, rng in zip(images, generators, strict=True)])

    def _one(self, image: Image.Image, generator: np.random.Generator) -> Tensor:
        box = random_crop_box(image.size, self.scale, self.ratio, generator)
        # Cropped first: resize(box=...) would let the filter reach beyond the crop.
        image = image.crop(box).resize((self.size, self.size), self.interpolation)
        if generator.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.random_augment is not None:
            image = self.random_augment(image, generator)
        tensor = normalised(image, self.mean, self.std)
        return tensor if self.erasing is None else self.erasing(tensor, generator)


@dataclass(frozen=True)
class EvaluationTransform:
    """Resize the shorter side to `size / crop`, rounded down, and take the centre.

    Args:
        size: side of the result in pixels.
        mean: mean of each channel in [0, 1].
        std: standard deviation of each channel in [0, 1].
        crop: the centre's side as a fraction of the resized image's shorter side.
        interpolation: how the image is resized.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float = 0.875
    interpolation: Image.Resampling = BICUBIC

    def __call__(self, images: Sequence[Image.Image], generators: Sequence[np.random.Generator]) -> Tensor:
        """Return a float32 tensor (B, 3, size, size); nothing is drawn from the generators."""
        return torch.stack([normalised(self._centre(image), self.mean, self.std) for image in images])

    def _centre(self, image: Image.Image) -> Image.Image:
        short = math.floor(self.size / self.crop)
        width, height = image.size
        scaled = (short, short * height // width) if width <= height else (short * width // height, short)
        left, top = round((scaled[0] - self.size) / 2), round((scaled[1] - self.size) / 2)
        resized = image.resize(scaled, self.interpolation)
        return resized.crop((left, top, left + self.size, top + self.size))


def random_crop_box(
    image: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: np.random.Generator,
) -> tuple[int, int, int, int]:
    """Return the (left, top, right, bottom) of an Inception crop.

    The area is uniform in `scale` and the logarithm of width over height uniform in `ratio`; after ten crops
    that do not fit it is the largest central one whose width over height is within `ratio`.

    Args:
        image: width and height in pixels.
        scale: range of the area, as fractions of the image's.
        ratio: range of width over height.
        generator: what is drawn from.

    Source: C. Szegedy et al., "Going Deeper with Convolutions", arXiv:1409.4842, section 6.
    """
    width, height = image
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_ATTEMPTS):
        area = generator.uniform(*scale) * width * height
        aspect = math.exp(generator.uniform(low, high))
        columns, rows = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < columns <= width and 0 < rows <= height:
            top = int(generator.integers(0, height - rows, endpoint=True))
            left = int(generator.integers(0, width - columns, endpoint=True))
            return left, top, left + columns, top + rows
    columns = min(width, max(1, round(height * ratio[1])))
    rows = min(height, max(1, round(width / ratio[0])))
    left, top = (width - columns) // 2, (height - rows) // 2
    return left, top, left + columns, top + rows


def normalised(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (value / 255 - mean) / std of an RGB image as a float32 tensor (3, height, width)."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    mean_column, std_column = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    return (pixels - mean_column) / std_column
