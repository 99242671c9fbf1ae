"""Mixed precision: a skipped step changes nothing, a scaled step is the plain step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers.training import ALGORITHMS, algorithm, assert_exact, loss_at, mlp, same_bits, snapshot, sparse
from torch import nn, optim
from torch.amp import GradScaler

import dst

BASES: dict[str, Callable[..., optim.Optimizer]] = {
    "AdamW": optim.AdamW,
    "AdamW-foreach": partial(optim.AdamW, foreach=True),
    "AdamW-fused": partial(optim.AdamW, fused=True),
    "SGD-momentum": partial(optim.SGD, lr=0.1, momentum=0.9),
    "SGD-fused": partial(optim.SGD, lr=0.1, momentum=0.9, fused=True),
}
every_base = pytest.mark.parametrize("make", BASES.values(), ids=BASES)
every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)
INTERVAL = 4


def scaler(scale: float = 2.0**10) -> GradScaler:
    return GradScaler("cpu", init_scale=scale, growth_interval=3)


def scaled_step(
    model: nn.Module, optimizer: optim.Optimizer, scaling: GradScaler, step: int, *, clip: bool = False
) -> None:
    optimizer.zero_grad()
    scaling.scale(loss_at(model, step)).backward()
    if clip:
        scaling.unscale_(optimizer)
        assert isinstance(optimizer, dst.SparseOptimizer)
        optimizer.mask_gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    scaling.step(optimizer)
    scaling.update()


def overflow(model: nn.Module, optimizer: optim.Optimizer, scaling: GradScaler, step: int) -> None:
    """Take a step whose gradient holds one infinity; the scaler must skip it."""
    optimizer.zero_grad()
    scaling.scale(loss_at(model, step)).backward()
    next(model.parameters()).grad.view(-1)[3] = math.inf
    scaling.step(optimizer)
    scaling.update()


@every_base
def test_amp_scaling_is_not_advertised(make: Callable[..., optim.Optimizer]) -> None:
    """GradScaler unscales and skips by itself then, also over a base that could do it inside."""
    optimizer = sparse(mlp(), make)
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)
    assert getattr(optimizer.base, "_step_supports_amp_scaling", False) == ("fused=True" in repr(make))


@every_base
@every_algorithm
def test_a_skipped_step_moves_nothing(make: Callable[..., optim.Optimizer], name: str) -> None:
    model = mlp()
    optimizer = sparse(model, make, name, interval=INTERVAL)
    scaling = scaler()
    heard: list[str] = []
    counts = dict(optimizer.sparsifier.counts)
    for step in range(1, 3 * INTERVAL + 1):
        before = snapshot(model, optimizer)
        optimizer.sparsifier.on_change(lambda layer, *_: heard.append(layer))
        heard.clear()
        for again in range(2):  # also on the step at which an update is due
            overflow(model, optimizer, scaling, step + again)
            assert same_bits(before, snapshot(model, optimizer))
            assert not heard
        scaled_step(model, optimizer, scaling, step)
        assert optimizer.sparsifier.step == step
        assert_exact(optimizer, counts)


@every_base
@every_algorithm
def test_skips_leave_no_trace_in_a_run(make: Callable[..., optim.Optimizer], name: str) -> None:
    """With skips in between, early masked or not, the run is the one without skips."""
    clean, noisy = mlp(), mlp()
    first, second = sparse(clean, make, name), sparse(noisy, make, name)
    scaling, other = scaler(), scaler()
    for step in range(1, 3 * INTERVAL + 1):
        scaled_step(clean, first, scaling, step, clip=True)
        for number in range(step % 3):
            other.load_state_dict(scaling.state_dict())
            second.zero_grad()
            other.scale(loss_at(noisy, 1000 + step)).backward()
            next(noisy.parameters()).grad.view(-1)[3] = math.nan
            if number:
                other.unscale_(second)
                second.mask_gradients()
            other.step(second)
            other.update()
        scaled_step(noisy, second, other, step, clip=True)
        assert same_bits(snapshot(clean, first), snapshot(noisy, second)), step


@every_base
@every_algorithm
def test_a_scaled_step_is_the_plain_step(make: Callable[..., optim.Optimizer], name: str) -> None:
    """Scaling by a power of two is exact in float32, so the runs agree bit for bit."""
    plain, scaled = mlp(), mlp()
    first, second = sparse(plain, make, name), sparse(scaled, make, name)
    scaling = scaler()
    for step in range(1, 4 * INTERVAL + 1):
        first.zero_grad()
        loss_at(plain, step).backward()
        first.step()
        scaled_step(scaled, second, scaling, step)
    assert same_bits(snapshot(plain, first), snapshot(scaled, second))
    assert scaling.get_scale() > 2.0**10  # it grew on the way


@every_base
@every_algorithm
def test_sparsity_zero_under_a_scaler_is_the_base(make: Callable[..., optim.Optimizer], name: str) -> None:
    plain, wrapped = mlp(), mlp()
    dense = make(plain.parameters())
    optimizer = sparse(wrapped, make, name, sparsity=0.0)
    scaling, other = scaler(), scaler()
    for step in range(1, 3 * INTERVAL + 1):
        for model, taken, used in ((plain, dense, scaling), (wrapped, optimizer, other)):
            if step % 5 == 0:
                overflow(model, taken, used, step)
            scaled_step(model, taken, used, step)
        assert same_bits(plain.state_dict(), wrapped.state_dict())
    saved = optimizer.state_dict()
    saved.pop("sparse")
    assert same_bits(saved, dense.state_dict())
    assert scaling.state_dict() == other.state_dict()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("clear", ["optimizer", "model"])
@pytest.mark.parametrize("early", [True, False], ids=["masked-early", "masked-by-step"])
def test_after_a_skip_the_update_reads_the_new_dense_gradient(
    set_to_none: bool, clear: str, early: bool
) -> None:
    """Gradients masked early are kept for the update; those of a skipped step must not be used.

    With `set_to_none=False` the same gradient tensors come back, so identity tells nothing.
    """

    def run(skip: bool) -> dict[str, Any]:
        model = mlp()
        optimizer = sparse(model, optim.AdamW, "rigl", interval=1)
        scaling = scaler()
        for step in range(1, 8):
            for attempt in ("skipped", "taken") if skip else ("taken",):
                source = optimizer if clear == "optimizer" else model
                source.zero_grad(set_to_none=set_to_none)
                scaling.scale(loss_at(model, step + (500 if attempt == "skipped" else 0))).backward()
                if attempt == "skipped":
                    model[0].weight.grad[0, 0] = math.inf
                scaling.unscale_(optimizer)
                if early or attempt == "skipped":
                    optimizer.mask_gradients()
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaling.step(optimizer)
                scaling.update(new_scale=1024.0)
        return snapshot(model, optimizer)

    assert same_bits(run(skip=False), run(skip=True))


def test_after_a_skip_an_all_zero_dense_gradient_counts() -> None:
    """Inactive weights may all have a zero gradient; growth must not fall back on the skipped step's."""
    weight = nn.Parameter(torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0]))
    mask = torch.arange(8) < 4
    optimizer = dst.SparseOptimizer(
        optim.SGD([weight], lr=0.1),
        {"w": weight},
        masks={"w": mask},
        algorithm=dst.rigl(total_steps=10, interval=1, drop_fraction=dst.Constant(0.25)),
    )
    weight.grad = torch.tensor([0.0, 0, 0, 0, 1, 2, 3, math.inf])
    optimizer.mask_gradients()  # then the step is skipped
    optimizer.zero_grad()
    weight.grad = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0])
    optimizer.step()
    assert optimizer.masks["w"].tolist() == [True, True, True, True, False, False, False, False]
    assert weight.tolist() == [4, 3, 2, 0, 0, 0, 0, 0]  # the last one left and came back from zero


