"""SNFS: weights move between tensors, towards where the momentum is large."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from torch import Tensor

from ..algorithms import Memory, PruneAndGrow, Update, annealed, stop_step, updates_until
from ..masks import grow, prune
from ..schedules import Schedule
from ..scores import Evidence, Magnitude
from .around import AroundRule

_EPSILON = 1e-8  # of the published code


@dataclass(frozen=True)
class Momentum:
    """Score by the base optimizer's momentum: |m|, or |m| / (sqrt(v) + 1e-8) where it keeps both moments.

    It says something of inactive weights only where the base sees dense gradients (`masks_gradients`
    False): masked momentum is zero there, and growth by it would bring back what has just left.

    Examples:
        >>> import torch
        >>> w = torch.zeros(2)
        >>> Momentum()(Evidence(w, w == 0, None, {"momentum_buffer": torch.tensor([-2.0, 1.0])}, None))
        tensor([2., 1.])

    Source:
        Dettmers and Zettlemoyer 2019 (arXiv 1907.04840), section 3, "momentum growth"; the form for Adam is
        that of github.com/TimDettmers/sparse_learning, core.py.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"state"})

    def __call__(self, evidence: Evidence) -> Tensor:
        """Return the scores, in the tensor's shape."""
        state, shape = evidence.state, evidence.weight.shape
        moment = state.get("momentum_buffer", state.get("exp_avg"))
        if not isinstance(moment, Tensor) or moment.shape != shape:
            raise ValueError(
                f"the base optimizer keeps no momentum, only {sorted(map(str, state))}; use SGD with "
                "momentum, Adam, AdamW or another one with `momentum_buffer` or `exp_avg`"
            )
        square = state.get("exp_avg_sq")
        if isinstance(square, Tensor) and square.shape == shape:
            return moment.abs() / (square.sqrt() + _EPSILON)
        return moment.abs()


@dataclass(frozen=True)
class Redistributed(AroundRule):
    """Prune every tensor, and share the freed weights out among all by their mean momentum.

    From each tensor l with n_l active weights k_l = min(rounding(f(t) n_l), n_l - floor) leave. Of the sum
    R of all k_l, tensor l receives the part r_l / sum_j r_j, r_l being the mean of the rule's growth score
    over the weights active before the update; what exceeds the room in a tensor goes to the others in
    the same proportion. Shares are rounded by largest remainder, so the total number of active weights
    never changes. A tensor that is dense at its first update stays dense and takes no part; neither does
    one that has had no gradient yet.

    Args:
        rule: When, who leaves, how many, and by which score weights come and are shared out.
        floor: Least number of weights of a tensor that stay, at least 0.

    Examples:
        >>> snfs(total_steps=1000) == snfs(total_steps=1000)
        True
    """

    floor: int = 1

    def update(
        self, step: int, counts: Mapping[str, int], evidence: Mapping[str, Evidence], memory: Memory
    ) -> Update:
        """Prune, redistribute and grow; see `Algorithm.update`."""
        fraction, dense = self.fraction(step), dict(memory)
        kept: dict[str, Tensor] = {}
        seen: dict[str, Evidence] = {}
        scores: dict[str, Tensor] = {}
        share: dict[str, float] = {}
        freed: dict[str, int] = {}
        for name in counts:
            one = evidence[name]
            active = int(one.mask.count_nonzero())
            if dense.setdefault(name, active == one.mask.numel()) or not one.state:
                continue
            k = max(min(self.rule.rounding(fraction * active), active - self.floor), 0)
            scores[name] = self.rule.grow(one)
            share[name] = _mean(scores[name], one.mask)
            seen[name], freed[name] = one, k
            kept[name] = prune(self.rule.prune(one), one.mask, k)
        room = {name: int((~mask).count_nonzero()) for name, mask in kept.items()}
        coming = apportioned(sum(freed.values()), share, room, otherwise=freed)
        masks = {name: grow(scores[name], mask, coming[name]) for name, mask in kept.items()}
        again = {name: self.restarted(seen[name].mask, kept[name], mask) for name, mask in masks.items()}
        return Update(masks, dense, {name: mask for name, mask in again.items() if mask is not None})


