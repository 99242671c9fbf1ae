"""The pictures that a run leaves behind. Nothing is shown on a screen; everything is drawn into a file."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

BLUE, ORANGE, GREY = "#2166ac", "#d6604d", "#8a8a8a"
BACKGROUND = "#f2f2f2"
GROUPS = {
    "large kernel": "#2166ac",
    "small kernel": "#67a9cf",
    "pointwise and linear": "#ef8a62",
    "other convolution": GREY,
}


def draw_curves(history: Sequence[Mapping[str, float]], path: Path, title: str) -> None:
    """Draw loss, held-out accuracy, learning rate and mask movement over the epochs.

    Args:
        history: rows with `epoch`, `train_loss`, `loss`, `accuracy`, `lr` and, where they exist,
            `ema_accuracy`, `drop_fraction` and `exploration`.
        path: the PNG file to write.
        title: stands over the picture.
    """
    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle(title)
    loss, accuracy, rate, masks = figure.subplots(2, 2).flat
    _lines(loss, history, {"train_loss": ("training (augmented)", GREY), "loss": ("held out", BLUE)})
    loss.set(title="Loss", ylim=(0, None))
    _lines(accuracy, history, {"accuracy": ("weights", BLUE), "ema_accuracy": ("moving average", ORANGE)})
    accuracy.set_title("Held-out accuracy")
    accuracy.set_ylim(
        _zoomed([row[key] for row in history for key in ("accuracy", "ema_accuracy") if key in row])
    )
    accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    _lines(rate, history, {"lr": ("learning rate", BLUE)})
    rate.set(title="Learning rate", ylim=(0, None))
    _lines(
        masks,
        history,
        {
            "exploration": ("weights that were ever active", BLUE),
            "drop_fraction": ("dropped by an update", ORANGE),
        },
    )
    masks.set(title="Mask movement", ylim=(0, 1.02))
    masks.yaxis.set_major_formatter(PercentFormatter(1))
    for axes in (loss, accuracy, rate, masks):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    _write(figure, path)


def draw_sparsity(masks: Mapping[str, Tensor], path: Path, title: str) -> None:
    """Draw the sparsity of every masked tensor as a bar, in the model's order from the top.

    Args:
        masks: name to bool tensor, in the model's order.
        path: the PNG file to write.
        title: stands over the picture.
    """
    figure = Figure(figsize=(10, max(3.5, 1.6 + 0.19 * len(masks))), layout="constrained")
    axes = figure.subplots()
    total = sum(mask.numel() for mask in masks.values())
    active = sum(int(mask.count_nonzero()) for mask in masks.values())
    for row, mask in enumerate(masks.values()):
        count, size = int(mask.count_nonzero()), mask.numel()
        axes.barh(row, 1 - count / size, color=GROUPS[kind_of(mask.shape)], height=0.8)
        axes.text(
            1.01, row, f"{count:,} of {size:,}", va="center", fontsize=7, color="#444444", clip_on=False
        )
    mean = axes.axvline(1 - active / total, color="black", linewidth=1, linestyle="--")
    shapes = {kind_of(mask.shape) for mask in masks.values()}
    handles = [
        axes.barh([0], [0], color=color, label=name) for name, color in GROUPS.items() if name in shapes
    ]
    figure.legend(
        [*handles, mean],
        [*(name for name in GROUPS if name in shapes), f"all together: {1 - active / total:.1%}"],
        loc="outside lower center",
        ncols=5,
        frameon=False,
    )
    axes.set_yticks(range(len(masks)), [f"{name.removesuffix('.weight')}" for name in masks], fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set(xlim=(0, 1), xlabel="sparsity (share of zeros); at the right: active weights")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    _write(figure, path)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Hold one depthwise kernel of a block: its weights and mask, both (channels, 1, height, width)."""

    name: str
    weight: Tensor
    mask: Tensor


