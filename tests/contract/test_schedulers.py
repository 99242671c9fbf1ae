"""Every learning-rate scheduler of torch takes the wrapper and moves the rate of the optimizer inside."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.training import ALGORITHMS, loss_at, mlp, same_bits, sparse
from torch import optim
from torch.optim import lr_scheduler as lrs
from torch.optim.optimizer import Optimizer
from torch.optim.swa_utils import SWALR

import dst

STEPS = 12

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "ChainedScheduler": lambda o: lrs.ChainedScheduler(
        [lrs.ConstantLR(o, 0.1, 3), lrs.ExponentialLR(o, 0.9)]
    ),
    "ConstantLR": lambda o: lrs.ConstantLR(o, factor=0.5, total_iters=4),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, T_max=STEPS),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, T_0=5),
    "CyclicLR": lambda o: lrs.CyclicLR(o, base_lr=0.001, max_lr=0.1, step_size_up=4),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, gamma=0.9),
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda step: 0.95**step),
    "LinearLR": lambda o: lrs.LinearLR(o, start_factor=0.2, total_iters=6),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, milestones=[3, 6]),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda step: 0.95),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, max_lr=0.1, total_steps=STEPS + 1),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, total_iters=STEPS),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1, total_iters=4), lrs.CosineAnnealingLR(o, STEPS)], milestones=[4]
    ),
    "StepLR": lambda o: lrs.StepLR(o, step_size=3),
    "SWALR": lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=5),
}
every_scheduler = pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)


def momentum(params: Any) -> Optimizer:
    return optim.SGD(params, lr=0.05, momentum=0.9)


def test_every_scheduler_of_torch_is_here() -> None:
    found = {
        name
        for name, kind in vars(lrs).items()
        if isinstance(kind, type) and issubclass(kind, lrs.LRScheduler) and not name.startswith("_")
    }
    assert found - {"LRScheduler"} == SCHEDULERS.keys() - {"SWALR"}


def rates(optimizer: Optimizer, scheduler: Any, step: Callable[[int], object]) -> list[tuple[float, float]]:
    """Return (rate, momentum) of every step; any warning, as about the order of calls, is an error."""
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(1, STEPS + 1):
            step(number)
            if isinstance(scheduler, lrs.ReduceLROnPlateau):
                scheduler.step(1.0)
            else:
                scheduler.step()
            group = optimizer.param_groups[0]
            seen.append((float(group["lr"]), float(group["momentum"])))
    return seen


@every_scheduler
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_rate_of_the_base_follows_the_scheduler(make: Callable[[Optimizer], Any], name: str) -> None:
    """The rates are those of the unwrapped optimizer, also where a mask update replaces the step."""
    model, plain = mlp(), mlp()
    optimizer, dense = sparse(model, momentum, name, interval=3), momentum(plain.parameters())

    def one(held: torch.nn.Module, taken: Optimizer) -> Callable[[int], object]:
        def step(number: int) -> None:
            taken.zero_grad()
            loss_at(held, number).backward()
            taken.step()

        return step

    scheduler, other = make(optimizer), make(dense)
    mine = rates(optimizer.base, scheduler, one(model, optimizer))
    assert mine == rates(dense, other, one(plain, dense))
    assert len(set(mine)) > 1
    assert scheduler.optimizer is optimizer


@every_scheduler
def test_state_of_a_scheduler_resumes_with_the_optimizer(make: Callable[[Optimizer], Any]) -> None:
    def build() -> tuple[torch.nn.Module, dst.SparseOptimizer, Any]:
        model = mlp()
        optimizer = sparse(model, momentum, "rigl", interval=3)
        return model, optimizer, make(optimizer)

    def go(model: torch.nn.Module, optimizer: dst.SparseOptimizer, scheduler: Any, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            loss_at(model, step).backward()
            optimizer.step()
            scheduler.step(*([1.0] if isinstance(scheduler, lrs.ReduceLROnPlateau) else []))

    model, optimizer, scheduler = build()
    go(model, optimizer, scheduler, range(1, 6))
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()])
    go(model, optimizer, scheduler, range(6, 11))
    again, restored, follower = build()
    again.load_state_dict(saved[0])
    restored.load_state_dict(saved[1])
    follower.load_state_dict(saved[2])
    go(again, restored, follower, range(6, 11))
    assert same_bits(model.state_dict(), again.state_dict())
    assert restored.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_the_order_of_calls_is_watched_as_for_any_optimizer() -> None:
    optimizer = sparse(mlp())
    scheduler = lrs.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match=r"lr_scheduler\.step\(\)` before `optimizer\.step"):
        scheduler.step()


def test_each_group_follows_its_own_rate() -> None:
    model = mlp()
    base = optim.SGD(
        [
            {"params": model[0].parameters(), "lr": 0.1},
            {"params": [*model[1].parameters(), *model[3].parameters()]},
        ],
        lr=0.2,
    )
    optimizer = dst.SparseOptimizer(base, model, sparsity=0.5, algorithm=dst.static())
    scheduler = lrs.LambdaLR(optimizer, [lambda step: 0.5**step, lambda step: 1.0])
    before = model[3].bias.detach().clone()
    loss_at(model, 1).backward()
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in base.param_groups] == [0.05, 0.2]
    assert torch.equal(model[3].bias, before - 0.2 * model[3].bias.grad)
