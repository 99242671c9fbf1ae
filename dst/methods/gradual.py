"""From dense, or less sparse, to sparse: gradual magnitude pruning and GraNet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..algorithms import Memory, Newcomers, PruneAndGrow, Update, annealed, stop_step
from ..masks import prune
from ..schedules import Cubic, Every, Schedule
from ..scores import Evidence, Gradient, Magnitude
from .around import AroundRule


def gmp(*, total_steps: int, interval: int = 100, start: float = 0.0, stop: float = 0.75) -> PruneAndGrow:
    """Prune the smallest weights of each tensor gradually, fast at first and slowly at the end.

    Rule: every `interval` steps from t_0 = start * total_steps on, after the optimizer step, the smallest |w|
    leave each tensor until its sparsity is s(t) = s_f (1 - (1 - (t - t_0) / (n interval))**3), n being the
    number of intervals until stop * total_steps; training starts dense and has reached s_f at the
    n-th. What is pruned never comes back: its gradient is masked and its value is zero, so the masks
    only shrink. Each tensor ends at the sparsity of the distribution; for one threshold over all tensors
    take `granet` with a drop fraction of 0. Give the optimizer a sparsity, not `masks`: masks that are
    sparse already would first be filled up to what the cubic allows.

    Args:
        total_steps: Optimizer steps of the whole training.
        interval: Optimizer steps between two prunings.
        start: Fraction of the training before the pruning begins, in [0, stop).
        stop: Fraction of the training by which the final sparsity is reached, in (0, 1].

    Returns:
        An algorithm.

    Raises:
        ValueError: If a number is out of its range or not one interval fits between start and stop.

    Examples:
        >>> gmp(total_steps=1000, interval=50).sparsity
        Cubic(start=0.0, steps=750, end=1.0, offset=0)

    Source:
        Zhu and Gupta 2017 (arXiv 1710.01878), equation 1, with s_i = 0. They prune every tensor to one
        sparsity (`distribution=dst.uniform`). Their library keeps the value of what is masked, so that it
        might pass a later threshold again (not confirmed); here it is lost.
    """
    due, reached = _cubic(total_steps, interval, start, stop, initial=0.0)
    return PruneAndGrow(due=due, prune=Magnitude(), grow=Magnitude(), sparsity=reached)


@dataclass(frozen=True)
class GlobalFirst(AroundRule):
    """Prune all tensors together to the schedule's total, then prune and grow each one by the rule.

    The (sum_l n_l) - (sum_l m_l) active weights with the smallest scores of the rule leave, wherever they
    are, m_l being the counts that the schedule asks for; at least `floor` stay in each tensor, or m_l where
    that is less. Then the rule works in each tensor at the count it is left with. The number of active
    weights never rises.

    Args:
        rule: When, to what sparsity, who leaves, who comes and how many.
        floor: Least number of weights that the global pruning leaves in a tensor.

    Examples:
        >>> granet(total_steps=1000) == granet(total_steps=1000)
        True
    """

    floor: int = 1

    def update(
        self, step: int, counts: Mapping[str, int], evidence: Mapping[str, Evidence], memory: Memory
    ) -> Update:
        """Prune globally, then prune and grow; see `Algorithm.update`."""
        seen = {name: evidence[name] for name in counts}
        pruned = self._pruned(seen, counts)
        masks: dict[str, Tensor] = {}
        restarted: dict[str, Tensor] = {}
        for name, one in seen.items():
            left = replace(one, mask=pruned[name])
            active = int(left.mask.count_nonzero())
            outcome = self.rule.update(step, {name: active}, {name: left}, {})
            masks[name] = outcome.masks.get(name, left.mask)
            again = self.restarted(one.mask, left.mask, masks[name])
            if again is not None:
                restarted[name] = again | outcome.restarted.get(name, torch.zeros_like(again))
        return Update(masks, memory, restarted)

    def _pruned(self, seen: Mapping[str, Evidence], counts: Mapping[str, int]) -> dict[str, Tensor]:
        active = {name: int(one.mask.count_nonzero()) for name, one in seen.items()}
        excess = sum(active.values()) - sum(counts.values())
        if excess <= 0:
            return {name: one.mask for name, one in seen.items()}
        scores = {name: self.rule.prune(one) for name, one in seen.items()}
        candidates: dict[str, Tensor] = {}
        for name, one in seen.items():
            least = min(self.floor, counts[name], active[name])
            candidates[name] = one.mask & ~prune(scores[name], one.mask, active[name] - least)
        device = next(iter(scores.values())).device
        pool = torch.cat([scores[name][mask].to(device) for name, mask in candidates.items()])
        stay = prune(pool, torch.ones_like(pool, dtype=torch.bool), excess)
        sizes = [int(mask.count_nonzero()) for mask in candidates.values()]
        masks: dict[str, Tensor] = {}
        for (name, candidate), part in zip(candidates.items(), stay.split(sizes), strict=True):
            masks[name] = seen[name].mask.clone()
            masks[name][candidate] = part.to(candidate.device)
        return masks


def granet(
    *,
    total_steps: int,
    interval: int = 100,
    drop_fraction: float | Schedule = 0.5,
    initial: float = 0.0,
    start: float = 0.0,
    stop: float = 0.6875,
    newcomers: Newcomers = "zero",
) -> GlobalFirst:
    """Prune all tensors together along a cubic, and regenerate some weights in each tensor every time.

    Rule: every `interval` steps from t_0 = start * total_steps on, after the optimizer step, the smallest |w|
    of all tensors together leave until the sparsity of the whole is
    s(t) = s_f + (s_i - s_f) (1 - (t - t_0) / (n interval))**3, n being the number of intervals until
    stop * total_steps; at least one stays in each tensor. Then in each tensor that is not dense the
    k = ceil(f(t) n) smallest |w| leave, and k of the largest |dL/dw| come, from zero; f is a cosine from
    `drop_fraction` to 0.005 over the whole training. After n intervals only the second half remains. The
    number of active weights never rises.

    The start is given as a part of the final sparsity: initial = s_i / s_f, so 0 is dense-to-sparse, and
    0.5 / 0.9 starts a network at sparsity 0.5 that ends at 0.9. Each tensor then starts at that part of its
    own final sparsity, while the published code draws an ERK mask of sparsity s_i; the totals agree.

    Args:
        total_steps: Optimizer steps of the whole training.
        interval: Optimizer steps between two updates; the published runs have 1000 for CIFAR, 4000 for
            ImageNet.
        drop_fraction: Start of the cosine, or a schedule to be used as it is; 0 is global gradual
            magnitude pruning without regeneration.
        initial: Part of the final sparsity at step 0, in [0, 1].
        start: Fraction of the training before the first update, in [0, stop).
        stop: Fraction of the training by which the final sparsity is reached, in (0, 1]; 110 of 160 epochs
            for CIFAR, 0.3 for ImageNet.
        newcomers: Optimizer state of weights that left or came; see `PruneAndGrow`.

    Returns:
        An algorithm.

    Raises:
        ValueError: If a number is out of its range or not one interval fits between start and stop.

    Examples:
        >>> granet(total_steps=160_000, interval=1000, initial=0.5).sparsity
        Cubic(start=0.5, steps=110000, end=1.0, offset=0)

    Source:
        Liu et al. 2021 (arXiv 2106.10404), section 4, and github.com/Shiweiliuiiiiiii/GraNet, CIFAR/.
        The published code ends its pruning one interval early, at a sparsity just below s_f, and a weight
        that the second half drops and grows at once keeps its value; here s_f is reached exactly, and
        such a weight restarts at zero.
    """
    due, reached = _cubic(total_steps, interval, start, stop, initial=initial)
    last = due.stop or 0
    rule = PruneAndGrow(
        due=replace(due, stop=max(last, total_steps)),
        prune=Magnitude(),
        grow=Gradient(),
        drop_fraction=annealed(drop_fraction, total_steps, floor=0.005),
        rounding=math.ceil,
        newcomers=newcomers,
        sparsity=reached,
    )
    return GlobalFirst(rule)


def _cubic(
    total_steps: int, interval: int, start: float, stop: float, *, initial: float
) -> tuple[Every, Cubic]:
    end = stop_step(total_steps, stop)
    if not 0 <= start < stop:
        raise ValueError(f"start is a fraction of the training in [0, stop), got start={start}, stop={stop}")
    if not 0 <= initial <= 1:
        raise ValueError(f"initial is a part of the final sparsity in [0, 1], got {initial}")
    first = math.floor(start * total_steps)
    due = Every(interval, start=first)  # checks the interval
    length = (end - first) // interval * interval
    if not length:
        raise ValueError(
            f"no interval of {interval} steps fits between step {first} and step {end}, so nothing would be "
            "pruned; lower the interval or start earlier"
        )
    return replace(due, stop=first + length + 1), Cubic(float(initial), length, 1.0, offset=first)
