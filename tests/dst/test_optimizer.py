from __future__ import annotations

import copy
import gc
import math
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers.training import (
    ALGORITHMS,
    algorithm,
    assert_exact,
    batch,
    bits,
    convnet,
    loss_at,
    mlp,
    same_bits,
    snapshot,
    sparse,
    train,
)
from torch import Tensor, nn, optim

import dst

every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)
every_updating = pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "static"])


def linear(inputs: int = 8, outputs: int = 1) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    return layer


# --- What is refused -----------------------------------------------------------------------------


def test_sparse_adam_is_refused() -> None:
    layer = linear()
    with pytest.raises(TypeError, match="SparseAdam takes sparse gradients"):
        dst.SparseOptimizer(optim.SparseAdam(layer.parameters()), layer, sparsity=0.5, algorithm=dst.static())


@every_updating
def test_lbfgs_with_changing_masks_is_refused(name: str) -> None:
    layer = linear()
    with pytest.raises(TypeError, match="LBFGS models the curvature"):
        dst.SparseOptimizer(optim.LBFGS(layer.parameters()), layer, sparsity=0.5, algorithm=algorithm(name))


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_with_a_static_mask_solves_the_sparse_problem(line_search: str | None) -> None:
    """The optimum of least squares over the active weights is known in closed form."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 8, generator=generator, dtype=torch.float64)
    y = torch.randn(40, 1, generator=generator, dtype=torch.float64)
    layer = linear().double()
    base = optim.LBFGS(
        layer.parameters(), tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn=line_search
    )
    optimizer = dst.SparseOptimizer(base, layer, sparsity=0.5, algorithm=dst.static())
    mask = optimizer.masks["weight"]

    def closure() -> Tensor:
        optimizer.zero_grad()
        assert not bits(layer.weight)[~mask].any()
        loss = (layer(x) - y).square().sum()
        loss.backward()
        return loss

    for _ in range(10):
        loss = optimizer.step(closure)
        assert_exact(optimizer, {"weight": 4})
    assert isinstance(loss, Tensor)
    solution = torch.linalg.lstsq(x[:, mask[0]], y).solution
    assert torch.allclose(layer.weight.detach()[0, mask[0]], solution[:, 0], rtol=1e-4, atol=1e-6)
    assert optimizer.sparsifier.step == 10


def test_a_base_that_is_no_optimizer_or_already_sparse_is_refused() -> None:
    model = mlp()
    optimizer = sparse(model)
    for base in (optimizer, optim.lr_scheduler.StepLR(optimizer.base, 1), None):
        with pytest.raises(
            TypeError, match=r"base must be a torch\.optim\.Optimizer that is not itself sparse"
        ):
            dst.SparseOptimizer(base, model, sparsity=0.5, algorithm=dst.static())  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [dst.rigl, "rigl", None])
def test_an_algorithm_that_is_none_is_refused_at_once(wrong: Any) -> None:
    """The usual slip is a preset that was not called; the model is not touched."""
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match=r"algorithm must be a value.*such as dst\.rigl\(total_steps"):
        dst.SparseOptimizer(optim.SGD(model.parameters()), model, sparsity=0.5, algorithm=wrong)
    assert same_bits(before, model.state_dict())


def test_tensors_that_the_base_does_not_hold_are_refused() -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"1 of 2 tensors are not held by SGD, the first is '3\.weight'"):
        dst.SparseOptimizer(optim.SGD(model[0].parameters()), model, sparsity=0.5, algorithm=dst.static())


def test_exactly_one_of_sparsity_and_masks() -> None:
    layer = linear()
    base = optim.SGD(layer.parameters())
    mask = {"weight": torch.ones(1, 8, dtype=torch.bool)}
    with pytest.raises(ValueError, match="got both"):
        dst.SparseOptimizer(base, layer, sparsity=0.5, masks=mask, algorithm=dst.static())
    with pytest.raises(ValueError, match="got neither"):
        dst.SparseOptimizer(base, layer, algorithm=dst.static())


def test_masks_that_do_not_fit_are_refused_and_nothing_is_changed() -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    base = optim.SGD(model.parameters())
    good = torch.ones(16, 10, dtype=torch.bool)
    for masks, message in [
        ({}, "masks is empty"),
        ({"0.weights": good}, "masks names '0.weights', which is not among the parameters"),
        ({"0.weight": good.float()}, r"must be bool of shape \(16, 10\), got torch.float32"),
        ({"0.weight": good[1:]}, r"must be bool of shape \(16, 10\), got torch.bool of shape \(15, 10\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            dst.SparseOptimizer(base, model, masks=masks, algorithm=dst.static())
    assert same_bits(before, model.state_dict())


@pytest.mark.parametrize(
    ("returned", "wrong"), [(["0.weight"], "3.weight"), (["0.weight", "3.weight", "x"], "x")]
)
def test_a_distribution_of_other_names_is_refused(returned: list[str], wrong: str) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=f"distribution must return a sparsity for each name.*{wrong}"):
        dst.SparseOptimizer(
            optim.SGD(model.parameters()),
            model,
            sparsity=0.5,
            distribution=lambda params, sparsity: dict.fromkeys(returned, sparsity),
            algorithm=dst.static(),
        )


@pytest.mark.parametrize("sparsity", [1.0, 1, -0.1, 1.5, math.nan, {"*": 2.0}])
def test_a_sparsity_outside_the_range_is_refused(sparsity: Any) -> None:
    layer = linear()
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="sparsity"):
        dst.SparseOptimizer(optim.SGD(layer.parameters()), layer, sparsity=sparsity, algorithm=dst.static())
    assert torch.equal(before, layer.weight)


def test_one_tied_tensor_has_one_mask() -> None:
    """Under one name it trains; under two it is refused."""
    model = nn.Sequential(linear(6, 6), nn.ReLU(), linear(6, 6))
    model[2].weight = model[0].weight
    optimizer = sparse(model, partial(optim.SGD, lr=0.1), "rigl", sparsity=0.5, interval=2)
    assert list(optimizer.masks) == ["0.weight"]
    for step in range(1, 8):
        optimizer.zero_grad()
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        model(x).square().sum().backward()
        optimizer.step()
        assert_exact(optimizer, {"0.weight": 18})
        assert model[2].weight is model[0].weight
    twice = {"first": model[0].weight, "second": model[2].weight}
    with pytest.raises(ValueError, match="'first' and 'second' are one tied parameter"):
        dst.SparseOptimizer(optimizer.base, twice, sparsity=0.5, algorithm=dst.static())


# --- How sparse ----------------------------------------------------------------------------------


def test_a_mapping_of_names_and_globs_sets_each_tensor() -> None:
    model = convnet()
    optimizer = dst.SparseOptimizer(
        optim.SGD(model.parameters()),
        model,
        sparsity={"*": 0.5, "5.*": 0.9, "5.weight": 0.875},
        algorithm=dst.static(),
    )
    assert optimizer.sparsifier.counts == {"0.weight": 108, "2.weight": 36, "5.weight": 150}
    for mapping, message in [({"0.*": 0.5}, "no pattern"), ({"*": 0.5, "stem*": 0.1}, "matches no selected")]:
        with pytest.raises(ValueError, match=message):
            dst.SparseOptimizer(
                optim.SGD(model.parameters()), model, sparsity=mapping, algorithm=dst.static()
            )


def test_given_masks_are_kept_bit_for_bit() -> None:
    """Also empty and full ones, and tensors without a mask stay dense."""
    model = convnet()
    generator = torch.Generator().manual_seed(0)
    masks = {
        "0.weight": torch.rand(model[0].weight.shape, generator=generator) < 0.3,
        "2.weight": torch.zeros(model[2].weight.shape, dtype=torch.bool),
    }
    given = copy.deepcopy(masks)
    before = copy.deepcopy(model.state_dict())
    optimizer = dst.SparseOptimizer(
        optim.AdamW(model.parameters()), model, masks=masks, algorithm=dst.static()
    )
    masks["0.weight"].fill_(True)  # the caller's tensor is not the optimizer's
    assert same_bits(optimizer.masks, given)
    for name, value in model.state_dict().items():
        expected = before[name].where(given[name], 0.0) if name in given else before[name]
        assert torch.equal(bits(value), bits(expected)), name
    train(model, optimizer, range(1, 6))
    assert same_bits(optimizer.masks, given)
    assert_exact(optimizer, {name: int(mask.sum()) for name, mask in given.items()})
    assert model[5].weight.count_nonzero() == model[5].weight.numel()


def test_a_seed_decides_the_masks_whatever_the_order_of_tensors() -> None:
    def masks(seed: int, *, backwards: bool = False) -> dict[str, Tensor]:
        model = mlp(seed=seed + 5)
        params = dst.select(model)
        order = reversed(params.items()) if backwards else params.items()
        optimizer = dst.SparseOptimizer(
            optim.SGD(model.parameters(), lr=0.1),
            dict(order),
            sparsity=0.7,
            distribution=dst.uniform,
            algorithm=algorithm("set", interval=2),
            seed=seed,
        )
        for _ in range(5):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(1.0)
            optimizer.step()
        return dict(sorted(optimizer.masks.items()))

    assert same_bits(masks(0), masks(0, backwards=True))
    assert not same_bits(masks(0), masks(1))


def test_names_are_those_of_the_plain_model() -> None:
    """A wrapped model (DDP, compile, AveragedModel) gets the same names and therefore the same masks."""

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    plain, inner = sparse(mlp()), mlp()
    wrapped = sparse(Wrapper(inner))
    assert same_bits(plain.masks, wrapped.masks)
    mapping = {f"module.{name}": parameter for name, parameter in dst.select(inner).items()}
    with pytest.warns(UserWarning, match="exactly zero"):
        again = dst.SparseOptimizer(
            wrapped.base, mapping, sparsity=0.75, distribution=dst.uniform, algorithm=dst.static(), seed=1
        )
    assert list(again.masks) == list(plain.masks)


def test_the_global_generators_are_not_used() -> None:
    model = mlp()
    before = torch.get_rng_state()
    optimizer = sparse(model, torch.optim.AdamW, "set", interval=1)
    train(model, optimizer, range(1, 5))
    assert torch.equal(before, torch.get_rng_state())


# --- Warnings ------------------------------------------------------------------------------------


def test_masks_drawn_on_a_sparse_model_warn() -> None:
    model = mlp()
    first = sparse(model)  # fresh random weights: no warning, which would be an error here
    with pytest.warns(
        UserWarning, match=r"of the 256 selected weights are exactly zero.*masks_from_weights"
    ) as caught:
        sparse(model, seed=1)
    assert caught[0].filename.endswith("training.py")  # the line that built the optimizer
    masks = first.masks
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse(mlp(), seed=1)
        clean = mlp()
        clean.load_state_dict(model.state_dict())
        # the trained zeros are the ones the masks name
        kept = {name: parameter != 0 for name, parameter in dst.select(clean).items()}
        dst.SparseOptimizer(optim.SGD(clean.parameters()), clean, masks=kept, algorithm=dst.static())
    assert len(masks) == 2


@pytest.mark.parametrize(("zeros", "warns"), [(2, False), (3, True)])
def test_one_percent_of_zeros_is_the_border(zeros: int, warns: bool) -> None:
    weight = nn.Parameter(torch.ones(200))
    weight.data[:zeros] = 0
    mask = torch.arange(200) < 100
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dst.SparseOptimizer(optim.SGD([weight]), {"w": weight}, masks={"w": mask}, algorithm=dst.static())
    assert bool(caught) == warns


# --- An optimizer like any other -----------------------------------------------------------------


@every_algorithm
def test_hooks_on_wrapper_and_base_fire_once_a_step(name: str) -> None:
    model = mlp()
    optimizer = sparse(model, optim.AdamW, name, interval=2)
    heard: list[str] = []
    for who, place in (("wrapper", optimizer), ("base", optimizer.base)):
        place.register_step_pre_hook(lambda *_, who=who: heard.append(f"{who} pre"))
        place.register_step_post_hook(lambda *_, who=who: heard.append(f"{who} post"))
    for step in range(1, 7):
        replaced = optimizer.sparsifier.replaces_next_step
        assert replaced == (name == "rigl" and step % 2 == 0)
        train(model, optimizer, [step])
        inner = [] if replaced else ["base pre", "base post"]
        assert heard == ["wrapper pre", *inner, "wrapper post"]
        heard.clear()


def test_a_post_hook_sees_the_finished_step() -> None:
    model = mlp()
    optimizer = sparse(model, optim.AdamW, "set", interval=1)
    seen: list[int] = []

    def hook(*_: object) -> None:
        assert_exact(optimizer, optimizer.sparsifier.counts)
        seen.append(optimizer.sparsifier.step)

    optimizer.register_step_post_hook(hook)
    train(model, optimizer, range(1, 4))
    assert seen == [1, 2, 3]


def test_hooks_of_state_dict_and_load_state_dict() -> None:
    """As torch documents them: they may return a new dict or change the one they are given."""
    optimizer = sparse(mlp())
    heard: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda *_: heard.append("save"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "returned": 1})
    optimizer.register_state_dict_post_hook(lambda _, state: state.update(changed=2))
    saved = optimizer.state_dict()
    assert (saved["returned"], saved["changed"], heard) == (1, 2, ["save"])

    other = sparse(mlp(), seed=9)
    masks = copy.deepcopy(other.masks)
    saved["parcel"] = saved.pop("sparse")
    before = set(saved)

    def unpack_in_place(_: object, state: dict[str, Any]) -> None:
        state["sparse"] = state.pop("parcel")

    other.register_load_state_dict_pre_hook(unpack_in_place)
    other.register_load_state_dict_post_hook(lambda _: heard.append("loaded"))
    other.load_state_dict(saved)
    assert heard == ["save", "loaded"]
    assert set(saved) == before  # the caller's dict is not the one a hook changes
    assert same_bits(other.masks, optimizer.masks)
    assert not same_bits(other.masks, masks)

    third = sparse(mlp(), seed=9)
    third.register_load_state_dict_pre_hook(lambda _, state: {**state, "sparse": state["parcel"]})
    third.load_state_dict(saved)
    assert same_bits(third.masks, optimizer.masks)


@every_algorithm
@pytest.mark.parametrize("base", [optim.AdamW, partial(optim.SGD, lr=0.1, momentum=0.9)])
def test_a_closure_is_the_plain_loop(name: str, base: Callable[..., optim.Optimizer]) -> None:
    """Evaluated once, its loss returned, masked weights seen, gradients masked: also when replaced."""
    plain, closed = mlp(), mlp()
    first, second = sparse(plain, base, name), sparse(closed, base, name)
    for step in range(1, 14):
        train(plain, first, [step])
        calls = 0

        def closure(step: int = step) -> Tensor:
            nonlocal calls
            calls += 1
            assert torch.is_grad_enabled()
            assert_exact(second, second.sparsifier.counts)
            second.zero_grad()
            loss = loss_at(closed, step)
            loss.backward()
            return loss

        loss = second.step(closure)
        assert calls == 1
        assert isinstance(loss, Tensor)
        assert loss.requires_grad
        assert same_bits(snapshot(plain, first), snapshot(closed, second)), step


def test_a_closure_sees_masked_weights_even_if_they_were_written_to() -> None:
    model = mlp()
    optimizer = sparse(model)
    with torch.no_grad():
        model[0].weight.fill_(3.0)

    def closure() -> float:
        assert_exact(optimizer, optimizer.sparsifier.counts)
        return 1.25

    assert optimizer.step(closure) == 1.25


@every_algorithm
def test_a_closure_that_fails_changes_nothing(name: str) -> None:
    """Neither counters nor masks nor weights move, at a step that is due either."""
    model = mlp()
    optimizer = sparse(model, optim.AdamW, name, interval=1)
    train(model, optimizer, range(1, 3))
    before = snapshot(model, optimizer)

    def closure() -> float:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(closure)
    assert same_bits(before, snapshot(model, optimizer))
    train(model, optimizer, [3])
    assert optimizer.sparsifier.step == 3


def test_a_base_that_evaluates_twice_gets_two_masked_evaluations() -> None:
    class Twice(optim.SGD):
        """Evaluates, moves all weights, evaluates again and steps, as sharpness-aware minimisation does."""

        def step(self, closure: Any = None) -> Any:
            with torch.enable_grad():
                closure()
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.add_(0.01)
            with torch.enable_grad():
                loss = closure()
            super().step()
            return loss

    model = mlp()
    optimizer = sparse(model, partial(Twice, lr=0.1), "set")
    counts = dict(optimizer.sparsifier.counts)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        assert_exact(optimizer, counts)
        optimizer.zero_grad()
        loss = loss_at(model, 1)
        loss.backward()
        return loss

    for _ in range(6):
        optimizer.step(closure)
        assert_exact(optimizer, counts)
    assert (calls, optimizer.sparsifier.step) == (12, 6)


def test_a_replaced_step_leaves_the_base_alone() -> None:
    """The closure runs once and its loss is returned; dense tensors and all step counts stay."""
    model = mlp()
    optimizer = sparse(model, optim.AdamW, "rigl", interval=3)
    train(model, optimizer, range(1, 3))
    called: list[str] = []
    optimizer.base.register_step_pre_hook(lambda *_: called.append("base"))
    before = copy.deepcopy((model, optimizer))
    expected = loss_at(model, 3).detach()

    def closure() -> Tensor:
        called.append("closure")
        optimizer.zero_grad()
        loss = loss_at(model, 3)
        loss.backward()
        return loss

    assert optimizer.sparsifier.replaces_next_step
    loss = optimizer.step(closure)
    assert torch.equal(loss.detach(), expected)
    assert called == ["closure"]
    assert optimizer.sparsifier.step == 3
    old_model, old = before
    for (name, parameter), earlier in zip(model.named_parameters(), old_model.parameters(), strict=True):
        state, earlier_state = optimizer.state[parameter], old.state[earlier]
        assert torch.equal(state["step"], earlier_state["step"])
        if name not in optimizer.masks:
            assert torch.equal(parameter, earlier)
            assert same_bits(state, earlier_state)
            continue
        # What left or came, or left and came back, is zero now; everything else has not moved.
        moved = bits(parameter) != bits(earlier)
        assert moved.any()
        assert not parameter[moved].any()
        for key in ("exp_avg", "exp_avg_sq"):
            reset = bits(state[key]) != bits(earlier_state[key])
            assert not state[key][reset | moved].any()


def test_groups_added_later_train_dense() -> None:
    model, extra = mlp(), nn.Linear(6, 6)
    optimizer = sparse(model, partial(optim.SGD, lr=0.1), "set", interval=2)
    optimizer.add_param_group({"params": list(extra.parameters()), "lr": 0.5})
    assert [group["lr"] for group in optimizer.base.param_groups] == [0.1, 0.5]
    counts = dict(optimizer.sparsifier.counts)
    for step in range(1, 6):
        optimizer.zero_grad()
        x, _ = batch(model, step)
        extra(model(x)).square().mean().backward()
        before, gradient = extra.weight.detach().clone(), extra.weight.grad.clone()
        replaced = optimizer.sparsifier.replaces_next_step
        optimizer.step()
        assert not replaced
        assert torch.equal(extra.weight, before - 0.5 * gradient)
        assert_exact(optimizer, counts)
    optimizer.param_groups[0]["lr"] = 0.0
    frozen = copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    loss_at(model, 9).backward()
    optimizer.base.step()
    assert same_bits(frozen, model.state_dict())


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_clears_every_gradient(set_to_none: bool) -> None:
    model = mlp()
    optimizer = sparse(model)
    loss_at(model, 1).backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    for parameter in model.parameters():
        if set_to_none:
            assert parameter.grad is None
        else:
            assert parameter.grad is not None
            assert not parameter.grad.any()


def test_repr_tells_algorithm_counts_and_base() -> None:
    text = repr(sparse(mlp(), optim.AdamW, "rigl"))
    for part in ("PruneAndGrow(", "64 of 256 weights active in 2 tensors", "AdamW", "lr: 0.001"):
        assert part in text


def test_it_is_an_optimizer_and_its_parts_are_those_of_the_base() -> None:
    optimizer = sparse(mlp())
    assert isinstance(optimizer, optim.Optimizer)
    fresh: list[dict[str, Any]] = copy.copy(optimizer.param_groups)
    optimizer.param_groups = fresh
    assert optimizer.base.param_groups is fresh
    optimizer.defaults = {**optimizer.defaults, "note": 1}
    assert optimizer.base.defaults["note"] == 1
    state = copy.copy(optimizer.state)
    optimizer.state = state
    assert optimizer.base.state is state
    handed = optimizer.masks
    handed.pop("0.weight")
    assert set(optimizer.masks) == {"0.weight", "3.weight"}


def test_parameters_given_with_names_are_taken() -> None:
    model, plain = mlp(), mlp()
    optimizer = sparse(model, lambda _: optim.AdamW(model.named_parameters()), "set")
    train(model, optimizer, range(1, 10))
    train(plain, sparse(plain, optim.AdamW, "set"), range(1, 10))
    assert same_bits(model.state_dict(), plain.state_dict())
    assert optimizer.state_dict()["param_groups"][0]["param_names"][0] == "0.weight"


def test_nothing_keeps_a_dropped_optimizer_alive() -> None:
    """The optimizer must not hang in a reference cycle through torch's patched step."""
    import weakref

    model = mlp()
    reference = weakref.ref(sparse(model, optim.AdamW, "rigl"))
    gc.collect()
    assert reference() is None


