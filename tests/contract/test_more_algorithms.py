"""The methods beyond the four first presets, through the same probes as these."""

from __future__ import annotations

import base64
import copy
import io
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers.training import bits, convnet, loss_at, mlp, same_bits, set_gradients, snapshot, train
from torch import nn, optim
from torch.amp import GradScaler

import dst

INTERVAL, TOTAL = 4, 60

PRESETS: dict[str, Callable[[], dst.Algorithm]] = {
    "set_signed": lambda: dst.set_signed(total_steps=TOTAL, interval=INTERVAL),
    "itop": lambda: dst.itop(total_steps=TOTAL, interval=INTERVAL),
    "mest": lambda: dst.mest(total_steps=TOTAL, interval=INTERVAL),
    "mest_soft": lambda: dst.mest_soft(total_steps=TOTAL, interval=INTERVAL),
    "snfs": lambda: dst.snfs(total_steps=TOTAL, interval=INTERVAL),
    "gmp": lambda: dst.gmp(total_steps=TOTAL, interval=INTERVAL),
    "granet": lambda: dst.granet(total_steps=TOTAL, interval=INTERVAL),
    "granet from sparse": lambda: dst.granet(total_steps=TOTAL, interval=INTERVAL, initial=0.6),
}
PER_TENSOR = {"set_signed", "itop", "mest"}  # every tensor keeps its count
BASES: dict[str, Callable[[Any], optim.Optimizer]] = {
    "AdamW": partial(optim.AdamW, lr=0.01, weight_decay=0.1),
    "AdamW-fused": partial(optim.AdamW, lr=0.01, fused=True),
    "SGD": partial(optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "NAdam": partial(optim.NAdam, lr=0.01),
    "Adamax": partial(optim.Adamax, lr=0.01),
}
every_method = pytest.mark.parametrize("name", PRESETS)
every_base = pytest.mark.parametrize("base", BASES)


def wrapped(model: nn.Module, name: str, base: str = "AdamW", seed: int = 0) -> dst.SparseOptimizer:
    return dst.SparseOptimizer(
        BASES[base](model.parameters()),
        model,
        sparsity=0.75,
        distribution=dst.uniform,
        algorithm=PRESETS[name](),
        seed=seed,
    )


def final_total(optimizer: dst.SparseOptimizer) -> int:
    return round(0.25 * sum(p.numel() for p in optimizer.sparsifier.params.values()))


@every_base
@every_method
def test_counts_and_zeros_stay_exact(name: str, base: str) -> None:
    model = convnet()
    optimizer = wrapped(model, name, base)
    engine = optimizer.sparsifier
    pointers = [(p.data_ptr(), p.stride()) for p in model.parameters()]
    first, total, explored = dict(engine.counts), sum(engine.counts.values()), engine.explored
    for step in range(1, TOTAL + 1):
        set_gradients(dict(model.named_parameters()), step)
        if engine.algorithm.masks_gradients and step % 3:
            worst = torch.tensor([math.nan, math.inf, -math.inf])
            for key, mask in optimizer.masks.items():
                gradient = engine.params[key].grad
                places = (~mask).reshape(-1).nonzero().squeeze(1)[::2]
                gradient.view(-1)[places] = worst.repeat(len(places))[: len(places)]
        optimizer.step()
        for key, mask in optimizer.masks.items():
            assert int(mask.count_nonzero()) == engine.counts[key] >= 1
            assert not bits(engine.params[key])[~mask].any()
            assert explored[key] <= engine.explored[key]
            assert engine.params[key].isfinite().all()
        if name in PER_TENSOR:
            assert engine.counts == first
        if name == "snfs":
            assert sum(engine.counts.values()) == total
        if name in ("gmp", "granet", "granet from sparse"):
            assert sum(engine.counts.values()) <= total
            total = sum(engine.counts.values())
        explored = engine.explored
    assert sum(engine.counts.values()) == final_total(optimizer)
    assert engine.updates == sum(engine.algorithm.due(step) for step in range(1, TOTAL + 1)) >= 10
    assert pointers == [(p.data_ptr(), p.stride()) for p in model.parameters()]


@pytest.mark.parametrize("stop", [0, 3, 4, 5, 21, 41, 47])
@every_method
@pytest.mark.filterwarnings("ignore:.*selected weights are exactly zero:UserWarning")
def test_a_resume_is_the_uninterrupted_run(name: str, stop: int) -> None:
    model = mlp()
    optimizer = wrapped(model, name, seed=5)
    train(model, optimizer, range(1, stop + 1))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    before = snapshot(model, optimizer)
    again = mlp(9)
    again.load_state_dict(saved["model"])
    restored = wrapped(again, name, seed=6)
    restored.load_state_dict(saved["optimizer"])
    assert same_bits(before, snapshot(again, restored))
    for held, taken in ((model, optimizer), (again, restored)):
        train(held, taken, range(stop + 1, stop + 13))
    assert same_bits(snapshot(model, optimizer), snapshot(again, restored))


@every_method
def test_copies_go_on_alike(name: str) -> None:
    model = mlp()
    optimizer = wrapped(model, name)
    train(model, optimizer, range(1, 10))
    twins = copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))
    for held, taken in ((model, optimizer), *twins):
        train(held, taken, range(10, 24))
    for held, taken in twins:
        assert same_bits(snapshot(model, optimizer), snapshot(held, taken))


