"""Small models, keyed batches and probes shared by the proofs of the optimizer wrapper.

Nothing here draws from the global generator: a model is a function of its seed and a batch of its
step, so that two runs can be compared bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import dst

ALGORITHMS: dict[str, Callable[..., dst.Algorithm]] = {
    "static": lambda **_: dst.static(),
    "set": dst.set_,
    "rigl": dst.rigl,
    "slak": dst.slak,
}
"""Name to a preset that takes `total_steps` and `interval`."""

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def algorithm(name: str, total_steps: int = 100, interval: int = 4) -> dst.Algorithm:
    """Build a preset that updates its masks often."""
    return ALGORITHMS[name](total_steps=total_steps, interval=interval)


def mlp(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two Linear layers to be sparse, with a LayerNorm and biases that stay dense."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(10, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 6)).to(dtype)


def convnet(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A dense and a depthwise convolution and a Linear layer, without batch statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 5 * 5, 6),
        ).to(dtype)


def batch(model: nn.Module, step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    """Return the inputs and targets of a step for `mlp` or `convnet`."""
    generator = torch.Generator().manual_seed(1_000_003 * step + 17)
    first = next(model.parameters())
    shape = (size, 3, 5, 5) if first.dim() == 4 else (size, 10)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    y = torch.randn((size, 6), generator=generator, dtype=torch.float64)
    return x.to(first.dtype), y.to(first.dtype)


def loss_at(model: nn.Module, step: int) -> Tensor:
    """Return the loss of a step's batch."""
    x, y = batch(model, step)
    return (model(x) - y).square().mean()


def train(model: nn.Module, optimizer: Optimizer, steps: Iterable[int]) -> None:
    """Take one plain optimizer step for each step number."""
    for step in steps:
        optimizer.zero_grad()
        loss_at(model, step).backward()
        optimizer.step()


def sparse(
    model: nn.Module,
    base: Callable[[Any], Optimizer] = torch.optim.AdamW,
    name: str = "static",
    *,
    sparsity: float = 0.75,
    seed: int = 0,
    interval: int = 4,
    total_steps: int = 100,
) -> dst.SparseOptimizer:
    """Wrap an optimizer over all parameters of a model with a preset and uniform sparsity."""
    return dst.SparseOptimizer(
        base(model.parameters()),
        model,
        sparsity=sparsity,
        distribution=dst.uniform,
        algorithm=algorithm(name, total_steps, interval),
        seed=seed,
    )


def set_gradients(params: Mapping[str, Tensor], step: int) -> None:
    """Give every parameter a random gradient that depends on its name's position and the step only."""
    generator = torch.Generator().manual_seed(7_919 * step + 5)
    for parameter in params.values():
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = gradient.to(parameter)


def bits(tensor: Tensor) -> Tensor:
    """Return a tensor's bits as integers, so that -0.0 differs from 0.0 and NaN equals itself."""
    tensor = tensor.detach()
    if not tensor.is_floating_point():
        return tensor
    return tensor.contiguous().view(_INTEGER[tensor.element_size()])


def same_bits(a: Any, b: Any) -> bool:
    """Compare nested dicts and lists of tensors and primitives bit for bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return list(a) == list(b) and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def snapshot(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Copy everything that decides how training goes on: weights, optimizer state, masks, counters."""
    copied = {"model": _copied(model.state_dict()), "optimizer": _copied(optimizer.state_dict())}
    if isinstance(optimizer, dst.SparseOptimizer):
        engine = optimizer.sparsifier
        copied["masks"] = _copied(optimizer.masks)
        copied["counters"] = _copied([engine.counts, engine.explored, engine.last_grown])
    return copied


def assert_exact(optimizer: dst.SparseOptimizer, counts: Mapping[str, int]) -> None:
    """Assert the counts and that every inactive weight has the bits of +0.0."""
    engine = optimizer.sparsifier
    assert engine.counts == counts
    for name, mask in optimizer.masks.items():
        assert int(mask.count_nonzero()) == counts[name], name
        assert not bits(engine.params[name])[~mask].any(), name


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copied(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied(entry) for entry in value]
    return value
