"""The command line that every classification recipe has."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from recipes.data import DataError
from recipes.engine import classification, overrides
from recipes.engine.errors import UserError, as_user_error, one_line
from recipes.engine.folder import RunFolder, default_folder
from recipes.engine.job import Config
from recipes.engine.ranks import world_size

Choose = Callable[[str | None, str | None], Config]
"""From what stands after `--data` and `--model`, or None, to a config; raises `UserError`."""


def main(choose: Choose, description: str, argv: Sequence[str] | None = None) -> int:
    """Run a recipe from its command line and return the exit status.

    A request that cannot be is told in one line on stderr, with status 2.

    Args:
        choose: picks the config.
        description: what the recipe trains, for `--help`.
        argv: the arguments; those of the program if not given.
    """
    arguments = _parser(description).parse_args(argv)
    console = Console(highlight=False)
    _show_warnings()
    try:
        return _dispatch(choose, arguments, console)
    except (UserError, DataError, OSError) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped at once; the same command goes on from the last checkpoint", file=sys.stderr)
        return classification.STOPPED


def _dispatch(choose: Choose, arguments: argparse.Namespace, console: Console) -> int:
    if world_size() > 1:
        raise UserError(f"WORLD_SIZE is {world_size()}: this version trains in one process")
    file: Path | None = arguments.resume or arguments.eval
    if file and arguments.data is None and arguments.model is None:
        config = classification.stored_config(file)
    else:
        config = choose(arguments.data, arguments.model)
    changes = [*arguments.set, *([f"run.seed={arguments.seed}"] if arguments.seed is not None else [])]
    with as_user_error("config"):
        config = overrides.apply(config, changes)
    if arguments.dry_run:
        return classification.dry_run(config, console)
    if arguments.eval:
        return classification.evaluate(config, arguments.eval, console)
    return classification.run(config, RunFolder(_output(arguments, config)), arguments.resume, console)


def _output(arguments: argparse.Namespace, config: Config) -> Path:
    if arguments.output:
        return arguments.output
    if arguments.resume and arguments.resume.parent.name == "checkpoints":
        return arguments.resume.parent.parent  # the folder of the run that the checkpoint is of
    return default_folder(Path("runs"), config.name, config)


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--data", metavar="DATA", help="digits (default), fashion-mnist, or a folder of images")
    add("--model", metavar="NAME", help="which model, where the data leave a choice")
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="the run's folder; by default runs/NAME-DIGEST of the config",
    )
    add("--seed", type=int, metavar="N", help="the same as --set run.seed=N")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a field of the config; may be repeated",
    )
    add("--dry-run", action="store_true", help="print config, counts and the arithmetic of a step, and end")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--resume", type=Path, metavar="FILE", help="go on from this checkpoint")
    which.add_argument("--eval", type=Path, metavar="FILE", help="judge this checkpoint, and end")
    return parser


def _show_warnings() -> None:
    """Show on stderr what the packages warn of, whatever else they log."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler])
