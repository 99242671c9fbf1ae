from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers.training import (
    ALGORITHMS,
    algorithm,
    assert_exact,
    bits,
    convnet,
    loss_at,
    mlp,
    same_bits,
    set_gradients,
    sparse,
    train,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn, optim
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dst
from dst import Sparsifier

every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)
EVERY_STEP, EVERY_THIRD = dst.Every(1), dst.Every(3)
NO_STATE: dict[Tensor, Any] = {}


def at_rest(_: nn.Parameter) -> dict[str, float]:
    return {"moment": 0.5}


# --- One mask update against a brute-force oracle ------------------------------------------------


@dataclass
class Rule:
    """A preset in plain numpy: sort, take, write. Ties go by lowest index."""

    growth: str
    rounding: Any
    replaces: bool
    keeps_regrown: bool

    def update(
        self, weight: np.ndarray, mask: np.ndarray, gradient: np.ndarray, keys: np.ndarray, fraction: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (new weights, new mask) of a flat tensor."""
        active = [i for i in range(weight.size) if mask[i]]
        k = self.rounding(fraction * len(active))
        leaving = sorted(active, key=lambda i: (abs(weight[i]), i))[:k]
        kept = [i for i in active if i not in leaving]
        score = np.abs(gradient) if self.growth == "gradient" else keys
        candidates = [i for i in range(weight.size) if i not in kept]
        coming = sorted(candidates, key=lambda i: (-score[i], i))[:k]
        new = np.zeros_like(mask)
        new[kept + coming] = True
        written = np.where(new, weight, 0)
        for i in coming:
            if not (self.keeps_regrown and mask[i]):
                written[i] = 0
        return written, new


RULES = {
    "set": Rule("keys", math.floor, replaces=False, keeps_regrown=False),
    "rigl": Rule("gradient", math.floor, replaces=True, keeps_regrown=False),
    "slak": Rule("keys", math.ceil, replaces=False, keeps_regrown=True),
}


@settings(deadline=None, max_examples=60)
@pytest.mark.filterwarnings("ignore:.*exactly zero where:UserWarning")
@given(
    name=st.sampled_from(sorted(RULES)),
    values=st.lists(st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0]), min_size=2, max_size=30),
    seed=st.integers(0, 2**40),
    fraction=st.floats(0, 1),
    share=st.floats(0, 1),
)
def test_an_update_is_the_brute_force_rule(
    name: str, values: list[float], seed: int, fraction: float, share: float
) -> None:
    """Few distinct values, so that ties and active zeros are everywhere."""
    rule, size = RULES[name], len(values)
    generator = np.random.default_rng(seed)
    mask = np.zeros(size, dtype=bool)
    mask[generator.permutation(size)[: max(1, round(share * size))]] = True
    gradient = generator.choice([-1.0, 0.0, 1.0, 3.0], size)
    weight = nn.Parameter(torch.tensor(values))
    preset = replace(algorithm(name, interval=1), drop_fraction=dst.Constant(fraction))
    engine = Sparsifier(
        {"w": weight}, {"w": torch.tensor(mask)}, {"w": int(mask.sum())}, algorithm=preset, seed=seed
    )
    weight.grad = torch.tensor(gradient, dtype=torch.float32)
    keys = dst.random_keys(seed, 1, "w", torch.arange(size)).numpy()
    engine.before_step()
    assert engine.replaces_next_step == (rule.replaces and not mask.all())
    engine.after_step(NO_STATE, at_rest)
    if mask.all():
        expected, new = np.array(values, dtype=np.float32), mask
    else:
        before = np.where(mask, np.array(values, dtype=np.float32), 0)
        expected, new = rule.update(before, mask, gradient, keys, fraction)
    assert engine.masks["w"].tolist() == new.tolist()
    assert np.array_equal(weight.detach().numpy(), expected)
    assert engine.counts == {"w": int(mask.sum())}
    assert engine.explored == {"w": int((mask | new).sum())}
    kept_zero = ~new
    assert not bits(weight)[torch.tensor(kept_zero)].any()


@every_algorithm
def test_an_update_touches_only_what_left_or_came(name: str) -> None:
    """Kept weights and their optimizer state have the same bits after the update as before."""
    weight = nn.Parameter(torch.randn(20, 10, generator=torch.Generator().manual_seed(0)))
    preset = algorithm(name, interval=1)
    engine = Sparsifier({"w": weight}, None, {"w": 100}, algorithm=preset, seed=3)
    state = {weight: {"moment": torch.randn(20, 10), "step": torch.tensor(7.0), "factor": torch.ones(20, 1)}}
    before = copy.deepcopy([weight.detach(), state[weight]["moment"], engine.masks["w"]])
    weight.grad = torch.randn(20, 10, generator=torch.Generator().manual_seed(1))
    engine.before_step()
    engine.after_step(state, at_rest)
    moment, mask = state[weight]["moment"], engine.masks["w"]
    stayed = before[2] & mask
    changed = before[2] ^ mask
    if name in ("set", "rigl"):  # a weight that left and came back has restarted
        restarted = stayed & (weight == 0)
        stayed, changed = stayed & ~restarted, changed | restarted
    assert torch.equal(bits(weight)[stayed], bits(before[0])[stayed])
    resets = name in ("set", "rigl")
    assert torch.equal(bits(moment)[~changed], bits(before[1])[~changed])
    assert bool((moment[changed] == 0.5).all()) == (resets or not changed.any())
    if not resets:
        assert same_bits(moment, before[1])
    assert (state[weight]["step"].item(), state[weight]["factor"].sum().item()) == (7.0, 20.0)
    assert changed.any() == (name != "static")
    assert not bits(weight)[changed].any()
    assert engine.last_grown == ({} if name == "static" else {"w": int((mask & ~before[2]).sum())})


def test_mean_starts_second_moments_at_the_mean_of_the_settled() -> None:
    weight = nn.Parameter(torch.tensor([4.0, 3.0, 1.0, 0.0, 0.0, 0.0]))
    mask = torch.tensor([True, True, True, False, False, False])
    preset = dst.rigl(total_steps=10, interval=1, drop_fraction=dst.Constant(0.34), newcomers="mean")
    engine = Sparsifier({"w": weight}, {"w": mask}, {"w": 3}, algorithm=preset, seed=0)
    weight.grad = torch.tensor([0.0, 0, 0, 0, 5, 0])
    state = {weight: {"exp_avg": torch.arange(1.0, 7), "exp_avg_sq": torch.arange(1.0, 7)}}
    engine.before_step()
    engine.after_step(state, lambda _: {"exp_avg": 0.0, "exp_avg_sq": 0.0})
    assert engine.masks["w"].tolist() == [True, True, False, False, True, False]
    assert state[weight]["exp_avg"].tolist() == [1, 2, 0, 4, 0, 6]
    assert state[weight]["exp_avg_sq"].tolist() == [1, 2, 0, 4, 1.5, 6]


@settings(deadline=None, max_examples=30)
@given(
    name=st.sampled_from(sorted(RULES)),
    sparsity=st.floats(0, 0.99),
    seed=st.integers(-(2**70), 2**70),
    optimizer=st.sampled_from(["AdamW", "SGD", "RMSprop", "Adagrad"]),
    interval=st.integers(1, 4),
    fraction=st.floats(0, 1),
)
def test_counts_are_exact_for_any_sparsity_seed_and_schedule(
    name: str, sparsity: float, seed: int, optimizer: str, interval: int, fraction: float
) -> None:
    model = mlp(seed=1)
    preset = replace(algorithm(name, interval=interval), drop_fraction=dst.Constant(fraction))
    wrapped = dst.SparseOptimizer(
        getattr(optim, optimizer)(model.parameters(), lr=0.01, weight_decay=0.1),
        model,
        sparsity=sparsity,
        distribution=dst.uniform,
        algorithm=preset,
        seed=seed,
    )
    counts = dict(wrapped.sparsifier.counts)
    assert sum(counts.values()) == round((1 - sparsity) * 256)
    explored = dict(wrapped.sparsifier.explored)
    assert explored == counts
    ever = {key: mask.clone() for key, mask in wrapped.masks.items()}
    for step in range(1, 9):
        train(model, wrapped, [step])
        assert_exact(wrapped, counts)
        for key, mask in wrapped.masks.items():
            ever[key] |= mask
        assert wrapped.sparsifier.explored == {key: int(mask.sum()) for key, mask in ever.items()}


# --- NaN, frozen and malformed ------------------------------------------------------------------


@every_algorithm
def test_nan_weights_leave_first_and_never_spread(name: str) -> None:
    weight = nn.Parameter(torch.randn(30, generator=torch.Generator().manual_seed(0)))
    engine = Sparsifier({"w": weight}, None, {"w": 20}, algorithm=algorithm(name, interval=1), seed=0)
    broken = engine.masks["w"].nonzero()[:2, 0]
    weight.data[broken] = math.nan
    weight.grad = torch.full((30,), math.nan)
    engine.before_step()
    engine.after_step(NO_STATE, at_rest)
    assert int(weight.isnan().sum()) <= 2
    assert not weight.detach()[~engine.masks["w"]].any()
    assert engine.counts == {"w": int(engine.masks["w"].sum())} == {"w": 20}


@dataclass(frozen=True)
class Scripted:
    """An algorithm with the least that is asked of one: it returns what it was told to."""

    answer: Any
    due: Any = EVERY_STEP

    def update(self, step: int, counts: Any, evidence: Any, memory: Any) -> Any:
        return self.answer(step, counts, evidence, memory)


def test_an_algorithm_may_leave_all_traits_out_and_move_counts() -> None:
    """A pair is an update; counts follow the masks, memory comes back at the next update and is saved."""
    seen: list[Any] = []

    def answer(step: int, counts: Any, evidence: Any, memory: Any) -> Any:
        seen.append((step, dict(counts), dict(memory), sorted(evidence), len(evidence)))
        assert evidence["w"].grad is None
        assert evidence["w"].keys is None
        assert evidence["w"].state == {}
        with pytest.raises(KeyError):
            evidence["other"]
        new = evidence["w"].mask.clone()
        new[step % 6] = True
        return {"w": new}, {"steps": [*memory.get("steps", []), step], "tensor": torch.ones(2)}

    weight = nn.Parameter(torch.ones(6))
    mask = torch.tensor([True, False, False, False, False, False])
    engine = Sparsifier({"w": weight}, {"w": mask}, {"w": 1}, algorithm=Scripted(answer), seed=0)
    for _ in range(2):
        engine.before_step()
        engine.after_step(NO_STATE, at_rest)
    assert [entry[0] for entry in seen] == [1, 2]
    assert seen[0][1:] == ({"w": 1}, {}, ["w"], 1)
    assert seen[1][1] == {"w": 2}
    assert seen[1][2]["steps"] == [1]
    assert engine.counts == {"w": 3}
    assert engine.masks["w"].tolist() == [True, True, True, False, False, False]
    assert weight.tolist() == [1, 0, 0, 0, 0, 0]
    saved = engine.state_dict()
    saved["memory"]["tensor"].zero_()
    saved["memory"]["steps"].append(99)
    assert engine.state_dict()["memory"]["steps"] == [1, 2]
    assert engine.state_dict()["memory"]["tensor"].tolist() == [1, 1]
    saved = engine.state_dict()
    engine.load_state_dict(saved)
    saved["memory"]["tensor"].zero_()  # what was loaded is a copy, too
    saved["memory"]["steps"].append(99)
    assert engine.state_dict()["memory"]["steps"] == [1, 2]
    assert engine.state_dict()["memory"]["tensor"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"v": torch.ones(6, dtype=torch.bool)}, "a mask for 'v', which is not a sparse tensor"),
        ({"w": torch.ones(6)}, r"a torch.float32 mask of shape \(6,\) for 'w'; expected bool"),
        ({"w": torch.ones(5, dtype=torch.bool)}, r"expected bool of shape \(6,\)"),
    ],
)
def test_wrong_masks_of_an_algorithm_are_refused_before_anything_is_written(masks: Any, message: str) -> None:
    weight = nn.Parameter(torch.ones(6))
    engine = Sparsifier(
        {"w": weight}, None, {"w": 2}, algorithm=Scripted(lambda *_: (masks, {"new": 1})), seed=0
    )
    before = copy.deepcopy([engine.masks, weight.detach(), engine.counts, engine.state_dict()["memory"]])
    with pytest.raises(ValueError, match=message):
        engine.after_step(NO_STATE, at_rest)
    after = [engine.masks, weight.detach(), engine.counts, engine.state_dict()["memory"]]
    assert same_bits(before, after)


def test_a_share_of_the_sparsity_is_followed_by_the_rounding_of_the_start() -> None:
    """Gradual pruning: dense at first, then the exact count of each share, at last the target."""
    model = mlp()
    schedule = dst.Cubic(0.0, steps=8, end=1.0)
    gradual = dst.PruneAndGrow(due=dst.Every(2), sparsity=schedule)
    wrapped = dst.SparseOptimizer(
        optim.SGD(model.parameters(), lr=0.01),
        model,
        sparsity=0.8,
        distribution=dst.uniform,
        algorithm=gradual,
    )
    engine = wrapped.sparsifier
    assert engine.counts == {"0.weight": 160, "3.weight": 96}
    assert engine.targets == {"0.weight": 32, "3.weight": 19}
    previous = dict(engine.counts)
    for step in range(1, 13):
        train(model, wrapped, [step])
        if step % 2 == 0:
            share = schedule(step)
            assert sum(engine.counts.values()) == round(256 - share * (256 - 51))
        assert all(engine.counts[key] <= previous[key] for key in previous)
        previous = dict(engine.counts)
        assert_exact(wrapped, previous)
    assert engine.counts == engine.targets


def test_dense_weights_train_behind_the_mask() -> None:
    """The base moves a dense copy; the model holds it masked outside of the step."""

    @dataclass(frozen=True)
    class Behind:
        due: Any = EVERY_THIRD
        dense_weights: bool = True
        masks_gradients: bool = False

        def update(self, step: int, counts: Any, evidence: Any, memory: Any) -> Any:
            return {name: dst.draw(evidence[name].weight.abs(), counts[name]) for name in counts}, memory

    model, shadow = mlp(), mlp()
    optimizer = dst.SparseOptimizer(
        optim.SGD(model.parameters(), lr=0.1),
        model,
        sparsity=0.5,
        distribution=dst.uniform,
        algorithm=Behind(),
    )
    names = list(optimizer.masks)
    for step in range(1, 10):
        optimizer.zero_grad()
        loss_at(model, step).backward()
        with torch.no_grad():
            for (name, p), q in zip(model.named_parameters(), shadow.parameters(), strict=True):
                q.sub_(p.grad, alpha=0.1)
                assert name not in names or p.grad.count_nonzero() > optimizer.sparsifier.counts[name]
        optimizer.step()
        for name in names:
            dense = dict(shadow.named_parameters())[name].detach()
            if step % 3 == 0:
                assert torch.equal(optimizer.masks[name], dst.draw(dense.abs(), dense.numel() // 2))
            assert torch.equal(optimizer.sparsifier.weights(name), dense)
            expected = dense.where(optimizer.masks[name], 0.0)
            assert torch.equal(bits(optimizer.sparsifier.params[name]), bits(expected))


# --- on_change -----------------------------------------------------------------------------------


@every_algorithm
def test_on_change_tells_masks_and_the_need_for_dense_gradients(name: str) -> None:
    """Called for every tensor at registration and load, and later only when something changed."""
    model = mlp()
    interval = 4
    optimizer = sparse(model, optim.SGD, name, interval=interval)
    engine = optimizer.sparsifier
    heard: list[tuple[str, bool]] = []
    known: dict[str, Tensor] = {}

    def callback(layer: str, mask: Tensor, dense: bool) -> None:
        heard.append((layer, dense))
        known[layer] = mask

    engine.on_change(callback)
    layers = ["0.weight", "3.weight"]
    always = name == "slak"
    assert heard == [(layer, always) for layer in layers]
    heard.clear()
    told = always
    for step in range(1, 13):
        train(model, optimizer, [step])
        needed = always or (name == "rigl" and (step + 1) % interval == 0)
        updated = name != "static" and step % interval == 0
        assert heard == ([(layer, needed) for layer in layers] if updated or needed != told else []), step
        told = needed
        heard.clear()
        for layer, mask in optimizer.masks.items():
            assert known[layer] is mask  # changed in place: who holds it sees every update
    optimizer.load_state_dict(optimizer.state_dict())
    assert heard == [(layer, told) for layer in layers]
    heard.clear()
    optimizer.mask_gradients()
    optimizer.state_dict()
    copy.deepcopy((model, optimizer))[1].step()
    assert not heard  # a copy does not report to the original's listeners


def test_on_change_is_silent_for_tensors_an_update_left_alone() -> None:
    model = mlp()
    optimizer = dst.SparseOptimizer(
        optim.SGD(model.parameters(), lr=0.1),
        model,
        sparsity={"0.weight": 0.5, "3.weight": 0.0},
        algorithm=algorithm("set", interval=1),
    )
    heard: list[str] = []
    optimizer.sparsifier.on_change(lambda layer, *_: heard.append(layer))
    heard.clear()
    train(model, optimizer, [1])
    assert heard == ["0.weight"]


def test_on_change_follows_a_mask_that_had_to_move() -> None:
    """A new memory layout makes a new mask tensor; who holds the old one is told."""
    model = convnet()
    optimizer = sparse(model, optim.SGD, "static")
    known: dict[str, Tensor] = {}
    optimizer.sparsifier.on_change(lambda layer, mask, _: known.__setitem__(layer, mask))
    model.to(memory_format=torch.channels_last)
    optimizer.step()
    assert all(known[layer] is mask for layer, mask in optimizer.masks.items())


# --- No waiting for the device -------------------------------------------------------------------

READS = {
    "item",
    "tolist",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "nonzero",
    "cpu",
    "numpy",
    "unique",
}
READING_OPS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.index.Tensor,
}


class Reads(TorchDispatchMode):
    """Collect the operations that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READING_OPS:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class MethodReads(TorchFunctionMode):
    """Collect the tensor methods that return Python values."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READS:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_reads() -> Iterator[list[str]]:
    ops, methods = Reads(), MethodReads()
    everything: list[str] = []
    with ops, methods:
        yield everything
    everything += ops.seen + methods.seen


@every_algorithm
@pytest.mark.parametrize("base", [partial(optim.SGD, momentum=0.9), partial(optim.AdamW, foreach=True)])
def test_a_step_without_update_reads_nothing_back(name: str, base: Any) -> None:
    """On a GPU each such read would stall the queue; only a due step may."""
    model = convnet()
    optimizer = sparse(model, base, name, interval=4)
    plain = convnet()
    dense = base(plain.parameters())
    for step in range(1, 9):
        set_gradients(dict(model.named_parameters()), step)
        set_gradients(dict(plain.named_parameters()), step)
        with counted_reads() as reads:
            optimizer.mask_gradients()
            optimizer.step()
            optimizer.zero_grad()
        with counted_reads() as own:
            dense.step()
        if name == "static" or step % 4:
            assert reads == own, step
        else:
            assert len(reads) > len(own)  # the probe does see reads where there are some


# --- Determinism ---------------------------------------------------------------------------------


@every_algorithm
def test_masks_depend_on_neither_memory_layout_nor_order_of_tensors(name: str) -> None:
    def run(*, backwards: bool, last: bool) -> dict[str, Tensor]:
        model = convnet()
        if last:
            model.to(memory_format=torch.channels_last)
        params = dict(model.named_parameters())
        chosen = dst.select(model)
        optimizer = dst.SparseOptimizer(
            optim.SGD(model.parameters(), lr=0.125),
            dict(reversed(chosen.items())) if backwards else chosen,
            sparsity=0.6,
            distribution=dst.uniform,
            algorithm=algorithm(name, interval=2),
            seed=11,
        )
        for step in range(1, 8):
            set_gradients(params, step)
            optimizer.step()
        weights = {key: p.detach() for key, p in chosen.items()}
        return {key: optimizer.masks[key].contiguous() for key in weights} | {
            f"{key} value": value.contiguous() for key, value in weights.items()
        }

    expected = run(backwards=False, last=False)
    assert same_bits(expected, run(backwards=True, last=False))
    assert same_bits(expected, run(backwards=False, last=True))


def test_no_dense_gradient_is_kept_between_updates() -> None:
    """The copy lives from early masking to the update, and not at all where none is read."""
    model = mlp()
    optimizer = sparse(model, optim.SGD, "rigl", interval=3)
    kept = optimizer.sparsifier._dense_gradients
    for step in range(1, 7):
        optimizer.zero_grad()
        loss_at(model, step).backward()
        optimizer.mask_gradients()
        assert bool(kept) == (step % 3 == 0)
        first = {key: value.data_ptr() for key, value in kept.items()}
        optimizer.mask_gradients()
        assert first == {key: value.data_ptr() for key, value in kept.items()}  # kept once
        optimizer.step()
        assert not kept


# --- torch.compile -------------------------------------------------------------------------------


@pytest.mark.slow
@every_algorithm
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_is_never_recompiled(name: str) -> None:
    """Ten mask updates under fullgraph: one compilation, and the masks and weights of the eager run."""
    torch._dynamo.reset()
    eager, inner = mlp(), mlp()
    compiled = torch.compile(inner, fullgraph=True, backend="aot_eager")
    first = sparse(eager, optim.AdamW, name, interval=2, total_steps=1000)
    second = sparse(compiled, optim.AdamW, name, interval=2, total_steps=1000)
    assert list(first.masks) == list(second.masks)
    torch._dynamo.utils.counters.clear()
    frames = 0
    for step in range(1, 22):
        train(eager, first, [step])
        second.zero_grad()
        loss_at(compiled, step).backward()
        second.step()
        if step == 1:
            frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert same_bits(first.masks, second.masks)
    assert frames == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == frames
    assert not torch._dynamo.utils.counters["recompiles"]
    assert second.sparsifier.updates == (0 if name == "static" else 10)
    assert same_bits(eager.state_dict(), inner.state_dict())
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_default_backend_agrees_too() -> None:
    """Inductor rounds differently, so the gradients are given and the outputs compared."""
    torch._dynamo.reset()
    model = mlp()
    compiled = torch.compile(model, fullgraph=True)
    optimizer = sparse(model, optim.AdamW, "set", interval=1)
    x = torch.randn(8, 10, generator=torch.Generator().manual_seed(0))
    torch._dynamo.utils.counters.clear()
    for step in range(1, 12):
        set_gradients(dict(model.named_parameters()), step)
        optimizer.step()
        with torch.no_grad():
            assert torch.allclose(compiled(x), model(x), atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
