"""MEST: pruning by magnitude and gradient with a mutation that shrinks, within a hard or a soft bound."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..algorithms import Memory, Newcomers, PruneAndGrow, Update, stop_step, updates_until
from ..masks import grow, prune
from ..schedules import Schedule
from ..scores import Evidence, Random
from .around import AroundRule


@dataclass(frozen=True)
class MagnitudeAndGradient:
    """Score by |w| + lambda |dL/dw|.

    Args:
        gradient_weight: lambda, at least 0.

    Examples:
        >>> import torch
        >>> w, g = torch.tensor([-2.0, 1.0]), torch.tensor([0.0, -4.0])
        >>> MagnitudeAndGradient(0.5)(Evidence(w, w != 0, g, {}, None))
        tensor([2., 3.])

    Source:
        Yuan et al. 2021 (arXiv 2110.14032); see `mest`.
    """

    gradient_weight: float = 0.01
    needs: ClassVar[frozenset[str]] = frozenset({"grad"})

    def __post_init__(self) -> None:
        if not 0 <= self.gradient_weight < math.inf:
            raise ValueError(f"gradient_weight must be at least 0 and finite, got {self.gradient_weight}")

    def __call__(self, evidence: Evidence) -> Tensor:
        """Return the scores, in the tensor's shape."""
        if evidence.grad is None:
            raise ValueError("this score was given no gradient; the algorithm must need 'grad'")
        return evidence.weight.abs() + self.gradient_weight * evidence.grad.abs()


@dataclass(frozen=True)
class Stages:
    """Return one constant after another: f(t) = values[i] while until[i - 1] <= t < until[i].

    Args:
        values: The constants, one more than the steps.
        until: First steps of the second and all later stages, rising.

    Examples:
        >>> [Stages((0.2, 0.1, 0.0), (90, 120))(t) for t in (1, 89, 90, 120)]
        [0.2, 0.2, 0.1, 0.0]
    """

    values: tuple[float, ...]
    until: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.until) + 1 or list(self.until) != sorted(self.until):
            raise ValueError(
                f"stages need rising steps and one value more than steps, got values={self.values}, "
                f"until={self.until}"
            )

    def __call__(self, step: int) -> float:
        """Return the value at a step."""
        return self.values[sum(step >= begin for begin in self.until)]


@dataclass(frozen=True)
class SoftBound(AroundRule):
    """Prune to the target, then grow beyond it and train there until the next update.

    The target n_l of a tensor is its number of active weights at its first update. Every update prunes
    to n_l by the rule's score and grows k = rounding(f(t) n_l) more, so that n_l + k weights train; weights
    that are new compete with the old ones only when they have been trained. From step `last` on k is 0 and
    the target holds exactly. A dense tensor stays dense.

    Args:
        rule: When, who leaves, who comes, and k as a fraction of the target.
        last: First step at which updates only prune.

    Examples:
        >>> mest_soft(total_steps=1000) == mest_soft(total_steps=1000)
        True
    """

    last: int

    def update(
        self, step: int, counts: Mapping[str, int], evidence: Mapping[str, Evidence], memory: Memory
    ) -> Update:
        """Prune to the target and grow beyond it; see `Algorithm.update`."""
        fraction = self.fraction(step) if step < self.last else 0.0
        targets = dict(memory)
        masks: dict[str, Tensor] = {}
        restarted: dict[str, Tensor] = {}
        for name in counts:
            one = evidence[name]
            active, size = int(one.mask.count_nonzero()), one.mask.numel()
            target: int = targets.setdefault(name, active)
            if active == target == size:
                continue
            kept = prune(self.rule.prune(one), one.mask, max(active - target, 0))
            room = size - int(kept.count_nonzero())
            masks[name] = grow(self.rule.grow(one), kept, min(self.rule.rounding(fraction * target), room))
            again = self.restarted(one.mask, kept, masks[name])
            if again is not None:
                restarted[name] = again
        return Update(masks, targets, restarted)


