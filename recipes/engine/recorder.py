"""What a run leaves behind while it goes: checkpoints, TensorBoard log, history, lines on the screen."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Mapping
from types import FrameType, TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

import dst
from recipes.engine import checkpoint
from recipes.engine.config import OptimConfig, RunConfig
from recipes.engine.errors import NonFiniteError
from recipes.engine.folder import RunFolder
from recipes.engine.pictures import last_large_kernels
from recipes.engine.progress import Display, Pace, Reading
from recipes.engine.state import State

_logger = logging.getLogger(__name__)
PICTURES = 10  # how often in a run the log takes histograms and mask images
MASK_TAGS = ("step", "epoch", "lr", "sparsity", "exploration", "drop_fraction")  # logged under other tags


class StopSignal:
    """Turn the first Ctrl-C or SIGTERM into a request to stop after the step; a context manager.

    A second one ends the program at once; the last checkpoint is whole in either case.
    """

    def __init__(self, announce: Callable[[str], None]) -> None:
        self.requested = False
        self._announce = announce
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._announce("stopping: finishing this step and saving a checkpoint")


class Recorder:
    """Record a run in its folder and on the screen; the `Watcher` of the training loop.

    Args:
        folder: the run's folder, claimed.
        content: what a checkpoint at a step holds besides the state, such as the config.
        optim: for the number of epochs and the images of a step.
        run: the intervals.
        display: the screen.
        stop: tells when the user wants to stop.
        start: where the state stands.
    """

    def __init__(
        self,
        folder: RunFolder,
        content: Callable[[int], Mapping[str, Any]],
        optim: OptimConfig,
        run: RunConfig,
        *,
        display: Display,
        stop: StopSignal,
        start: State,
    ) -> None:
        self.folder = folder
        self.content = content
        self.run = run
        self.steps_per_epoch = display.steps // display.epochs
        self.display = display
        self.stop = stop
        self.images_per_step = optim.batch_size * optim.accumulation
        self.mask_interval = max(1, optim.epochs // PICTURES)
        self._loss = 0.0
        self.pace = Pace(total=display.steps * self.images_per_step)
        self.checkpoints = folder.checkpoints(run.keep)
        purge = (
            start.step + 1 if start.step else None
        )  # hides what a crashed process logged after its checkpoint
        self.writer = SummaryWriter(str(folder.tensorboard), purge_step=purge)
        masked = start.optimizer.sparsifier
        large = last_large_kernels(masked.params, masked.masks)
        self.mask_images = [kernel.name for kernels in large.values() for kernel in kernels]
        if not start.step:
            self._log_masks(start, pictures=True)

    def step(self, state: State, loss: float) -> None:
        """Show a completed step, and log it every `run.log_interval` steps."""
        self._loss = loss
        self.pace.update(time.perf_counter(), state.step * self.images_per_step)
        self.display.step(self._reading(state, loss))
        if state.step % self.run.log_interval == 0:
            self.writer.add_scalar("train/loss", loss, state.step)
            self.writer.add_scalar("train/learning_rate", state.learning_rate, state.step)
            self.writer.add_scalar("train/images_per_second", self.pace.images_per_second, state.step)

    def epoch(self, state: State, evaluated: bool) -> None:
        """Show a completed epoch; log and write down its scores where there are any."""
        reading = self._reading(state, state.history[-1]["train_loss"] if evaluated else self._loss)
        self.display.epoch(reading)
        if not evaluated:
            return
        _logger.info("epoch %d, step %d: %s", reading.epoch, state.step, reading)
        row = state.history[-1]
        for name, value in row.items():
            if name not in MASK_TAGS:
                self.writer.add_scalar(f"epoch/{name}", value, state.step)
        last = state.step == self.display.steps
        self._log_masks(state, pictures=last or reading.epoch % self.mask_interval == 0)
        self.writer.flush()
        self.folder.write_history(state.history)

    def save(self, state: State, best: bool) -> None:
        """Write a checkpoint, and once more under the name of the best where it is that.

        Raises:
            NonFiniteError: if a weight is not finite; the checkpoints that are there stay.
        """
        for name, parameter in state.model.named_parameters():
            if not parameter.isfinite().all():
                raise NonFiniteError(f"{name} is not finite at step {state.step}, which is not saved")
        content = {**self.content(state.step), **state.state_dict()}
        path = self.checkpoints.save(state.step, content)
        if best:
            checkpoint.save(content, self.folder.best)
        _logger.info("saved %s", path)

    def stop_requested(self) -> bool:
        """Return whether the user asked to stop."""
        return self.stop.requested

    def close(self) -> None:
        """Close the TensorBoard log."""
        self.writer.close()

    def _reading(self, state: State, loss: float) -> Reading:
        row = state.history[-1] if state.history else {}
        return Reading(
            step=state.step,
            epoch=-(-state.step // self.steps_per_epoch),
            loss=loss,
            score=row.get("ema_accuracy", row.get("accuracy")),
            images_per_second=self.pace.images_per_second,
            sparsity=state.sparsity,
            seconds_left=self.pace.seconds_left,
        )

    def _log_masks(self, state: State, pictures: bool) -> None:
        images = self.mask_images if pictures else ()
        dst.log_masks(self.writer, state.optimizer, state.step, histograms=pictures, images=images)
