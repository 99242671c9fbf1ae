"""Time the depthwise convolution against stock ``torch.nn.functional.conv2d``, forward and backward.

    python -m recipes.benchmarks.depthwise --output depthwise.json [--shapes slak convnext replknet small]

Every contestant (stock and ours, each in NCHW and channels-last) runs once a round, one after the other, so
that whatever else the machine does meets all of them. A ratio is the median over the rounds of stock's time
over ours in the same round; both are taken in the layout that suits them best, stock's first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dst_models.ops import depthwise_conv2d, depthwise_conv2d_reference

_LAYOUTS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}
_OPERATORS = {"stock": depthwise_conv2d_reference, "ours": depthwise_conv2d}


@dataclass(frozen=True)
class Shape:
    """One depthwise convolution: channels, side of the square map, kernel height and width."""

    channels: int
    side: int
    height: int
    width: int
    batch: int | None = None
    """Batch of its own; None takes the command line's."""

    def __str__(self) -> str:
        batch = "" if self.batch is None else f"{self.batch} x "
        return f"{batch}{self.channels}, {self.side}, {self.height}x{self.width}"


def _strips(channels: int, side: int, long: int, batch: int | None = None) -> tuple[Shape, ...]:
    kernels = ((long, 5), (5, long), (5, 5))
    return tuple(Shape(channels, side, height, width, batch) for height, width in kernels)


SHAPES: dict[str, tuple[Shape, ...]] = {
    # SLaK-T at 224 px: per stage MxN, NxM and NxN (arXiv:2207.03620, kernels 51 49 47 13 5, widths x 1.3).
    "slak": (*_strips(124, 56, 51), *_strips(249, 28, 49), *_strips(499, 14, 47), *_strips(998, 7, 13)),
    # ConvNeXt-T at 224 px (arXiv:2201.03545).
    "convnext": tuple(Shape(96 * 2**i, 56 // 2**i, 7, 7) for i in range(4)),
    # RepLKNet-31B at 224 px (arXiv:2203.06717), large kernels.
    "replknet": tuple(
        Shape(128 * 2**i, 56 // 2**i, kernel, kernel) for i, kernel in enumerate((31, 29, 27, 13))
    ),
    # Training on maps of 16 to 2 pixels, as small data sets give.
    "small": (
        *_strips(16, 16, 31, 64),
        *_strips(32, 8, 15, 64),
        *_strips(64, 4, 7, 64),
        Shape(64, 2, 3, 3, 64),
        Shape(32, 16, 31, 31, 64),
        Shape(32, 8, 15, 15, 64),
    ),
}


@dataclass(frozen=True)
class Row:
    """The result for one shape: milliseconds of forward plus backward, medians over the rounds."""

    shape: str
    stock_layout: str
    stock_ms: float
    ours_layout: str
    ours_ms: float
    ratio: float
    ratio_channels_last: float
    """Stock in its best layout over ours in channels-last, the layout of activations in our models."""
    ratio_nchw: float


def _contestant(
    operator: Callable[..., Tensor], shape: Shape, batch: int, dtype: torch.dtype, layout: str
) -> Callable[[], None]:
    size = (shape.batch or batch, shape.channels, shape.side, shape.side)
    x, grad = (torch.randn(size, dtype=dtype).contiguous(memory_format=_LAYOUTS[layout]) for _ in range(2))
    x.requires_grad_()
    weight = torch.randn(shape.channels, 1, shape.height, shape.width, dtype=dtype, requires_grad=True)

    def run() -> None:
        torch.autograd.grad(operator(x, weight), (x, weight), grad)

    return run


def _milliseconds(run: Callable[[], None], calls: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(calls):
        run()
    return (clock() - start) / calls * 1e3


def measure(shape: Shape, batch: int, rounds: int, dtype: torch.dtype, clock: Callable[[], float]) -> Row:
    """Time stock and ours in both layouts, interleaved, and compare best with best."""
    keys = list(itertools.product(_OPERATORS, _LAYOUTS))
    runs = {key: _contestant(_OPERATORS[key[0]], shape, batch, dtype, key[1]) for key in keys}
    calls = {}
    for key, run in runs.items():
        run()  # oneDNN compiles its kernel on the first call
        calls[key] = max(1, min(100, round(10 / _milliseconds(run, 1, clock))))
    times: dict[tuple[str, str], list[float]] = {key: [] for key in keys}
    for _ in range(rounds):
        for key, run in runs.items():
            times[key].append(_milliseconds(run, calls[key], clock))
    median = {key: statistics.median(values) for key, values in times.items()}
    stock = min((key for key in keys if key[0] == "stock"), key=median.__getitem__)
    ours = min((key for key in keys if key[0] == "ours"), key=median.__getitem__)

    def ratio(key: tuple[str, str]) -> float:
        return statistics.median(a / b for a, b in zip(times[stock], times[key], strict=True))

    return Row(
        shape=str(shape),
        stock_layout=stock[1],
        stock_ms=median[stock],
        ours_layout=ours[1],
        ours_ms=median[ours],
        ratio=ratio(ours),
        ratio_channels_last=ratio(("ours", "channels-last")),
        ratio_nchw=ratio(("ours", "NCHW")),
    )


def geometric_means(rows: list[Row]) -> dict[str, float]:
    """Return the geometric mean of each ratio over the rows."""
    names = ("ratio", "ratio_channels_last", "ratio_nchw")
    return {name: statistics.geometric_mean(getattr(row, name) for row in rows) for name in names}


def _print_row(*cells: str) -> None:
    widths = (20, 24, 24, 7, 13, 7)
    print("| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |")


def _print_group(name: str, rows: list[Row]) -> None:
    print(f"\n{name}: forward + backward")
    _print_row("channels, map, kernel", "best stock, ms", "ours, ms", "ratio", "channels-last", "NCHW")
    _print_row(*("---",) * 6)
    for row in rows:
        ratios = (f"{value:.2f}" for value in (row.ratio, row.ratio_channels_last, row.ratio_nchw))
        stock = f"{row.stock_ms:8.2f} {row.stock_layout}"
        _print_row(row.shape, stock, f"{row.ours_ms:8.2f} {row.ours_layout}", *ratios)
    _print_row("geometric mean", "", "", *(f"{mean:.2f}" for mean in geometric_means(rows).values()))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["slak"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count this process's processor time (busy machine, one thread)",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the command line; return what is written as JSON."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    settings = {
        "torch": torch.__version__,
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        **{name: getattr(options, name) for name in ("threads", "batch", "rounds", "dtype", "cpu_time")},
    }
    dtype = getattr(torch, options.dtype)
    clock = time.process_time if options.cpu_time else time.perf_counter
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    groups = {}
    for name in options.shapes:
        rows = [measure(shape, options.batch, options.rounds, dtype, clock) for shape in SHAPES[name]]
        _print_group(name, rows)
        groups[name] = {"rows": [asdict(row) for row in rows], "geometric_mean": geometric_means(rows)}
    result = {**settings, "groups": groups}
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
