"""Checkpoint files that survive a crash at any moment.

A file is written under a temporary name, flushed to the disk and renamed, so that under a checkpoint's
name there is always a whole file. What is read back is proved whole first (the CRC-32 of every record of
the zip archive, which `torch.load` does not look at), and only tensors and primitives are ever unpickled.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from recipes.engine.errors import UserError, one_line

FORMAT = 1
NAME = re.compile(r"step-(\d{9})\.pt")
_logger = logging.getLogger(__name__)


def save(content: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint so that `path` holds either what it held or all of the new content.

    Args:
        content: nested dictionaries and lists of tensors and primitives.
        path: the file to write; its folder is made.

    Raises:
        UserError: if the file cannot be written (a full disk, no permission); what was there stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: torch.save({"format": FORMAT, **content}, temporary))


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, and give it its name.

    Raises:
        UserError: if writing fails; `path` is then as it was and the temporary file is gone.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise UserError(f"{path} could not be written: {one_line(str(error))}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint into host memory without running anything that it holds.

    Raises:
        UserError: if there is no such file, it is damaged, or it is not a checkpoint of these recipes.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such checkpoint file")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise UserError(f"{path}: the file is damaged or no checkpoint ({one_line(str(error))})") from error
    if damaged:
        raise UserError(f"{path}: the file is damaged (the record {damaged} does not match its checksum)")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling a foreign file can raise anything
        first = one_line(str(error)).split(". ")[0]
        raise UserError(f"{path}: the file holds more than tensors and primitives ({first})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: the file is not a checkpoint of these recipes (no 'format': {FORMAT})")
    return content


class CheckpointFolder:
    """Keep the last checkpoints of a run in a folder, named by step.

    Args:
        folder: where the files are; made at the first save.
        keep: how many to keep, at least 1; with 2 or more, a damaged newest file costs one interval.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}: at least one checkpoint must be kept")
        self.folder = folder
        self.keep = keep

    def files(self) -> list[Path]:
        """Return the checkpoint files, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if NAME.fullmatch(path.name))

    def later_than(self, step: int) -> list[Path]:
        """Return the checkpoint files of later steps, oldest first."""
        return [path for path in self.files() if int(path.stem.removeprefix("step-")) > step]

    def save(self, step: int, content: Mapping[str, Any]) -> Path:
        """Write the checkpoint of a step, then remove the oldest ones beyond `keep`."""
        path = self.folder / f"step-{step:09d}.pt"
        save(content, path)
        for old in self.files()[: -self.keep]:
            old.unlink()
        return path

    def latest(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest whole checkpoint and its path, or None where there are no files.

        A damaged file is reported in the log and passed over in favour of the one before it.

        Raises:
            UserError: if there are files and none of them can be read.
        """
        files = self.files()
        for path in reversed(files):
            try:
                return path, load(path)
            except UserError as error:
                _logger.warning("%s; trying the checkpoint before it", error)
        if files:
            raise UserError(
                f"{self.folder}: none of the {len(files)} checkpoints can be read; move them away"
            )
        return None


def _flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle on a folder
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
