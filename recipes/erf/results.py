"""What is made of the scores: ratios, a table, a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from dst_models import area_ratio

SHARES = (0.2, 0.3, 0.5, 0.99)
"""Shares of the score for which the paper gives area ratios."""
OUTLINED = {0.5: "#4dd0e1", 0.99: "#aed581"}
CELLS = 128  # of a heat map, a side


@dataclasses.dataclass(frozen=True)
class Field:
    """Hold the measured field of one network.

    Attributes:
        name: of the network.
        weights: where its weights are from.
        score: (S, S), as `dst_models.effective_receptive_field` returns it.
        seconds: that measuring it took.
    """

    name: str
    weights: str
    score: Tensor
    seconds: float

    @property
    def label(self) -> str:
        """The name without the module that it is imported from."""
        return self.name.rpartition(":")[2]

    def ratios(self, *, log: bool) -> dict[float, tuple[int, float]]:
        """Return side and area ratio of the smallest centred square for each share."""
        return {share: area_ratio(self.score, share, log=log) for share in SHARES}

    def as_json(self) -> dict[str, object]:
        """Return what stands in the report."""
        measures = {"log10(score + 1)": True, "score": False}
        return {
            "model": self.name,
            "weights": self.weights,
            "seconds": round(self.seconds, 2),
            "largest_score": float(self.score.max()),
            "mean_score": float(self.score.mean()),
            "area_ratios": {
                measure: {
                    str(share): {"side": side, "ratio": ratio}
                    for share, (side, ratio) in self.ratios(log=log).items()
                }
                for measure, log in measures.items()
            },
        }


def table(fields: Sequence[Field]) -> Table:
    """Return the area ratios as a table for the terminal."""
    result = Table(
        title="Area of the smallest centred square\n(log: log10(score + 1), as published; plain: the score)",
        title_justify="left",
    )
    result.add_column("model")
    result.add_column("weights")
    result.add_column("that holds, of")
    for share in SHARES:
        result.add_column(f"{share:.0%}", justify="right")
    for field in fields:
        for log, measure in ((True, "log"), (False, "plain")):
            cells = (f"{ratio:.1%}" for _, ratio in field.ratios(log=log).values())
            first = (field.label, Path(field.weights).name) if log else ("", "")
            result.add_row(*first, measure, *cells, end_section=not log)
    return result


def draw(fields: Sequence[Field], path: Path, title: str) -> None:
    """Draw the fields side by side, log10(score + 1) over its largest value, with two squares.

    Scores are averaged over blocks of pixels so that at most some 128 a side are drawn.

    Args:
        fields: at least one, of one size.
        path: the PNG file to write.
        title: stands over the picture.
    """
    columns = min(4, len(fields))
    rows = -(-len(fields) // columns)
    figure = Figure(figsize=(max(6.5, 0.6 + 3.2 * columns), 1.3 + 3.5 * rows), layout="constrained")
    figure.suptitle(title, fontsize=11)
    cells = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in cells[len(fields) :]:
        axes.set_axis_off()
    block = max(1, fields[0].score.shape[0] // CELLS)
    for axes, field in zip(cells, fields, strict=False):
        picture = _heat_map(axes, field, block)
    blocks = f"means of {block}x{block} pixels, " if block > 1 else ""
    bar = figure.colorbar(picture, ax=cells, shrink=0.8, pad=0.01)
    bar.set_label(f"{blocks}log10(score + 1) over its largest value", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.legend(
        [Line2D([], [], color=color, linewidth=2) for color in OUTLINED.values()],
        [f"smallest centred square that holds {share:.0%}" for share in OUTLINED],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=9,
    )
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110, facecolor="white")


def _heat_map(axes: Axes, field: Field, block: int) -> AxesImage:
    size = field.score.shape[0]
    means = F.avg_pool2d(field.score[None, None], block, ceil_mode=True)[0, 0]
    values = (means + 1).log10().numpy()
    edge = len(values) * block
    picture = axes.imshow(
        values / values.max(),
        cmap="magma",
        vmin=0,
        vmax=1,
        interpolation="nearest",
        extent=(0, edge, edge, 0),
    )
    axes.set(xticks=[], yticks=[], xlim=(0, size), ylim=(size, 0))
    axes.set_title(f"{field.label}\n{Path(field.weights).name} weights", fontsize=9)
    told = []
    for share, color in OUTLINED.items():
        side, ratio = area_ratio(field.score, share)
        # An even map has no middle pixel; its largest square is the map itself.
        start = 0 if side == size else size // 2 - side // 2
        axes.add_patch(Rectangle((start, start), side, side, fill=False, edgecolor=color, linewidth=1.6))
        told.append(f"{share:.0%} in {ratio:.1%} of the area")
    axes.set_xlabel(", ".join(told), fontsize=8)
    return picture
