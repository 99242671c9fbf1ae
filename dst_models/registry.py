"""Models by name: a registry of entry points, each a function that builds one variant."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

__all__ = ["create_model", "list_models", "register_model"]

Entry = TypeVar("Entry", bound=Callable[..., nn.Module])

_ENTRIES: dict[str, Callable[..., nn.Module]] = {}


def register_model(entry: Entry) -> Entry:
    """Register a function that builds a model under the function's own name.

    Under ``@register_model``, ``def slak_tiny(**overrides) -> SLaK`` is what ``create_model("slak_tiny")``
    calls. An entry point that ends in ``**overrides`` hands them to the class named by its return annotation:
    what that class's constructor takes is what `create_model` accepts.

    Args:
        entry: Function of keyword arguments that returns an ``nn.Module``.

    Returns:
        The function itself, so that this serves as a decorator.

    Raises:
        ValueError: A model of that name is registered already.

    Examples:
        >>> from dst_models import register_model
        >>> from dst_models.slak import slak_tiny
        >>> register_model(slak_tiny)
        Traceback (most recent call last):
        ValueError: a model named 'slak_tiny' is registered already; give the new one another name
    """
    name = entry.__name__
    if name in _ENTRIES:
        raise ValueError(f"a model named {name!r} is registered already; give the new one another name")
    _ENTRIES[name] = entry
    return entry


def list_models(pattern: str = "*") -> list[str]:
    """List the registered model names that match a glob pattern, sorted.

    Args:
        pattern: Shell-style pattern, as in `fnmatch`.

    Returns:
        The names; an empty list where none matches.

    Examples:
        >>> from dst_models import list_models
        >>> list_models("convnext_*")
        ['convnext_base', 'convnext_small', 'convnext_tiny']
    """
    return sorted(fnmatch.filter(_ENTRIES, pattern))


def create_model(name: str, **overrides: Any) -> nn.Module:
    """Build the model registered under a name, with some of its settings overridden.

    Args:
        name: One of `list_models`.
        overrides: Constructor arguments that replace the variant's own, such as ``num_classes=10``.

    Returns:
        The model, freshly initialised, in training mode.

    Raises:
        ValueError: The name is not registered, or an override is not one the model takes.

    Examples:
        >>> from dst_models import create_model
        >>> model = create_model("slak_tiny", dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_classes=10)
        >>> model.dims
        (10, 20, 31, 41)
    """
    if name not in _ENTRIES:
        raise ValueError(_unknown_name(name))
    entry = _ENTRIES[name]
    accepted = _accepted_overrides(entry)
    if accepted is not None and (unknown := sorted(overrides.keys() - accepted)):
        raise ValueError(
            f"{name} does not take {', '.join(unknown)}; the overrides it takes are {', '.join(accepted)}"
        )
    return entry(**overrides)


def _unknown_name(name: str) -> str:
    close = difflib.get_close_matches(name, _ENTRIES, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"the models are {', '.join(list_models())}"
    return f"no model is named {name!r}; {hint}"


def _accepted_overrides(entry: Callable[..., nn.Module]) -> list[str] | None:
    """Name the keyword arguments an entry point takes, or None where it takes any."""
    signature = inspect.signature(entry, eval_str=True)
    if _open_ended(signature) and inspect.isclass(signature.return_annotation):
        signature = inspect.signature(signature.return_annotation)
    return None if _open_ended(signature) else list(signature.parameters)


def _open_ended(signature: inspect.Signature) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
