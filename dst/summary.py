"""What is sparse, how sparse, and what it saves: one table."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from .counters import Counts
from .counters import Row as LayerCounts
from .metrics import exploration_rate
from .optimizer import SparseOptimizer
from .selection import near_names

_LEFT = 2  # columns that hold text


@dataclass(frozen=True, slots=True)
class SummaryRow:
    """One masked tensor.

    Attributes:
        name: Its name in the plain model.
        shape: Its shape.
        sparsity: Fraction of its entries that are inactive, in [0, 1].
        active: Active weights.
        size: All weights.
        parameter_share: `size` as a fraction of `Summary.parameters`.
        mac_share: The sparse MACs of its layer as a fraction of the model's, None without counts. Tensors
            of one layer, such as the projections of attention, show the same figure.
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float
    active: int
    size: int
    parameter_share: float
    mac_share: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """What `summary` returns; printed, it is a table.

    Attributes:
        rows: The masked tensors, in the model's order.
        active: Active weights of the masked tensors.
        size: All weights of the masked tensors.
        sparsity: Fraction of them that are inactive.
        parameters: All parameters, dense ones included: the model's if counts were given, otherwise those
            that the base optimizer holds.
        nonzero: `parameters` without inactive weights.
        macs: Multiply-accumulates per sample with all weights; None without counts.
        sparse_macs: Multiply-accumulates per sample of active weights; None without counts.
        exploration_rate: Fraction of the masked weights that were ever active; see `exploration_rate`.
        step: Completed optimizer steps.
        algorithm: The algorithm, printed.
    """

    rows: tuple[SummaryRow, ...]
    active: int
    size: int
    sparsity: float
    parameters: int
    nonzero: int
    macs: int | None
    sparse_macs: int | None
    exploration_rate: float
    step: int
    algorithm: str

    def __str__(self) -> str:
        total = SummaryRow(
            "total",
            (),
            self.sparsity,
            self.active,
            self.size,
            self.size / self.parameters,
            None if self.sparse_macs is None else _distinct_mac_share(self.rows),
        )
        head = ["tensor", "shape", "sparsity", "active", "weights", "of parameters"]
        lines = [head, *(_cells(row) for row in (*self.rows, total))]
        if self.sparse_macs is not None:
            head.append("of sparse MACs")
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(_justified(line, widths)).rstrip() for line in lines]
        rule = "-" * len(table[0])
        table = [table[0], rule, *table[1:-1], rule, table[-1], "", *self._sentences()]
        return "\n".join(table)

    def _sentences(self) -> list[str]:
        found = [f"parameters        {self.nonzero:,} of {self.parameters:,} non-zero"]
        if self.macs is not None:
            found.append(f"MACs per sample   {self.sparse_macs:,} of {self.macs:,} with active weights")
        found.append(f"exploration rate  {self.exploration_rate:.4f} after {self.step:,} steps")
        algorithm = f"algorithm         {self.algorithm}"
        return found + textwrap.wrap(
            algorithm, 110, subsequent_indent=" " * 18, break_long_words=False, break_on_hyphens=False
        )


def summary(optimizer: SparseOptimizer, counts: Counts | None = None) -> Summary:
    """Summarise the masked tensors of an optimizer: counts, sparsity, share of the model.

    Args:
        optimizer: The sparse optimizer.
        counts: From `dst.count(model, input_size, masks=optimizer.masks)`, for the share of the
            multiply-accumulates (MACs).

    Returns:
        The summary; `str` makes the table. Counts are Python ints.

    Raises:
        ValueError: If the counts are of another model, or were made without the masks of now.

    Examples:
        >>> import torch
        >>> from dst.algorithms import static
        >>> from dst.counters import count
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2, bias=False))
        >>> optimizer = SparseOptimizer(torch.optim.SGD(model.parameters()), model, sparsity=0.5,
        ...                             distribution=lambda params, s: dict.fromkeys(params, s),
        ...                             algorithm=static())
        >>> print(str(summary(optimizer, count(model, 8, masks=optimizer.masks))).partition("algorithm")[0])
        tensor    shape  sparsity  active  weights  of parameters  of sparse MACs
        -------------------------------------------------------------------------
        0.weight  4x8      0.5000      16       32        72.73 %         80.00 %
        1.weight  2x4      0.5000       4        8        18.18 %         20.00 %
        -------------------------------------------------------------------------
        total              0.5000      20       40        90.91 %        100.00 %
        <BLANKLINE>
        parameters        24 of 44 non-zero
        MACs per sample   20 of 40 with active weights
        exploration rate  0.5000 after 0 steps
    """
    sparsifier = optimizer.sparsifier
    active = sum(sparsifier.counts.values())
    size = sum(parameter.numel() for parameter in sparsifier.params.values())
    if counts is None:
        parameters = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        nonzero = parameters - (size - active)
    else:
        parameters, nonzero = counts.params, counts.nonzero
    return Summary(
        rows=tuple(_row(optimizer, name, parameters, counts) for name in sparsifier.params),
        active=active,
        size=size,
        sparsity=(size - active) / size,
        parameters=parameters,
        nonzero=nonzero,
        macs=None if counts is None else counts.macs,
        sparse_macs=None if counts is None else counts.sparse_macs,
        exploration_rate=exploration_rate(optimizer),
        step=sparsifier.step,
        algorithm=repr(sparsifier.algorithm),
    )


def _row(optimizer: SparseOptimizer, name: str, parameters: int, counts: Counts | None) -> SummaryRow:
    parameter = optimizer.sparsifier.params[name]
    active, size = optimizer.sparsifier.counts[name], parameter.numel()
    return SummaryRow(
        name=name,
        shape=tuple(parameter.shape),
        sparsity=(size - active) / size,
        active=active,
        size=size,
        parameter_share=size / parameters,
        mac_share=None if counts is None else _mac_share(name, size - active, counts),
    )


def _mac_share(name: str, inactive: int, counts: Counts) -> float:
    layer = _layer(name, counts)
    if layer.params - layer.nonzero < inactive:
        raise ValueError(
            f"{name!r} has {inactive:,} inactive weights, but its layer was counted with "
            f"{layer.params - layer.nonzero:,}; count with the masks of now: "
            "dst.count(model, input_size, masks=optimizer.masks)"
        )
    return layer.sparse_macs / counts.sparse_macs if counts.sparse_macs else 0.0


def _layer(name: str, counts: Counts) -> LayerCounts:
    layers = {row.name: row for row in counts.rows}
    module = name.rpartition(".")[0]
    if module not in layers:
        raise ValueError(
            f"the counts have no layer {module!r} for the tensor {name!r}; near names: "
            f"{near_names(module, layers)}; count the model that the optimizer trains"
        )
    return layers[module]


def _distinct_mac_share(rows: Sequence[SummaryRow]) -> float:
    """Add up the shares of the layers, each once."""
    by_layer = {row.name.rpartition(".")[0]: row.mac_share or 0.0 for row in rows}
    return sum(by_layer.values())


def _cells(row: SummaryRow) -> list[str]:
    cells = [
        row.name,
        "x".join(map(str, row.shape)),
        f"{row.sparsity:.4f}",
        f"{row.active:,}",
        f"{row.size:,}",
        f"{100 * row.parameter_share:.2f} %",
    ]
    return cells if row.mac_share is None else [*cells, f"{100 * row.mac_share:.2f} %"]


def _justified(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        cell.ljust(width) if column < _LEFT else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
