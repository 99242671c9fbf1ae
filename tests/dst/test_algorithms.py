"""The presets against references written from the papers, step by step; algorithms are values."""

from __future__ import annotations

import base64
import copy
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import dst
from dst.algorithms import PruneAndGrow, Update
from dst.schedules import Constant, Cosine, Cubic, Every, InversePower, Never
from dst.scores import Evidence, Gradient, Magnitude, Random

SHAPES = {"fc.weight": (12, 10), "conv.weight": (7, 3, 3, 3), "dense.weight": (4, 5)}
SPARSITY = {"fc.weight": 0.7, "conv.weight": 0.85, "dense.weight": 0.0}
BASES: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}
AT_REST = {"momentum_buffer": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0}


# --- References, from the papers --------------------------------------------------------------------
#
# A network is name -> parameter, a mask is a set of active flat positions, and everything is done one
# weight at a time. Each reference takes one gradient a step and one plain torch optimizer.

Masks = dict[str, set[int]]


def smallest(values: list[float], among: set[int], k: int) -> set[int]:
    return set(sorted(among, key=lambda i: (values[i], i))[:k])


def largest(values: list[float], among: set[int], k: int) -> set[int]:
    return set(sorted(among, key=lambda i: (-values[i], i))[:k])


def magnitudes(tensor: Tensor) -> list[float]:
    return tensor.detach().abs().reshape(-1).tolist()


def zero(tensor: Tensor, positions: set[int], value: float = 0.0) -> None:
    tensor.detach().view(-1)[sorted(positions)] = value


def inactive(parameter: Tensor, active: set[int]) -> set[int]:
    return set(range(parameter.numel())) - active


def masked_step(base: torch.optim.Optimizer, params: dict[str, nn.Parameter], masks: Masks) -> None:
    for name, parameter in params.items():
        zero(parameter.grad, inactive(parameter, masks[name]))
    base.step()
    for name, parameter in params.items():
        zero(parameter, inactive(parameter, masks[name]))


def restart(base: torch.optim.Optimizer, parameter: nn.Parameter, positions: set[int]) -> None:
    """Give weights a fresh start: value zero, and the optimizer state of a weight never trained."""
    zero(parameter, positions)
    for key, value in base.state[parameter].items():
        if key in AT_REST:
            zero(value, positions, AT_REST[key])


def rigl_step(params, masks, base, step, *, alpha, interval, end, keep_regrown=False):
    """RigL, algorithm 1: on an update step the mask update takes the place of the optimizer step."""
    if step % interval or step >= end:
        return masked_step(base, params, masks)
    fraction = alpha / 2 * (1 + math.cos(math.pi * step / end))
    for name, parameter in params.items():
        active = masks[name]
        k = math.floor(fraction * len(active))
        dropped = smallest(magnitudes(parameter), active, k)
        kept = active - dropped
        if len(active) == parameter.numel():
            continue  # a dense layer stays dense and untouched
        grown = largest(magnitudes(parameter.grad), inactive(parameter, kept), k)
        masks[name] = kept | grown
        restart(base, parameter, dropped ^ grown if keep_regrown else dropped | grown)
    return None


def set_step(params, masks, base, step, *, alpha, interval, end, seed):
    """SET with magnitudes and annealing: the update follows the step, weights come at random."""
    masked_step(base, params, masks)
    if step % interval or step >= end:
        return
    fraction = alpha / 2 * (1 + math.cos(math.pi * step / end))
    for name, parameter in params.items():
        active = masks[name]
        if len(active) == parameter.numel():
            continue
        k = math.floor(fraction * len(active))
        dropped = smallest(magnitudes(parameter), active, k)
        keys = dst.random_keys(seed, step, name, torch.arange(parameter.numel())).tolist()
        grown = largest(keys, inactive(parameter, active - dropped), k)
        masks[name] = (active - dropped) | grown
        restart(base, parameter, dropped | grown)


def slak_step(params, masks, base, step, *, alpha, interval, total, seed):
    """SLaK's published training: dense gradients, ceil, to 0.005 over the whole run, moments untouched."""
    base.step()
    for name, parameter in params.items():
        zero(parameter, inactive(parameter, masks[name]))
    if step % interval:
        return
    fraction = 0.005 + (alpha - 0.005) * (1 + math.cos(math.pi * min(step, total) / total)) / 2
    for name, parameter in params.items():
        active = masks[name]
        if len(active) == parameter.numel():
            continue
        k = math.ceil(fraction * len(active))
        dropped = smallest(magnitudes(parameter), active, k)
        keys = dst.random_keys(seed, step, name, torch.arange(parameter.numel())).tolist()
        masks[name] = (active - dropped) | largest(keys, inactive(parameter, active - dropped), k)
        zero(parameter, dropped - masks[name])  # what came back keeps its value


