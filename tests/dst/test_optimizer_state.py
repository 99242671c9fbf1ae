"""Values at rest against real runs of every torch optimizer on zero gradients; resets touch what changed."""

from __future__ import annotations

import copy
import inspect
import logging

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from dst.optimizer_state import SECOND_MOMENTS, reset_, values_at_rest

OPTIMIZERS = {
    "Adadelta": lambda p: torch.optim.Adadelta(p, weight_decay=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
    "Adagrad": lambda p: torch.optim.Adagrad(p),
    "Adagrad, initial sum": lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.5, lr_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True, weight_decay=0.1),
    "Adam, fused": lambda p: torch.optim.Adam(p, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p),
    "AdamW, amsgrad, maximize": lambda p: torch.optim.AdamW(p, amsgrad=True, maximize=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "AdamW, tensor rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "Adamax": lambda p: torch.optim.Adamax(p),
    "Adamax, other eps": lambda p: torch.optim.Adamax(p, eps=1e-4),
    "ASGD": lambda p: torch.optim.ASGD(p, t0=1.0),
    "NAdam": lambda p: torch.optim.NAdam(p, decoupled_weight_decay=True),
    "RAdam": lambda p: torch.optim.RAdam(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p),
    "RMSprop, centered": lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.9),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.03),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "SGD, nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon"] = lambda p: torch.optim.Muon(p)

SHAPES = ((6, 4), (5,), (4, 3, 2, 2))


def test_every_dense_optimizer_of_torch_is_here():
    classes = {
        name
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer
    }
    tested = {name.split(",")[0] for name in OPTIMIZERS}
    assert tested == classes - {"LBFGS", "SparseAdam"}


def after_zero_gradients(
    build, shape: tuple[int, ...], dtype: torch.dtype, steps: int
) -> dict[str, set[float]]:
    """Run the real optimizer on a zero weight with zero gradients and read every per-weight state."""
    weight = nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = build([weight])
    for _ in range(steps):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    return {
        key: set(value.reshape(-1).tolist())
        for key, value in optimizer.state[weight].items()
        if isinstance(value, torch.Tensor) and value.dim() and value.shape == weight.shape
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("steps", [1, 5])
def test_at_rest_is_what_zero_gradients_leave(name: str, steps: int):
    build = OPTIMIZERS[name]
    for shape in SHAPES if name != "Muon" else SHAPES[:1]:
        weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        base = build([weight])
        for _ in range(3):
            weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            base.step()
        expected = after_zero_gradients(build, shape, torch.float32, steps)
        assert {key: {value} for key, value in values_at_rest(base)(weight).items()} == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["AdamW", "Adamax", "Rprop", "Adagrad, initial sum"])
def test_the_dtype_is_the_parameters(name: str, dtype: torch.dtype):
    weight = nn.Parameter(torch.ones(3, 3, dtype=dtype))
    expected = after_zero_gradients(OPTIMIZERS[name], (3, 3), dtype, 3)
    found = values_at_rest(OPTIMIZERS[name]([weight]))(weight)
    assert {key: {value} for key, value in found.items()} == expected


def test_known_values():
    weight = nn.Parameter(torch.ones(2, 2))
    assert values_at_rest(torch.optim.SGD([weight], lr=0.1))(weight) == {}
    assert values_at_rest(torch.optim.AdamW([weight]))(weight) == {"exp_avg": 0.0, "exp_avg_sq": 0.0}
    assert values_at_rest(torch.optim.Adamax([weight]))(weight)["exp_inf"] == pytest.approx(1e-8)
    assert values_at_rest(torch.optim.Rprop([weight], lr=0.25))(weight)["step_size"] == 0.25


def test_the_options_are_those_of_the_parameters_own_group():
    first, second = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    base = torch.optim.Rprop([{"params": [first], "lr": 0.25}, {"params": [second], "lr": 0.5}])
    assert values_at_rest(base)(first)["step_size"] == 0.25
    assert values_at_rest(base)(second)["step_size"] == 0.5
    base.param_groups[0]["amsgrad"] = True  # an entry the class does not know must not matter
    assert values_at_rest(base)(first)["step_size"] == 0.25


def test_named_parameters_are_taken():
    layer = nn.Linear(3, 2)
    base = torch.optim.Adamax(layer.named_parameters())
    assert set(values_at_rest(base)(layer.weight)) == {"exp_avg", "exp_inf"}


def snapshot(base: Optimizer) -> dict:
    return copy.deepcopy(base.state_dict())


