"""RandAugment as the published ImageNet recipe uses it: "rand-m9-mstd0.5-inc1".

Two of fifteen operations are drawn for an image, with replacement; each is then carried out with probability
one half, at a magnitude drawn around 9 of 10. "inc" takes the mappings in which a larger magnitude always
means a stronger change.

Sources: E. D. Cubuk, B. Zoph, J. Shlens, Q. V. Le, "RandAugment", arXiv:1909.13719, figure 2; the ranges, the
normal magnitude and the increasing mappings are those of timm, `timm/data/auto_augment.py`, releases 0.3.2
and 1.0.31. The table in `docs/reproduction/augmentation.md` compares them one by one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

Draw = Callable[[float, np.random.Generator], Any]
Apply = Callable[[Image.Image, Any, "RandAugment"], Image.Image]
_PART = re.compile(r"(mstd|m|n|inc)(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class RandAugment:
    """Apply `layers` random operations to an image.

    Args:
        magnitude: mean magnitude, 0 to 10.
        magnitude_std: standard deviation of the magnitude; what is drawn is clipped to 0 to 10.
        layers: operations drawn for an image.
        probability: of carrying out a drawn operation.
        fill: RGB colour of what a geometric operation uncovers; the data's mean colour.
        interpolation: resampling of the geometric operations.

    Example:
        >>> augment = RandAugment.from_string("rand-m9-mstd0.5-inc1")
        >>> augment(Image.new("RGB", (32, 32)), np.random.default_rng(0)).size
        (32, 32)
    """

    magnitude: float = 9.0
    magnitude_std: float = 0.5
    layers: int = 2
    probability: float = 0.5
    fill: tuple[int, int, int] = (124, 116, 104)
    interpolation: Image.Resampling = Image.Resampling.BICUBIC

    def __post_init__(self) -> None:
        if not 0 <= self.magnitude <= 10 or self.magnitude_std < 0 or self.layers < 1:
            raise ValueError(
                f"{self}: expected a magnitude from 0 to 10, a deviation from 0 and layers from 1"
            )

    @classmethod
    def from_string(
        cls,
        policy: str,
        fill: tuple[int, int, int] = (124, 116, 104),
        interpolation: Image.Resampling = Image.Resampling.BICUBIC,
    ) -> RandAugment:
        """Read a policy in timm's notation, such as "rand-m9-mstd0.5-inc1" or "rand-m7-n3-inc1".

        Args:
            policy: "rand", then `m` (magnitude), `mstd`, `n` (layers) in any order, and "inc1".
            fill: RGB colour of what a geometric operation uncovers.
            interpolation: resampling of the geometric operations.

        Raises:
            ValueError: if the policy is anything else; the mappings without "inc1" are not offered.
        """
        name, *parts = policy.split("-")
        found = [_PART.fullmatch(part) for part in parts]
        numbers = {match[1]: float(match[2]) for match in found if match}
        is_complete = "m" in numbers and len(numbers) == len(parts)
        if name != "rand" or not is_complete or numbers.get("inc") != 1:
            raise ValueError(f"policy {policy!r}: expected rand-m<magnitude>[-mstd<std>][-n<layers>]-inc1")
        return cls(
            magnitude=numbers["m"],
            magnitude_std=numbers.get("mstd", 0.0),
            layers=int(numbers.get("n", 2)),
            fill=fill,
            interpolation=interpolation,
        )

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        """Return an augmented copy of an RGB image, of the same size."""
        for choice in generator.integers(len(OPERATIONS), size=self.layers):
            if generator.random() < self.probability:
                operation = OPERATIONS[choice]
                image = operation.apply(image, operation.draw(self._magnitude(generator), generator), self)
        return image

    def _magnitude(self, generator: np.random.Generator) -> float:
        return min(max(generator.normal(self.magnitude, self.magnitude_std), 0.0), 10.0)


@dataclass(frozen=True)
class Operation:
    """One operation: how a magnitude becomes its argument, and what it does with that.

    Args:
        name: the operation's name in the literature.
        draw: (magnitude 0 to 10, generator) -> argument.
        apply: (image, argument, policy) -> image.
    """

    name: str
    draw: Draw
    apply: Apply


def _sign(generator: np.random.Generator) -> float:
    return -1.0 if generator.random() < 0.5 else 1.0


def _nothing(magnitude: float, generator: np.random.Generator) -> None:
    return None


def _up_to(limit: float) -> Draw:
    """Return a mapping to magnitude/10 of `limit`, to either side."""
    return lambda magnitude, generator: _sign(generator) * limit * magnitude / 10


def _blend(magnitude: float, generator: np.random.Generator) -> float:
    """Return a blending factor: 1 is the image as it is, 0.1 and 1.9 are the strongest."""
    return max(0.1, 1 + _sign(generator) * 0.9 * magnitude / 10)


def _bits(magnitude: float, generator: np.random.Generator) -> int:
    return 4 - int(4 * (magnitude / 10))


def _threshold(magnitude: float, generator: np.random.Generator) -> int:
    return 256 - int(256 * (magnitude / 10))


def _addend(magnitude: float, generator: np.random.Generator) -> int:
    return int(110 * (magnitude / 10))


def _posterize(image: Image.Image, bits: int, policy: RandAugment) -> Image.Image:
    """Keep the highest bits, at the strongest magnitude none, which Pillow's own refuses."""
    kept = 256 - 2 ** (8 - bits)
    return image.point([value & kept for value in range(256)] * len(image.getbands()))