def draw_kernels(params: Mapping[str, Tensor], masks: Mapping[str, Tensor], path: Path, title: str) -> bool:
    """Draw the large kernels of the last block of each stage: where their taps are, and how strong.

    The two strips of a decomposed kernel are laid over each other in the square that they stand for.

    Args:
        params: name to weights.
        masks: name to bool tensor, of the same shapes.
        path: the PNG file to write.
        title: stands over the picture.

    Returns:
        False, with nothing drawn, where the model has no large kernels.
    """
    blocks = last_large_kernels(params, masks)
    if not blocks:
        return False
    figure = Figure(figsize=(13, 0.7 + 3.3 * len(blocks)), layout="constrained")
    figure.suptitle(title)
    rows = np.atleast_1d(figure.subfigures(len(blocks), 1))
    for row, (block, kernels) in zip(rows, blocks.items(), strict=True):
        _draw_block(row, block, kernels)
    _write(figure, path)
    return True


@dataclasses.dataclass(frozen=True)
class Mistake:
    """Hold one held-out image (channels, height, width) in [0, 1], its class, and what the model said."""

    image: Tensor
    truth: str
    said: str
    probability: float


def draw_mistakes(mistakes: Sequence[Mistake], path: Path, title: str) -> None:
    """Draw held-out images that the model misclassified, the surest mistake first.

    Args:
        mistakes: at least one.
        path: the PNG file to write.
        title: stands over the picture.
    """
    columns = min(8, len(mistakes))
    rows = -(-len(mistakes) // columns)
    figure = Figure(figsize=(max(6.5, 1.5 * columns), 0.7 + 2.0 * rows), layout="constrained")
    figure.suptitle(title)
    cells = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in cells[len(mistakes) :]:
        axes.set_axis_off()
    for axes, mistake in zip(cells, mistakes, strict=False):
        pixels = mistake.image.clamp(0, 1).movedim(0, -1).numpy()
        axes.imshow(pixels if pixels.shape[-1] == 3 else pixels[..., 0], cmap="gray_r", vmin=0, vmax=1)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color("#c8c8c8")
        truth, said = (
            textwrap.shorten(name, 22, placeholder="...") for name in (mistake.truth, mistake.said)
        )
        axes.set_title(f"{truth}\nsaid {said}\n({mistake.probability:.0%} sure)", fontsize=7)
    _write(figure, path)


def kind_of(shape: Sequence[int]) -> str:
    """Return which group of `GROUPS` a weight of this shape belongs to.

    Example:
        >>> kind_of((8, 1, 51, 5)), kind_of((8, 1, 5, 5)), kind_of((32, 8))
        ('large kernel', 'small kernel', 'pointwise and linear')
    """
    if len(shape) == 4 and shape[1] == 1 and shape[0] > 1:
        return "large kernel" if max(shape[2:]) > 5 else "small kernel"
    if len(shape) == 2 or (len(shape) == 4 and tuple(shape[2:]) == (1, 1)):
        return "pointwise and linear"
    return "other convolution"


def _draw_block(row: SubFigure, block: str, kernels: Sequence[Kernel]) -> None:
    side = max(max(kernel.mask.shape[2:]) for kernel in kernels)
    shapes = " and ".join(f"{kernel.mask.shape[2]}x{kernel.mask.shape[3]}" for kernel in kernels)
    sparsity = 1 - float(torch.cat([kernel.mask.flatten() for kernel in kernels]).float().mean())
    told = f"{block}: {shapes}, {kernels[0].mask.shape[0]} channels, {sparsity:.0%} sparse"
    row.suptitle(told, fontsize=10, x=0.01, ha="left")
    share, strength, samples = row.subplots(1, 3, width_ratios=(1, 1, 1.7))
    _square(share, overlay([kernel.mask.float().mean((0, 1)) for kernel in kernels], side), "viridis", row)
    share.set_title("channels in which a tap is active", fontsize=9)
    share.images[0].colorbar.ax.yaxis.set_major_formatter(PercentFormatter(1))
    _square(strength, overlay([kernel.weight.abs().mean((0, 1)) for kernel in kernels], side), "magma", row)
    strength.set_title("mean size of its weight", fontsize=9)
    _samples(samples, kernels)


def _square(axes: Axes, values: np.ndarray, colors: str, row: SubFigure) -> None:
    half = values.shape[0] // 2
    picture = axes.imshow(values, cmap=colors, interpolation="nearest", extent=(-half - 0.5, half + 0.5) * 2)
    axes.set_facecolor(BACKGROUND)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.tick_params(labelsize=7)
    row.colorbar(picture, ax=axes, shrink=0.85).ax.tick_params(labelsize=7)


def _samples(axes: Axes, kernels: Sequence[Kernel]) -> None:
    """Draw the masks of the first channels side by side, for a decomposed kernel its upright strip."""
    kernel = max(kernels, key=lambda item: item.mask.shape[2])
    channels, _, height, width = kernel.mask.shape
    columns = min(channels, max(4, 110 // (width + 1)))
    rows = min(-(-channels // columns), max(1, 62 // (height + 1)))
    shown = min(channels, rows * columns)
    sheet = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1), np.nan)
    for channel in range(shown):
        top, left = channel // columns * (height + 1), channel % columns * (width + 1)
        sheet[top : top + height, left : left + width] = kernel.mask[channel, 0].numpy()
    axes.imshow(sheet, cmap=ListedColormap(["#ffffff", BLUE]), vmin=0, vmax=1, interpolation="nearest")
    axes.set_facecolor("#c8c8c8")
    axes.set_xticks([])
    axes.set_yticks([])
    which = f"the first {shown}" if shown < channels else f"all {shown}"
    axes.set_title(f"{height}x{width} masks of {which} channels (blue is active)", fontsize=9)


def overlay(strips: Sequence[Tensor], side: int) -> np.ndarray:
    """Lay kernels centred over each other in a square: their mean where they meet, NaN where none is."""
    total, layers = np.zeros((side, side)), np.zeros((side, side))
    for strip in strips:
        height, width = strip.shape
        top, left = (side - height) // 2, (side - width) // 2
        total[top : top + height, left : left + width] += strip.numpy()
        layers[top : top + height, left : left + width] += 1
    return np.where(layers > 0, total / np.maximum(layers, 1), np.nan)


def last_large_kernels(params: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, list[Kernel]]:
    """Return the large kernels of the last block of each stage, by the block's name."""
    blocks: dict[str, list[Kernel]] = {}
    for name, mask in masks.items():
        if kind_of(mask.shape) == "large kernel":
            kernel = Kernel(name, params[name].detach().float().cpu(), mask.cpu())
            blocks.setdefault(_block_of(name), []).append(kernel)
    last: dict[str, str] = {}
    for block in blocks:
        last[block.rpartition(".")[0]] = block
    return {block: blocks[block] for block in last.values()}


def _block_of(name: str) -> str:
    """Cut a parameter's name after its second number: `stages.2.8.large.weight` is of block `stages.2.8`."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    end = numbers[1] + 1 if len(numbers) > 1 else len(parts) - 2
    return ".".join(parts[:end])


def _lines(axes: Axes, history: Sequence[Mapping[str, float]], lines: Mapping[str, tuple[str, str]]) -> None:
    for key, (label, color) in lines.items():
        rows = [row for row in history if key in row]
        if rows:
            marker = "o" if len(rows) == 1 else None
            axes.plot(
                [r["epoch"] for r in rows], [r[key] for r in rows], color=color, label=label, marker=marker
            )
    if len(axes.lines) > 1:
        axes.legend(frameon=False)


def _zoomed(values: Sequence[float]) -> tuple[float, float]:
    """Return limits that show the better values well; the steep beginning may leave the picture."""
    low = float(np.quantile(values, 0.25)) if values else 0.0
    top = max(values, default=1.0)
    return max(0.0, low - 0.5 * (top - low) - 0.002), min(1.0, top + 0.1 * (top - low) + 0.002)


def _write(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=130, facecolor="white")


def to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the CPU, detached."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
