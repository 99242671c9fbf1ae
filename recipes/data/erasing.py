"""Random erasing, the "pixel" kind: a rectangle of a normalised image becomes Gaussian noise.

Source: Z. Zhong, L. Zheng, G. Kang, S. Li, Y. Yang, "Random Erasing Data Augmentation", arXiv:1708.04896,
algorithm 1, with the ranges of the published ImageNet recipe: areas of 2 % to a third, and noise in each
pixel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomErasing:
    """Replace a rectangle by noise with some probability.

    The rectangle's area is uniform in `area` and the logarithm of its height over its width uniform in
    `aspect`. One that does not fit strictly inside the image is drawn again, at most `attempts` times in
    all; then the image stays.

    Args:
        probability: of erasing an image.
        area: smallest and largest area, as fractions of the image's.
        aspect: smallest and largest height over width.
        attempts: how many rectangles are tried.
    """

    probability: float = 0.25
    area: tuple[float, float] = (0.02, 1 / 3)
    aspect: tuple[float, float] = (0.3, 1 / 0.3)
    attempts: int = 10

    def __call__(self, image: Tensor, generator: np.random.Generator) -> Tensor:
        """Return the image (channels, height, width), or a copy of it with the rectangle erased."""
        if generator.random() >= self.probability:
            return image
        channels, height, width = image.shape
        rectangle = self._rectangle(height, width, generator)
        if rectangle is None:
            return image
        top, left, rows, columns = rectangle
        noise = generator.standard_normal((channels, rows, columns), dtype=np.float32)
        erased = image.clone()
        erased[:, top : top + rows, left : left + columns] = torch.from_numpy(noise)
        return erased

    def _rectangle(
        self, height: int, width: int, generator: np.random.Generator
    ) -> tuple[int, int, int, int] | None:
        for _ in range(self.attempts):
            area = generator.uniform(*self.area) * height * width
            aspect = math.exp(generator.uniform(*np.log(self.aspect)))
            rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if rows < height and columns < width:
                top = int(generator.integers(0, height - rows, endpoint=True))
                left = int(generator.integers(0, width - columns, endpoint=True))
                return top, left, rows, columns
        return None
