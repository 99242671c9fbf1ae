"""Time the upkeep of masks against the published procedures, side by side in one run.

    python -m recipes.benchmarks.upkeep

Two rows on the tensors of SLaK-T at 40 % uniform sparsity, medians over interleaved rounds: keeping the
inactive weights at +0.0, against `p.data = p.data * float_mask`; and one update (drop 30 % by magnitude, grow
as many at random), against the procedure of the published code: float masks, a full sort of a layer to prune
it and another one to find where to grow.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import dst
import dst_models
from dst.upkeep import zero_inactive_


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and return the exit status."""
    parser = argparse.ArgumentParser(description="Time the upkeep of masks.")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds, at least 1")
    parser.add_argument("--model", default="slak_tiny", help="whose tensors; a name of dst_models")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    params = dst.select(dst_models.create_model(arguments.model))
    weights = {name: parameter.detach().clone() for name, parameter in params.items()}
    masks = {name: torch.rand_like(weight) < 0.6 for name, weight in weights.items()}
    floats = {name: mask.float() for name, mask in masks.items()}
    size = sum(weight.numel() for weight in weights.values())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {size:,} weights, ms")
    print("| what | published | here | ratio |\n|---|---|---|---|")
    rows: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
        ("keep at zero", lambda: published_masking(weights, floats), lambda: masking(weights, masks)),
        ("one update", lambda: published_update(weights, floats), lambda: update(weights, masks)),
    ]
    for what, published, here in rows:
        old, new = interleaved(published, here, arguments.rounds)
        print(f"| {what} | {1e3 * old:.1f} | {1e3 * new:.1f} | {old / new:.2f} |", flush=True)
    return 0


def masking(weights: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
    """Keep the inactive weights at +0.0 as the engine does."""
    for name, weight in weights.items():
        zero_inactive_(weight, masks[name])


def published_masking(weights: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
    """Multiply by float masks into new storage."""
    for name, weight in weights.items():
        weight.data = weight.data * masks[name]


def update(weights: dict[str, Tensor], masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop 30 % by magnitude and grow as many at random, exactly."""
    updated: dict[str, Tensor] = {}
    for name, weight in weights.items():
        k = int(0.3 * int(masks[name].count_nonzero()))
        kept = dst.prune(weight.abs(), masks[name], k)
        index = torch.arange(weight.numel(), dtype=torch.int32)
        updated[name] = dst.grow(dst.random_keys(0, 1, name, index).view(weight.shape), kept, k)
    return updated


def published_update(weights: dict[str, Tensor], masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sort a whole layer to prune it, and sort it again to find where to grow."""
    updated: dict[str, Tensor] = {}
    for name, weight in weights.items():
        active = int(masks[name].sum())
        k = int(0.3 * active)
        threshold = weight.abs().flatten().sort().values[max(weight.numel() - active + k - 1, 0)]
        kept = (weight.abs() > threshold).float()
        scores = torch.rand_like(weight) * (kept == 0)
        order = scores.flatten().sort(descending=True).indices
        kept.view(-1)[order[:k]] = 1.0
        updated[name] = kept
    return updated


def interleaved(one: Callable[[], object], other: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Return the median seconds of two functions that are called in turn, after one call that warms up."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for function, kept in zip((one, other), times, strict=True):
            started = time.perf_counter()
            function()
            kept.append(time.perf_counter() - started)
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


if __name__ == "__main__":
    sys.exit(main())