# --- Running both -----------------------------------------------------------------------------------


def fresh_params() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def gradients(params: dict[str, nn.Parameter], step: int) -> None:
    """Give each weight a dense gradient that depends on the step and on the weight."""
    generator = torch.Generator().manual_seed(step)
    for parameter in params.values():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.grad = noise + 0.5 * parameter.detach()


def active_sets(masks: dict[str, Tensor]) -> Masks:
    return {name: set(mask.reshape(-1).nonzero().squeeze(1).tolist()) for name, mask in masks.items()}


def run_both(algorithm, build, reference, steps: int, seed: int = 11) -> Iterator[dst.SparseOptimizer]:
    """Train with the library and with the reference; after each step all must be equal, bit for bit."""
    params, twins = fresh_params(), fresh_params()
    optimizer = dst.SparseOptimizer(
        build(list(params.values())), params, sparsity=SPARSITY, algorithm=algorithm, seed=seed
    )
    base = build(list(twins.values()))
    masks = active_sets(optimizer.masks)
    counts = {name: len(active) for name, active in masks.items()}
    assert counts == {"fc.weight": 36, "conv.weight": 28, "dense.weight": 20}
    for name, twin in twins.items():
        zero(twin, inactive(twin, masks[name]))
    for step in range(1, steps + 1):
        gradients(params, step)
        gradients(twins, step)
        optimizer.step()
        reference(twins, masks, base, step)
        assert active_sets(optimizer.masks) == masks
        assert {name: len(active) for name, active in masks.items()} == counts == optimizer.sparsifier.counts
        for name, parameter in params.items():
            assert_same_bits(parameter, twins[name])
            theirs, ours = base.state[twins[name]], optimizer.state[parameter]
            assert theirs.keys() == ours.keys()
            for key in theirs:
                assert_same_bits(ours[key], theirs[key])
        yield optimizer


def assert_same_bits(left: Tensor, right: Tensor) -> None:
    assert torch.equal(left.detach().view(torch.int32), right.detach().view(torch.int32))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("regrown", ["zero", "keep"])
def test_rigl_is_the_reference(base: str, regrown: str):
    total, end = 560, 420
    runs = run_both(
        dst.rigl(total_steps=total, interval=2, drop_fraction=0.5, regrown=regrown),
        BASES[base],
        lambda *a: rigl_step(*a, alpha=0.5, interval=2, end=end, keep_regrown=regrown == "keep"),
        430,
    )
    updates = [optimizer.sparsifier.updates for optimizer in runs]
    assert updates[-1] == 209  # every second step before the end
    assert updates[419:] == [209] * 11


@pytest.mark.parametrize("base", BASES)
def test_set_is_the_reference(base: str):
    runs = run_both(
        dst.set_(total_steps=280, interval=1, drop_fraction=0.4),
        BASES[base],
        lambda *a: set_step(*a, alpha=0.4, interval=1, end=210, seed=11),
        215,
    )
    updates = [optimizer.sparsifier.updates for optimizer in runs]
    assert updates[-1] == 209


@pytest.mark.parametrize("base", BASES)
def test_slak_is_the_reference(base: str):
    runs = run_both(
        dst.slak(total_steps=400, interval=2, drop_fraction=0.5),
        BASES[base],
        lambda *a: slak_step(*a, alpha=0.5, interval=2, total=400, seed=11),
        410,
    )
    updates = [optimizer.sparsifier.updates for optimizer in runs]
    assert updates[-1] == 205  # it never stops
    assert updates[399] == 200


