"""Build a model from a string such as "package.module:callable"."""

from __future__ import annotations

import ast
import contextlib
import importlib
from typing import Any

import torch
from torch import nn

from .checkpoint_files import InspectionError, one_line


def model_from_spec(spec: str, *, on_meta: bool = False) -> nn.Module:
    """Import a module that the user names and call what builds a model.

    Args:
        spec: "package.module:callable", or with arguments that are Python literals,
            "package.module:callable('name', width=2)". It is imported and called, so name only code that
            you trust.
        on_meta: Build on the meta device, without memory for weights.

    Returns:
        The model.

    Raises:
        InspectionError: If the string is malformed, nothing of that name exists, or it makes no model.

    Examples:
        >>> model_from_spec("torch.nn:Linear(4, 2, bias=False)", on_meta=True).weight.shape
        torch.Size([2, 4])
    """
    module, path, args, kwargs = _parsed(spec)
    try:
        made: Any = importlib.import_module(module)
        for attribute in path:
            made = getattr(made, attribute)
        if not isinstance(made, nn.Module):
            with torch.device("meta") if on_meta else contextlib.nullcontext():
                made = made(*args, **kwargs)
    except Exception as error:  # the user's own code can raise anything
        raise InspectionError(f"--model {spec}: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(made, nn.Module):
        raise InspectionError(f"--model {spec}: made a {type(made).__name__}, expected a torch.nn.Module")
    return made


def _parsed(spec: str) -> tuple[str, list[str], list[Any], dict[str, Any]]:
    module, _, rest = spec.partition(":")
    try:
        node = ast.parse(rest, mode="eval").body
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        if isinstance(node, ast.Call):
            args = [ast.literal_eval(value) for value in node.args]
            # A double star has no name, and an empty one is refused below.
            kwargs = {word.arg or "": ast.literal_eval(word.value) for word in node.keywords}
            node = node.func
        path = ast.unparse(node).split(".")
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        path, args, kwargs = [""], [], {}
    if not all(name.isidentifier() for name in [*module.split("."), *path, *kwargs]):
        raise InspectionError(
            f"--model {spec}: expected package.module:callable, with literal arguments if any, such as "
            "my_models:build or my_models:build('small', classes=10)"
        )
    return module, path, args, kwargs
