"""From a config to the things that train: model, optimizer, schedule and moving average."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import dst
import dst_models
from recipes.engine.config import ModelConfig, OptimConfig, RunConfig, SparseConfig
from recipes.engine.errors import UserError
from recipes.engine.schedule import warmup_cosine
from recipes.engine.state import State
from recipes.engine.task import Task

DISTRIBUTIONS = {"erk": dst.erk, "uniform": dst.uniform}
ALGORITHMS = {"slak": dst.slak, "set": dst.set_, "rigl": dst.rigl}


def choose_device(run: RunConfig) -> torch.device:
    """Return the device that a run asks for; `auto` is the accelerator where there is one, else the CPU.

    Raises:
        UserError: if there is no such device.
    """
    if run.device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")
    try:
        return torch.empty(0, device=run.device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"run.device={run.device}: torch cannot use it ({str(error).splitlines()[0]})"
        ) from error


def build_model(config: ModelConfig, *, classes: int, channels: int) -> nn.Module:
    """Build the named model for images of so many channels and so many classes."""
    return dst_models.create_model(config.name, num_classes=classes, in_chans=channels, **config.overrides())


def build_state(
    model: nn.Module,
    task: Task,
    sparse: SparseConfig,
    optim: OptimConfig,
    run: RunConfig,
    *,
    steps_per_epoch: int,
    first_batch: Any = None,
) -> State:
    """Put a model under the sparse optimizer, its learning rate under the schedule, and average its weights.

    Args:
        model: freshly initialised, on its device.
        task: its loss, which SNIP measures the weights by.
        sparse: how sparse, and how the masks move.
        optim: the base optimizer and the schedule.
        run: the seed.
        steps_per_epoch: optimizer steps in an epoch.
        first_batch: what SNIP measures on. None spreads the sparsity evenly instead, which costs nothing
            where a checkpoint replaces the masks anyway.
    """
    total_steps = optim.epochs * steps_per_epoch
    base = torch.optim.AdamW(
        decay_groups(model, optim.weight_decay), lr=optim.lr, betas=_pair(optim.betas), fused=True
    )
    distribution = DISTRIBUTIONS.get(sparse.distribution, dst.uniform)
    if sparse.distribution == "snip" and first_batch is not None and sparse.sparsity > 0:
        distribution = functools.partial(dst.snip, loss=functools.partial(task.loss, model, first_batch))
    optimizer = dst.SparseOptimizer(
        base,
        dst.select(model),
        sparsity=sparse.sparsity,
        distribution=distribution,
        algorithm=build_algorithm(sparse, total_steps),
        seed=run.seed,
    )
    warmup = round(optim.warmup_epochs * steps_per_epoch)
    scheduler = warmup_cosine(optimizer, total_steps=total_steps, warmup_steps=warmup, min_lr=optim.min_lr)
    ema = None if optim.ema_decay is None else dst.SparseEMA(model, optimizer, optim.ema_decay)
    return State(model, optimizer, scheduler, ema)


def build_algorithm(sparse: SparseConfig, total_steps: int) -> dst.Algorithm:
    """Return the algorithm that a config names."""
    if sparse.algorithm == "static":
        return dst.static()
    make = ALGORITHMS[sparse.algorithm]
    return make(total_steps=total_steps, interval=sparse.interval, drop_fraction=sparse.drop_fraction)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two parameter groups: tensors of two or more dimensions decay, all others do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def count(model: nn.Module, input_size: tuple[int, int, int], masks: Mapping[str, Tensor]) -> Any:
    """Return `dst.count` of a model with its masks, on the CPU's copy of the masks."""
    return dst.count(model, input_size, {name: mask.cpu() for name, mask in masks.items()})


def _pair(values: tuple[float, ...]) -> tuple[float, float]:
    first, second = values
    return first, second
