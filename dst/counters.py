"""Parameters and multiply-accumulates, dense and sparse, by layer; and what a training step costs."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .algorithms import Algorithm
from .selection import near_names, plain_name, unwrapped
from .tally import Work, forward_work


@dataclass(frozen=True, slots=True)
class Row:
    """The counts of one layer: a module that holds parameters of its own.

    Args:
        name: The module's name in the plain model; empty for the model itself.
        type: The module's class.
        shape: Shape of its weight, or of its first parameter.
        params: Number of its own parameters that no earlier row has counted.
        nonzero: The same without inactive weights.
        output: Size of its last output without the batch; None where no MACs are counted.
        macs: Multiply-accumulates per sample with all weights.
        sparse_macs: Multiply-accumulates per sample of active weights.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    params: int
    nonzero: int
    output: tuple[int, ...] | None
    macs: int
    sparse_macs: int


@dataclass(frozen=True, slots=True)
class Counts:
    """What `count` returns; printed, it is a table.

    Args:
        params: Number of parameters, a shared one counted once.
        nonzero: The same without inactive weights.
        macs: Multiply-accumulates per sample with all weights.
        sparse_macs: Multiply-accumulates per sample of active weights.
        rows: The layers, in the model's order; each field above is the sum over them.
    """

    params: int
    nonzero: int
    macs: int
    sparse_macs: int
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        lines: list[list[str]] = [
            ["layer", "type", "weight", "output", "parameters", "non-zero", "MACs", "sparse MACs"]
        ]
        for row in self.rows:
            sizes = (_times(row.shape), "-" if row.output is None else _times(row.output))
            lines.append([row.name or "(model)", row.type, *sizes, *_numbers(row)])
        lines.append(["total", "", "", "", *_numbers(self)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(
                cell.ljust(width) if i < 4 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        text.append(
            "MACs are multiply-accumulates per sample of convolution, linear and attention projection\n"
            "weights; biases, normalisation, pooling, attention products and element-wise operations\n"
            "are not counted."
        )
        return "\n".join(text)


def count(
    model: nn.Module,
    input_size: int | Sequence[int],
    masks: Mapping[str, Tensor] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Counts:
    """Count parameters and multiply-accumulates (MACs), dense and sparse, per layer and in total.

    A weight of a convolution, linear layer or attention projection is used once at each output position
    (input position, if transposed), so MACs = sum_l positions_l N_l and sparse MACs = sum_l positions_l k_l,
    where k_l are its active weights. One sample passes forward in eval mode on the meta device, without
    arithmetic and without a copy of the model; where the model cannot do that, on its own device, which is
    logged. The model is afterwards as it was. Shared weights count once as parameters and at each call as
    MACs. A weight that the forward pass reads around its module is not seen.

    Args:
        model: Any module, also wrapped in `DistributedDataParallel` or compiled.
        input_size: Size of one sample without the batch, such as (3, 224, 224).
        masks: Name to bool mask, True where active; a tensor without a mask is dense.
        dtype: Type of the input; by default the model's floating-point type. Use torch.long for token models.

    Returns:
        The counts, Python ints.

    Raises:
        ValueError: If a mask has an unknown name, another shape than its parameter or is not bool, or the
            model has uninitialised (lazy) parameters.
        TypeError: If `input_size` is not one or several integers.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(128, 10))
        >>> mask = torch.arange(216).reshape(8, 3, 3, 3) < 54
        >>> counts = count(model, (3, 4, 4), masks={"0.weight": mask})
        >>> counts.params, counts.nonzero, counts.macs, counts.sparse_macs
        (1514, 1352, 4736, 2144)
    """
    size = (input_size,) if isinstance(input_size, int) else tuple(input_size)
    if not all(isinstance(side, int) for side in size):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"input_size must be a size without the batch, such as (3, 224, 224), got {input_size!r}"
        )
    model = unwrapped(model)
    by_id = _by_identity(model, masks or {})
    rows = tuple(_rows(model, by_id, forward_work(model, size, dtype, by_id)))
    return Counts(
        params=sum(row.params for row in rows),
        nonzero=sum(row.nonzero for row in rows),
        macs=sum(row.macs for row in rows),
        sparse_macs=sum(row.sparse_macs for row in rows),
        rows=rows,
    )


def training_macs(counts: Counts, algorithm: Algorithm) -> float:
    """Return the mean cost of a training step per sample, by the published formulas.

    With f_S sparse and f_D dense forward MACs, a step costs f_S forward, f_S for the gradients of the
    activations, and for those of the weights f_S, or f_D where they are dense:

    - never dense (static, SET): 3 f_S
    - dense at the mask updates, every dT steps, that read gradients (RigL): (3 f_S dT + 2 f_S + f_D) / (dT +
      1)
    - dense at every step (SNFS; and `slak`, whose optimizer is given dense gradients): 2 f_S + f_D

    Which of them holds is read from the algorithm: `masks_gradients`, `dense_weights`, `needs`,
    `due.interval`. As in the paper, steps after the last mask update are not told apart.

    Args:
        counts: Counts of the model with its masks.
        algorithm: How it is trained.

    Returns:
        MACs per sample and step; dense training costs 3 `counts.macs`.

    Raises:
        ValueError: If the algorithm's sparsity changes during training, or it reads gradients at times that
            are not a regular interval.

    Examples:
        >>> from .algorithms import rigl, static
        >>> counts = Counts(params=100, nonzero=10, macs=1000, sparse_macs=100, rows=())
        >>> training_macs(counts, static()), training_macs(counts, rigl(total_steps=1000, interval=9))
        (300.0, 390.0)

    Source:
        Evci et al., Rigging the Lottery, ICML 2020, appendix H.
    """
    sparse, dense = counts.sparse_macs, counts.macs
    if getattr(algorithm, "sparsity", None) is not None:
        raise ValueError(
            "this algorithm changes the sparsity during training, so no single step stands for all; count "
            "with the masks of several steps and average"
        )
    if getattr(algorithm, "dense_weights", False) or not getattr(algorithm, "masks_gradients", True):
        return float(2 * sparse + dense)
    if "grad" not in getattr(algorithm, "needs", ()):
        return float(3 * sparse)
    interval = getattr(algorithm.due, "interval", None)
    if not isinstance(interval, int):
        raise ValueError(f"the cost needs mask updates at a regular interval, got due={algorithm.due!r}")
    return (3 * sparse * interval + 2 * sparse + dense) / (interval + 1)


def _by_identity(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """Return each mask by the identity of its parameter, which any of its names finds."""
    named = {plain_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    for name, parameter in named.items():
        if is_lazy(parameter):
            raise ValueError(
                f"parameter {name!r} is not initialised yet (a lazy module); run one batch first"
            )
    by_id: dict[int, Tensor] = {}
    for name, mask in masks.items():
        if name not in named:
            raise ValueError(f"mask {name!r} names no parameter; near names: {near_names(name, named)}")
        parameter = named[name]
        if mask.dtype != torch.bool or mask.shape != parameter.shape:
            raise ValueError(
                f"mask {name!r} must be bool of shape {tuple(parameter.shape)}, got {mask.dtype} of shape "
                f"{tuple(mask.shape)}"
            )
        by_id[id(parameter)] = mask
    return by_id


def _rows(model: nn.Module, masks: Mapping[int, Tensor], work: Mapping[nn.Module, Work]) -> Generator[Row]:
    counted: set[int] = set()
    for name, module in cast("Sequence[tuple[str, nn.Module]]", list(model.named_modules())):
        own = dict(module.named_parameters(recurse=False))
        done = work.get(module, Work())
        if not own and module not in work:
            continue
        new = [p for p in own.values() if id(p) not in counted]
        counted.update(map(id, new))
        weight = own.get("weight", next(iter(own.values()), None))
        yield Row(
            name=plain_name(name),
            type=type(module).__name__,
            shape=() if weight is None else tuple(weight.shape),
            params=sum(p.numel() for p in new),
            nonzero=sum(int(masks[id(p)].count_nonzero()) if id(p) in masks else p.numel() for p in new),
            output=done.output,
            macs=done.macs,
            sparse_macs=done.sparse_macs,
        )


def _numbers(row: Row | Counts) -> tuple[str, str, str, str]:
    return f"{row.params:,}", f"{row.nonzero:,}", f"{row.macs:,}", f"{row.sparse_macs:,}"


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
