"""The folder of a run: what lies in it, and the care that nothing in it is overwritten by another run."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.engine import overrides
from recipes.engine.checkpoint import CheckpointFolder, write_atomically
from recipes.engine.errors import UserError

CONFIG = "config.json"
FREE = (
    "data.workers",
    "run.device",
    "run.threads",
    "run.keep",
    "run.log_interval",
    "run.checkpoint_interval",
)
"""Fields that a run may change when it goes on: they alter nothing that is computed."""


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Name the files of a run.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def best(self) -> Path:
        """The checkpoint with the highest held-out score."""
        return self.path / "best.pt"

    @property
    def tensorboard(self) -> Path:
        """The TensorBoard log."""
        return self.path / "tensorboard"

    @property
    def log(self) -> Path:
        """What was said on the way, in plain text."""
        return self.path / "run.log"

    @property
    def report(self) -> Path:
        """The figures of a finished run; its presence tells that the run is finished."""
        return self.path / "report.json"

    def checkpoints(self, keep: int) -> CheckpointFolder:
        """Return the last checkpoints."""
        return CheckpointFolder(self.path / "checkpoints", keep)

    def picture(self, name: str) -> Path:
        """Return where a picture goes."""
        return self.path / f"{name}.png"

    def contents(self) -> list[tuple[str, str]]:
        """Return the files that a person may want to open, each with what it shows."""
        told = {
            "curves.png": "loss, accuracy, learning rate and mask movement",
            "sparsity.png": "sparsity by layer",
            "kernels.png": "the learned large-kernel masks",
            "mistakes.png": "held-out images that are misclassified",
            "report.json": "the figures above",
            "history.csv": "the scores of every evaluated epoch",
            "config.json": "every setting",
            "best.pt": "the checkpoint with the highest held-out accuracy",
            "checkpoints": "the last checkpoints",
            "tensorboard": "tensorboard --logdir shows it",
            "run.log": "what was said on the way",
        }
        return [(f"  {name}", text) for name, text in told.items() if (self.path / name).exists()]

    def check(self, config: Any) -> None:
        """Make sure that the folder is new or empty, or holds the run of this config; write nothing.

        Raises:
            UserError: if it holds anything else.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; --output names a folder")
        if (self.path / CONFIG).is_file():
            stored = read_config(self.path / CONFIG, type(config))
            check_same_run(stored, config, str(self.path), "--output another folder")
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise UserError(
                f"{self.path} holds files that are not of a run; --output a new or an empty folder"
            )

    def claim(self, config: Any) -> None:
        """Take the folder for the run of this config: what `check` lets pass.

        Raises:
            UserError: as `check`, or if the folder cannot be made; nothing is written then.
        """
        self.check(config)
        if not (self.path / CONFIG).is_file():
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{self.path} cannot be made: {error.strerror}") from error
            write_json(self.path / CONFIG, overrides.to_primitives(config))

    def write_history(self, history: Sequence[Mapping[str, float]]) -> None:
        """Write the history as a table, `history.csv`."""
        columns = list(dict.fromkeys(key for row in history for key in row))

        def write(temporary: Path) -> None:
            with temporary.open("w", newline="") as file:
                table = csv.DictWriter(file, columns, restval="")
                table.writeheader()
                table.writerows(history)

        write_atomically(self.path / "history.csv", write)


def check_same_run(stored: Any, wanted: Any, source: str, remedy: str) -> None:
    """Compare the config of a run on the disk with the one that is asked for, apart from `FREE` fields.

    Raises:
        UserError: naming the fields that differ.
    """
    differing = [text for text in overrides.differences(stored, wanted) if text.partition(":")[0] not in FREE]
    if differing:
        shown = "; ".join(differing[:3]) + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")
        raise UserError(f"{source} holds a different run ({shown}); {remedy}")


def read_config(path: Path, cls: type[Any]) -> Any:
    """Read a `config.json`.

    Raises:
        UserError: if it cannot be read or is of another recipe.
    """
    try:
        return overrides.from_primitives(cls, json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the config of a run of this recipe ({error})") from error


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))


def default_folder(root: Path, name: str, config: Any) -> Path:
    """Return the folder of a run that was given none: its config decides; a finished run is left in peace.

    Args:
        root: where such folders go.
        name: the first part of the folder's name.
        config: the run; fields in `FREE` do not count.

    Returns:
        `root/name-<digest>`, or the first of `-2`, `-3` ... that holds no finished run.
    """
    leaves = {key: value for key, value in overrides.flatten(config).items() if key not in FREE}
    digest = hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest()[:8]
    path, number = root / f"{name}-{digest}", 1
    while RunFolder(path).report.exists():
        number += 1
        path = root / f"{name}-{digest}-{number}"
    return path