def test_the_references_meet_what_they_should_tell_apart():
    # Dropped weights do come back within an update, and dense gradients do move Adam's moments; else the
    # three tests above could not see the difference between the published variants.
    seen: dict[str, Tensor] = {}
    for algorithm in (
        dst.rigl(total_steps=100, interval=2, drop_fraction=0.9),
        dst.rigl(total_steps=100, interval=2, drop_fraction=0.9, regrown="keep"),
        dst.slak(total_steps=100, interval=2, drop_fraction=0.9),
    ):
        params = fresh_params()
        optimizer = dst.SparseOptimizer(
            BASES["AdamW"](list(params.values())), params, sparsity=SPARSITY, algorithm=algorithm
        )
        for step in range(1, 5):
            gradients(params, step)
            optimizer.step()
        seen[repr(algorithm)] = params["conv.weight"].detach()
        moments = optimizer.state[params["conv.weight"]]["exp_avg_sq"]
        off = ~optimizer.masks["conv.weight"]
        assert bool((moments[off] != 0).any()) == (not algorithm.masks_gradients)
    first, second, _ = seen.values()
    assert not torch.equal(first, second)


# --- One update -------------------------------------------------------------------------------------


@st.composite
def evidences(draw: st.DrawFn) -> tuple[Evidence, int]:
    size = draw(st.integers(1, 60))
    pool = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-40, math.nan, math.inf, -math.inf])
    weight, grad = (torch.tensor(draw(st.lists(pool, min_size=size, max_size=size))) for _ in range(2))
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    keys = dst.random_keys(draw(st.integers(0, 99)), 1, "w", torch.arange(size))
    active = int(mask.count_nonzero())
    wanted = draw(st.just(active) | st.integers(0, size))
    return Evidence(weight, mask, grad, {}, keys), wanted


@given(
    evidences(),
    st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.99, 1.0]),
    st.sampled_from([Gradient(), Random(), Magnitude()]),
    st.sampled_from([math.floor, math.ceil]),
    st.sampled_from(["zero", "keep"]),
)
def test_an_update_is_exact_whatever_the_scores(case, fraction, grow, rounding, regrown):
    seen, wanted = case
    algorithm = PruneAndGrow(
        due=Every(1), grow=grow, drop_fraction=Constant(fraction), rounding=rounding, regrown=regrown
    )
    memory = {"kept": 1}
    fields = ("weight", "mask", "grad", "keys")
    before = {field: getattr(seen, field).clone() for field in fields}
    outcome = algorithm.update(1, {"w": wanted}, {"w": seen}, memory)
    for field, value in before.items():
        assert torch.equal(getattr(seen, field).view(torch.uint8), value.view(torch.uint8))
    assert outcome.memory == {"kept": 1}
    active, size = int(seen.mask.count_nonzero()), seen.mask.numel()
    if active == wanted == size:
        assert outcome.masks == {}
        return
    new = outcome.masks["w"]
    assert new is not seen.mask
    assert int(new.count_nonzero()) == wanted
    leaving = max(active - wanted, 0) + min(rounding(fraction * active), active, wanted)
    left = set((seen.mask & ~new).nonzero().squeeze(1).tolist())
    came = set((new & ~seen.mask).nonzero().squeeze(1).tolist())
    assert len(left) <= leaving
    assert len(came) <= wanted - (active - leaving)
    dropped = smallest(
        [-1.0 if math.isnan(w) else w for w in magnitudes(seen.weight)],
        set(seen.mask.nonzero().squeeze(1).tolist()),
        leaving,
    )
    assert left <= dropped
    back = dropped - left
    if regrown == "zero":
        assert set(outcome.restarted["w"].nonzero().squeeze(1).tolist()) == back
    else:
        assert outcome.restarted == {}


def test_a_dense_tensor_is_not_even_looked_at():
    class Untouchable:
        def __call__(self, evidence: Evidence) -> Tensor:
            raise AssertionError("scores of a dense tensor are not needed")

    dense = Evidence(torch.ones(3), torch.ones(3, dtype=torch.bool), None, {}, None)
    algorithm = PruneAndGrow(prune=Untouchable(), grow=Untouchable(), drop_fraction=Constant(1.0))
    assert algorithm.update(1, {"w": 3}, {"w": dense}, {}) == Update({}, {}, {})


def test_a_dense_tensor_trains_as_if_alone():
    params = fresh_params()
    optimizer = dst.SparseOptimizer(
        BASES["AdamW"](list(params.values())),
        params,
        sparsity=SPARSITY,
        algorithm=dst.set_(total_steps=400, interval=1),
    )
    alone = nn.Parameter(fresh_params()["dense.weight"].detach())
    base = BASES["AdamW"]([alone])
    for step in range(1, 51):
        gradients(params, step)
        alone.grad = params["dense.weight"].grad.clone()
        optimizer.step()
        base.step()
        assert_same_bits(params["dense.weight"], alone)
    assert optimizer.masks["dense.weight"].all()


