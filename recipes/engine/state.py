"""Everything that a run carries from one step to the next, and that a checkpoint holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import dst
from recipes.engine.errors import UserError, one_line


@dataclasses.dataclass
class State:
    """Hold the moving parts of a run.

    Randomness that is not here (augmentation, mixing, the order of the images, the masks) is a function of
    the seed and the position, so the step is all that it needs.

    Attributes:
        model: the live model.
        optimizer: the sparse optimizer over it, masks included.
        scheduler: sets the learning rate after each step.
        ema: moving average of the weights, or None.
        step: completed optimizer steps.
        loss_sum: sum of the losses of this epoch's completed steps.
        best: highest held-out score so far, in [0, 1].
        seconds: time spent training so far, earlier processes included.
        history: one row of readings for each evaluated epoch.
    """

    model: nn.Module
    optimizer: dst.SparseOptimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: dst.SparseEMA | None
    step: int = 0
    loss_sum: float = 0.0
    best: float = 0.0
    seconds: float = 0.0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return float(self.scheduler.get_last_lr()[0])

    @property
    def sparsity(self) -> float:
        """Share of zeros among the masked weights."""
        engine = self.optimizer.sparsifier
        return 1 - sum(engine.counts.values()) / sum(param.numel() for param in engine.params.values())

    @property
    def drop_fraction(self) -> float | None:
        """Share of the active weights that a mask update would drop now, or None."""
        engine = self.optimizer.sparsifier
        schedule = getattr(engine.algorithm, "drop_fraction", None)
        return None if schedule is None else float(schedule(engine.step))

    def state_dict(self) -> dict[str, Any]:
        """Return the content of a checkpoint: tensors and primitives, sharing memory with the run."""
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "random": random_state(),
            "step": self.step,
            "loss_sum": self.loss_sum,
            "best": self.best,
            "seconds": self.seconds,
            "history": [dict(row) for row in self.history],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], source: str) -> None:
        """Put the run where a checkpoint left it.

        Args:
            state_dict: what `state_dict` returned, possibly in another process.
            source: names the checkpoint in an error.

        Raises:
            UserError: if the checkpoint is of another model, or a part is missing.
        """
        check_same_shapes(self.model, state_dict.get("model", {}), source)
        try:
            self.model.load_state_dict(state_dict["model"])
            self.optimizer.load_state_dict(state_dict["optimizer"])
            self.scheduler.load_state_dict(state_dict["scheduler"])
            if self.ema:
                self.ema.load_state_dict(state_dict["ema"])
            self.step = int(state_dict["step"])
            self.loss_sum = float(state_dict["loss_sum"])
            self.best = float(state_dict["best"])
            self.seconds = float(state_dict["seconds"])
            self.history = [dict(row) for row in state_dict["history"]]
            set_random_state(state_dict["random"])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"{source}: this run cannot go on from it ({one_line(str(error))})") from error


def check_same_shapes(model: nn.Module, weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Compare the tensors of a checkpoint with those of a model, before anything is loaded.

    Raises:
        UserError: naming the first tensor that differs, and how many do.
    """
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    differing = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if differing:
        name = differing[0]
        raise UserError(
            f"{source}: the checkpoint is of another model: {name} is {found.get(name, 'absent')} in the file"
            f" and {expected.get(name, 'absent')} in this run ({len(differing)} tensors differ)"
        )


def random_state() -> dict[str, Any]:
    """Return the state of torch's global generators on the CPU and on every CUDA device."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
