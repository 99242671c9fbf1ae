"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import dst
from recipes.engine.config import OptimConfig, RunConfig
from recipes.engine.errors import NonFiniteError
from recipes.engine.state import State
from recipes.engine.task import Task


class Feed(Protocol):
    """Give the loop its batches, as a function of the position alone."""

    steps_per_epoch: int

    def train(self, epoch: int, first_step: int) -> Iterator[Sequence[Any]]:
        """Yield for each optimizer step of an epoch, from `first_step` on, its micro-batches."""
        ...

    def held_out(self) -> Iterable[Any]:
        """Yield the batches of the held-out images, each image once."""
        ...


class Watcher(Protocol):
    """Be told what happens; it writes, draws and saves, and never changes the run."""

    def step(self, state: State, loss: float) -> None:
        """Note a completed step."""
        ...

    def epoch(self, state: State, evaluated: bool) -> None:
        """Note a completed epoch; `state.history` ends with its scores where it was evaluated."""
        ...

    def save(self, state: State, best: bool) -> None:
        """Write a checkpoint; `best` tells that its score is the highest so far."""
        ...

    def stop_requested(self) -> bool:
        """Return whether the run should end after the step that was just completed."""
        ...


def train(state: State, task: Task, feed: Feed, optim: OptimConfig, run: RunConfig, watcher: Watcher) -> bool:
    """Train from where the state stands to the last epoch.

    A checkpoint is written after each evaluated epoch, every `run.checkpoint_interval` steps, and when a
    stop is requested, always between two steps. Training on from any of them gives the same bits as never
    having stopped.

    Args:
        state: the run so far; it is changed in place.
        task: its loss and its evaluation.
        feed: its batches.
        optim: how long and how fast.
        run: precision and the intervals.
        watcher: told of each step, epoch and checkpoint.

    Returns:
        True when the last epoch is done, False when a stop was requested before.

    Raises:
        NonFiniteError: before a loss that is not finite reaches the weights, or such weights a checkpoint.
    """
    started = time.perf_counter() - state.seconds
    state.model.train()
    for epoch in range(state.step // feed.steps_per_epoch, optim.epochs):
        for micro_batches in feed.train(epoch, state.step % feed.steps_per_epoch):
            loss = take_step(state, task, micro_batches, optim, run)
            state.seconds = time.perf_counter() - started
            watcher.step(state, loss)
            if state.step % feed.steps_per_epoch == 0:
                break  # the checkpoint of an epoch's last step is written after the evaluation
            if watcher.stop_requested():
                watcher.save(state, best=False)
                return False
            if run.checkpoint_interval and state.step % run.checkpoint_interval == 0:
                watcher.save(state, best=False)
        last = epoch + 1 == optim.epochs
        evaluated = last or (epoch + 1) % run.eval_interval == 0
        score = evaluate(state, task, feed, run) if evaluated else 0.0
        is_best = evaluated and score > state.best
        state.best = max(state.best, score)
        state.loss_sum = 0.0
        state.seconds = time.perf_counter() - started
        watcher.epoch(state, evaluated)
        if evaluated or watcher.stop_requested():
            watcher.save(state, best=is_best)
        if watcher.stop_requested() and not last:
            return False
    return True


def take_step(
    state: State, task: Task, micro_batches: Sequence[Any], optim: OptimConfig, run: RunConfig
) -> float:
    """Take one optimizer step on the mean loss of several micro-batches and return that loss."""
    losses: list[Tensor] = []
    for batch in micro_batches:
        with autocast(state.model, run):
            loss = task.loss(state.model, batch) / len(micro_batches)
        loss.backward()
        losses.append(loss.detach())
    total = float(torch.stack(losses).sum())
    if not math.isfinite(total):
        raise NonFiniteError(
            f"the loss is {total} at step {state.step + 1}; the weights did not take this step."
            " A lower optim.lr, a longer optim.warmup_epochs or optim.max_grad_norm=1 may help"
        )
    if optim.max_grad_norm is not None:
        state.optimizer.mask_gradients()
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), optim.max_grad_norm)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.scheduler.step()
    if state.ema:
        state.ema.update()
    state.step += 1
    state.loss_sum += total
    return total


def evaluate(state: State, task: Task, feed: Feed, run: RunConfig) -> float:
    """Judge the live model and its moving average, note the scores, and return the better headline."""
    with autocast(state.model, run):
        scores = task.evaluate(state.model, feed.held_out())
        averaged = task.evaluate(state.ema.module, feed.held_out()) if state.ema else {}
    row = {"step": float(state.step), "epoch": state.step / feed.steps_per_epoch}
    row["train_loss"] = state.loss_sum / feed.steps_per_epoch
    row |= {"lr": state.learning_rate, "sparsity": state.sparsity}
    row["exploration"] = float(dst.exploration_rate(state.optimizer))
    if state.drop_fraction is not None:
        row["drop_fraction"] = state.drop_fraction
    row |= scores | {f"ema_{name}": value for name, value in averaged.items()}
    state.history.append(row)
    return max(scores[task.headline], averaged.get(task.headline, 0.0))


def autocast(model: nn.Module, run: RunConfig) -> torch.autocast:
    """Return the context in which forward passes are computed."""
    device = next(model.parameters()).device
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=run.precision == "bfloat16")
