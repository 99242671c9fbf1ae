"""The parts that the configs of all recipes are made of: frozen values that check themselves."""

from __future__ import annotations

import dataclasses
from typing import Literal

Distribution = Literal["snip", "erk", "uniform"]
Algorithm = Literal["slak", "set", "rigl", "static"]
Precision = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Say which model is trained; None leaves a choice to the named variant.

    Attributes:
        name: an entry of `dst_models.list_models()`.
        depths: blocks in each of the four stages.
        dims: channels in each stage, before the width factor.
        kernel_sizes: side of the large kernel in each stage.
        small_kernel: side of the small kernel beside it, and the short side of the decomposed strips.
        width_factor: factor on `dims`; the paper spends the weights that sparsity frees on 1.3 times the
            width.
        decomposed: whether the large kernel is two strips (MxN and NxM) or one square.
        drop_path_rate: largest probability of leaving out a block, in [0, 1).
        layer_scale_init: first value of the layer scale.
        stem_stride: side of the stem's patches in pixels; 4 as published, less for small images.
    """

    name: str
    depths: tuple[int, ...] | None = None
    dims: tuple[int, ...] | None = None
    kernel_sizes: tuple[int, ...] | None = None
    small_kernel: int | None = None
    width_factor: float | None = None
    decomposed: bool | None = None
    drop_path_rate: float | None = None
    layer_scale_init: float | None = None
    stem_stride: int | None = None

    def overrides(self) -> dict[str, object]:
        """Return the keyword arguments of `dst_models.create_model` that are set."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if name != "name" and value is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Say what is trained on and how it reaches the model.

    Attributes:
        source: `digits`, `fashion-mnist`, or a folder of images.
        split: how images are held out, where the data leave a choice; None takes their first way.
        held_out: share of the images that is held out, where the data are split here.
        second_split: train a second time, by this split, and report its accuracy beside the first; None does
            not.
        size: side of the model's input in pixels.
        channels: channels of the model's input.
        mixup: parameter of mixup's Beta distribution; 0 switches it off.
        cutmix: parameter of CutMix's Beta distribution; 0 switches it off.
        evaluation_batch: images in one forward pass of an evaluation.
        workers: processes that load images; 0 loads in the training process.
    """

    source: str
    split: str | None = None
    held_out: float = 0.2
    second_split: str | None = None
    size: int = 224
    channels: int = 3
    mixup: float = 0.8
    cutmix: float = 1.0
    evaluation_batch: int = 256
    workers: int = 0

    def __post_init__(self) -> None:
        _check(0 < self.held_out < 1, "data.held_out", self.held_out, "between 0 and 1")
        _check(self.channels in (1, 3), "data.channels", self.channels, "1 or 3")
        for name in ("size", "evaluation_batch"):
            _check(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "at least 1")
        for name in ("mixup", "cutmix", "workers"):
            _check(getattr(self, name) >= 0, f"data.{name}", getattr(self, name), "at least 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """Say how sparse the weights are and how the masks move.

    Attributes:
        sparsity: share of the maskable weights that are zero, in [0, 1).
        distribution: how it is spread over the layers; `snip` takes layer ratios from one batch, as SLaK
            does.
        snip_batch: images in that batch.
        algorithm: how the masks move; `slak` drops the smallest weights and grows random ones.
        drop_fraction: first share of the active weights that an update drops, in (0, 1).
        interval: optimizer steps between two updates.
    """

    sparsity: float = 0.4
    distribution: Distribution = "snip"
    snip_batch: int = 64
    algorithm: Algorithm = "slak"
    drop_fraction: float = 0.5
    interval: int = 2000

    def __post_init__(self) -> None:
        _check(0 <= self.sparsity < 1, "sparse.sparsity", self.sparsity, "in [0, 1)")
        _check(0 < self.drop_fraction < 1, "sparse.drop_fraction", self.drop_fraction, "between 0 and 1")
        _check(self.interval >= 1, "sparse.interval", self.interval, "at least 1")
        _check(self.snip_batch >= 1, "sparse.snip_batch", self.snip_batch, "at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Say how long and how fast is trained, by AdamW under a warm-up and a cosine.

    Attributes:
        epochs: passes over the training images.
        warmup_epochs: epochs of linear warm-up; may be a fraction.
        batch_size: images in one forward pass of one process.
        accumulation: forward and backward passes that one optimizer step sums up.
        lr: peak learning rate; it is used as it stands and never scaled behind one's back.
        lr_batch: the effective batch that `lr` was published for; None where it was chosen for this recipe.
        min_lr: the rate at the end.
        weight_decay: decoupled weight decay of tensors with two or more dimensions; the others have none.
        betas: decay rates of AdamW's two moments.
        label_smoothing: share of the target that is spread over all classes, in [0, 1).
        max_grad_norm: the norm that gradients of active weights are clipped to; None does not clip.
        ema_decay: decay of the moving average of the weights; None keeps none.
    """

    epochs: int
    warmup_epochs: float
    batch_size: int
    accumulation: int = 1
    lr: float = 4e-3
    lr_batch: int | None = None
    min_lr: float = 1e-6
    weight_decay: float = 0.05
    betas: tuple[float, ...] = (0.9, 0.999)
    label_smoothing: float = 0.1
    max_grad_norm: float | None = None
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulation"):
            _check(getattr(self, name) >= 1, f"optim.{name}", getattr(self, name), "at least 1")
        _check(
            0 <= self.warmup_epochs <= self.epochs, "optim.warmup_epochs", self.warmup_epochs, "within epochs"
        )
        _check(self.lr > 0, "optim.lr", self.lr, "above 0")
        _check(0 <= self.min_lr <= self.lr, "optim.min_lr", self.min_lr, "between 0 and optim.lr")
        _check(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "at least 0")
        _check(len(self.betas) == 2, "optim.betas", self.betas, "two numbers")
        _check(all(0 <= beta < 1 for beta in self.betas), "optim.betas", self.betas, "each in [0, 1)")
        _check(0 <= self.label_smoothing < 1, "optim.label_smoothing", self.label_smoothing, "in [0, 1)")
        if self.ema_decay is not None:
            _check(0 <= self.ema_decay < 1, "optim.ema_decay", self.ema_decay, "in [0, 1) or none")
        if self.max_grad_norm is not None:
            _check(self.max_grad_norm > 0, "optim.max_grad_norm", self.max_grad_norm, "above 0 or none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Say how the run behaves as a program; only `seed` and `precision` change what is computed.

    Attributes:
        seed: of the weights' first values, the masks, the augmentation and the order of the images.
        device: `auto`, `cpu`, `cuda` or another torch device.
        precision: `bfloat16` computes the forward pass under autocast.
        threads: CPU threads of torch; 0 leaves torch's choice.
        eval_interval: epochs between two evaluations; the last epoch is always evaluated.
        checkpoint_interval: optimizer steps between two checkpoints inside an epoch; 0 saves after epochs
            only.
        keep: checkpoints to keep.
        log_interval: optimizer steps between two points of the TensorBoard log.
    """

    seed: int = 0
    device: str = "auto"
    precision: Precision = "float32"
    threads: int = 0
    eval_interval: int = 1
    checkpoint_interval: int = 0
    keep: int = 2
    log_interval: int = 10

    def __post_init__(self) -> None:
        _check(0 <= self.seed < 2**31, "run.seed", self.seed, "in [0, 2^31)")
        for name in ("eval_interval", "keep", "log_interval"):
            _check(getattr(self, name) >= 1, f"run.{name}", getattr(self, name), "at least 1")
        for name in ("threads", "checkpoint_interval"):
            _check(getattr(self, name) >= 0, f"run.{name}", getattr(self, name), "at least 0")


def _check(holds: bool, key: str, value: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{key} is {value}: it must be {expected}")
