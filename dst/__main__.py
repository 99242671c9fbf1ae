"""The command line: `python -m dst inspect FILE` and `python -m dst diff FILE FILE`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NoReturn, TextIO

from torch import Tensor

from .inspection.checkpoint_files import InspectionError
from .inspection.model_spec import model_from_spec
from .inspection.png import png
from .inspection.report import Difference, Inspection, compare_masks, inspect_masks
from .inspection.saved_masks import SavedMasks, read_masks
from .inspection.tables import printable
from .logs import mask_image
from .selection import near_names

_VISIBLE = 512  # pixels on the longer side of a picture, about, at least


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, or 2 with one line on standard error."""
    try:
        arguments = _parser().parse_args(argv)
        result = _difference(arguments) if arguments.command == "diff" else _inspection(arguments)
        _write(sys.stdout, json.dumps(asdict(result), indent=2) if arguments.json else str(result))
    except InspectionError as error:
        _write(sys.stderr, f"error: {printable(str(error))}")
        return 2
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


class _Parser(argparse.ArgumentParser):
    """Report a wrong option in one line, as every other error."""

    def error(self, message: str) -> NoReturn:
        raise InspectionError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m dst", description="Look into sparse checkpoints; nothing in them is run."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="count what is active in a checkpoint, by tensor")
    inspect.add_argument("file", help="what torch.save or safetensors wrote")
    inspect.add_argument("--model", metavar="PACKAGE.MODULE:CALLABLE", help="builds the model, to count MACs")
    inspect.add_argument("--input-size", nargs="+", type=int, metavar="N", help="one sample, as 3 224 224")
    inspect.add_argument("--meta", action="store_true", help="build the model without memory for weights")
    inspect.add_argument("--images", type=Path, metavar="DIR", help="draw the masks into this folder")
    inspect.add_argument("--select", action="append", metavar="GLOB", help="draw these only; can be repeated")
    diff = commands.add_parser("diff", help="compare the masks of two checkpoints")
    diff.add_argument("file", help="the first, before")
    diff.add_argument("other", help="the second, after")
    for command in (inspect, diff):
        command.add_argument("--entry", help="look only into this entry of the file, such as model_ema")
        command.add_argument("--json", action="store_true", help="write JSON")
    return parser


def _inspection(arguments: argparse.Namespace) -> Inspection:
    if (arguments.model is None) != (arguments.input_size is None):
        raise InspectionError(
            "--model and --input-size go together, as --model my:build --input-size 3 224 224"
        )
    if arguments.meta and arguments.model is None:
        raise InspectionError("--meta is how --model is built; give --model too")
    if arguments.select and arguments.images is None:
        raise InspectionError("--select chooses which masks --images draws; give --images too")
    saved = read_masks(arguments.file, arguments.entry)
    if arguments.model is None:
        result = inspect_masks(saved)
    else:
        model = model_from_spec(arguments.model, on_meta=arguments.meta)
        result = inspect_masks(saved, model, arguments.input_size)
    if arguments.images is not None:
        _draw(_selected(saved, arguments.select or ["*"]), arguments.images)
    return result


def _difference(arguments: argparse.Namespace) -> Difference:
    before, after = (read_masks(file, arguments.entry) for file in (arguments.file, arguments.other))
    return compare_masks(before, after)


def _selected(saved: SavedMasks, patterns: Sequence[str]) -> dict[str, Tensor]:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in saved.masks):
            near = near_names(pattern, saved.masks)
            raise InspectionError(f"--select {pattern} matches no masked tensor; near names: {near}")
    return {
        name: mask
        for name, mask in saved.masks.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def _draw(masks: Mapping[str, Tensor], folder: Path) -> None:
    """Write a PNG file for each mask, under a name that no name in a file can lead out of the folder."""
    taken: set[str] = set()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, mask in masks.items():
            stem = re.sub(r"[^A-Za-z0-9._-]", "_", name)
            while stem in taken:
                stem += "_"
            taken.add(stem)
            (folder / f"{stem}.png").write_bytes(png(_enlarged(mask_image(mask))))
    except OSError as error:
        raise InspectionError(f"{folder}: cannot write the pictures ({error.strerror})") from error


def _enlarged(image: Tensor) -> Tensor:
    """Repeat the pixels of a small picture a whole number of times, so that one can see it."""
    factor = max(1, _VISIBLE // max(image.shape))
    return image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def _write(stream: TextIO, text: str) -> None:
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()


if __name__ == "__main__":
    logging.getLogger(__package__).addHandler(logging.NullHandler())  # what is to be told is in the output
    sys.exit(main())