# --- Gradients -----------------------------------------------------------------------------------


@every_algorithm
def test_masking_gradients_twice_is_masking_them_once(name: str) -> None:
    once, often = mlp(), mlp()
    first, second = sparse(once, optim.AdamW, name), sparse(often, optim.AdamW, name)
    for step in range(1, 14):
        train(once, first, [step])
        second.zero_grad()
        loss_at(often, step).backward()
        for _ in range(3):
            second.mask_gradients()
            for key, mask in second.masks.items():
                gradient = second.sparsifier.params[key].grad
                if name == "slak":
                    assert gradient[~mask].any()  # dense gradients reach the base, as published
                else:
                    assert not bits(gradient)[~mask].any()
        second.step()
        assert same_bits(snapshot(once, first), snapshot(often, second)), step


def test_clipping_between_does_not_hide_the_dense_gradient() -> None:
    """Early masking keeps the dense gradient once; clipping the rest changes no choice of RigL."""
    plain, clipped = mlp(dtype=torch.float64), mlp(dtype=torch.float64)
    base = partial(optim.SGD, lr=0.0)
    first, second = sparse(plain, base, "rigl", interval=2), sparse(clipped, base, "rigl", interval=2)
    for step in range(1, 12):
        train(plain, first, [step])
        second.zero_grad()
        loss_at(clipped, step).backward()
        second.mask_gradients()
        nn.utils.clip_grad_norm_(clipped.parameters(), 1e-3)
        second.mask_gradients()
        second.step()
        assert same_bits(first.masks, second.masks), step
    assert first.sparsifier.updates == 5