@pytest.mark.parametrize("fraction", [-0.1, 1.0000001, math.nan, math.inf])
def test_a_drop_fraction_out_of_range_raises(fraction: float):
    seen = Evidence(torch.ones(4), torch.tensor([True, True, False, False]), None, {}, torch.arange(4))
    for schedule in (Constant(fraction), lambda step: fraction):
        with pytest.raises(ValueError, match=r"drop_fraction must lie in \[0, 1\], got .* at step 7"):
            PruneAndGrow(drop_fraction=schedule).update(7, {"w": 2}, {"w": seen}, {})
    for preset in (dst.set_, dst.rigl, dst.slak):
        with pytest.raises(ValueError, match=r"drop_fraction must lie in \[0, 1\]"):
            preset(total_steps=100, drop_fraction=fraction)


# --- Counts that follow a schedule -------------------------------------------------------------------


@pytest.mark.parametrize("grow", [Random(), Gradient()], ids=repr)
def test_a_share_makes_exact_counts_that_only_fall(grow):
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": (9, 11), "b": (3, 3, 3, 3), "c": (50,), "d": (7,), "e": (2, 3)}
    params = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in sizes.items()}
    share = Cubic(0.0, steps=200, end=1.0, offset=10)
    algorithm = PruneAndGrow(due=Every(3), grow=grow, drop_fraction=Constant(0.2), sparsity=share)
    sparsity = {"a": 0.9, "b": 0.75, "c": 0.55, "d": 0.3, "e": 0.0}
    base = torch.optim.SGD(list(params.values()), lr=0.1, momentum=0.9)
    optimizer = dst.SparseOptimizer(base, params, sparsity=sparsity, algorithm=algorithm)
    engine = optimizer.sparsifier
    final = engine.targets
    assert sum(final.values()) == round(sum((1 - s) * params[n].numel() for n, s in sparsity.items()))
    assert all(mask.all() for mask in optimizer.masks.values())  # a share of 0 is dense
    totals, latest = [], sum(p.numel() for p in params.values())
    for step in range(1, 241):
        for parameter in params.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        counts = {name: int(mask.count_nonzero()) for name, mask in optimizer.masks.items()}
        assert counts == engine.counts
        if step % 3 == 0:
            part = Fraction(share(step))
            wanted = {n: p.numel() - part * (p.numel() - final[n]) for n, p in params.items()}
            assert abs(sum(counts.values()) - sum(wanted.values())) <= Fraction(1, 2) + Fraction(1, 10**9)
            assert all(abs(counts[n] - wanted[n]) < 1 + 1e-9 for n in counts)
        else:
            assert sum(counts.values()) == latest
        latest = sum(counts.values())
        totals.append(latest)
        for name, parameter in params.items():
            assert not parameter.detach()[~optimizer.masks[name]].any()
    assert totals == sorted(totals, reverse=True)
    assert counts == final
    assert counts["e"] == 6
    assert len(set(totals)) > 30


# --- Presets ----------------------------------------------------------------------------------------


def test_what_the_presets_are():
    assert dst.static() == PruneAndGrow(due=Never())
    assert dst.set_(total_steps=1000) == PruneAndGrow(
        due=Every(100, stop=750), grow=Random(), drop_fraction=Cosine(0.3, 750)
    )
    assert dst.rigl(total_steps=1000) == PruneAndGrow(
        due=Every(100, stop=750), grow=Gradient(), drop_fraction=Cosine(0.3, 750), replaces_step=True
    )
    assert dst.slak(total_steps=1000) == PruneAndGrow(
        due=Every(100),
        grow=Random(),
        drop_fraction=Cosine(0.3, 1000, end=0.005),
        rounding=math.ceil,
        masks_gradients=False,
        newcomers="keep",
        regrown="keep",
    )


def test_arguments_of_the_presets_arrive():
    assert dst.set_(total_steps=1000, interval=7, stop=1.0).due == Every(7, stop=1000)
    assert dst.rigl(total_steps=32_000, stop=25 / 32).due == Every(100, stop=25_000)
    assert dst.rigl(total_steps=10, newcomers="mean", regrown="keep").newcomers == "mean"
    own = InversePower(0.4, 10)
    for preset in (dst.set_, dst.rigl, dst.slak):
        assert preset(total_steps=10, drop_fraction=own).drop_fraction is own
        assert preset(total_steps=10, drop_fraction=np.float32(0.5)).drop_fraction(0) == 0.5
    assert dst.slak(total_steps=10, drop_fraction=0.001).drop_fraction(10) == 0.001  # the floor never lifts


