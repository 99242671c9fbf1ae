"""Find the masks of a checkpoint: those that dst saved, or those that its zeros tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..export import masks_from_weights
from ..masks import unpack
from ..selection import plain_name
from .checkpoint_files import InspectionError, one_line, read_checkpoint

_STATE = ("step", "updates", "seed", "algorithm", "shapes", "masks", "explored")
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "net", "model_ema", "state_dict_ema", "ema")
_DEPTH = 6  # how deep is looked


@dataclass(frozen=True)
class SavedMasks:
    """The masks of a checkpoint and what is saved with them.

    Attributes:
        file: Where they were read.
        masks: Name to bool mask, in the order saved.
        from_zeros: Whether they were read off the weights: an active weight that is zero counts inactive.
        step: Completed optimizer steps; this and what follows is None where masks are from zeros.
        updates: Mask updates so far.
        algorithm: The algorithm, printed.
        seed: Seed of its random choices.
        explored: Weights that were ever active, over all tensors.
        stray: Weights outside the masks that are not zero, over the tensors whose weights are in the file
            too; 0 in a model that is as sparse as its masks say.
    """

    file: str
    masks: dict[str, Tensor]
    from_zeros: bool
    step: int | None = None
    updates: int | None = None
    algorithm: str | None = None
    seed: int | None = None
    explored: int | None = None
    stray: int | None = None


def read_masks(path: str, entry: str | None = None) -> SavedMasks:
    """Read the masks of a checkpoint file.

    A sparse state that dst saved is found wherever it lies. Without one, the masks are the non-zero weights
    of the state dict, which may be wrapped under the usual names, such as "model" or "state_dict".

    Args:
        path: The file.
        entry: Look only into this entry, such as "model_ema" or "optimizers.0".

    Returns:
        The masks.

    Raises:
        InspectionError: If the file cannot be read, or holds no masks and no zeros.
    """
    content = read_checkpoint(path)
    if entry is not None:
        content = _entered(content, entry, path)
    states = list(_sparse_states(content, "", _DEPTH, set()))
    if len(states) > 1:
        places = ", ".join(place or "the file itself" for place, _ in states)
        raise InspectionError(
            f"{path}: holds {len(states)} sparse states ({places}); choose one with --entry"
        )
    if not states:
        return _from_zeros(content, path)
    try:
        return _from_state(states[0][1], _weights(content) or {}, path)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        raise InspectionError(f"{path}: the sparse state is damaged ({one_line(error)})") from error


def _entered(content: Any, entry: str, path: str) -> Mapping[Any, Any]:
    found = content
    for part in entry.split("."):
        if isinstance(found, Mapping) and part in found:
            found = cast("Mapping[Any, Any]", found)[part]
        elif isinstance(found, Sequence) and part.isdigit() and int(part) < len(found):
            found = cast("Sequence[Any]", found)[int(part)]
        else:
            raise InspectionError(f"{path}: has no entry {entry!r}; its entries are {_listed(content)}")
    if not isinstance(found, Mapping):
        raise InspectionError(f"{path}: the entry {entry!r} is a {type(found).__name__}, expected a dict")
    return cast("Mapping[Any, Any]", found)


def _sparse_states(
    content: Any, place: str, depth: int, seen: set[int]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield what looks like the state of a `Sparsifier`, with the entry it lies under."""
    if id(content) in seen:  # a pickle may hold itself
        return
    if isinstance(content, Mapping):
        if all(key in content for key in _STATE):
            yield place, cast("Mapping[str, Any]", content)
            return
        inside = list(cast("Mapping[Any, Any]", content).items())
    elif isinstance(content, (list, tuple)):
        inside = list(enumerate(cast("Sequence[Any]", content)))
    else:
        return
    seen.add(id(content))
    if depth:
        for key, value in inside:
            yield from _sparse_states(value, f"{place}.{key}" if place else str(key), depth - 1, seen)


def _from_state(state: Mapping[str, Any], weights: Mapping[str, Tensor], path: str) -> SavedMasks:
    for key, kind in (("step", int), ("updates", int), ("seed", int), ("algorithm", str)):
        if not isinstance(state[key], kind):
            raise TypeError(f"its {key} is a {type(state[key]).__name__}")
    shapes = {str(name): tuple(map(int, shape)) for name, shape in state["shapes"].items()}
    if not shapes or not all(side > 0 for shape in shapes.values() for side in shape):
        raise ValueError("it names no tensor, or one without entries")
    masks = {name: unpack(state["masks"][name], shape) for name, shape in shapes.items()}
    explored = sum(
        int(unpack(state["explored"][name], shape).count_nonzero()) for name, shape in shapes.items()
    )
    return SavedMasks(
        file=path,
        masks=masks,
        from_zeros=False,
        step=state["step"],
        updates=state["updates"],
        algorithm=state["algorithm"],
        seed=state["seed"],
        explored=explored,
        stray=_stray(masks, weights),
    )


def _stray(masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> int | None:
    plain = {plain_name(name): weight for name, weight in weights.items()}
    pairs = [(mask, plain[name]) for name, mask in masks.items() if name in plain]
    pairs = [(mask, weight) for mask, weight in pairs if weight.shape == mask.shape]
    return sum(int(weight[~mask].count_nonzero()) for mask, weight in pairs) if pairs else None


def _from_zeros(content: Mapping[Any, Any], path: str) -> SavedMasks:
    weights = _weights(content)
    if weights is None:
        raise InspectionError(
            f"{path}: holds no floating-point tensor of two or more dimensions; its entries are "
            f"{_listed(content)}; if the weights lie deeper, name where with --entry"
        )
    try:
        return SavedMasks(file=path, masks=masks_from_weights(weights), from_zeros=True)
    except ValueError:
        total = sum(weight.numel() for weight in weights.values())
        raise InspectionError(
            f"{path}: is dense: none of the {total:,} weights in {len(weights)} tensors is zero, and it "
            "holds no masks"
        ) from None


def _weights(content: Mapping[Any, Any], depth: int = _DEPTH) -> dict[str, Tensor] | None:
    """Return the weight tensors of the first state dict there is, unwrapping the usual names."""
    found = {name: value for name, value in content.items() if isinstance(name, str) and _is_weight(value)}
    if found:
        return found
    for key in _WRAPPERS:
        inner = content.get(key)
        if isinstance(inner, Mapping) and depth:
            weights = _weights(cast("Mapping[Any, Any]", inner), depth - 1)
            if weights:
                return weights
    return None


def _is_weight(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dim() > 1
        and value.numel() > 0
        and value.layout == torch.strided
        and value.device.type == "cpu"
    )


def _listed(content: Mapping[Any, Any]) -> str:
    names = list(map(str, content))
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if names[5:] else "") or "none"