@every_algorithm
def test_four_small_batches_are_one_large_one(name: str) -> None:
    """In float64 accumulated gradients choose the same masks."""
    whole, parts = mlp(dtype=torch.float64), mlp(dtype=torch.float64)
    first, second = sparse(whole, optim.AdamW, name), sparse(parts, optim.AdamW, name)
    for step in range(1, 26):
        x, y = batch(whole, step)
        first.zero_grad()
        (whole(x) - y).square().mean().backward()
        first.step()
        second.zero_grad()
        for a, b in zip(x.split(2), y.split(2), strict=True):
            ((parts(a) - b).square().mean() / 4).backward()
        if step % 2:
            second.mask_gradients()
        second.step()
        assert same_bits(first.masks, second.masks), step
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@every_algorithm
def test_a_frozen_tensor_keeps_mask_and_weights(name: str) -> None:
    model = mlp()
    optimizer = sparse(model, optim.AdamW, name, interval=2)
    train(model, optimizer, range(1, 4))
    model[0].weight.requires_grad_(False)
    mask, weight = optimizer.masks["0.weight"].clone(), model[0].weight.detach().clone()
    other = optimizer.masks["3.weight"].clone()
    train(model, optimizer, range(4, 9))
    assert torch.equal(mask, optimizer.masks["0.weight"])
    assert torch.equal(bits(weight), bits(model[0].weight))
    assert torch.equal(other, optimizer.masks["3.weight"]) == (name == "static")
    model[0].weight.requires_grad_(True)
    train(model, optimizer, range(9, 13))
    assert torch.equal(mask, optimizer.masks["0.weight"]) == (name == "static")
    assert_exact(optimizer, {"0.weight": 40, "3.weight": 24})


