"""How a network trains sparse: an algorithm is a value.

An algorithm decides when the masks change and what they become; it sees all tensors at once and
writes to none of them. SET, RigL, SLaK's training and a fixed mask are one dataclass,
`PruneAndGrow`, with different fields. A method that does not fit it is its own frozen dataclass with
the attributes of `Algorithm`; the engine (`dst.Sparsifier`) stays the same.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

from .masks import grow, prune
from .schedules import Constant, Cosine, Every, Never, Schedule, Trigger
from .scores import Evidence, Gradient, Magnitude, Random, ScoreFn

logger = logging.getLogger(__name__)

Memory = dict[str, Any]
"""What an algorithm remembers between updates: tensors, numbers, strings, and dicts or lists of them."""

Newcomers = Literal["zero", "keep", "mean"]
"""What the optimizer state of weights that left or came becomes; see `PruneAndGrow`."""


class Update(NamedTuple):
    """The outcome of one mask update.

    Attributes:
        masks: Name to bool tensor; a tensor that is left out keeps its mask.
        memory: What the algorithm remembers from now on.
        restarted: Name to bool tensor: weights that left and came back in this same update and start
            again from zero. Weights that are active only before or only after need no mention.
    """

    masks: Mapping[str, Tensor]
    memory: Memory
    restarted: Mapping[str, Tensor] = {}


class Algorithm(Protocol):
    """What the engine asks of an algorithm: `due` and `update`.

    An algorithm may also have these attributes; where one is left out, the engine takes the default.

    - `needs`, frozenset of str: evidence to gather, any of "grad", "state", "keys". Default: nothing.
    - `replaces_step`, bool: a mask update takes the place of the optimizer step. Default: False.
    - `masks_gradients`, bool: gradients of inactive weights are zeroed. Default: True.
    - `dense_weights`, bool: the base trains a dense copy behind the mask, which the model sees masked;
      one more copy of the weights in memory. Default: False.
    - `newcomers`, "zero", "mean" or "keep": optimizer state of weights that left or came, see
      `PruneAndGrow`. Default: "zero".
    - `sparsity`, a schedule or None: the part of the final sparsity that is reached at a step, 0 dense,
      1 all of it. Default: None, all of it always.
    """

    @property
    def due(self) -> Trigger:
        """Tell whether the masks are updated at a step (1 is the first)."""
        ...

    def update(
        self, step: int, counts: Mapping[str, int], evidence: Mapping[str, Evidence], memory: Memory
    ) -> Update | tuple[Mapping[str, Tensor], Memory]:
        """Choose new masks for all tensors at once.

        Args:
            step: The optimizer step just completed.
            counts: How many weights each tensor shall have active afterwards, unless the algorithm
                moves weights between tensors.
            evidence: Name to evidence, made when it is asked for; read each tensor once.
            memory: What the previous update returned; empty at the first.

        Returns:
            An `Update`, or just (masks, memory).
        """
        ...


@dataclass(frozen=True, kw_only=True, repr=False)
class PruneAndGrow:
    """Drop the lowest scores, grow the highest, at an exact count.

    In every tensor with n active weights and m wanted, k = rounding(drop_fraction(t) n) weights leave
    besides the n - m that are too many; then weights come until m are active. A weight that has just
    left may come back. A tensor that is dense and stays dense is left alone.

    Args:
        due: When the masks change.
        prune: Who leaves: the active weights with the smallest of these scores.
        grow: Who comes: the inactive weights with the largest of these scores.
        drop_fraction: Fraction of the active weights that leave, in [0, 1], as a schedule.
        rounding: From a fraction of a weight to an int: `math.floor` (RigL) or `math.ceil` (SLaK).
        replaces_step: Whether a mask update takes the place of the optimizer step (RigL) or follows it.
        masks_gradients: Whether the base sees zero gradients at inactive weights, or the dense ones.
        newcomers: Optimizer state of weights that left or came. "zero": what the optimizer would hold
            after zero gradients only. "mean": the same, but second moments of those that came start at
            the mean over the tensor's active weights. "keep": not touched.
        regrown: A weight that leaves and comes back in one update restarts at "zero" or will "keep" its
            value and its optimizer state.
        sparsity: Schedule of the part of the final sparsity that is reached, 0 dense, 1 all of it; None for
            all of it always.

    Examples:
        >>> rigl(total_steps=1000) == rigl(total_steps=1000)
        True
    """

    due: Trigger = field(default_factory=Never)
    prune: ScoreFn = field(default_factory=Magnitude)
    grow: ScoreFn = field(default_factory=Random)
    drop_fraction: Schedule = field(default_factory=lambda: Constant(0.0))
    rounding: Callable[[float], int] = math.floor
    replaces_step: bool = False
    masks_gradients: bool = True
    newcomers: Newcomers = "zero"
    regrown: Literal["zero", "keep"] = "zero"
    sparsity: Schedule | None = None

    def __post_init__(self) -> None:
        if self.newcomers not in ("zero", "keep", "mean"):
            raise ValueError(f"newcomers must be 'zero', 'keep' or 'mean', got {self.newcomers!r}")
        if self.regrown not in ("zero", "keep"):
            raise ValueError(f"regrown must be 'zero' or 'keep', got {self.regrown!r}")

    @property
    def needs(self) -> frozenset[str]:
        """What the two scores read."""
        if isinstance(self.due, Never):
            return frozenset()
        nothing: frozenset[str] = frozenset()
        return getattr(self.prune, "needs", nothing) | getattr(self.grow, "needs", nothing)

    def update(
        self, step: int, counts: Mapping[str, int], evidence: Mapping[str, Evidence], memory: Memory
    ) -> Update:
        """Prune and grow every tensor; see `Algorithm.update`."""
        masks: dict[str, Tensor] = {}
        restarted: dict[str, Tensor] = {}
        fraction = self.drop_fraction(step)
        if not 0 <= fraction <= 1:
            raise ValueError(f"drop_fraction must lie in [0, 1], got {fraction} at step {step}")
        for name, wanted in counts.items():
            seen = evidence[name]
            active = int(seen.mask.count_nonzero())
            if active == wanted == seen.mask.numel():
                continue
            leaving = max(active - wanted, 0) + min(self.rounding(fraction * active), active, wanted)
            kept = prune(self.prune(seen), seen.mask, leaving)
            masks[name] = grow(self.grow(seen), kept, wanted - (active - leaving))
            if self.regrown == "zero":
                restarted[name] = seen.mask & masks[name] & ~kept
        return Update(masks, memory, restarted)

    def __repr__(self) -> str:
        values = ", ".join(f"{f.name}={_public_name(getattr(self, f.name))}" for f in fields(self))
        return f"PruneAndGrow({values})"


def static() -> PruneAndGrow:
    """Keep the initial masks for the whole training.

    Rule: the mask of step 0 is the mask of every step; gradients of inactive weights are zero.

    Returns:
        An algorithm that is never due.

    Examples:
        >>> static().due(100)
        False

    Source:
        The "static" baseline of RigL (arXiv 1911.11134), section 4.
    """
    return PruneAndGrow()


def set_(
    *,
    total_steps: int,
    interval: int = 100,
    drop_fraction: float | Schedule = 0.3,
    stop: float = 0.75,
    newcomers: Newcomers = "zero",
    regrown: Literal["zero", "keep"] = "zero",
) -> PruneAndGrow:
    """Drop the smallest weights and grow random ones, after the optimizer step.

    Rule: every `interval` steps before `stop` * total_steps, k = floor(f(t) n) weights of the smallest
    |w| leave each tensor and k uniformly random inactive ones come, from zero.

    Args:
        total_steps: Optimizer steps of the whole training.
        interval: Optimizer steps between two updates.
        drop_fraction: Start of a cosine to 0 at the stop, or a schedule to be used as it is;
            `Constant(0.3)` is the original's.
        stop: Fraction of the training after which the masks stay, in (0, 1].
        newcomers: Optimizer state of weights that left or came; see `PruneAndGrow`.
        regrown: Whether a weight that leaves and comes back in one update restarts at "zero" or will
            "keep" its value.

    Returns:
        An algorithm.

    Raises:
        ValueError: If a number is out of its range.

    Examples:
        >>> set_(total_steps=1000).due(100), set_(total_steps=1000).due(800)
        (True, False)

    Source:
        Mocanu et al. 2018 (arXiv 1707.04780), algorithm 1, in the magnitude form with annealing of
        RigL (arXiv 1911.11134), section 4. The original drops the smallest positive and the largest
        negative weights apart, never anneals and never stops.
    """
    end = stop_step(total_steps, stop)
    return PruneAndGrow(
        due=updates_until(interval, end),
        grow=Random(),
        drop_fraction=annealed(drop_fraction, end),
        newcomers=newcomers,
        regrown=regrown,
    )


def rigl(
    *,
    total_steps: int,
    interval: int = 100,
    drop_fraction: float | Schedule = 0.3,
    stop: float = 0.75,
    newcomers: Newcomers = "zero",
    regrown: Literal["zero", "keep"] = "zero",
) -> PruneAndGrow:
    """Drop the smallest weights and grow those with the largest gradients, in place of a step.

    Rule: every `interval` steps before `stop` * total_steps, instead of the optimizer step,
    k = floor(f(t) n) weights of the smallest |w| leave each tensor and k of the largest |dL/dw| among
    those not kept come, from zero; f is a cosine from `drop_fraction` to 0.

    Args:
        total_steps: Optimizer steps of the whole training.
        interval: Optimizer steps between two updates.
        drop_fraction: Start of a cosine to 0 at the stop, or a schedule to be used as it is.
        stop: Fraction of the training after which the masks stay, in (0, 1].
        newcomers: Optimizer state of weights that left or came; see `PruneAndGrow`.
        regrown: "zero" as the paper, or "keep" as the authors' TensorFlow code, for a weight that is
            dropped and grown in one update.

    Returns:
        An algorithm.

    Raises:
        ValueError: If a number is out of its range.

    Examples:
        >>> rigl(total_steps=1000).replaces_step
        True

    Source:
        Evci et al. 2020 (arXiv 1911.11134), algorithm 1; defaults of section 4.1.
    """
    end = stop_step(total_steps, stop)
    return PruneAndGrow(
        due=updates_until(interval, end),
        grow=Gradient(),
        drop_fraction=annealed(drop_fraction, end),
        replaces_step=True,
        newcomers=newcomers,
        regrown=regrown,
    )


def slak(*, total_steps: int, interval: int = 100, drop_fraction: float | Schedule = 0.3) -> PruneAndGrow:
    """Train as the published SLaK code does: random growth, dense gradients, never stopping.

    Rule: every `interval` steps, after the optimizer step, k = ceil(f(t) n) weights of the smallest |w|
    leave each tensor and k uniformly random ones come; f is a cosine from `drop_fraction` to 0.005 over
    the whole training, and updates never stop: weights that come in one at the last step stay at zero.
    Gradients are not masked and moments are never touched; a weight that leaves and comes back in one
    update keeps its value.

    Args:
        total_steps: Optimizer steps of the whole training.
        interval: Optimizer steps between two updates; 2000 for SLaK-T, 100 for S and B.
        drop_fraction: Start of the cosine, or a schedule to be used as it is; 0.5 for SLaK-T, 0.3 for
            S and B.

    Returns:
        An algorithm.

    Raises:
        ValueError: If a number is out of its range.

    Examples:
        >>> slak(total_steps=1000).masks_gradients
        False

    Source:
        Liu et al. 2023 (arXiv 2207.03620), section 4 and appendix A; github.com/VITA-Group/SLaK,
        sparse_core.py and funcs.py. Deviations: docs/reproduction/differences.md.
    """
    end = stop_step(total_steps, 1)
    _warn_if_never(interval, end + 1)
    return PruneAndGrow(
        due=Every(interval),
        grow=Random(),
        drop_fraction=annealed(drop_fraction, end, floor=0.005),
        rounding=math.ceil,
        masks_gradients=False,
        newcomers="keep",
        regrown="keep",
    )


def annealed(drop_fraction: float | Schedule, steps: int, floor: float = 0.0) -> Schedule:
    """Turn a number into a cosine from it to a floor over some steps, and leave a schedule as it is.

    Examples:
        >>> annealed(0.3, 100)
        Cosine(start=0.3, steps=100, end=0.0, offset=0)
    """
    if callable(drop_fraction):
        return drop_fraction
    if not 0 <= drop_fraction <= 1:
        raise ValueError(f"drop_fraction must lie in [0, 1], got {drop_fraction}")
    return Cosine(float(drop_fraction), steps, end=min(floor, float(drop_fraction)))


def stop_step(total_steps: int, stop: float) -> int:
    """Return the step at which a fraction of the training is over, at least 1.

    Examples:
        >>> stop_step(1000, 0.75)
        750
    """
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1 optimizer step, got {total_steps}")
    if not 0 < stop <= 1:
        raise ValueError(f"stop is a fraction of the training in (0, 1], got {stop}")
    return max(1, math.floor(stop * total_steps))


def updates_until(interval: int, stop: int) -> Every:
    """Return a trigger for every `interval` steps before a step, warning if it is never due.

    Examples:
        >>> updates_until(100, 750)
        Every(interval=100, start=0, stop=750)
    """
    _warn_if_never(interval, stop)
    return Every(interval, stop=stop)


def _warn_if_never(interval: int, stop: int) -> None:
    if interval >= stop:
        logger.warning(
            "no mask update is due: the first would be at step %d and updates end before step %d, so the "
            "masks stay as they are drawn; lower the interval, or use dst.static() if that is meant",
            interval,
            stop,
        )


def _public_name(value: object) -> str:
    """Print a function by its import path, which unlike its repr is the same in every process."""
    name = getattr(value, "__qualname__", None)
    if callable(value) and name is not None:
        return f"{value.__module__}.{name}"
    return repr(value)
