"""A training of an image classifier: its config, and what is built from it before anything is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from recipes.data import Augmentation
from recipes.engine import build, overrides
from recipes.engine.config import DataConfig, ModelConfig, OptimConfig, RunConfig, SparseConfig
from recipes.engine.errors import as_user_error
from recipes.engine.feed import IMAGENET, ImageFeed, NominalFeed
from recipes.engine.ranks import world_size
from recipes.engine.report import amount
from recipes.engine.state import State
from recipes.engine.task import Classification


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Describe one training of an image classifier completely.

    Attributes:
        name: of the recipe's variant; the first part of a run folder's name.
        data: what is trained on.
        augment: how training images are varied.
        model: what is trained.
        sparse: how sparse it is and how the masks move.
        optim: how long and how fast.
        run: how the run behaves as a program.
    """

    name: str
    data: DataConfig
    augment: Augmentation
    model: ModelConfig
    sparse: SparseConfig
    optim: OptimConfig
    run: RunConfig = dataclasses.field(default_factory=RunConfig)


@dataclasses.dataclass(frozen=True)
class Job:
    """Hold an opened data set and a built model."""

    config: Config
    feed: ImageFeed | NominalFeed
    task: Classification
    model: torch.nn.Module

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        return self.config.data.channels, self.config.data.size, self.config.data.size

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.optim.epochs * self.feed.steps_per_epoch


def prepare(config: Config) -> Job:
    """Open the data and build the model; without a data set, take ImageNet's sizes.

    Raises:
        UserError: if a setting, the data or the device cannot be used.
    """
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    device = build.choose_device(config.run)
    with as_user_error(f"data {config.data.source}"):
        feed = (
            ImageFeed(config.data, config.augment, config.optim, config.run.seed, device)
            if config.data.source
            else NominalFeed(IMAGENET, config.optim, device)
        )
    torch.manual_seed(config.run.seed)
    classes = feed.sizes.classes
    with as_user_error(f"model {config.model.name}"):
        model = build.build_model(config.model, classes=classes, channels=config.data.channels)
    return Job(config, feed, Classification(classes), model.to(device))


def start(job: Job, *, measure: bool) -> State:
    """Put the model under its sparse optimizer, schedule and moving average.

    Args:
        job: data and model.
        measure: whether SNIP looks at a batch; not needed where a checkpoint replaces the masks.
    """
    config, feed = job.config, job.feed
    measured_on = (
        feed.first_batch(config.sparse.snip_batch) if measure and isinstance(feed, ImageFeed) else None
    )
    with as_user_error("optimizer"):
        return build.build_state(
            job.model,
            job.task,
            config.sparse,
            config.optim,
            config.run,
            steps_per_epoch=feed.steps_per_epoch,
            first_batch=measured_on,
        )


def describe(job: Job) -> Iterator[tuple[str, str]]:
    """Yield what is trained on and the arithmetic of a step, as pairs of a name and a text."""
    sizes, optim = job.feed.sizes, job.config.optim
    source = job.config.data.source or "ImageNet-1k's sizes, no data opened"
    images = f"{sizes.train:,} training and {sizes.held_out:,} held-out images of {sizes.classes} classes"
    yield "data", f"{source}: {images}"
    batch = optim.batch_size * optim.accumulation * world_size()
    shares = f"{optim.batch_size} images x {optim.accumulation} accumulated x {_processes()}"
    yield "effective batch", f"{shares} = {batch} a step"
    epoch = f"{sizes.train:,} // {batch} = {job.feed.steps_per_epoch:,} an epoch"
    yield "steps", f"{epoch}, {job.total_steps:,} in {optim.epochs} epochs"
    yield "learning rate", _rate(optim, batch)


def describe_counts(job: Job, state: State) -> Iterator[tuple[str, str]]:
    """Yield parameters, multiply-accumulates and sparsity, as pairs of a name and a text."""
    counted = build.count(job.model, job.input_size, state.optimizer.masks)
    maskable = sum(parameter.numel() for parameter in state.optimizer.sparsifier.params.values())
    yield "model", f"{job.config.model.name} for {' x '.join(map(str, job.input_size))} pixels"
    yield "parameters", f"{counted.params:,} dense, {counted.nonzero:,} non-zero"
    yield "MACs an image", f"{amount(counted.macs)} dense, {amount(counted.sparse_macs)} at non-zero weights"
    yield "sparsity", f"{state.sparsity:.2%} of {maskable:,} weights in {len(state.optimizer.masks)} tensors"


def describe_config(config: Config) -> Iterator[tuple[str, str]]:
    """Yield every field of a config under its dotted key, written as `--set` reads it."""
    return ((key, overrides.show(value)) for key, value in overrides.flatten(config).items())


def _processes() -> str:
    return f"{world_size()} process{'es' if world_size() > 1 else ''}"


def _rate(optim: OptimConfig, batch: int) -> str:
    text = f"{optim.lr:g} at the peak, down to {optim.min_lr:g}"
    if optim.lr_batch is None:
        return text
    text += f"; published for a batch of {optim.lr_batch} and used as it stands"
    if batch != optim.lr_batch:
        scaled = optim.lr * batch / optim.lr_batch
        text += (
            f" (by the linear rule, this batch of {batch} would have {scaled:g}: --set optim.lr={scaled:g})"
        )
    return text