def test_no_step_is_replaced_when_every_sparse_tensor_is_frozen() -> None:
    """Fine-tuning biases and norms under a frozen sparse network loses no optimizer step."""
    model, plain = mlp(), mlp()
    base = partial(optim.SGD, lr=0.1)
    optimizer, other = sparse(model, base, "rigl", interval=2), sparse(plain, base, "static")
    for held in (model, plain):
        for parameter in dst.select(held).values():
            parameter.requires_grad_(False)
    train(model, optimizer, range(1, 9))
    train(plain, other, range(1, 9))
    assert same_bits(model.state_dict(), plain.state_dict())


@every_algorithm
def test_a_tensor_without_gradient_is_not_chosen_by_it(name: str) -> None:
    """RigL has nothing to read there and leaves it alone; the others need no gradient."""
    model = mlp()
    optimizer = sparse(model, partial(optim.SGD, lr=0.1), name, interval=2)
    mask = optimizer.masks["0.weight"].clone()
    for step in range(1, 6):
        optimizer.zero_grad()
        model[3](torch.ones(2, 16) * step).square().sum().backward()
        assert model[0].weight.grad is None
        optimizer.mask_gradients()
        optimizer.step()
        assert_exact(optimizer, {"0.weight": 40, "3.weight": 24})
    assert torch.equal(mask, optimizer.masks["0.weight"]) == (name in ("static", "rigl"))