def mest(
    *,
    total_steps: int,
    interval: int = 100,
    drop_fraction: float | Schedule = 0.2,
    gradient_weight: float = 0.01,
    stop: float = 0.75,
    newcomers: Newcomers = "zero",
) -> PruneAndGrow:
    """Drop by magnitude and gradient, grow at random: MEST with elastic mutation (EM).

    Rule: every `interval` steps before `stop` * total_steps, after the optimizer step, k = floor(f(t) n)
    active weights of the smallest |w| + lambda |dL/dw| leave each tensor and k uniformly random inactive
    ones come, from zero. f is `drop_fraction` for the first three quarters of that time and half of it for
    the last.

    Only gradients of active weights are read, so sparse hardware needs no dense one; here the engine
    forms the dense gradient all the same.

    Args:
        total_steps: Optimizer steps of the whole training.
        interval: Optimizer steps between two updates; the published code updates every fifth epoch.
        drop_fraction: Fraction of the active weights in the first stage, or a schedule to be used as it
            is. The published mutation ratio is of all weights: 0.02 at sparsity 0.9 is 0.2 of the active.
        gradient_weight: lambda, at least 0.
        stop: Fraction of the training after which the masks stay, in (0, 1].
        newcomers: Optimizer state of weights that left or came; see `PruneAndGrow`.

    Returns:
        An algorithm.

    Raises:
        ValueError: If a number is out of its range.

    Examples:
        >>> mest(total_steps=1600).drop_fraction
        Stages(values=(0.2, 0.1), until=(900,))

    Source:
        Yuan et al. 2021 (arXiv 2110.14032) and its code, github.com/boone891214/MEST: the score from
        prune_utils/utils_pr.py, the stages (0.02, 0.01 and 0 of all weights, changing at epochs 90 and 120 of
        160) from scripts/resnet32. lambda = 0.01 is not confirmed: it is 0 in the released scripts, which
        then prune by |w| alone, and the paper's text was not at hand.
    """
    end = stop_step(total_steps, stop)
    return PruneAndGrow(
        due=updates_until(interval, end),
        prune=MagnitudeAndGradient(gradient_weight),
        grow=Random(),
        drop_fraction=_staged(drop_fraction, end),
        newcomers=newcomers,
    )


def mest_soft(
    *,
    total_steps: int,
    interval: int = 100,
    drop_fraction: float | Schedule = 0.2,
    gradient_weight: float = 0.01,
    stop: float = 0.75,
    newcomers: Newcomers = "zero",
) -> SoftBound:
    """Grow first and prune at the next update: MEST with elastic mutation and a soft bound (EM&S).

    Rule: every `interval` steps before `stop` * total_steps, after the optimizer step, each tensor is pruned
    by |w| + lambda |dL/dw| to its target n, and floor(f(t) n) uniformly random inactive weights come, from
    zero. Between updates more weights train than the sparsity says: (1 + f(t)) times as many, a cost to
    report with the result. f is as in `mest`, and 0 at the last update, after which the sparsity is exact.

    Args:
        total_steps: Optimizer steps of the whole training.
        interval: Optimizer steps between two updates.
        drop_fraction: Fraction of the target that comes in the first stage, or a schedule to be used as it
            is before the last update.
        gradient_weight: lambda, at least 0.
        stop: Fraction of the training after which the masks stay, in (0, 1].
        newcomers: Optimizer state of weights that left or came; see `PruneAndGrow`.

    Returns:
        An algorithm.

    Raises:
        ValueError: If a number is out of its range.

    Examples:
        >>> mest_soft(total_steps=1000, interval=100).last
        700

    Source:
        As `mest`; the bounds of its scripts for EM&S at sparsity 0.9 are 0.88, 0.89 and 0.9 after growing.
    """
    end = stop_step(total_steps, stop)
    rule = PruneAndGrow(
        due=updates_until(interval, end),
        prune=MagnitudeAndGradient(gradient_weight),
        grow=Random(),
        drop_fraction=_staged(drop_fraction, end),
        newcomers=newcomers,
    )
    return SoftBound(rule, last=(end - 1) // interval * interval)


def _staged(drop_fraction: float | Schedule, end: int) -> Schedule:
    if callable(drop_fraction):
        return drop_fraction
    if not 0 <= drop_fraction <= 1:
        raise ValueError(f"drop_fraction must lie in [0, 1], got {drop_fraction}")
    return Stages((float(drop_fraction), float(drop_fraction) / 2), (math.ceil(0.75 * end),))