def snfs(
    *,
    total_steps: int,
    interval: int = 100,
    drop_fraction: float | Schedule = 0.5,
    stop: float = 1.0,
) -> Redistributed:
    """Drop the smallest weights, and grow by momentum where the momentum is large, across layers.

    Rule: every `interval` steps, after the optimizer step, k_l = ceil(f(t) n_l) weights of the smallest |w|
    leave tensor l, at most n_l - 1; of the R = sum_l k_l freed ones tensor l receives the part
    r_l / sum_j r_j, r_l = mean |M| over its active weights, where the largest |M| are inactive. M is the
    base's own momentum, divided by sqrt(v) for Adam; so the base needs one, and sees dense gradients.
    Neither it nor any other optimizer state is ever touched, and a weight that leaves and comes back in
    one update keeps its value.

    Args:
        total_steps: Optimizer steps of the whole training.
        interval: Optimizer steps between two updates; the published code updates once an epoch.
        drop_fraction: Start of a cosine to 0 at the stop, or a schedule to be used as it is.
        stop: Fraction of the training after which the masks stay, in (0, 1].

    Returns:
        An algorithm.

    Raises:
        ValueError: If a number is out of its range; at the first update, if the base has no momentum.

    Examples:
        >>> snfs(total_steps=1000).masks_gradients
        False

    Source:
        Dettmers and Zettlemoyer 2019 (arXiv 1907.04840), algorithm 1, and their code,
        github.com/TimDettmers/sparse_learning. The code caps a tensor at 99 % of its room and prunes less in
        tensors denser than 80 %; here the cap is the room itself and there is no such rule. The paper's
        pseudocode itself was not at hand.
    """
    end = stop_step(total_steps, stop)
    rule = PruneAndGrow(
        due=updates_until(interval, end),
        prune=Magnitude(),
        grow=Momentum(),
        drop_fraction=annealed(drop_fraction, end),
        rounding=math.ceil,
        masks_gradients=False,
        newcomers="keep",
        regrown="keep",
    )
    return Redistributed(rule)


def apportioned(
    total: int, share: Mapping[str, float], room: Mapping[str, int], *, otherwise: Mapping[str, int]
) -> dict[str, int]:
    """Share a number out in proportion, no more than fits to each, exactly in sum.

    Whoever is due as much as there is room for, or more, is filled; the rest goes to the others in the
    same proportion, rounded by largest remainder, equal remainders by name. Where no share is left (all
    are zero or not finite) the proportion is that of `otherwise`, and after that of the room.

    Args:
        total: What there is, at most the sum of all room.
        share: Name to weight, at least 0; NaN and infinity count as 0.
        room: Name to the most it can take.
        otherwise: Name to weight, where shares are all 0.

    Returns:
        Name to what it gets.

    Raises:
        ValueError: If the total does not fit.

    Examples:
        >>> apportioned(10, {"a": 3.0, "b": 1.0}, {"a": 4, "b": 20}, otherwise={"a": 1, "b": 1})
        {'a': 4, 'b': 6}
    """
    if total > sum(room.values()):
        raise ValueError(f"{total} weights do not fit into the room of {sum(room.values())}")
    parts = {name: Fraction(value) if math.isfinite(value) else Fraction(0) for name, value in share.items()}
    given, remaining = dict.fromkeys(room, 0), total
    open_to = {name for name, free in room.items() if free}
    while remaining and open_to:
        weights = next(
            w
            for w in (parts, otherwise, room)
            if any(w[name] > 0 for name in open_to)  # room has one at least
        )
        whole = sum(Fraction(weights[name]) for name in open_to)
        due = {name: remaining * Fraction(weights[name]) / whole for name in open_to}
        full = {name for name in open_to if due[name] >= room[name]}
        if not full:
            return given | _largest_remainders(due)
        for name in full:
            given[name] = room[name]
            remaining -= room[name]
        open_to -= full
    return given


def _largest_remainders(due: Mapping[str, Fraction]) -> dict[str, int]:
    whole = {name: math.floor(value) for name, value in due.items()}
    missing = int(sum(due.values())) - sum(whole.values())
    order = sorted(due, key=lambda name: (whole[name] - due[name], name))
    return {name: value + (name in order[:missing]) for name, value in whole.items()}


def _mean(scores: Tensor, mask: Tensor) -> float:
    return float(scores[mask].double().mean()) if bool(mask.any()) else 0.0