def test_a_step_without_any_gradient_still_counts() -> None:
    model = mlp()
    optimizer = sparse(model, optim.AdamW, "rigl", interval=1)
    before = snapshot(model, optimizer)["model"]
    optimizer.step()
    assert optimizer.sparsifier.step == 1
    assert same_bits(before, model.state_dict())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_in_another_memory_layout_are_masked(layout: torch.memory_format) -> None:
    model = convnet()
    optimizer = sparse(model)
    loss_at(model, 1).backward()
    model[0].weight.grad = model[0].weight.grad.to(memory_format=layout)
    expected = model[0].weight.grad.where(optimizer.masks["0.weight"], 0.0)
    optimizer.mask_gradients()
    assert torch.equal(bits(model[0].weight.grad), bits(expected))


def test_a_preconditioner_of_a_square_tensor_is_not_state_of_its_weights() -> None:
    """Shampoo keeps (rows, rows) for (rows, columns): the same shape where the tensor is square."""

    class Preconditioned(optim.Optimizer):
        def __init__(self, params: Any, lr: float = 0.1) -> None:
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    state = self.state[parameter]
                    state.setdefault("left", torch.eye(len(parameter))).addmm_(
                        parameter.grad, parameter.grad.T
                    )
                    parameter.sub_(parameter.grad, alpha=group["lr"])

    weight = nn.Parameter(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))
    optimizer = dst.SparseOptimizer(
        Preconditioned([weight]), {"w": weight}, sparsity=0.5, algorithm=algorithm("set", interval=2)
    )
    expected = torch.eye(6)
    for step in (1, 2):
        weight.grad = torch.randn(6, 6, generator=torch.Generator().manual_seed(step))
        masked = weight.grad.where(optimizer.masks["w"], 0.0)
        expected.addmm_(masked, masked.T)
        optimizer.step()
    assert optimizer.sparsifier.last_grown["w"] > 0
    assert torch.allclose(optimizer.state[weight]["left"], expected)


