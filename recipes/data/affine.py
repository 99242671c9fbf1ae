"""Random affine maps for a whole batch of small images at once.

One bilinear sampling takes the stored pixels straight to the size that the model sees, so that nothing is
interpolated twice: 64 digits from 8x8 to 32x32 cost about a millisecond. With every range at its default the
map is the identity, which is what evaluation uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Affine:
    r"""Rotate, shear, scale, move and mirror images at random, resize them and normalise them.

    The image's coordinates run from -1 to 1. A point x of the stored image goes to

        y = R(angle) Shear(shear) diag(scale, scale) x + 2 * translation,

    each parameter uniform in its range, and the value at y is read bilinearly at the point that goes there;
    outside the stored image it is 0. Mirroring negates the horizontal coordinate of x.

    Args:
        size: side of the result in pixels.
        mean: mean of each channel in [0, 1].
        std: standard deviation of each channel in [0, 1].
        channels: channels of the result; one grey channel is repeated.
        degrees: largest rotation, in degrees.
        translate: largest move along each axis, as a fraction of the side.
        scale: smallest and largest size.
        shear: largest horizontal shear, in degrees.
        mirror: probability of a left-right flip.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> Affine(size=32, mean=(0.3,), std=(0.4,), degrees=10)(torch.rand(2, 1, 8, 8), [rng, rng]).shape
        torch.Size([2, 1, 32, 32])
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int = 1
    degrees: float = 0.0
    translate: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    shear: float = 0.0
    mirror: float = 0.0

    def __call__(self, images: Tensor, generators: Sequence[np.random.Generator]) -> Tensor:
        """Transform a batch.

        Args:
            images: float tensor (B, C, H, W) in [0, 1], square.
            generators: one for each image; six numbers are drawn from each.

        Returns:
            Float tensor (B, channels, size, size).
        """
        batch, stored, height, width = images.shape
        if height != width or stored not in (1, self.channels):
            wanted = f"square images of 1 or {self.channels} channels"
            raise ValueError(f"images of shape {tuple(images.shape)}: expected {wanted}")
        draws = np.stack([generator.random(6) for generator in generators])
        inverse = torch.from_numpy(self._inverse_maps(draws)).to(images.dtype)
        grid = F.affine_grid(inverse, [batch, stored, self.size, self.size], align_corners=False)
        warped = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return ((warped - mean) / std).expand(-1, self.channels, -1, -1).contiguous()

    def _inverse_maps(self, draws: np.ndarray) -> np.ndarray:
        """Return (B, 2, 3), from a result's coordinates to an image's, for uniform draws (B, 6)."""
        signed = 2 * draws - 1
        angle = np.radians(self.degrees) * signed[:, 0]
        slope = np.tan(np.radians(self.shear) * signed[:, 1])
        low, high = self.scale
        size = low + (high - low) * draws[:, 2]
        move = 2 * self.translate * signed[:, 3:5]
        sign = np.where(draws[:, 5] < self.mirror, -1.0, 1.0)
        cos, sin = np.cos(angle), np.sin(angle)
        rotation = np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], 1)
        one, zero = np.ones_like(sign), np.zeros_like(sign)
        shear = np.stack([np.stack([sign, -sign * slope], -1), np.stack([zero, one], -1)], 1)
        linear = shear @ rotation / size[:, None, None]
        return np.concatenate([linear, -linear @ move[:, :, None]], axis=2)
