"""What a run says when it is done: one page of figures on the screen, and the same figures as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from recipes.engine.progress import clock
from recipes.engine.state import State


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """Hold what is reported of one training.

    Attributes:
        accuracy: share of the held-out images told right by the weights of the last epoch.
        ema_accuracy: the same by the moving average of the weights; None without one.
        best_accuracy: the highest of both over all evaluations; picked on the held-out images, so it
            flatters.
        images: held-out images.
        seconds: training time, evaluations and checkpoints included.
        params: all parameters.
        nonzero: parameters less the inactive weights.
        macs: multiply-accumulates of one image, dense.
        sparse_macs: those at active weights.
        maskable: weights that have a mask.
        sparsity: share of zeros among them.
        exploration: share of them that was active at some time.
    """

    accuracy: float
    ema_accuracy: float | None
    best_accuracy: float
    images: int
    seconds: float
    params: int
    nonzero: int
    macs: int
    sparse_macs: int
    maskable: int
    sparsity: float
    exploration: float

    @property
    def headline(self) -> float:
        """The accuracy that a run is judged by: after the last epoch, the average's if there is one."""
        return self.accuracy if self.ema_accuracy is None else self.ema_accuracy


def collect(state: State, counted: Any, images: int) -> Figures:
    """Gather the figures of a finished training.

    Args:
        state: after the last epoch.
        counted: what `dst.count` returned for the model and its masks.
        images: held-out images.
    """
    row = state.history[-1]
    return Figures(
        accuracy=row["accuracy"],
        ema_accuracy=row.get("ema_accuracy"),
        best_accuracy=state.best,
        images=images,
        seconds=state.seconds,
        params=counted.params,
        nonzero=counted.nonzero,
        macs=counted.macs,
        sparse_macs=counted.sparse_macs,
        maskable=sum(parameter.numel() for parameter in state.optimizer.sparsifier.params.values()),
        sparsity=state.sparsity,
        exploration=row["exploration"],
    )


def as_json(name: str, figures: Figures, second: tuple[str, Figures] | None = None) -> dict[str, Any]:
    """Return figures as JSON takes them, those of a second split under its own key."""
    content = {"name": name, **dataclasses.asdict(figures)}
    if second:
        content["second_split"] = {"split": second[0], **dataclasses.asdict(second[1])}
    return content


def as_rows(figures: Figures, second: tuple[str, Figures] | None = None) -> list[tuple[str, str]]:
    """Write figures as pairs of a name and a text.

    Args:
        figures: of the run.
        second: name of another split, and the figures of the training on it.
    """
    f = figures
    rows = [("held-out accuracy", _accuracy(f))]
    if second:
        name, other = second
        rows.append((f"{name} accuracy", f"{_accuracy(other)}, a training of its own"))
    rows += [
        ("parameters", f"{f.params:,} dense, {f.nonzero:,} non-zero ({1 - f.nonzero / f.params:.1%} fewer)"),
        (
            "MACs an image",
            f"{amount(f.macs)} dense, {amount(f.sparse_macs)} at non-zero weights"
            f" ({1 - f.sparse_macs / f.macs:.1%} fewer; counted, not timed: masks alone save no time)",
        ),
        ("sparsity", f"{f.sparsity:.2%} of {f.maskable:,} maskable weights"),
        ("exploration rate", f"{f.exploration:.1%} of them were active at some time"),
        (
            "training time",
            clock(f.seconds) + (f" and {clock(second[1].seconds)} on {second[0]}" if second else ""),
        ),
    ]
    return rows


def amount(number: float) -> str:
    """Write a large number with three digits and a unit.

    Example:
        >>> amount(8_705_000_000), amount(12_345_678), amount(999)
        ('8.71 G', '12.3 M', '999')
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            value = number / size
            return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"
    return f"{number:.0f}"


def _accuracy(figures: Figures) -> str:
    right = round(figures.headline * figures.images)
    text = f"{figures.headline:.2%} ({right:,} of {figures.images:,} images"
    if figures.ema_accuracy is None:
        return text + ")"
    return text + f"; by the moving average, {figures.accuracy:.2%} without it)"
