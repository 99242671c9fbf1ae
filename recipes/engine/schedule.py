"""The learning rate: linear warm-up, then half a cosine down to a floor, set at every step."""

from __future__ import annotations

import dataclasses
import math

import torch


@dataclasses.dataclass
class WarmupCosine:
    """Give the factor on the base learning rate after a number of completed steps.

    With W warm-up steps of T in all, and f the floor as a fraction of the base rate::

        factor(t) = (t + 1) / W                                            t < W
        factor(t) = f + (1 - f) (1 + cos(pi (t - W) / (T - W))) / 2        W <= t <= T

    The published schedule of SLaK (inherited from ConvNeXt's `cosine_scheduler`) starts the warm-up at a
    rate of zero, so that its first step moves nothing; here the first step is already one W-th of the way.

    Args:
        total_steps: T, steps of the whole run.
        warmup_steps: W, at most T.
        floor: f, in [0, 1].

    Example:
        >>> factor = WarmupCosine(total_steps=10, warmup_steps=2, floor=0.0)
        >>> [round(factor(step), 2) for step in (0, 1, 2, 6, 10)]
        [0.5, 1.0, 1.0, 0.5, 0.0]

    Source: Liu et al., "More ConvNets in the 2020s" (SLaK), appendix on the training recipe.
    """

    total_steps: int
    warmup_steps: int
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps <= self.total_steps:
            raise ValueError(
                f"warm-up of {self.warmup_steps} steps does not fit into {self.total_steps} steps"
            )
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor is {self.floor}: the smallest rate lies between 0 and the base rate")

    def __call__(self, step: int) -> float:
        """Return the factor after `step` completed steps."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        span = max(1, self.total_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / span)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_cosine(
    optimizer: torch.optim.Optimizer, *, total_steps: int, warmup_steps: int, min_lr: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """Attach the schedule to an optimizer; call `step()` on the result once after each optimizer step.

    Args:
        optimizer: any optimizer; its present learning rates are the peak rates, the first group's counts for
            `min_lr`.
        total_steps: steps of the whole run.
        warmup_steps: steps of linear warm-up.
        min_lr: the rate at the end, at most the peak rate.
    """
    peak = optimizer.param_groups[0]["lr"]
    if not 0 <= min_lr <= peak:
        raise ValueError(f"min_lr is {min_lr}: it must lie between 0 and the peak learning rate {peak}")
    shape = WarmupCosine(total_steps, warmup_steps, min_lr / peak if peak else 0.0)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
