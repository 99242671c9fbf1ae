"""Which weights: scores of the entries of one tensor, larger meaning keep or grow first.

A score is a frozen callable from `Evidence` to a tensor. Its `needs` name the fields of the evidence
that cost something to provide, so that the engine gathers only what an algorithm reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Evidence:
    """What an algorithm may look at in one tensor; nothing in it may be written to.

    Args:
        weight: The tensor, its own shape and dtype.
        mask: bool, the same shape; True is active.
        grad: The dense gradient averaged over ranks, or None where the algorithm does not need it.
        state: The base optimizer's state of the tensor, such as `exp_avg`; empty unless needed.
        keys: int32 random keys of (seed, step, name, position), or None unless needed.
    """

    weight: Tensor
    mask: Tensor
    grad: Tensor | None
    state: Mapping[str, object]
    keys: Tensor | None


class LazyEvidence(Mapping[str, Evidence]):
    """Evidence made when it is asked for, so that keys and gradients exist for one tensor at a time."""

    def __init__(self, names: list[str], make: Callable[[str], Evidence]) -> None:
        self._names, self._make = names, make

    def __getitem__(self, name: str) -> Evidence:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # without making the evidence, as the inherited method would

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


ScoreFn = Callable[[Evidence], Tensor]


@dataclass(frozen=True)
class Magnitude:
    """Score by |w|.

    Examples:
        >>> import torch
        >>> w = torch.tensor([-2.0, 1.0])
        >>> Magnitude()(Evidence(w, w != 0, None, {}, None))
        tensor([2., 1.])
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, evidence: Evidence) -> Tensor:
        """Return the scores, in the tensor's shape."""
        return evidence.weight.abs()


@dataclass(frozen=True)
class Gradient:
    """Score by |dL/dw|, of the gradient averaged over ranks.

    Examples:
        >>> import torch
        >>> w, g = torch.zeros(2), torch.tensor([-2.0, 1.0])
        >>> Gradient()(Evidence(w, w == 0, g, {}, None))
        tensor([2., 1.])

    Source:
        RigL (arXiv 1911.11134), section 3.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"grad"})

    def __call__(self, evidence: Evidence) -> Tensor:
        """Return the scores, in the tensor's shape."""
        if evidence.grad is None:
            raise ValueError("the gradient score was given no gradient; the algorithm must need 'grad'")
        return evidence.grad.abs()


@dataclass(frozen=True)
class Random:
    """Score by random keys: the k largest are a uniformly random set of k.

    Examples:
        >>> import torch
        >>> w = torch.zeros(2)
        >>> Random()(Evidence(w, w == 0, None, {}, torch.tensor([7, 3])))
        tensor([7, 3])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys"})

    def __call__(self, evidence: Evidence) -> Tensor:
        """Return the scores, in the tensor's shape."""
        if evidence.keys is None:
            raise ValueError("the random score was given no keys; the algorithm must need 'keys'")
        return evidence.keys
