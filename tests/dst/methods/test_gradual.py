"""Gradual magnitude pruning and GraNet against references of their own, update by update."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.updates import SHAPES, Seen, check_values, largest, magnitudes, run, smallest
from torch import nn

import dst
from dst.methods.gradual import GlobalFirst
from dst.schedules import Constant, Cosine, Cubic, Every

SIZES = {name: math.prod(shape) for name, shape in SHAPES.items()}
TOTAL = sum(SIZES.values())
FINAL = {"fc.weight": 36, "conv.weight": 28, "head.weight": 18, "dense.weight": 20}


def reached(step: int, start: int, length: int, initial: float) -> float:
    progress = min(max(step - start, 0), length) / length
    return 1 - (1 - initial) * (1 - progress) ** 3


def wanted(part: float) -> int:
    return TOTAL - round(part * (TOTAL - sum(FINAL.values())))


def test_gmp_is_the_reference():
    algorithm = dst.gmp(total_steps=200, interval=4, start=0.1, stop=0.75)
    totals, due = [], []
    for one in run(algorithm, 200):
        due.append(one.step)
        for name, active in one.before.items():
            gone = len(active) - len(one.after[name])
            assert gone >= 0
            assert one.after[name] == active - smallest(magnitudes(one.weights[name]), active, gone)
            part = reached(one.step, 20, 128, 0.0)
            exact = SIZES[name] - part * (SIZES[name] - FINAL[name])
            assert abs(len(one.after[name]) - exact) < 1 + 1e-9
        check_values(one, one.after)
        totals.append(sum(map(len, one.after.values())))
        assert totals[-1] == wanted(reached(one.step, 20, 128, 0.0))
    assert due == list(range(20, 149, 4))
    assert totals[0] == TOTAL  # at t_0 the sparsity is that of the start
    assert one.optimizer.sparsifier.counts == FINAL
    assert totals == sorted(totals, reverse=True)


def global_reference(one: Seen, least: dict[str, int], total: int) -> dict[str, set[int]]:
    """Take weights out one at a time, smallest first, passing by tensors that are down to their least."""
    kept = {name: set(active) for name, active in one.before.items()}
    names = list(kept)
    order = sorted(
        (abs(one.weights[name][i]), names.index(name), i) for name in names for i in one.before[name]
    )
    for _, at, i in order:
        if sum(map(len, kept.values())) <= total:
            break
        if len(kept[names[at]]) > least[names[at]]:
            kept[names[at]].remove(i)
    return kept


@pytest.mark.parametrize("quiet", [1.0, 1e-3], ids=["even", "one layer quiet"])
@pytest.mark.parametrize("initial", [0.0, 0.5 / 0.7])
def test_granet_is_the_reference(initial: float, quiet: float):
    steps, length = 180, 120
    algorithm = dst.granet(total_steps=steps, interval=3, initial=initial, stop=2 / 3)
    totals, regrown, at_floor, lengths = [], 0, 0, set()
    for one in run(algorithm, steps, scale={"head.weight": quiet}):
        part = reached(one.step, 0, length, initial)
        kept = global_reference(one, dict.fromkeys(SIZES, 1), wanted(part))
        fraction = 0.005 + 0.495 * (1 + math.cos(math.pi * (one.step / steps))) / 2
        stayed = dict(kept)
        for name, active in kept.items():
            expected = active
            if len(active) < SIZES[name]:
                k = math.ceil(fraction * len(active))
                stayed[name] = active - smallest(magnitudes(one.weights[name]), active, k)
                candidates = one.inactive(name, stayed[name])
                expected = stayed[name] | largest(magnitudes(one.gradients[name]), candidates, k)
                regrown += len(expected & one.before[name] - stayed[name])
            assert one.after[name] == expected
            assert len(expected) >= 1
            at_floor += len(expected) == 1
        check_values(one, stayed)
        totals.append(sum(map(len, one.after.values())))
        assert totals[-1] == wanted(part)
        lengths.add(tuple(map(len, one.after.values())))
    assert len(totals) == 59  # also after the pruning, up to the end but for the last step
    assert totals == sorted(totals, reverse=True)
    assert totals[39:] == [sum(FINAL.values())] * 20
    assert regrown > 10  # globally pruned or dropped, and grown in the same update
    assert len(lengths) > 20
    if quiet < 1:
        assert at_floor > 10


def test_the_start_of_granet_is_a_part_of_the_final_sparsity():
    for sparsity in (0.9, 0.6):
        weight = nn.Parameter(torch.randn(50, 40))
        optimizer = dst.SparseOptimizer(
            torch.optim.SGD([weight], lr=0.1),
            {"w": weight},
            sparsity=sparsity,
            algorithm=dst.granet(total_steps=100, interval=10, initial=0.5 / sparsity),
        )
        assert optimizer.sparsifier.counts == {"w": 1000}


def test_without_regeneration_granet_is_global_pruning():
    algorithm = dst.granet(total_steps=100, interval=5, drop_fraction=0.0)
    for one in run(algorithm, 99):
        assert all(one.after[name] <= one.before[name] for name in one.after)
        assert one.after == global_reference(
            one, dict.fromkeys(SIZES, 1), wanted(reached(one.step, 0, 65, 0.0))
        )


def test_a_higher_floor_holds():
    algorithm = replace(dst.granet(total_steps=100, interval=5), floor=9)
    scale = {"head.weight": 1e-3, "fc.weight": 1e-3}
    least = {
        name: min(map(len, (one.after[name] for one in run(algorithm, 99, scale=scale)))) for name in SIZES
    }
    assert min(least.values()) == 9


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_weights_leave_or_stay_but_counts_hold(bad: float):
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    weight[0] = bad
    dense = torch.ones(6, 6, dtype=torch.bool)
    seen = {name: dst.Evidence(weight, dense, weight.clone(), {}, None) for name in "ab"}
    algorithm = dst.granet(total_steps=100, interval=1, drop_fraction=0.0)
    outcome = algorithm.update(50, {"a": 20, "b": 17}, seen, {})
    assert sum(int(mask.count_nonzero()) for mask in outcome.masks.values()) == 37
    for mask in outcome.masks.values():
        assert bool(mask[0].any()) == (bad == math.inf)


def test_masks_that_are_given_are_never_filled_up():
    params = {"w": nn.Parameter(torch.randn(10, 10))}
    masks = {"w": torch.rand(10, 10) < 0.3}
    optimizer = dst.SparseOptimizer(
        torch.optim.SGD([params["w"]], lr=0.1),
        params,
        masks=masks,
        algorithm=dst.granet(total_steps=50, interval=2),
    )
    count = int(masks["w"].count_nonzero())
    for _ in range(50):
        params["w"].grad = torch.randn(10, 10)
        optimizer.step()
        assert optimizer.sparsifier.counts == {"w": count}


def test_what_the_presets_are():
    assert dst.gmp(total_steps=1000) == dst.PruneAndGrow(
        due=Every(100, stop=701), grow=dst.Magnitude(), sparsity=Cubic(0.0, 700, 1.0)
    )
    assert dst.gmp(total_steps=1000).needs == frozenset()
    rule = dst.PruneAndGrow(
        due=Every(1000, stop=160_000),
        grow=dst.Gradient(),
        drop_fraction=Cosine(0.5, 160_000, end=0.005),
        rounding=math.ceil,
        sparsity=Cubic(0.5, 110_000, 1.0),
    )
    algorithm = dst.granet(total_steps=160_000, interval=1000, initial=0.5)
    assert algorithm == GlobalFirst(rule)
    assert algorithm.needs == {"grad"}
    assert dst.granet(total_steps=100, interval=10, stop=1.0).due == Every(10, stop=101)
    own = Constant(0.1)
    assert dst.granet(total_steps=100, interval=10, drop_fraction=own).rule.drop_fraction is own


@pytest.mark.parametrize("preset", [dst.gmp, dst.granet])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interval": 76}, "no interval of 76 steps fits between step 0 and step"),
        ({"interval": 0}, "interval must be at least 1"),
        ({"start": 0.9}, r"start is a fraction of the training in \[0, stop\), got start=0.9"),
        ({"start": -0.1}, "start is a fraction"),
        ({"stop": 1.5}, "stop is a fraction"),
        ({"total_steps": 0}, "total_steps must be at least 1"),
    ],
)
def test_numbers_out_of_range_raise(preset, arguments: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        preset(**({"total_steps": 100, "interval": 5} | arguments))


@pytest.mark.parametrize("initial", [-0.1, 1.1, math.nan])
def test_a_start_that_is_no_part_raises(initial: float):
    with pytest.raises(ValueError, match="initial is a part of the final sparsity"):
        dst.granet(total_steps=100, interval=5, initial=initial)
