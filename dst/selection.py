"""Which tensors of a model are made sparse: globs over the plain model's parameter names."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import cast

from torch import nn
from torch.nn.parameter import is_lazy

logger = logging.getLogger(__name__)

# What DistributedDataParallel and AveragedModel, torch.compile, and activation checkpointing put into names.
_WRAPPERS = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module"})
_WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)  # pyright: ignore[reportPrivateUsage]
_SPLIT_PROJECTIONS = frozenset({"q_proj_weight", "k_proj_weight", "v_proj_weight"})


@dataclass
class _Tensor:
    """A distinct parameter: every name it goes by, and whether every owner makes it a candidate."""

    parameter: nn.Parameter
    names: list[str]
    candidate: bool

    def matches(self, pattern: str) -> bool:
        return any(fnmatchcase(name, pattern) for name in self.names)


def select(
    model: nn.Module, include: str | Sequence[str] | None = None, exclude: str | Sequence[str] = ()
) -> dict[str, nn.Parameter]:
    """Select the parameters that are to be sparse.

    Candidates are the `weight` of Linear and convolution modules (transposed ones too) and the input
    projections of attention (`in_proj_weight`, or `q_proj_weight`, `k_proj_weight`, `v_proj_weight`).
    Embeddings, position tables, tokens, norms, layer scales and biases are never candidates. A pattern of
    `include` that matches a candidate selects only the candidates it matches; one that matches none selects
    what it matches, which is how an embedding is asked for. `exclude` then takes away. A tied tensor has one
    entry, under its first name; any of its names matches; it is a candidate only if each of its owners makes
    it one. Frozen parameters (`requires_grad=False`) are left out.

    Args:
        model: Any module, also wrapped in `DistributedDataParallel` or compiled.
        include: Glob or globs (case-sensitive, `*` crosses dots) on parameter names; None takes every
            candidate.
        exclude: Glob or globs of what is left dense.

    Returns:
        Name to parameter, in the model's order. Names are the plain model's: path components `module` and
        `_orig_mod` are stripped.

    Raises:
        ValueError: If a pattern matches nothing or only frozen parameters, if nothing is selected, or if a
            selected parameter is not a non-empty, initialised, real floating-point tensor.
        TypeError: If `model` is not a module or a pattern is not a string.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 10))
        >>> list(select(model))
        ['0.weight', '3.weight']
        >>> list(select(model, exclude="0.*"))
        ['3.weight']
    """
    tensors = _distinct_tensors(model)
    includes = None if include is None else _patterns(include, "include")
    excludes = _patterns(exclude, "exclude")
    if includes is None:
        chosen = [tensor for tensor in tensors if tensor.candidate and tensor.parameter.requires_grad]
    else:
        picked = {id(tensor) for pattern in includes for tensor in _included(tensors, pattern)}
        chosen = [tensor for tensor in tensors if id(tensor) in picked]
    dropped = {id(tensor) for pattern in excludes for tensor in _matching(tensors, pattern, "exclude")}
    chosen = [tensor for tensor in chosen if id(tensor) not in dropped]
    if not chosen:
        raise ValueError(
            f"nothing is selected from {type(model).__name__} with include={include!r}, exclude={exclude!r}: "
            "expected at least one trainable weight of a Linear, convolution or attention module; "
            "name other parameters in include"
        )
    for tensor in chosen:
        _check_maskable(tensor)
    return {tensor.names[0]: tensor.parameter for tensor in chosen}


def plain_name(name: str) -> str:
    """Strip from a name the path components that wrappers add, such as `module` and `_orig_mod`.

    Args:
        name: A dotted name.

    Returns:
        The name that the unwrapped model uses.

    Examples:
        >>> plain_name("_orig_mod.module.stages.0.weight")
        'stages.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DataParallel, DistributedDataParallel and torch.compile.

    Examples:
        >>> layer = nn.Linear(2, 2)
        >>> unwrapped(nn.DataParallel(layer)) is layer
        True
    """
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = cast("nn.Module", model.module)
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def near_names(wanted: str, names: Iterable[str]) -> str:
    """Write the three names most like `wanted`, for an error message.

    Args:
        wanted: A name or pattern that was not found.
        names: The names there are.

    Returns:
        The names, quoted and separated by commas.

    Examples:
        >>> near_names("stem.wieght", ["stem.weight", "head.bias"])
        "'stem.weight', 'head.bias'"
    """
    return ", ".join(repr(name) for name in get_close_matches(wanted, list(names), n=3, cutoff=0.0))


def _distinct_tensors(model: nn.Module) -> list[_Tensor]:
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"select needs an nn.Module, got {type(model).__name__}")
    by_id: dict[int, _Tensor] = {}
    owner_of: dict[str, nn.Parameter] = {}
    modules = cast("Iterable[tuple[str, nn.Module]]", model.named_modules(remove_duplicate=False))
    for prefix, module in modules:
        local = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        for attribute, parameter in local.items():
            name = plain_name(f"{prefix}.{attribute}" if prefix else attribute)
            if owner_of.setdefault(name, parameter) is not parameter:
                raise ValueError(
                    f"two parameters of {type(model).__name__} are called {name!r} once the wrappers' path "
                    "components 'module' and '_orig_mod' are stripped; rename one of the two attributes"
                )
            tensor = by_id.setdefault(id(parameter), _Tensor(parameter, [], candidate=True))
            if name not in tensor.names:
                tensor.names.append(name)
            tensor.candidate = tensor.candidate and _is_candidate(module, attribute)
        if isinstance(module, _WEIGHTED) and "weight" not in local:
            logger.warning(
                "%s (%s) has no plain `weight` parameter (it is parametrized or pruned), so it stays dense "
                "unless its parameters are named in include",
                plain_name(prefix),
                type(module).__name__,
            )
    return list(by_id.values())


def _is_candidate(module: nn.Module, attribute: str) -> bool:
    if isinstance(module, _WEIGHTED):
        return attribute == "weight"
    if isinstance(module, nn.MultiheadAttention) and attribute in _SPLIT_PROJECTIONS:
        return True
    return attribute == "in_proj_weight"


def _patterns(patterns: str | Sequence[str], what: str) -> tuple[str, ...]:
    found = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in found:
        if not isinstance(pattern, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"{what} must be a glob string or a sequence of them, got {pattern!r}")
    return found


def _matching(tensors: Sequence[_Tensor], pattern: str, what: str) -> list[_Tensor]:
    found = [tensor for tensor in tensors if tensor.matches(pattern)]
    if not found:
        names = [name for tensor in tensors for name in tensor.names]
        raise ValueError(
            f"{what} pattern {pattern!r} matches no parameter; near names: {near_names(pattern, names)}"
        )
    return found


def _included(tensors: Sequence[_Tensor], pattern: str) -> list[_Tensor]:
    matching = _matching(tensors, pattern, "include")
    wanted = [tensor for tensor in matching if tensor.candidate] or matching
    trainable = [tensor for tensor in wanted if tensor.parameter.requires_grad]
    if not trainable:
        raise ValueError(
            f"include pattern {pattern!r} matches only frozen parameters (requires_grad=False), such as "
            f"{wanted[0].names[0]!r}; unfreeze them or leave the pattern out"
        )
    return trainable


def _check_maskable(tensor: _Tensor) -> None:
    name, parameter = tensor.names[0], tensor.parameter
    if is_lazy(parameter):
        raise ValueError(f"parameter {name!r} is not initialised yet (a lazy module); run one batch first")
    if not parameter.is_floating_point():
        raise ValueError(
            f"parameter {name!r} has dtype {parameter.dtype}, but only real floating-point tensors "
            "can be sparse; exclude it"
        )
    if parameter.numel() == 0:
        raise ValueError(f"parameter {name!r} of shape {tuple(parameter.shape)} has no elements; exclude it")
