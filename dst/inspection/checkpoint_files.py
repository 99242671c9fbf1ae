"""Read a checkpoint of any origin without running anything that it holds."""

from __future__ import annotations

import importlib
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

_ZIP = b"PK\x03\x04"


class InspectionError(ValueError):
    """Say in one line why a file cannot be inspected."""


def read_checkpoint(path: str | Path) -> Mapping[Any, Any]:
    """Read what `torch.save` or safetensors wrote, into host memory.

    A zip archive of torch is proved whole first, by the checksum of every record, which `torch.load` does
    not look at. Only tensors and primitives are unpickled (`weights_only=True`).

    Args:
        path: The file.

    Returns:
        The mapping that was saved.

    Raises:
        InspectionError: If there is no such file, it is damaged, needs pickle, or holds no mapping.

    Examples:
        >>> read_checkpoint("nothing.pt")
        Traceback (most recent call last):
        dst.inspection.checkpoint_files.InspectionError: nothing.pt: there is no such file
    """
    path = Path(path)
    head = _head(path)
    if path.suffix == ".safetensors" or head[8:9] == b"{":  # eight bytes of length, then JSON
        return _safetensors(path)
    if head.startswith(_ZIP):
        _check_whole(path)
    content = _torch(path)
    if not isinstance(content, Mapping):
        raise InspectionError(f"{path}: holds a {type(content).__name__}, expected a dict of name -> tensor")
    return cast("Mapping[Any, Any]", content)


def one_line(error: BaseException) -> str:
    r"""Return the first sentence of an error's message, on one line.

    Examples:
        >>> one_line(RuntimeError("no such storage. Please\n file an issue"))
        'no such storage'
    """
    words = " ".join(str(error).split())
    return re.split(r"[.!] ", words)[0].rstrip(".") or type(error).__name__


def _head(path: Path) -> bytes:
    if path.is_dir():
        raise InspectionError(f"{path}: is a folder, expected one checkpoint file")
    try:
        with path.open("rb") as file:
            return file.read(16)
    except FileNotFoundError:
        raise InspectionError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InspectionError(f"{path}: cannot be read ({reason})") from error


def _check_whole(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile meets bad bytes with many kinds of error
        raise InspectionError(f"{path}: the file is damaged ({one_line(error)})") from error
    if damaged:
        raise InspectionError(f"{path}: the file is damaged (record {damaged!r} fails its checksum)")


def _torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old formats warn; what matters is whether they can be read
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling a foreign file can raise anything
        refused = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(r"class ([\w.]+)", str(error))
        if refused:
            raise InspectionError(
                f"{path}: needs pickle, which can run any code, for {refused[1]}; nothing was run: save its "
                "tensors alone, torch.save(model.state_dict(), ...), and inspect that file"
            ) from error
        if "TorchScript" in str(error):
            raise InspectionError(f"{path}: is a TorchScript program; save its state_dict() alone") from error
        raise InspectionError(
            f"{path}: the file is damaged, or was written by neither torch.save nor safetensors"
        ) from error


def _safetensors(path: Path) -> Mapping[Any, Any]:
    try:
        # By name, at the moment of need: dst depends on torch and numpy only.
        load_file = importlib.import_module("safetensors.torch").load_file
    except ImportError as error:
        raise InspectionError(
            f"{path}: reading safetensors needs a package that is not installed: pip install safetensors"
        ) from error
    try:
        return load_file(path, device="cpu")
    except Exception as error:  # SafetensorError, and what numbers out of range raise
        raise InspectionError(
            f"{path}: the file is damaged or no safetensors file ({one_line(error)})"
        ) from error
