"""Two relatives of SET: its original form, with signs apart, and growth where no weight has been yet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..algorithms import Memory, Newcomers, PruneAndGrow, Update, annealed, stop_step, updates_until
from ..masks import pack, unpack
from ..schedules import Constant, Schedule
from ..scores import Evidence, Random
from .around import AroundRule


@dataclass(frozen=True)
class SignedMagnitude:
    """Score by the rank of |w| among the active weights of its own sign: (rank + 1/2) / how many there are.

    Pruning k of n by this score takes k shared out between positive and negative weights in proportion to
    their numbers (by the method of Webster), and of each sign those closest to zero. Weights that are
    exactly zero, and NaN, score -1 and leave first. Among equals of a sign the lowest index leaves first.

    Examples:
        >>> w = torch.tensor([-4.0, -1.0, 2.0, 3.0])
        >>> SignedMagnitude()(Evidence(w, w != 0, None, {}, None))
        tensor([0.7500, 0.2500, 0.2500, 0.7500], dtype=torch.float64)

    Source:
        Mocanu et al. 2018 (arXiv 1707.04780), algorithm 1; see `set_signed`.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, evidence: Evidence) -> Tensor:
        """Return the scores, float64, in the tensor's shape; those of inactive weights mean nothing."""
        weight, active = evidence.weight.reshape(-1), evidence.mask.reshape(-1)
        scores = torch.full_like(weight, -1, dtype=torch.float64)
        for sign in (weight > 0, weight < 0):
            places = (sign & active).nonzero().squeeze(1)
            ranked = places[weight[places].abs().argsort(stable=True)]
            ranks = torch.arange(len(ranked), dtype=torch.float64, device=weight.device)
            scores[ranked] = (ranks + 0.5) / max(len(ranked), 1)
        return scores.view(evidence.weight.shape)


def set_signed(
    *,
    total_steps: int,
    interval: int = 100,
    drop_fraction: float | Schedule = 0.3,
    newcomers: Newcomers = "zero",
) -> PruneAndGrow:
    """Evolve as the original SET: the smallest positive and the largest negative weights leave, apart.

    Rule: every `interval` steps before the last, after the optimizer step, k = floor(f n) weights leave each
    tensor: those closest to zero of each sign, k being shared out in proportion to how many there are of
    each. Then k uniformly random inactive ones come. f is constant: nothing is annealed or stopped.

    Args:
        total_steps: Optimizer steps of the whole training.
        interval: Optimizer steps between two updates; the original's is one epoch.
        drop_fraction: The constant fraction (zeta), or a schedule.
        newcomers: Optimizer state of weights that left or came; see `PruneAndGrow`.

    Returns:
        An algorithm.

    Raises:
        ValueError: If a number is out of its range.

    Examples:
        >>> set_signed(total_steps=1000).drop_fraction
        Constant(value=0.3)

    Source:
        Mocanu et al. 2018 (arXiv 1707.04780), algorithm 1, and the authors' code,
        github.com/dcmocanu/sparse-evolutionary-artificial-neural-networks (zeta = 0.3, epsilon = 20). Here
        newcomers start from zero, as in that code's mask variant; its variant on sparse matrices draws
        them with standard deviation 0.1. The code takes the fraction of each sign by itself.
    """
    if not callable(drop_fraction):
        if not 0 <= drop_fraction <= 1:
            raise ValueError(f"drop_fraction must lie in [0, 1], got {drop_fraction}")
        drop_fraction = Constant(float(drop_fraction))
    return PruneAndGrow(
        due=updates_until(interval, stop_step(total_steps, 1)),
        prune=SignedMagnitude(),
        grow=Random(),
        drop_fraction=drop_fraction,
        newcomers=newcomers,
    )


@dataclass(frozen=True)
class UnfiredFirst(AroundRule):
    """Let a rule that grows at random grow first where no weight has ever been active.

    The keys of weights that were active at any time are put below all others, so newcomers are uniformly
    random among the never active, and when these are used up among the rest. What was ever active is
    remembered at one bit a weight.

    Args:
        rule: When, who leaves and how many; its `grow` must be `Random`.

    Raises:
        ValueError: If the rule grows by anything else.

    Examples:
        >>> itop(total_steps=10_000) == itop(total_steps=10_000)
        True
    """

    def __post_init__(self) -> None:
        if self.rule.grow != Random():
            raise ValueError(f"unfired-first growth is random growth, but the rule grows by {self.rule.grow}")

    def update(
        self, step: int, counts: Mapping[str, int], evidence: Mapping[str, Evidence], memory: Memory
    ) -> Update:
        """Prune by the rule and grow unfired weights first; see `Algorithm.update`."""
        fired = dict(memory)
        masks: dict[str, Tensor] = {}
        restarted: dict[str, Tensor] = {}
        for name in counts:
            one = evidence[name]
            if one.keys is None:
                raise ValueError("unfired-first growth was given no keys; the algorithm must need 'keys'")
            ever = one.mask.clone()
            if name in fired:
                ever |= unpack(fired[name].to(ever.device), ever.shape)
            keys = one.keys.to(torch.int64)
            outcome = self.rule.update(
                step, {name: counts[name]}, {name: replace(one, keys=keys - (ever.to(torch.int64) << 32))}, {}
            )
            masks.update(outcome.masks)
            restarted.update(outcome.restarted)
            fired[name] = pack(ever | outcome.masks.get(name, ever))
        return Update(masks, fired, restarted)


def itop(
    *,
    total_steps: int,
    interval: int = 1500,
    drop_fraction: float | Schedule = 0.5,
    newcomers: Newcomers = "zero",
) -> UnfiredFirst:
    """Explore: drop the smallest weights rarely and in numbers, and grow where none has been active yet.

    Rule: every `interval` steps before the last, after the optimizer step, k = ceil(f(t) n) weights of the
    smallest |w| leave each tensor, and k come, from zero: uniformly random among those that were never
    active, and when these are used up among the rest. f is a cosine from `drop_fraction` to 0.005.

    Args:
        total_steps: Optimizer steps of the whole training.
        interval: Optimizer steps between two updates; long, so that newcomers are trained before judged.
        drop_fraction: Start of the cosine, or a schedule to be used as it is.
        newcomers: Optimizer state of weights that left or came; see `PruneAndGrow`.

    Returns:
        An algorithm.

    Raises:
        ValueError: If a number is out of its range.

    Examples:
        >>> itop(total_steps=10_000).due(1500)
        True

    Source:
        Liu et al. 2021 (arXiv 2102.02887) and github.com/Shiweiliuiiiiiii/In-Time-Over-Parameterization:
        growth "random_unfired", interval 1500 and drop fraction 0.5 of its commands for CIFAR. The SET-ITOP
        and RigL-ITOP that the paper reports grow at random and by gradient: they are `set_` and `rigl`
        with this long interval (4000 for RigL), drop fraction and schedule.
    """
    end = stop_step(total_steps, 1)
    rule = PruneAndGrow(
        due=updates_until(interval, end),
        grow=Random(),
        drop_fraction=annealed(drop_fraction, end, floor=0.005),
        rounding=math.ceil,
        newcomers=newcomers,
    )
    return UnfiredFirst(rule)
