"""Which transforms a data set gets: one flat, printable description for both kinds of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recipes.data.affine import Affine
from recipes.data.augment import INTERPOLATIONS, EvaluationTransform, TrainTransform
from recipes.data.erasing import RandomErasing
from recipes.data.image_folder import FolderImages
from recipes.data.images import TensorImages, Transform
from recipes.data.random_augment import RandAugment


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Say how training images are varied; the defaults are the published ImageNet recipe.

    Attributes:
        flip: probability of a left-right flip, for both kinds.
        crop_scale: for folders, smallest and largest area of the random crop, as fractions of the image's.
        crop_ratio: for folders, smallest and largest width over height of the random crop.
        policy: for folders, RandAugment in timm's notation; None for none.
        erasing: for folders, probability of random erasing; 0 for none.
        interpolation: for folders, how images are resized, to train and to evaluate.
        evaluation_crop: for folders, side of the centre that is evaluated over the resized shorter side.
        degrees: for images in memory, largest rotation, in degrees.
        translate: for images in memory, largest move along each axis, as a fraction of the side.
        zoom: for images in memory, smallest and largest size.
        shear: for images in memory, largest horizontal shear, in degrees.
    """

    flip: float = 0.5
    crop_scale: tuple[float, ...] = (0.08, 1.0)
    crop_ratio: tuple[float, ...] = (3 / 4, 4 / 3)
    policy: str | None = "rand-m9-mstd0.5-inc1"
    erasing: float = 0.25
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    evaluation_crop: float = 0.875
    degrees: float = 0.0
    translate: float = 0.0
    zoom: tuple[float, ...] = (1.0, 1.0)
    shear: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flip", "erasing"):
            _check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")
        for name in ("crop_scale", "crop_ratio", "zoom"):
            value = getattr(self, name)
            holds = len(value) == 2 and 0 < value[0] <= value[1]
            _check(holds, name, value, "two numbers above 0, the smaller one first")
        _check(self.crop_scale[1] <= 1, "crop_scale", self.crop_scale, "at most 1")
        crop = self.evaluation_crop
        _check(0 < crop <= 1, "evaluation_crop", crop, "above 0 and at most 1")
        _check(
            self.interpolation in INTERPOLATIONS, "interpolation", self.interpolation, "bicubic or bilinear"
        )
        _check(0 <= self.degrees <= 180, "degrees", self.degrees, "between 0 and 180")
        _check(0 <= self.translate <= 1, "translate", self.translate, "between 0 and 1")
        _check(0 <= self.shear < 90, "shear", self.shear, "at least 0 and less than 90")
        if self.policy is not None:
            RandAugment.from_string(self.policy)


def transforms(
    images: TensorImages | FolderImages, size: int, augmentation: Augmentation, channels: int = 3
) -> tuple[Transform, Transform]:
    """Return the transform to train with and the one to evaluate with.

    Args:
        images: the data set; its kind, mean and standard deviation count.
        size: side of the model's input in pixels.
        augmentation: how training images are varied.
        channels: channels of the model's input; grey images in memory are repeated, images from folders
            have 3.

    Raises:
        ValueError: if the images cannot have this many channels.
    """
    if isinstance(images, TensorImages):
        return _in_memory(images, size, augmentation, channels)
    _check(channels == 3, "channels", channels, "3 for images from folders")
    interpolation = INTERPOLATIONS[augmentation.interpolation]
    red, green, blue = (min(255, round(255 * value)) for value in images.mean)
    policy, erasing = augmentation.policy, augmentation.erasing
    training = TrainTransform(
        size=size,
        mean=images.mean,
        std=images.std,
        scale=_pair(augmentation.crop_scale),
        ratio=_pair(augmentation.crop_ratio),
        flip=augmentation.flip,
        random_augment=RandAugment.from_string(policy, (red, green, blue), interpolation) if policy else None,
        erasing=RandomErasing(erasing) if erasing else None,
        interpolation=interpolation,
    )
    crop = augmentation.evaluation_crop
    return training, EvaluationTransform(size, images.mean, images.std, crop, interpolation)


def _in_memory(
    images: TensorImages, size: int, augmentation: Augmentation, channels: int
) -> tuple[Transform, Transform]:
    stored = images.pixels.shape[1]
    _check(stored in (1, channels), "channels", channels, f"{stored}, as the images have")
    training = Affine(
        size=size,
        mean=images.mean,
        std=images.std,
        channels=channels,
        degrees=augmentation.degrees,
        translate=augmentation.translate,
        scale=_pair(augmentation.zoom),
        shear=augmentation.shear,
        mirror=augmentation.flip,
    )
    return training, Affine(size=size, mean=images.mean, std=images.std, channels=channels)


def _pair(values: tuple[float, ...]) -> tuple[float, float]:
    low, high = values
    return low, high


def _check(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}: it must be {expected}")
