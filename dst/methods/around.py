"""Methods that do something before, after or instead of a part of prune-and-grow.

Such a method holds a `PruneAndGrow` as its `rule`: when, who leaves, who comes, how many; and adds what
tensor-by-tensor pruning and growing cannot say.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..algorithms import Memory, Newcomers, PruneAndGrow, Update
from ..schedules import Schedule, Trigger
from ..scores import Evidence


@dataclass(frozen=True)
class AroundRule(ABC):
    """Take every trait of an algorithm from a rule, and leave `update` to be said.

    Args:
        rule: When the masks change, who leaves, who comes and how many.
    """

    rule: PruneAndGrow

    @property
    def due(self) -> Trigger:
        """When the masks change."""
        return self.rule.due

    @property
    def needs(self) -> frozenset[str]:
        """What the rule's scores read."""
        return self.rule.needs

    @property
    def replaces_step(self) -> bool:
        """Whether a mask update takes the place of the optimizer step."""
        return self.rule.replaces_step

    @property
    def masks_gradients(self) -> bool:
        """Whether the base sees zero gradients at inactive weights."""
        return self.rule.masks_gradients

    @property
    def newcomers(self) -> Newcomers:
        """Optimizer state of weights that left or came."""
        return self.rule.newcomers

    @property
    def sparsity(self) -> Schedule | None:
        """Schedule of the part of the final sparsity that is reached."""
        return self.rule.sparsity

    @abstractmethod
    def update(
        self, step: int, counts: Mapping[str, int], evidence: Mapping[str, Evidence], memory: Memory
    ) -> Update:
        """Choose new masks for all tensors at once; see `Algorithm.update`."""

    def fraction(self, step: int) -> float:
        """Return the rule's drop fraction at a step, or raise where it is not in [0, 1]."""
        fraction = self.rule.drop_fraction(step)
        if not 0 <= fraction <= 1:
            raise ValueError(f"drop_fraction must lie in [0, 1], got {fraction} at step {step}")
        return fraction

    def restarted(self, before: Tensor, kept: Tensor, after: Tensor) -> Tensor | None:
        """Return which weights left and came back and start again, or None where they keep their value."""
        return before & ~kept & after if self.rule.regrown == "zero" else None