# --- A model that moves after wrapping -----------------------------------------------------------


@every_algorithm
def test_a_model_moved_to_float64_after_wrapping(name: str) -> None:
    model = mlp()
    optimizer = sparse(model, optim.AdamW, name)
    model.to(dtype=torch.float64)
    train(model, optimizer, range(1, 14))
    assert model[0].weight.dtype == torch.float64
    assert_exact(optimizer, {"0.weight": 40, "3.weight": 24})


@every_algorithm
def test_a_model_moved_to_channels_last_after_wrapping(name: str) -> None:
    """The memory layout changes neither masks nor weights."""
    plain, moved = convnet(), convnet()
    first, second = sparse(plain, optim.AdamW, name), sparse(moved, optim.AdamW, name)
    train(plain, first, [1])
    train(moved, second, [1])
    moved.to(memory_format=torch.channels_last)
    assert not moved[0].weight.is_contiguous()
    for step in range(2, 10):
        for model, optimizer in ((plain, first), (moved, second)):
            optimizer.zero_grad()
            for index, parameter in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(100 * step + index)
                gradient = torch.randn(parameter.shape, generator=generator)
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
            optimizer.step()
        assert_exact(second, first.sparsifier.counts)
        assert second.masks["0.weight"].stride() == moved[0].weight.stride()
    assert same_bits(plain.state_dict(), moved.state_dict())
    assert same_bits(first.masks, second.masks)