@every_method
def test_an_early_mask_and_a_skipped_step_change_nothing(name: str) -> None:
    plain, scaled = mlp(), mlp()
    optimizers = wrapped(plain, name), wrapped(scaled, name)
    scaler = GradScaler("cpu", init_scale=2.0**4, growth_interval=10_000)
    train(plain, optimizers[0], range(1, 26))
    for step in range(1, 26):
        if step in (4, 7, 8):  # an overflow before, at and after an update
            optimizers[1].zero_grad()
            scaler.scale(loss_at(scaled, step)).backward()
            next(scaled.parameters()).grad[0, 0] = math.inf
            scaler.step(optimizers[1])
            scaler.update(2.0**4)
        optimizers[1].zero_grad()
        scaler.scale(loss_at(scaled, step)).backward()
        scaler.unscale_(optimizers[1])
        optimizers[1].mask_gradients()
        scaler.step(optimizers[1])
        scaler.update(2.0**4)
    assert same_bits(snapshot(plain, optimizers[0]), snapshot(scaled, optimizers[1]))


@every_method
def test_a_frozen_tensor_keeps_its_mask(name: str) -> None:
    model = mlp()
    optimizer = wrapped(model, name)
    model[0].weight.requires_grad_(False)
    mask, values = optimizer.masks["0.weight"].clone(), model[0].weight.detach().clone()
    train(model, optimizer, range(1, 30))
    assert torch.equal(optimizer.masks["0.weight"], mask)
    assert torch.equal(model[0].weight, values)


@every_method
def test_half_precision_weights(name: str) -> None:
    model = mlp(dtype=torch.bfloat16)
    optimizer = wrapped(model, name)
    train(model, optimizer, range(1, TOTAL + 1))
    assert sum(optimizer.sparsifier.counts.values()) == final_total(optimizer)


@pytest.mark.parametrize("rank_order", [False, True])
@every_method
def test_the_order_of_the_tensors_does_not_matter(name: str, rank_order: bool) -> None:
    model = mlp()
    params = dst.select(model)
    if rank_order:
        params = dict(reversed(params.items()))
    optimizer = dst.SparseOptimizer(
        BASES["SGD"](model.parameters()), params, sparsity=0.75, algorithm=PRESETS[name]()
    )
    train(model, optimizer, range(1, 41))
    reference = mlp()
    other = dst.SparseOptimizer(
        BASES["SGD"](reference.parameters()), dst.select(reference), sparsity=0.75, algorithm=PRESETS[name]()
    )
    train(reference, other, range(1, 41))
    for key, mask in optimizer.masks.items():
        assert torch.equal(mask, other.masks[key])


def test_an_algorithm_is_a_value() -> None:
    values = [preset() for preset in PRESETS.values()]
    for one, twin in zip(values, [preset() for preset in PRESETS.values()], strict=True):
        for other in (twin, copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
            assert other == one
            assert hash(other) == hash(one)
            assert repr(other) == repr(one)
    assert len({*values}) == len({*map(repr, values)}) == len(values)


def test_another_process_prints_and_reads_the_same() -> None:
    values = [preset() for preset in PRESETS.values()]
    code = (
        "import base64, pickle, sys; values = pickle.loads(base64.b64decode(sys.argv[1])); "
        "print(repr(values)); print(base64.b64encode(pickle.dumps(values)).decode())"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code, base64.b64encode(pickle.dumps(values)).decode()],
        env={**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout.splitlines()
    assert printed[0] == repr(values)
    assert pickle.loads(base64.b64decode(printed[1])) == values
    assert "0x" not in printed[0]


def test_the_repr_prints_the_whole_algorithm() -> None:
    assert repr(dst.snfs(total_steps=100, interval=10)) == (
        "Redistributed(rule=PruneAndGrow(due=Every(interval=10, start=0, stop=100), prune=Magnitude(), "
        "grow=Momentum(), drop_fraction=Cosine(start=0.5, steps=100, end=0.0, offset=0), "
        "rounding=math.ceil, replaces_step=False, masks_gradients=False, newcomers='keep', "
        "regrown='keep', sparsity=None), floor=1)"
    )
