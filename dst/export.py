"""Masks from weights, and masks onto copies of a model.

Nothing here writes to a model that is being trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from .optimizer import SparseOptimizer
from .selection import near_names, plain_name, select
from .upkeep import zero_inactive_


def masks_from_weights(
    model_or_params: nn.Module | Mapping[str, Any],
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
) -> dict[str, Tensor]:
    """Read masks off weights that hold zeros: a weight is active if it is not zero.

    For a model or checkpoint that was pruned or trained sparse and saved without its masks; hand the result
    to `SparseOptimizer(..., masks=...)`. A model that dst trains has its masks in the optimizer's state:
    load that instead, since a weight that has just grown is active and still zero.

    Which tensors: of a model, those that `dst.select(model, include, exclude)` takes. Of a mapping, which
    does not know its modules, every floating-point tensor of two or more dimensions, so that biases, norms
    and layer scales are left out; an embedding with a padding row is not told from a matrix, and is for
    `exclude`. A pattern of `include` that matches none of them takes what it does match. Tensors that share
    their storage, as tied weights do, have one mask, under the first name.

    Args:
        model_or_params: A model, or name -> tensor such as a state dict; entries that are no tensors, such
            as extra state, are passed over.
        include: Glob or globs on names; None takes all of the above.
        exclude: Glob or globs of what gets no mask.

    Returns:
        Name to bool tensor of the weight's shape, on its device. A tensor without a zero has a mask of all
        True. NaN counts as active, -0.0 as inactive. Names are the plain model's.

    Raises:
        ValueError: If nothing is selected, a pattern matches nothing, or no selected tensor has a zero.

    Examples:
        >>> masks_from_weights({"fc.weight": torch.tensor([[0.0, 2.0]]), "fc.bias": torch.zeros(1)})
        {'fc.weight': tensor([[False,  True]])}
    """
    if isinstance(model_or_params, nn.Module):
        weights: Mapping[str, Tensor] = select(model_or_params, include, exclude)
    else:
        weights = _selected(model_or_params, include, exclude)
    masks = {name: weight.detach() != 0 for name, weight in weights.items()}
    if all(bool(mask.all()) for mask in masks.values()):
        total = sum(mask.numel() for mask in masks.values())
        raise ValueError(
            f"none of the {total:,} weights in {len(masks)} tensors is zero, so there is no mask to take: "
            "this model is dense; give SparseOptimizer a sparsity instead"
        )
    return masks


@torch.no_grad()
def apply_masks(model: nn.Module, optimizer: SparseOptimizer) -> float:
    """Set the inactive weights of a copy of the model to exactly +0.0, in place.

    For averages that know nothing of masks, such as the `module` of torch's `AveragedModel` or of timm's
    `ModelEmaV3`, before they are evaluated or saved. `dst.SparseEMA` needs no such call.

    Args:
        model: A copy of the model that the optimizer trains, with the same parameter names but for the path
            components of wrappers, `module` and `_orig_mod`. Written to.
        optimizer: The sparse optimizer whose masks are applied.

    Returns:
        The sparsity of the masked tensors before: the fraction of their entries that were zero.

    Raises:
        ValueError: If a mask has no parameter of its name and shape, or if `model` holds the very parameters
            that the optimizer trains; nothing is written then.

    Examples:
        >>> import copy
        >>> from dst.algorithms import static
        >>> model = nn.Linear(4, 1)
        >>> dense = copy.deepcopy(model)
        >>> optimizer = SparseOptimizer(torch.optim.SGD(model.parameters()), model, sparsity=0.5,
        ...                             algorithm=static())
        >>> apply_masks(dense, optimizer), apply_masks(dense, optimizer)
        (0.0, 0.5)
    """
    named = {plain_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    trained = optimizer.sparsifier.params
    for name, mask in optimizer.masks.items():
        if name not in named or named[name].shape != mask.shape:
            found = f"of shape {tuple(named[name].shape)}" if name in named else "missing"
            raise ValueError(
                f"the mask of {name!r} has shape {tuple(mask.shape)}, but its parameter in "
                f"{type(model).__name__} is {found}; near names: {near_names(name, named)}; "
                "give a copy of the model that the optimizer trains"
            )
        if named[name] is trained[name]:
            raise ValueError(
                f"{name!r} is being trained by this optimizer, which keeps its inactive weights at zero; "
                "apply_masks is for copies of the model"
            )
    zeros = 0
    for name, mask in optimizer.masks.items():
        weight = named[name].detach()
        zeros += weight.numel() - int(weight.count_nonzero())
        zero_inactive_(weight, mask.to(weight.device))
    return zeros / sum(mask.numel() for mask in optimizer.masks.values())


def _selected(
    params: Mapping[str, Any], include: str | Sequence[str] | None, exclude: str | Sequence[str]
) -> dict[str, Tensor]:
    tensors = _distinct(params)
    candidates = [name for name, tensor in tensors.items() if tensor.dim() >= 2]
    chosen = set(candidates)
    if include is not None:
        chosen = {name for pattern in _patterns(include) for name in _included(pattern, candidates, tensors)}
    for pattern in _patterns(exclude):
        chosen -= set(_matching(pattern, tensors))
    if not chosen:
        raise ValueError(
            f"nothing is selected from {len(params)} entries, such as {list(params)[:3]}, with "
            f"include={include!r}, exclude={exclude!r}: expected name -> tensor with floating-point tensors "
            "of two or more dimensions; of a whole checkpoint, give the entry that holds the weights"
        )
    return {name: tensor for name, tensor in tensors.items() if name in chosen}


def _distinct(params: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the floating-point tensors under plain names, those that share storage once."""
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[object, ...]] = set()
    for name, value in params.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0:
            continue
        place = (value.device, value.data_ptr(), value.shape, value.stride())
        if place not in seen:
            seen.add(place)
            tensors[plain_name(name)] = value
    return tensors


def _included(pattern: str, candidates: Sequence[str], tensors: Mapping[str, Tensor]) -> list[str]:
    matching = _matching(pattern, tensors)
    return [name for name in matching if name in candidates] or matching


def _matching(pattern: str, tensors: Mapping[str, Tensor]) -> list[str]:
    found = [name for name in tensors if fnmatchcase(name, pattern)]
    if not found:
        raise ValueError(
            f"pattern {pattern!r} matches no floating-point tensor; "
            f"near names: {near_names(pattern, tensors)}"
        )
    return found


def _patterns(patterns: str | Sequence[str]) -> Sequence[str]:
    return (patterns,) if isinstance(patterns, str) else patterns
