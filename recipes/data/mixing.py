"""Mixup, CutMix and label smoothing of a whole batch, as soft targets.

Sources: H. Zhang, M. Cisse, Y. N. Dauphin, D. Lopez-Paz, "mixup", arXiv:1710.09412, section 2; S. Yun, D.
Han, S. J. Oh, S. Chun, J. Choe, Y. Yoo, "CutMix", arXiv:1905.04899, equations 1 and 2; C. Szegedy, V.
Vanhoucke, S. Ioffe, J. Shlens, Z. Wojna, "Rethinking the Inception Architecture", arXiv:1512.00567, section 7
(label smoothing).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recipes.data.keyed import Stream, generator


@dataclass(frozen=True)
class Mixing:
    """Mix every image of a batch with its mirror partner: sample i with sample B - 1 - i.

    One share is drawn for the batch. Mixup adds the partner's image with weight 1 - share; CutMix pastes a
    rectangle of it that covers about 1 - share of the area, and the share becomes exactly the uncovered part.
    The target is

        share * smooth(label) + (1 - share) * smooth(partner's label),

    where smooth puts 1 - s + s/K on the class and s/K on the others. With `mixup = cutmix = 0` only the
    smoothing is left. Everything is drawn from (seed, step, part), so a resumed run mixes as an uninterrupted
    one.

    Args:
        classes: number of classes K.
        seed: the run's seed.
        mixup: both parameters of mixup's Beta distribution; 0 switches it off.
        cutmix: both parameters of CutMix's Beta distribution; 0 switches it off.
        switch: probability of CutMix where both are on.
        smoothing: label smoothing s.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> mixing = Mixing(classes=3, seed=0)
        >>> images, targets = mixing(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]), step=7)
        >>> targets.sum(dim=1)
        tensor([1., 1., 1., 1.])
    """

    classes: int
    seed: int
    mixup: float = 0.8
    cutmix: float = 1.0
    switch: float = 0.5
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        if self.classes < 1 or min(self.mixup, self.cutmix) < 0:
            raise ValueError(f"{self}: expected at least one class, and mixup and cutmix of at least 0")
        if not 0 <= self.switch <= 1 or not 0 <= self.smoothing < 1:
            raise ValueError(
                f"{self}: expected switch between 0 and 1, and smoothing at least 0 and less than 1"
            )

    def __call__(self, images: Tensor, labels: Tensor, step: int, part: int = 0) -> tuple[Tensor, Tensor]:
        """Return mixed images and soft targets; the arguments are left as they are.

        Args:
            images: float tensor (B, channels, height, width), on any device.
            labels: int64 tensor (B,).
            step: the optimizer step that the batch belongs to.
            part: which of that step's batches it is, counted over accumulation and ranks.

        Returns:
            The images, and float32 targets (B, classes) whose rows sum to 1.
        """
        rng = generator(self.seed, Stream.MIXING, step, part)
        share, cut = self._draw(rng)
        if cut:
            images, share = _cutmix(images, share, rng)
        elif share < 1:
            images = images.flip(0).mul_(1 - share).add_(images, alpha=share)
        targets = self.smooth(labels)
        return images, targets * share + targets.flip(0) * (1 - share)

    def smooth(self, labels: Tensor) -> Tensor:
        """Return the smoothed float32 targets (B, classes) of int64 labels (B,)."""
        off = self.smoothing / self.classes
        targets = torch.full((len(labels), self.classes), off, device=labels.device)
        return targets.scatter_(1, labels[:, None], 1 - self.smoothing + off)

    def _draw(self, rng: np.random.Generator) -> tuple[float, bool]:
        """Return the share of the own image, and whether to cut."""
        if not self.mixup and not self.cutmix:
            return 1.0, False
        cut = bool(self.cutmix) and (not self.mixup or rng.random() < self.switch)
        concentration = self.cutmix if cut else self.mixup
        return float(rng.beta(concentration, concentration)), cut


def _cutmix(images: Tensor, share: float, rng: np.random.Generator) -> tuple[Tensor, float]:
    """Paste the partner's rectangle; its centre is uniform and what lies beyond the edge is cut off."""
    height, width = images.shape[-2:]
    side = math.sqrt(1 - share)
    top, bottom = _interval(height, int(height * side), rng)
    left, right = _interval(width, int(width * side), rng)
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images[..., top:bottom, left:right].flip(0)
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _interval(length: int, cut: int, rng: np.random.Generator) -> tuple[int, int]:
    centre = int(rng.integers(length))
    return max(centre - cut // 2, 0), min(centre + cut // 2, length)