@every_base
@every_algorithm
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast(
    make: Callable[..., optim.Optimizer], name: str, accumulation: int, dtype: torch.dtype
) -> None:
    """What SLaK's published loop lost under AMP: every step ends at the asked count."""
    model = mlp()
    optimizer = sparse(model, make, name)
    counts = dict(optimizer.sparsifier.counts)
    scaling = scaler()
    for step in range(1, 3 * INTERVAL + 1):
        optimizer.zero_grad()
        for part in range(accumulation):
            with torch.autocast("cpu", dtype=dtype):
                loss = loss_at(model, step * accumulation + part) / accumulation
            scaling.scale(loss).backward()
        scaling.step(optimizer)
        scaling.update()
        assert_exact(optimizer, counts)
    assert optimizer.sparsifier.step == 3 * INTERVAL


@every_algorithm
def test_a_float16_or_bfloat16_model_stays_exact(name: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = mlp(dtype=dtype)
        optimizer = sparse(model, partial(optim.AdamW, lr=1e-3, eps=1e-4), name)
        counts = dict(optimizer.sparsifier.counts)
        for step in range(1, 10):
            optimizer.zero_grad()
            loss_at(model, step).backward()
            optimizer.step()
            assert_exact(optimizer, counts)
            assert all(p.isfinite().all() and p.dtype == dtype for p in model.parameters())


@every_base
def test_a_copied_optimizer_is_skipped_too(make: Callable[..., optim.Optimizer]) -> None:
    """Hooks or flags lost in a deepcopy would let infinities through."""
    model, optimizer = copy.deepcopy((model := mlp(), sparse(model, make, "set")))
    before = snapshot(model, optimizer)
    overflow(model, optimizer, scaler(), 1)
    assert same_bits(before, snapshot(model, optimizer))


def test_gradients_masked_before_clipping_measure_the_sparse_norm() -> None:
    for name in ("static", "set", "rigl"):
        model = mlp()
        optimizer = dst.SparseOptimizer(
            optim.SGD(model.parameters(), lr=0.1),
            model,
            sparsity=0.75,
            distribution=dst.uniform,
            algorithm=algorithm(name, interval=1),
        )
        loss_at(model, 1).backward()
        gradients = {key: p.grad.clone() for key, p in model.named_parameters()}
        for key, mask in optimizer.masks.items():
            gradients[key] = gradients[key].where(mask, 0.0)
        expected = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
        optimizer.mask_gradients()
        optimizer.mask_gradients()
        assert torch.isclose(nn.utils.get_total_norm([p.grad for p in model.parameters()]), expected)