@every_algorithm
def test_a_parameter_that_is_a_strided_view(name: str) -> None:
    """Memory with gaps between the weights: what lies in the gaps is never touched."""
    storage = torch.randn(9, 14, generator=torch.Generator().manual_seed(0))
    gaps = storage[:, 1::2].clone()
    weight = nn.Parameter(storage[:, ::2])
    optimizer = dst.SparseOptimizer(
        optim.AdamW([weight]), {"w": weight}, sparsity=0.5, algorithm=algorithm(name, interval=2)
    )
    mask = optimizer.masks["w"]
    for step in range(1, 8):
        weight.grad = torch.randn(9, 7, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        assert_exact(optimizer, optimizer.sparsifier.counts)
        assert optimizer.masks["w"] is mask
    assert torch.equal(gaps, storage[:, 1::2])


# --- Saving --------------------------------------------------------------------------------------


@every_algorithm
def test_a_saved_model_is_a_plain_model_with_real_zeros(name: str) -> None:
    model, plain = mlp(), mlp()
    names = list(plain.state_dict())
    optimizer = sparse(model, optim.AdamW, name)
    train(model, optimizer, range(1, 8))
    assert list(model.state_dict()) == names
    plain.load_state_dict(model.state_dict(), strict=True)
    for key, mask in optimizer.masks.items():
        assert not bits(plain.state_dict()[key])[~mask].any()
    assert [key for key, _ in model.named_buffers()] == []
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks


def test_copies_and_pickles_drop_nothing_that_trains() -> None:
    """Copies of (model, optimizer) go on alone; see test_resume.py for bit-equality."""
    model = mlp()
    optimizer = sparse(model, optim.AdamW, "rigl", interval=2)
    optim.lr_scheduler.StepLR(optimizer, 1)  # it patches step on the instance
    for copied_model, copied in (
        copy.deepcopy((model, optimizer)),
        pickle.loads(pickle.dumps((model, optimizer))),
    ):
        assert isinstance(copied, dst.SparseOptimizer)
        held = {id(p) for group in copied.param_groups for p in group["params"]}
        assert held == {id(p) for p in copied_model.parameters()}
        assert all(id(p) in held for p in copied.sparsifier.params.values())
        train(copied_model, copied, range(1, 8))
        assert copied.sparsifier.step == 7
        assert_exact(copied, optimizer.sparsifier.counts)
    assert optimizer.sparsifier.step == 0


# --- The edge: what is told, what is refused, what is left after a failure ---------------------------


def _linear(sparsity: float = 0.5, **options: Any) -> tuple[nn.Linear, dst.SparseOptimizer]:
    layer = nn.Linear(8, 4, bias=False)
    base = options.pop("base", None) or torch.optim.SGD(layer.parameters(), lr=0.1)
    options.setdefault("algorithm", dst.static())
    return layer, dst.SparseOptimizer(base, layer, sparsity=sparsity, **options)


@pytest.mark.parametrize("preset", [dst.set_, dst.rigl, dst.slak])
def test_an_algorithm_that_is_never_due_is_told(preset: Any, caplog: pytest.LogCaptureFixture) -> None:
    preset(total_steps=1000, interval=100)
    assert not caplog.records
    assert not any(preset(total_steps=50, interval=100).due(step) for step in range(1, 51))
    assert "no mask update is due" in caplog.text


def test_vectors_among_the_parameters_are_told(caplog: pytest.LogCaptureFixture) -> None:
    layer = nn.Linear(8, 4)
    base = torch.optim.SGD(layer.parameters(), lr=0.1)
    dst.SparseOptimizer(base, dict(layer.named_parameters()), sparsity=0.5, algorithm=dst.static())
    assert "fewer than two dimensions, such as 'bias'" in caplog.text


def test_a_distribution_beside_a_sparsity_for_each_name_is_refused() -> None:
    layer = nn.Linear(8, 4)
    base = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="leave distribution out"):
        dst.SparseOptimizer(
            base, layer, sparsity={"weight": 0.5}, distribution=dst.uniform, algorithm=dst.static()
        )