def same(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_base_is_not_touched(name: str, caplog: pytest.LogCaptureFixture):
    weight = nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    base = OPTIMIZERS[name]([weight])
    weight.grad = torch.ones_like(weight)
    base.step()
    fired: list[object] = []
    base.register_step_pre_hook(lambda *_: fired.append("pre"))
    base.register_step_post_hook(lambda *_: fired.append("post"))
    state = base.state[weight]
    before = snapshot(base), weight.detach().clone(), weight.grad.clone(), torch.get_rng_state()
    values_at_rest(base)(weight)
    assert same(before[0], base.state_dict())
    assert base.state[weight] is state
    assert list(base.state) == [weight]
    assert torch.equal(weight.detach(), before[1])
    assert torch.equal(weight.grad, before[2])
    assert torch.equal(torch.get_rng_state(), before[3])
    assert not fired
    assert not caplog.records


class NeedsModel(Optimizer):
    """A third-party optimizer that cannot be built from its groups."""

    def __init__(self, params, model: nn.Module) -> None:
        super().__init__(params, {})
        self.model = model

    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("step", torch.zeros(()))
                state.setdefault("rows", torch.ones(p.shape[0]))
                state.setdefault("velocity", torch.zeros_like(p)).add_(p.grad)


def test_a_class_that_cannot_be_rebuilt_rests_at_zero_and_says_so(caplog: pytest.LogCaptureFixture):
    layer = nn.Linear(3, 2, bias=False)
    base = NeedsModel(layer.parameters(), layer)
    layer.weight.grad = torch.ones(2, 3)
    base.step()
    with caplog.at_level(logging.WARNING, logger="dst"):
        assert values_at_rest(base)(layer.weight) == {"velocity": 0.0}
    (record,) = caplog.records
    assert "NeedsModel" in record.getMessage()
    assert "reset to 0" in record.getMessage()
    assert torch.equal(base.state[layer.weight]["velocity"], torch.ones(2, 3))


class Renamed(torch.optim.Adamax):
    """A user's subclass with another signature that keeps its options in the groups."""

    def __init__(self, params, *, rate: float = 0.1) -> None:
        super().__init__(params, lr=rate, eps=1e-3)


def test_a_subclass_keeps_its_own_options():
    weight = nn.Parameter(torch.ones(2, 2))
    assert values_at_rest(Renamed([weight]))(weight)["exp_inf"] == pytest.approx(1e-3)


# --- Resets ------------------------------------------------------------------------------------


def state_of(shape: tuple[int, ...]) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    return {
        "step": torch.tensor(7.0),
        "exp_avg": torch.randn(shape, generator=generator),
        "exp_avg_sq": torch.rand(shape, generator=generator),
        "row_var": torch.rand(shape[0], 1, generator=generator),
        "note": "kept",
    }


AT_REST = {"exp_avg": 0.0, "exp_avg_sq": 0.25, "absent": 3.0}


def test_reset_writes_the_changed_entries_and_no_other():
    state = state_of((4, 5))
    before = copy.deepcopy(state)
    changed = torch.rand(4, 5, generator=torch.Generator().manual_seed(3)) < 0.4
    tensors = {key: state[key] for key in ("exp_avg", "exp_avg_sq")}
    reset_(state, AT_REST, changed, None, torch.ones(4, 5, dtype=torch.bool))
    for key, tensor in tensors.items():
        assert state[key] is tensor
        assert torch.equal(tensor, before[key].masked_fill(changed, AT_REST[key]))
    assert state.keys() == before.keys()
    assert all(same(state[key], before[key]) for key in ("step", "row_var", "note"))


def test_newcomers_start_at_the_mean_second_moment_of_the_settled():
    state = state_of((4, 5))
    before = copy.deepcopy(state)
    old = torch.rand(4, 5, generator=torch.Generator().manual_seed(3)) < 0.5
    new = torch.rand(4, 5, generator=torch.Generator().manual_seed(4)) < 0.5
    came = new & ~old
    reset_(state, AT_REST, old ^ new, came, new)
    expected = before["exp_avg_sq"].masked_fill(old ^ new, 0.25)
    expected[came] = before["exp_avg_sq"][old & new].mean()
    assert torch.allclose(state["exp_avg_sq"], expected, rtol=1e-6)
    assert torch.equal(state["exp_avg"], before["exp_avg"].masked_fill(old ^ new, 0.0))


def test_newcomers_without_settled_weights_start_at_rest():
    state = state_of((4, 5))
    everything = torch.ones(4, 5, dtype=torch.bool)
    reset_(state, AT_REST, everything, everything, everything)
    assert (state["exp_avg_sq"] == 0.25).all()


def test_a_reset_takes_nan_away():
    state = {"exp_avg": torch.tensor([torch.nan, 1.0])}
    reset_(state, {"exp_avg": 0.0}, torch.tensor([True, False]), None, torch.tensor([True, True]))
    assert state["exp_avg"].tolist() == [0.0, 1.0]


def test_the_second_moments_are_those_of_torchs_optimizers():
    # A state that can only hold squares or absolute values: after gradients of both signs it has no negative.
    for name, build in OPTIMIZERS.items():
        weight = nn.Parameter(torch.zeros(8, 4))
        base = build([weight])
        for seed in range(3):
            weight.grad = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
            base.step()
        for key, value in base.state[weight].items():
            if not isinstance(value, torch.Tensor) or value.shape != weight.shape:
                continue
            positive = bool((value >= 0).all()) and key != "step_size"  # Rprop's rate is no moment
            assert positive == (key in SECOND_MOMENTS), (name, key)