def _solarize_add(image: Image.Image, addend: int, policy: RandAugment) -> Image.Image:
    """Add to every value below 128."""
    table = [min(255, value + addend) if value < 128 else value for value in range(256)]
    return image.point(table * len(image.getbands()))


def _transform(image: Image.Image, matrix: tuple[float, ...], policy: RandAugment) -> Image.Image:
    """Read (x, y) of the result from (a x + b y + c, d x + e y + f) of the image, in pixels."""
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=policy.interpolation, fillcolor=policy.fill
    )


def _rotate(image: Image.Image, degrees: float, policy: RandAugment) -> Image.Image:
    return image.rotate(degrees, resample=policy.interpolation, fillcolor=policy.fill)


def _enhance(enhancer: Callable[[Image.Image], Any]) -> Apply:
    return lambda image, factor, policy: enhancer(image).enhance(factor)


OPERATIONS: tuple[Operation, ...] = (
    Operation("AutoContrast", _nothing, lambda image, _, policy: ImageOps.autocontrast(image)),
    Operation("Equalize", _nothing, lambda image, _, policy: ImageOps.equalize(image)),
    Operation("Invert", _nothing, lambda image, _, policy: ImageOps.invert(image)),
    Operation("Rotate", _up_to(30.0), _rotate),
    Operation("Posterize", _bits, _posterize),
    Operation("Solarize", _threshold, lambda image, threshold, policy: ImageOps.solarize(image, threshold)),
    Operation("SolarizeAdd", _addend, _solarize_add),
    Operation("Color", _blend, _enhance(ImageEnhance.Color)),
    Operation("Contrast", _blend, _enhance(ImageEnhance.Contrast)),
    Operation("Brightness", _blend, _enhance(ImageEnhance.Brightness)),
    Operation("Sharpness", _blend, _enhance(ImageEnhance.Sharpness)),
    Operation("ShearX", _up_to(0.3), lambda image, s, policy: _transform(image, (1, s, 0, 0, 1, 0), policy)),
    Operation("ShearY", _up_to(0.3), lambda image, s, policy: _transform(image, (1, 0, 0, s, 1, 0), policy)),
    Operation(
        "TranslateX",
        _up_to(0.45),
        lambda image, part, policy: _transform(image, (1, 0, part * image.width, 0, 1, 0), policy),
    ),
    Operation(
        "TranslateY",
        _up_to(0.45),
        lambda image, part, policy: _transform(image, (1, 0, 0, 0, 1, part * image.height), policy),
    ),
)
