"""Runs that stop at each mask update and show what it saw and what it did, for references to repeat."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import dst

SHAPES = {"fc.weight": (12, 10), "conv.weight": (7, 3, 3, 3), "head.weight": (4, 9), "dense.weight": (4, 5)}
SPARSITY = {"fc.weight": 0.7, "conv.weight": 0.85, "head.weight": 0.5, "dense.weight": 0.0}

Numbers = dict[str, list[float]]
Positions = dict[str, set[int]]


@dataclass
class Seen:
    """One update: step, weights and gradients before it, masks before and after, weights after."""

    step: int
    weights: Numbers
    gradients: Numbers
    keys: dict[str, list[int]]
    state: dict[str, dict[str, list[float]]]
    before: Positions
    after: Positions
    weights_after: Numbers
    optimizer: dst.SparseOptimizer

    @property
    def sizes(self) -> dict[str, int]:
        return {name: len(values) for name, values in self.weights.items()}

    def inactive(self, name: str, active: set[int]) -> set[int]:
        return set(range(len(self.weights[name]))) - active


def flat(tensor: Tensor) -> list[Any]:
    return tensor.detach().reshape(-1).tolist()


def positions(masks: dict[str, Tensor]) -> Positions:
    return {name: set(mask.reshape(-1).nonzero().squeeze(1).tolist()) for name, mask in masks.items()}


def smallest(values: list[float], among: set[int], k: int) -> set[int]:
    return set(sorted(among, key=lambda i: (values[i], i))[:k])


def largest(values: list[float], among: set[int], k: int) -> set[int]:
    return set(sorted(among, key=lambda i: (-values[i], i))[:k])


def magnitudes(values: list[float]) -> list[float]:
    return [abs(value) for value in values]


def run(
    algorithm: dst.Algorithm,
    steps: int,
    *,
    base: Callable[[Any], torch.optim.Optimizer] = lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    sparsity: dict[str, float] = SPARSITY,
    scale: dict[str, float] | None = None,
    seed: int = 3,
) -> Iterator[Seen]:
    """Train fixed tensors on keyed noise, yielding each mask update; the tensors' scales may differ."""
    generator = torch.Generator().manual_seed(seed)
    params = {
        name: nn.Parameter((scale or {}).get(name, 1.0) * torch.randn(SHAPES[name], generator=generator))
        for name in sparsity
    }
    optimizer = dst.SparseOptimizer(
        base(list(params.values())), params, sparsity=sparsity, algorithm=algorithm, seed=seed
    )
    for step in range(1, steps + 1):
        for name, parameter in params.items():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = (scale or {}).get(name, 1.0) * noise + 0.3 * parameter.detach()
        dense = {name: flat(parameter.grad) for name, parameter in params.items()}
        before = {name: mask.clone() for name, mask in optimizer.masks.items()}
        looked: dict[str, Any] = {}
        after_step = optimizer.sparsifier.after_step

        def look(
            state: Any, at_rest: Any, looked: dict = looked, go: Any = after_step, masks: dict = before
        ) -> None:
            looked["weights"] = {name: flat(params[name] * masks[name]) for name in params}
            looked["state"] = {
                name: {key: flat(v) for key, v in state.get(p, {}).items() if isinstance(v, Tensor)}
                for name, p in params.items()
            }
            go(state, at_rest)

        optimizer.sparsifier.after_step = look
        try:
            optimizer.step()
        finally:
            del optimizer.sparsifier.after_step
        after = positions(optimizer.masks)
        assert {name: len(active) for name, active in after.items()} == optimizer.sparsifier.counts
        for name, parameter in params.items():  # the bits of +0.0
            assert not parameter.detach().view(torch.int32)[~optimizer.masks[name]].any()
        if not algorithm.due(step):
            assert after == positions(before)
            continue
        index = {name: torch.arange(parameter.numel()) for name, parameter in params.items()}
        yield Seen(
            step,
            looked["weights"],
            dense,
            {name: dst.random_keys(seed, step, name, index[name]).tolist() for name in params},
            looked["state"],
            positions(before),
            after,
            {name: flat(parameter) for name, parameter in params.items()},
            optimizer,
        )


def check_values(one: Seen, kept: Positions, *, regrown: str = "zero") -> None:
    """Assert that kept weights are as before the update, and that others start from zero or were kept."""
    for name, weights in one.weights.items():
        for i, value in enumerate(one.weights_after[name]):
            stays = i in kept[name] or (regrown == "keep" and i in one.before[name] & one.after[name])
            assert value == (weights[i] if stays else 0.0), (name, i)