def test_names_of_masks_are_those_of_the_plain_model() -> None:
    layer = nn.Linear(8, 4)
    mask = torch.rand(4, 8) < 0.5
    optimizer = dst.SparseOptimizer(
        torch.optim.SGD(layer.parameters(), lr=0.1),
        layer,
        masks={"module.weight": mask},
        algorithm=dst.static(),
    )
    assert torch.equal(optimizer.masks["weight"], mask)


@pytest.mark.parametrize("seed", [1.5, None, "a"])
def test_a_seed_is_an_integer(seed: Any) -> None:
    with pytest.raises(TypeError):
        _linear(seed=seed)


def test_a_numpy_seed_is_saved_as_an_int() -> None:
    import numpy as np

    _, optimizer = _linear(seed=np.int64(7))
    assert type(optimizer.state_dict()["sparse"]["seed"]) is int


def test_a_step_that_fails_leaves_the_weights_masked() -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(1.0)
            raise RuntimeError("out of memory")

    layer = nn.Linear(8, 4, bias=False)
    _, optimizer = (
        layer,
        dst.SparseOptimizer(Failing(layer.parameters(), lr=0.1), layer, sparsity=0.5, algorithm=dst.static()),
    )
    layer.weight.grad = torch.ones_like(layer.weight)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert int(layer.weight.count_nonzero()) == 16
    assert optimizer.sparsifier.step == 0


def test_a_sparse_gradient_is_refused_in_a_sentence() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = dst.SparseOptimizer(
        torch.optim.SGD(embedding.parameters(), lr=0.1),
        {"weight": embedding.weight},
        sparsity=0.5,
        algorithm=dst.static(),
    )
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="needs dense gradients"):
        optimizer.step()


def test_one_more_global_hook_sees_no_step_of_a_probe() -> None:
    seen: list[str] = []
    from torch.optim.optimizer import register_optimizer_step_post_hook

    layer = nn.Linear(8, 4, bias=False)
    optimizer = dst.SparseOptimizer(
        torch.optim.AdamW(layer.parameters()),
        layer,
        sparsity=0.5,
        algorithm=dst.set_(total_steps=10, interval=1),
    )
    handle = register_optimizer_step_post_hook(lambda one, *_: seen.append(type(one).__name__))
    try:
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
    finally:
        handle.remove()
    assert seen == ["AdamW", "SparseOptimizer"]
