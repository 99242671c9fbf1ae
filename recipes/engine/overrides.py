"""Read and change a nested frozen config by dotted keys: `optim.lr=1e-3`."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from recipes.engine.errors import UserError

T = TypeVar("T")
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return every leaf of a nested config under its dotted key, in order.

    Args:
        config: a dataclass instance whose fields are dataclasses or values.
        prefix: put before every key.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Inner:
        ...     lr: float = 0.1
        >>> @dataclass(frozen=True)
        ... class Outer:
        ...     name: str = "a"
        ...     optim: Inner = Inner()
        >>> flatten(Outer())
        {'name': 'a', 'optim.lr': 0.1}
    """
    leaves: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            leaves |= flatten(value, f"{prefix}{field.name}.")
        else:
            leaves[prefix + field.name] = value
    return leaves


def apply(config: T, assignments: Iterable[str]) -> T:
    """Return a copy of a config with `key=value` assignments applied, each value read by its field's type.

    Args:
        config: a frozen dataclass, nested at will; it is not changed.
        assignments: texts like `"optim.lr=1e-3"` or `"model.depths=1,1,2,1"`.

    Returns:
        The changed copy.

    Raises:
        UserError: for a text without `=`, an unknown key (near names are shown), or a value of another type.
    """
    changes: dict[str, Any] = {}
    kinds = leaf_types(type(config))
    for text in assignments:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals:
            raise UserError(f"--set {text}: expected key=value, for example optim.lr=1e-3")
        if key not in kinds:
            raise UserError(f"--set {text}: no field is called '{key}'; {_near(key, kinds)}")
        try:
            changes[key] = parse(value, kinds[key])
        except ValueError as error:
            raise UserError(f"--set {text}: {error}") from None
    return replace(config, changes)


def replace(config: T, changes: Mapping[str, Any]) -> T:
    """Return a copy of a config with the leaves under the given dotted keys replaced.

    All changes to one part are made at once, so that a part which checks its fields sees them together.

    Raises:
        ValueError: if a part rejects its new values.
    """
    own = {key: value for key, value in changes.items() if "." not in key}
    parts: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        head, dot, tail = key.partition(".")
        if dot:
            parts.setdefault(head, {})[tail] = value
    nested = {head: replace(getattr(config, head), inner) for head, inner in parts.items()}
    return dataclasses.replace(typing.cast(Any, config), **own, **nested)


def leaf_types(cls: Any, prefix: str = "") -> dict[str, Any]:
    """Return the annotated type of every leaf of a nested config class under its dotted key."""
    leaves: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            leaves |= leaf_types(kind, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = kind
    return leaves


def parse(text: str, kind: Any) -> Any:
    """Read a value of an annotated type from text.

    Understood are `int`, `float` (finite), `bool` (true/false, yes/no, on/off), `str`, `Literal`, `X | None`
    (`none`) and `tuple[X, ...]` (separated by commas, brackets allowed).

    Raises:
        ValueError: if the text is not such a value.

    Example:
        >>> parse("(51, 49, 47, 13)", tuple[int, ...]), parse("none", float | None), parse("1e-3", float)
        ((51, 49, 47, 13), None, 0.001)
    """
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        return _parse_optional(text, kind)
    if origin is tuple:
        item = typing.get_args(kind)[0]
        inner = text.strip().strip("()[]").strip().removesuffix(",")
        return tuple(parse(part, item) for part in inner.split(",")) if inner else ()
    text = text.strip()
    if origin is Literal:
        choices = typing.get_args(kind)
        if text not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}, got '{text}'")
        return text
    if kind is bool:
        if text.lower() not in WORDS:
            raise ValueError(f"expected true or false, got '{text}'")
        return WORDS[text.lower()]
    if kind is int or kind is float:
        return _parse_number(text, kind)
    return text


def show(value: Any) -> str:
    """Write a value as `parse` reads it.

    Example:
        >>> show((1, 2)), show(None), show(True)
        ('1,2', 'none', 'true')
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(show(item) for item in value)
    return repr(value) if isinstance(value, float) else str(value)


def to_primitives(config: Any) -> dict[str, Any]:
    """Return a nested config as dictionaries, lists and primitives, for JSON and a safe `torch.load`."""
    return {
        field.name: to_primitives(value) if dataclasses.is_dataclass(value) else _plain(value)
        for field in dataclasses.fields(config)
        for value in [getattr(config, field.name)]
    }


def from_primitives(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build a config of the given class from what `to_primitives` returned.

    Raises:
        ValueError: if a field is missing or unknown, or a part rejects its values.
    """
    kinds = typing.get_type_hints(cls)
    if unequal := sorted(set(kinds) ^ set(values)):
        raise ValueError(f"the stored {cls.__name__} differs in its fields: {', '.join(unequal)}")
    built = {
        name: from_primitives(kind, values[name]) if dataclasses.is_dataclass(kind) else _frozen(values[name])
        for name, kind in kinds.items()
    }
    return cls(**built)


def differences(one: Any, other: Any) -> list[str]:
    """Return one text for each leaf in which two configs of the same class differ: `key: value -> value`."""
    left, right = flatten(one), flatten(other)
    return [f"{key}: {show(left[key])} -> {show(right[key])}" for key in left if left[key] != right[key]]


def _parse_optional(text: str, kind: Any) -> Any:
    if text.strip().lower() == "none":
        return None
    (inner,) = (arg for arg in typing.get_args(kind) if arg is not type(None))
    return parse(text, inner)


def _parse_number(text: str, kind: type[int] | type[float]) -> int | float:
    try:
        value = kind(text)
    except ValueError:
        word = "a whole number" if kind is int else "a number"
        raise ValueError(f"expected {word}, got '{text}'") from None
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number, got '{text}'")
    return value


def _near(key: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    last = key.rpartition(".")[2]
    near += [name for name in known if name.rpartition(".")[2] == last and name not in near]
    if near:
        return f"did you mean {' or '.join(near[:4])}?"
    return "--dry-run lists every field"


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
