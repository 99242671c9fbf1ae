"""One contract for every dense-gradient optimizer of torch, in every form that runs on a CPU."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from helpers.training import ALGORITHMS, algorithm, assert_exact, bits, same_bits, set_gradients
from torch import Tensor, nn, optim
from torch.optim import Optimizer

import dst

STEPS = 64
INTERVAL = 5

BASES: dict[str, Callable[..., Optimizer]] = {
    "Adadelta": partial(optim.Adadelta, lr=0.5),
    "Adafactor": partial(optim.Adafactor, lr=0.02),
    "Adagrad": partial(optim.Adagrad, lr=0.05, initial_accumulator_value=0.25),
    "Adam": partial(optim.Adam, lr=0.01),
    "Adam-amsgrad": partial(optim.Adam, lr=0.01, amsgrad=True),
    "AdamW": partial(optim.AdamW, lr=0.01),
    "Adamax": partial(optim.Adamax, lr=0.01),
    "ASGD": partial(optim.ASGD, lr=0.02, t0=20),
    "NAdam": partial(optim.NAdam, lr=0.01),
    "RAdam": partial(optim.RAdam, lr=0.01),
    "RMSprop": partial(optim.RMSprop, lr=0.01),
    "RMSprop-centered": partial(optim.RMSprop, lr=0.01, centered=True, momentum=0.9),
    "Rprop": partial(optim.Rprop, lr=0.01),
    "SGD": partial(optim.SGD, lr=0.05),
    "SGD-momentum": partial(optim.SGD, lr=0.02, momentum=0.9, dampening=0.1),
    "SGD-nesterov": partial(optim.SGD, lr=0.02, momentum=0.9, nesterov=True),
    "Muon": partial(optim.Muon, lr=0.01),
}
FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "maximize": {"maximize": True},
    "decay": {"weight_decay": 0.1},
    "foreach-maximize-decay": {"foreach": True, "maximize": True, "weight_decay": 0.1},
    "fused-maximize-decay": {"fused": True, "maximize": True, "weight_decay": 0.1},
}
SLOW_FORMS = {"foreach", "fused", "maximize", "decay"}  # the quick tests take them together
SINGLE_FORMS = {"Rprop", "Muon"}  # they lack maximize or decay, so the forms are not taken together
REFUSED = {"LBFGS", "SparseAdam"}  # LBFGS trains static masks, see tests/dst/test_optimizer.py


def _takes(base: Callable[..., Optimizer], options: Mapping[str, Any]) -> bool:
    assert isinstance(base, partial)
    return set(options) <= set(inspect.signature(base.func).parameters)


CASES = [
    pytest.param(
        partial(base, **options),
        id=f"{name}-{form}",
        marks=pytest.mark.slow if form in SLOW_FORMS and name not in SINGLE_FORMS else (),
    )
    for name, base in BASES.items()
    for form, options in FORMS.items()
    if _takes(base, options)
]
every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)
every_base = pytest.mark.parametrize("make", CASES)


def tensors(make: partial[Optimizer], seed: int = 0) -> dict[str, nn.Parameter]:
    """Two tensors to be sparse and two to stay dense; Muon takes matrices only."""
    shapes = {"a": (6, 2, 3, 3), "b": (9, 7), "c": (5, 4), "d": (7,)}
    if make.func is optim.Muon:
        shapes = {"a": (12, 9), "b": (9, 7), "c": (5, 4)}
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def wrapped(
    make: Callable[..., Optimizer], params: dict[str, nn.Parameter], name: str, sparsity: float = 0.7
):
    return dst.SparseOptimizer(
        make(list(params.values())),
        {key: params[key] for key in ("a", "b")},
        sparsity=sparsity,
        distribution=dst.uniform,
        algorithm=algorithm(name, total_steps=100, interval=INTERVAL),
    )


def poison(optimizer: dst.SparseOptimizer) -> None:
    """Put NaN, infinities, -0.0, the largest and the least number into gradients of inactive weights."""
    worst = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 3.4e38, 1e-45])
    for key, mask in optimizer.masks.items():
        gradient = optimizer.sparsifier.params[key].grad
        assert gradient is not None
        places = (~mask).reshape(-1).nonzero().squeeze(1)[::2]
        gradient.view(-1)[places] = worst.repeat(len(places))[: len(places)]


def at_rest(make: Callable[..., Optimizer], params: Mapping[str, nn.Parameter], steps: int) -> list[dict]:
    """Return, by step, the per-weight state of an unwrapped optimizer of zeros with zero gradients."""
    zeros = {key: nn.Parameter(torch.zeros_like(parameter)) for key, parameter in params.items()}
    optimizer = make(list(zeros.values()))
    history = []
    for _ in range(steps):
        for parameter in zeros.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        history.append({key: per_weight(optimizer, parameter) for key, parameter in zeros.items()})
    return history


def per_weight(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    state = optimizer.state[parameter]
    return {
        key: value.clone()
        for key, value in state.items()
        if isinstance(value, Tensor) and value.dim() and value.shape == parameter.shape
    }


def test_every_optimizer_of_torch_is_here() -> None:
    known = {base.func.__name__ for base in BASES.values() if isinstance(base, partial)} | REFUSED
    found = {
        name
        for name, kind in vars(optim).items()
        if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer
    }
    assert found == known


@every_base
@every_algorithm
def test_counts_zeros_and_state_stay_exact(make: partial[Optimizer], name: str) -> None:
    params = tensors(make)
    optimizer = wrapped(make, params, name)
    counts = dict(optimizer.sparsifier.counts)
    assert sum(counts.values()) == round(0.3 * sum(params[key].numel() for key in ("a", "b")))
    masks_gradients = optimizer.sparsifier.algorithm.masks_gradients
    rest = at_rest(make, {key: params[key] for key in ("a", "b")}, STEPS)
    before = {key: mask.clone() for key, mask in optimizer.masks.items()}
    took = 0
    for step in range(1, STEPS + 1):
        set_gradients(params, step)
        if masks_gradients and step % 3:
            poison(optimizer)
        took += not optimizer.sparsifier.replaces_next_step
        optimizer.step()
        assert_exact(optimizer, counts)
        assert all(parameter.isfinite().all() for parameter in params.values())
        if not masks_gradients:
            continue
        for key, mask in optimizer.masks.items():
            state = per_weight(optimizer, params[key])
            for entry, value in state.items():
                expected = rest[took - 1][key][entry]
                assert torch.equal(value[~mask], expected[~mask]), (step, key, entry)
    changed = any(not torch.equal(before[key], mask) for key, mask in optimizer.masks.items())
    assert changed == (name != "static")
    assert optimizer.sparsifier.step == STEPS
    assert optimizer.sparsifier.updates == (0 if name == "static" else STEPS // INTERVAL)


@every_base
@every_algorithm
def test_storage_and_identity_never_change(make: partial[Optimizer], name: str) -> None:
    params = tensors(make)
    if params["a"].dim() == 4:
        params["a"].data = params["a"].data.to(memory_format=torch.channels_last)
    base = make(list(params.values()))
    optimizer = dst.SparseOptimizer(
        base, {"a": params["a"]}, sparsity=0.5, algorithm=algorithm(name, interval=INTERVAL)
    )

    def fingerprint() -> list[object]:
        held = [parameter for group in base.param_groups for parameter in group["params"]]
        layout = [(id(p), p.data_ptr(), p.stride(), p.dtype, p.requires_grad) for p in held]
        masks = [(mask.data_ptr(), mask.stride()) for mask in optimizer.masks.values()]
        return [layout, masks, id(optimizer.param_groups), id(optimizer.state), id(base.param_groups[0])]

    before = fingerprint()
    for step in range(1, 2 * INTERVAL + 2):
        set_gradients(params, step)
        optimizer.step()
        assert fingerprint() == before
    assert optimizer.state is base.state
    assert optimizer.param_groups is base.param_groups
    assert optimizer.defaults is base.defaults


@every_base
@pytest.mark.parametrize("name", ["static", "set", "slak"])
def test_dense_tensors_train_as_without_masks(make: partial[Optimizer], name: str) -> None:
    params, alone = tensors(make), tensors(make)
    optimizer, dense = wrapped(make, params, name), make(list(alone.values()))
    for step in range(1, 31):
        set_gradients(params, step)
        set_gradients(alone, step)
        optimizer.step()
        dense.step()
        for key in params.keys() - {"a", "b"}:
            assert torch.equal(bits(params[key]), bits(alone[key])), (step, key)


@every_base
@every_algorithm
@pytest.mark.parametrize("closure", [False, True], ids=["plain", "closure"])
def test_sparsity_zero_is_the_optimizer_itself(make: partial[Optimizer], name: str, closure: bool) -> None:
    params, alone = tensors(make), tensors(make)
    alone["a"].data.view(-1)[0] = params["a"].data.view(-1)[0] = -0.0
    optimizer, dense = wrapped(make, params, name, sparsity=0.0), make(list(alone.values()))
    schedulers = [optim.lr_scheduler.ExponentialLR(o, gamma=0.9) for o in (optimizer, dense)]
    for step in range(1, 25):
        for held, taken in ((params, optimizer), (alone, dense)):

            def evaluate(held: dict[str, nn.Parameter] = held, step: int = step) -> float:
                set_gradients(held, step)
                return float(step)

            if closure:
                assert taken.step(evaluate) == float(step)
            else:
                evaluate()
                taken.step()
        for scheduler in schedulers:
            scheduler.step()
        assert same_bits(dict(params), dict(alone))
    mine, theirs = optimizer.state_dict(), dense.state_dict()
    mine.pop("sparse")
    assert same_bits(mine, theirs)


@pytest.mark.parametrize("make", [BASES["AdamW"], BASES["SGD-momentum"]], ids=["AdamW", "SGD-momentum"])
def test_slak_passes_non_finite_gradients_on_by_definition(make: partial[Optimizer]) -> None:
    """Dense gradients reach the moments, so NaN there stays in the state; the weights hold +0.0.

    A later newcomer inherits such a moment and turns NaN: that is what the published method does with
    a gradient that is not finite, and why it should be trained behind a check of the gradients.
    """
    params = tensors(make)
    optimizer = wrapped(make, params, "slak")
    counts = dict(optimizer.sparsifier.counts)
    for step in range(1, INTERVAL):
        set_gradients(params, step)
        for key, mask in optimizer.masks.items():
            params[key].grad[~mask] = math.nan
        optimizer.step()
        assert_exact(optimizer, counts)
        assert all(parameter.isfinite().all() for parameter in params.values())
    moment = next(iter(per_weight(optimizer, params["a"]).values()))
    assert moment[~optimizer.masks["a"]].isnan().all()
    set_gradients(params, INTERVAL)
    optimizer.step()
    assert_exact(optimizer, counts)


@pytest.mark.parametrize("make", [BASES["Adam"], BASES["SGD-nesterov"]], ids=["Adam", "SGD"])
def test_keep_never_touches_the_state(make: partial[Optimizer]) -> None:
    """With `newcomers="keep"` a weight that left keeps its moments until the base decays them."""
    params = tensors(make)
    optimizer = dst.SparseOptimizer(
        make(list(params.values())),
        {"a": params["a"]},
        sparsity=0.5,
        algorithm=dst.rigl(total_steps=100, interval=INTERVAL, newcomers="keep", regrown="keep"),
    )
    for step in range(1, INTERVAL):
        set_gradients(params, step)
        optimizer.step()
    before = per_weight(optimizer, params["a"])
    set_gradients(params, INTERVAL)
    optimizer.step()
    assert optimizer.sparsifier.last_grown["a"] > 0
    assert same_bits(before, per_weight(optimizer, params["a"]))


def test_muon_on_matrices_and_adamw_on_the_rest() -> None:
    """Two wrappers hold one model, each with the tensors of its own base."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 5))
    chosen = dst.select(model)
    matrices = {key: p for key, p in chosen.items() if p.dim() == 2}
    others = [p for p in model.parameters() if all(p is not m for m in matrices.values())]
    options: dict[str, Any] = {"sparsity": 0.6, "distribution": dst.uniform, "algorithm": algorithm("set")}
    first = dst.SparseOptimizer(optim.Muon(matrices.values(), lr=0.01), matrices, **options)
    second = dst.SparseOptimizer(
        optim.AdamW(others, lr=0.01), {key: p for key, p in chosen.items() if key not in matrices}, **options
    )
    assert set(first.masks) | set(second.masks) == set(chosen)
    counts = [dict(optimizer.sparsifier.counts) for optimizer in (first, second)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        for optimizer in (first, second):
            optimizer.zero_grad()
        model(torch.randn(4, 3, 5, 5, generator=generator)).square().mean().backward()
        for optimizer, expected in zip((first, second), counts, strict=True):
            optimizer.step()
            assert_exact(optimizer, expected)
