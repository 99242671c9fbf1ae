"""What a saved sparse state must hold, and how it is refused before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from .masks import unpack

_BY_TENSOR = ("shapes", "targets", "masks", "explored")
_KEYS = (*_BY_TENSOR, "step", "updates", "seed", "algorithm", "last_grown", "memory", "dense_weights")


def checked_masks(
    saved: Mapping[str, Any], params: Mapping[str, Tensor], algorithm: str, *, allow_other_algorithm: bool
) -> dict[str, Tensor]:
    """Return the masks of a saved state, or say in one sentence why it does not fit.

    Args:
        saved: From `Sparsifier.state_dict`.
        params: Name to the parameter the masks are for.
        algorithm: `repr` of the algorithm that shall continue.
        allow_other_algorithm: Accept a state that was saved under another one.

    Returns:
        Name to bool mask on the parameter's device.

    Raises:
        ValueError: If entries, tensors, shapes or the algorithm do not fit.

    Examples:
        >>> checked_masks({}, {}, "static", allow_other_algorithm=False)
        Traceback (most recent call last):
        ValueError: the saved sparse state lacks 'shapes' and 10 more; it was not written by dst
    """
    missing = [key for key in _KEYS if key not in saved]
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise ValueError(f"the saved sparse state lacks {missing[0]!r}{more}; it was not written by dst")
    _check_tensors(saved, params)
    for key in ("step", "updates", "seed"):
        if not isinstance(saved[key], int):
            raise ValueError(f"the saved {key} must be an int, got {saved[key]!r}: a damaged file")
    if saved["algorithm"] != algorithm and not allow_other_algorithm:
        raise ValueError(
            f"the state was saved under {saved['algorithm']}, but this optimizer uses {algorithm}; build it "
            "with the saved algorithm, or pass allow_other_algorithm=True to continue under the new one"
        )
    for name, parameter in params.items():
        unpack(saved["explored"][name], parameter.shape)  # refuses what is not a packed mask
    return {name: unpack(saved["masks"][name].to(p.device), p.shape) for name, p in params.items()}


def cloned(value: Any) -> Any:
    """Copy nested dicts and lists of tensors and primitives, so that nobody else can change them.

    Examples:
        >>> cloned({"phase": 1, "moments": (0.5,)})
        {'phase': 1, 'moments': [0.5]}
    """
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: cloned(entry) for key, entry in cast("dict[Any, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [cloned(entry) for entry in cast("list[Any]", value)]
    return value


def _check_tensors(saved: Mapping[str, Any], params: Mapping[str, Tensor]) -> None:
    theirs: Mapping[str, list[int]] = saved["shapes"]
    ours = {name: list(parameter.shape) for name, parameter in params.items()}
    different = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    if different:
        name = different[0]
        raise ValueError(
            f"the saved masks are of other tensors: {len(different)} differ, the first is {name!r}, saved as "
            f"{theirs.get(name)}, here {ours.get(name)}; wrap the model that was saved, with the same "
            "selection"
        )
    for key in _BY_TENSOR:
        if set(saved[key]) != set(params):
            raise ValueError(f"the saved {key} are of other tensors than the saved shapes: a damaged file")