def test_needs():
    assert dst.static().needs == frozenset()
    assert dst.set_(total_steps=10).needs == {"keys"}
    assert dst.slak(total_steps=10).needs == {"keys"}
    assert dst.rigl(total_steps=10).needs == {"grad"}
    assert PruneAndGrow(due=Every(1), prune=Gradient(), grow=Random()).needs == {"grad", "keys"}
    assert PruneAndGrow(due=Every(1), prune=abs, grow=Random()).needs == {"keys"}  # any callable is a score


def test_static_is_never_due():
    assert not any(dst.static().due(step) for step in range(10_000))


@pytest.mark.parametrize("preset", [dst.set_, dst.rigl], ids=lambda p: p.__name__)
def test_when_the_presets_are_due(preset):
    due = [t for t in range(1, 1001) if preset(total_steps=1000).due(t)]
    assert due == [100, 200, 300, 400, 500, 600, 700]
    assert [t for t in range(1, 1001) if dst.slak(total_steps=1000).due(t)] == [*range(100, 1001, 100)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": 0}, "total_steps must be at least 1"),
        ({"total_steps": -5}, "total_steps must be at least 1"),
        ({"total_steps": 10, "interval": 0}, "interval must be at least 1"),
    ],
)
def test_arguments_of_nothing_raise(arguments: dict[str, int], message: str):
    for preset in (dst.set_, dst.rigl, dst.slak):
        with pytest.raises(ValueError, match=message):
            preset(**arguments)


@pytest.mark.parametrize("stop", [0, -0.5, 1.01, math.nan])
def test_a_stop_outside_the_training_raises(stop: float):
    for preset in (dst.set_, dst.rigl):
        with pytest.raises(ValueError, match="stop is a fraction of the training"):
            preset(total_steps=100, stop=stop)


def test_unknown_words_raise():
    with pytest.raises(ValueError, match="newcomers must be 'zero', 'keep' or 'mean', got 'none'"):
        PruneAndGrow(newcomers="none")
    with pytest.raises(ValueError, match="regrown must be 'zero' or 'keep', got 'mean'"):
        PruneAndGrow(regrown="mean")


# --- Values -----------------------------------------------------------------------------------------


def presets() -> list[PruneAndGrow]:
    return [
        dst.static(),
        dst.set_(total_steps=1000),
        dst.rigl(total_steps=1000),
        dst.rigl(total_steps=1000, regrown="keep"),
        dst.slak(total_steps=1000, drop_fraction=InversePower(0.4, 10)),
        PruneAndGrow(due=Every(5), sparsity=Cubic(0.0, 10, 1.0), newcomers="mean"),
    ]


def test_an_algorithm_is_a_value():
    for one, twin in zip(presets(), presets(), strict=True):
        for other in (twin, copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
            assert other == one
            assert hash(other) == hash(one)
            assert repr(other) == repr(one)
    assert len({*presets()}) == len({*map(repr, presets())}) == len(presets())


def test_the_repr_prints_the_whole_algorithm():
    assert repr(dst.slak(total_steps=1000)) == (
        "PruneAndGrow(due=Every(interval=100, start=0, stop=None), prune=Magnitude(), grow=Random(), "
        "drop_fraction=Cosine(start=0.3, steps=1000, end=0.005, offset=0), rounding=math.ceil, "
        "replaces_step=False, masks_gradients=False, newcomers='keep', regrown='keep', sparsity=None)"
    )


def test_another_process_prints_and_reads_the_same():
    code = (
        "import base64, pickle, sys; "
        "values = pickle.loads(base64.b64decode(sys.argv[1])); "
        "print(repr(values)); print(base64.b64encode(pickle.dumps(values)).decode())"
    )
    sent = base64.b64encode(pickle.dumps(presets())).decode()
    printed = subprocess.run(
        [sys.executable, "-c", code, sent],
        env={**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout.splitlines()
    assert printed[0] == repr(presets())
    assert pickle.loads(base64.b64decode(printed[1])) == presets()
    assert "0x" not in printed[0]
