"""How masks move: exploration, churn and overlap, from exact integer counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .optimizer import SparseOptimizer


@dataclass(frozen=True)
class MaskOverlap:
    """The Jaccard index of two sets of masks; see `mask_overlap`.

    Attributes:
        total: Over all tensors taken together.
        tensors: Name to the index of one tensor.
    """

    total: float
    tensors: dict[str, float]


def exploration_rate(optimizer: SparseOptimizer) -> float:
    """Return the fraction of the masked weights that were ever active.

    R_s(t) = ||m_0 or m_1 or ... or m_t||_0 / N, over all N weights of all tensors that have a mask. It starts
    at 1 - sparsity and never falls.

    Args:
        optimizer: The sparse optimizer.

    Returns:
        A number in [1 - sparsity, 1].

    Examples:
        >>> import torch
        >>> from dst.algorithms import static
        >>> layer = torch.nn.Linear(8, 1)
        >>> exploration_rate(SparseOptimizer(torch.optim.SGD(layer.parameters()), layer, sparsity=0.75,
        ...                                  algorithm=static()))
        0.25

    Source:
        Liu et al. 2021, "Do We Actually Need Dense Over-Parameterization?" (ITOP, arXiv 2102.02887),
        section 3, the In-Time Over-Parameterization rate.
    """
    sparsifier = optimizer.sparsifier
    explored = sum(sparsifier.explored.values())
    return explored / sum(parameter.numel() for parameter in sparsifier.params.values())


def churn(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Return how much of the later masks is new.

    churn = |after and not before| / |after|, both counted over all tensors. For an update that drops and
    grows a fraction f of the active weights it is f, less what was dropped and grown again.

    Args:
        before: Name to bool mask.
        after: Name to bool mask, the same names and shapes.

    Returns:
        A number in [0, 1]; 0 if nothing is active afterwards.

    Raises:
        ValueError: If names, shapes or dtypes do not fit.

    Examples:
        >>> import torch
        >>> churn({"w": torch.tensor([True, True, False])}, {"w": torch.tensor([True, False, True])})
        0.5

    Source:
        The drop fraction that an update realises: RigL (arXiv 1911.11134), section 3, k / |theta| of the
        drop and grow criteria, measured on the masks.
    """
    _check(before, after)
    grown = sum(_count(after[name] & ~before[name].to(after[name].device)) for name in after)
    active = sum(_count(mask) for mask in after.values())
    return grown / active if active else 0.0


def mask_overlap(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> MaskOverlap:
    """Return the Jaccard index of two sets of masks, by tensor and in total.

    overlap = |a and b| / |a or b|; the total divides the sums over all tensors. It is 1 for equal masks, two
    empty ones included, and about (1 - s) / (1 + s) for independent random masks of sparsity s.

    Args:
        a: Name to bool mask.
        b: Name to bool mask, the same names and shapes.

    Returns:
        The overlap in total and by tensor, each in [0, 1]; the order of a and b does not matter.

    Raises:
        ValueError: If names, shapes or dtypes do not fit.

    Examples:
        >>> import torch
        >>> mask_overlap({"w": torch.tensor([True, True, False])}, {"w": torch.tensor([True, False, True])})
        MaskOverlap(total=0.333..., tensors={'w': 0.333...})

    Source:
        Jaccard, "The distribution of the flora in the alpine zone", New Phytologist 11(2), 1912.
    """
    _check(a, b)
    shared = {name: _count(mask & b[name].to(mask.device)) for name, mask in a.items()}
    either = {name: _count(mask | b[name].to(mask.device)) for name, mask in a.items()}
    return MaskOverlap(
        _ratio(sum(shared.values()), sum(either.values())),
        {name: _ratio(shared[name], either[name]) for name in shared},
    )


def _count(mask: Tensor) -> int:
    return int(mask.count_nonzero())


def _ratio(shared: int, either: int) -> float:
    return shared / either if either else 1.0


def _check(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    different = sorted(a.keys() ^ b.keys())
    if different:
        raise ValueError(
            f"the two sets of masks must name the same tensors, but {len(different)} names are in one only, "
            f"the first is {different[0]!r}"
        )
    for name, mask in a.items():
        other = b[name]
        if mask.shape != other.shape or not mask.dtype == other.dtype == torch.bool:
            raise ValueError(
                f"the masks of {name!r} must be bool of one shape, got {mask.dtype} of shape "
                f"{tuple(mask.shape)} and {other.dtype} of shape {tuple(other.shape)}"
            )
