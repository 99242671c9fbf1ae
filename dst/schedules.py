"""When something happens, and how much: frozen callables of the step.

A schedule is a value: it prints itself, compares equal to another with the same numbers, and pickles.
Steps count completed optimizer steps; the first is 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[int], float]
"""A number for every step, such as the fraction of the active weights to drop."""

Trigger = Callable[[int], bool]
"""Whether a step is due for a mask update."""


@dataclass(frozen=True)
class Constant:
    """Return the same value at every step: f(t) = value.

    Args:
        value: The value.

    Examples:
        >>> Constant(0.3)(1000)
        0.3
    """

    value: float

    def __call__(self, step: int) -> float:
        """Return the value at a step."""
        return self.value


@dataclass(frozen=True)
class Linear:
    """Go from start to end in a straight line: f(t) = start + (end - start) p.

    Here p is the progress (t - offset) / steps, held between 0 and 1.

    Args:
        start: Value until `offset`.
        steps: Length in optimizer steps, at least 1.
        end: Value from `offset + steps` on.
        offset: Step at which the way begins.

    Examples:
        >>> Linear(1.0, steps=10)(5)
        0.5
    """

    start: float
    steps: int
    end: float = 0.0
    offset: int = 0

    def __post_init__(self) -> None:
        _check_steps(self.steps)

    def __call__(self, step: int) -> float:
        """Return the value at a step."""
        return _approach(self.start, self.end, 1 - _progress(step, self.offset, self.steps))


@dataclass(frozen=True)
class Cosine:
    """Go from start to end along half a cosine: f(t) = end + (start - end) (1 + cos(pi p)) / 2.

    Here p is the progress (t - offset) / steps, held between 0 and 1; `end` is the floor.

    Args:
        start: Value until `offset`.
        steps: Length in optimizer steps, at least 1.
        end: Value from `offset + steps` on.
        offset: Step at which the way begins.

    Examples:
        >>> schedule = Cosine(0.3, steps=100)
        >>> schedule(0), round(schedule(50), 12), schedule(100)
        (0.3, 0.15, 0.0)

    Source:
        RigL (arXiv 1911.11134), section 3, f_decay; SLaK's published code with a floor of 0.005.
    """

    start: float
    steps: int
    end: float = 0.0
    offset: int = 0

    def __post_init__(self) -> None:
        _check_steps(self.steps)

    def __call__(self, step: int) -> float:
        """Return the value at a step."""
        progress = _progress(step, self.offset, self.steps)
        return _approach(self.start, self.end, (1 + math.cos(math.pi * progress)) / 2)


@dataclass(frozen=True)
class Cubic:
    """Rise fast, then settle: f(t) = end + (start - end) (1 - p)**3.

    Here p is the progress (t - offset) / steps, held between 0 and 1.

    Args:
        start: Value until `offset`.
        steps: Length in optimizer steps, at least 1.
        end: Value from `offset + steps` on.
        offset: Step at which the way begins.

    Examples:
        >>> Cubic(0.0, steps=10, end=0.8)(5)
        0.7000000000000001

    Source:
        Zhu and Gupta, "To prune, or not to prune" (arXiv 1710.01878), equation 1.
    """

    start: float
    steps: int
    end: float
    offset: int = 0

    def __post_init__(self) -> None:
        _check_steps(self.steps)

    def __call__(self, step: int) -> float:
        """Return the value at a step."""
        return _approach(self.start, self.end, (1 - _progress(step, self.offset, self.steps)) ** 3)


@dataclass(frozen=True)
class InversePower:
    """Fall as a power of what remains: f(t) = start (1 - p)**power.

    Here p is the progress (t - offset) / steps, held between 0 and 1.

    Args:
        start: Value until `offset`.
        steps: Length in optimizer steps, at least 1.
        power: Exponent, above 0; 1 is a straight line to 0.
        offset: Step at which the way begins.

    Examples:
        >>> InversePower(0.4, steps=4, power=3)(2)
        0.05

    Source:
        RigL (arXiv 1911.11134), appendix G, "inverse power".
    """

    start: float
    steps: int
    power: float = 3.0
    offset: int = 0

    def __post_init__(self) -> None:
        _check_steps(self.steps)
        if not self.power > 0:
            raise ValueError(f"power must be above 0, got {self.power}")

    def __call__(self, step: int) -> float:
        """Return the value at a step."""
        return self.start * (1 - _progress(step, self.offset, self.steps)) ** self.power


@dataclass(frozen=True)
class Every:
    """Be due every `interval` steps: start <= t < stop and (t - start) mod interval = 0, from step 1.

    Args:
        interval: Optimizer steps between two updates, at least 1.
        start: Where counting begins; with 0 the first due step is `interval`.
        stop: First step that is never due; None for no end.

    Examples:
        >>> [t for t in range(1, 400) if Every(100, stop=300)(t)]
        [100, 200]

    Source:
        RigL (arXiv 1911.11134), algorithm 1: t mod delta_T = 0 and t < T_end.
    """

    interval: int
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        if self.interval < 1 or self.start < 0:
            raise ValueError(
                f"interval must be at least 1 and start at least 0 steps, "
                f"got interval={self.interval}, start={self.start}"
            )

    def __call__(self, step: int) -> bool:
        """Tell whether a step is due."""
        begun = step >= max(self.start, 1) and (self.stop is None or step < self.stop)
        return begun and (step - self.start) % self.interval == 0


@dataclass(frozen=True)
class Never:
    """Be due at no step: the mask stays as it was drawn.

    Examples:
        >>> any(Never()(t) for t in range(1000))
        False
    """

    def __call__(self, step: int) -> bool:
        """Tell whether a step is due."""
        return False


def _progress(step: int, offset: int, steps: int) -> float:
    return min(max(step - offset, 0), steps) / steps


def _approach(start: float, end: float, remaining: float) -> float:
    """Return end + (start - end) * remaining, exact at both ends."""
    return start if remaining == 1 else end + (start - end) * remaining


def _check_steps(steps: int) -> None:
    if not steps >= 1:
        raise ValueError(f"a schedule needs at least 1 step, got steps={steps}")
