"""MEST with the hard and with the soft bound against references of their own."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.updates import check_values, largest, run, smallest

import dst
from dst.methods.elastic import MagnitudeAndGradient, SoftBound, Stages
from dst.schedules import Constant, Every

TARGET = {"fc.weight": 36, "conv.weight": 28, "head.weight": 18, "dense.weight": 20}


def scores(weights: list[float], gradients: list[float], factor: float) -> list[float]:
    # In float32, as the library adds.
    return (torch.tensor(weights).abs() + factor * torch.tensor(gradients).abs()).tolist()


def staged(step: int, end: int, fraction: float) -> float:
    return fraction if step < math.ceil(0.75 * end) else fraction / 2


@pytest.mark.parametrize("factor", [0.0, 0.01, 2.0])
def test_mest_is_the_reference(factor: float):
    updates, differ = 0, 0
    for one in run(dst.mest(total_steps=320, interval=2, gradient_weight=factor), 300):
        fraction = staged(one.step, 240, 0.2)
        kept = {"dense.weight": one.before["dense.weight"]}
        for name, active in one.before.items():
            if name in kept:
                continue
            k = math.floor(fraction * len(active))
            leaving = smallest(scores(one.weights[name], one.gradients[name], factor), active, k)
            differ += leaving != smallest(scores(one.weights[name], one.gradients[name], 0), active, k)
            kept[name] = active - leaving
            expected = kept[name] | largest(one.keys[name], one.inactive(name, kept[name]), k)
            assert one.after[name] == expected
        assert {name: len(active) for name, active in one.after.items()} == TARGET
        check_values(one, kept)
        updates += 1
    assert updates == 119
    assert bool(differ) == (factor > 0)


def test_mest_soft_is_the_reference():
    last, most, before = 236, 0, 0.0
    for one in run(dst.mest_soft(total_steps=320, interval=4), 300):
        fraction = 0.0 if one.step >= last else staged(one.step, 240, 0.2)
        kept = {"dense.weight": one.before["dense.weight"]}
        for name, active in one.before.items():
            if name in kept:
                continue
            surplus = len(active) - TARGET[name]
            assert surplus == math.floor(before * TARGET[name])
            score = scores(one.weights[name], one.gradients[name], 0.01)
            kept[name] = active - smallest(score, active, surplus)
            k = math.floor(fraction * TARGET[name])
            assert one.after[name] == kept[name] | largest(one.keys[name], one.inactive(name, kept[name]), k)
            most = max(most, k)
        check_values(one, kept)
        before = fraction
    assert one.step == last
    assert most == 7
    assert one.optimizer.sparsifier.counts == TARGET  # exact in the end


def test_a_soft_bound_never_grows_beyond_the_tensor():
    algorithm = dst.mest_soft(total_steps=30, interval=1, drop_fraction=Constant(1.0))
    sparsity = {"fc.weight": 0.1, "head.weight": 0.9}
    counts = [one.optimizer.sparsifier.counts.copy() for one in run(algorithm, 30, sparsity=sparsity)]
    assert counts[0] == {"fc.weight": 120, "head.weight": 8}
    assert counts[-1] == {"fc.weight": 108, "head.weight": 4}


def test_a_fraction_out_of_range_raises():
    with pytest.raises(ValueError, match=r"drop_fraction must lie in \[0, 1\], got 1.5 at step 1"):
        list(run(dst.mest_soft(total_steps=30, interval=1, drop_fraction=Constant(1.5)), 2))
    for preset in (dst.mest, dst.mest_soft):
        with pytest.raises(ValueError, match=r"drop_fraction must lie in \[0, 1\]"):
            preset(total_steps=10, interval=1, drop_fraction=-0.1)
        with pytest.raises(ValueError, match="gradient_weight must be at least 0"):
            preset(total_steps=10, interval=1, gradient_weight=math.nan)


def test_what_the_presets_are():
    rule = dst.PruneAndGrow(
        due=Every(10, stop=750), prune=MagnitudeAndGradient(0.01), drop_fraction=Stages((0.2, 0.1), (563,))
    )
    assert dst.mest(total_steps=1000, interval=10) == rule
    assert dst.mest_soft(total_steps=1000, interval=10) == SoftBound(rule, last=740)
    assert rule.needs == {"grad", "keys"}


def test_nan_leaves_first_and_a_score_without_gradient_raises():
    weight, grad = torch.tensor([1.0, 5.0, 3.0]), torch.tensor([0.0, math.nan, 0.0])
    seen = dst.Evidence(weight, torch.ones(3, dtype=torch.bool), grad, {}, None)
    assert dst.prune(MagnitudeAndGradient()(seen), seen.mask, 1).tolist() == [True, False, True]
    with pytest.raises(ValueError, match="was given no gradient"):
        MagnitudeAndGradient()(dst.Evidence(weight, seen.mask, None, {}, None))


def test_stages_that_do_not_fit_raise():
    for values, until in (((1.0,), (3,)), ((1.0, 2.0, 3.0), (5, 4))):
        with pytest.raises(ValueError, match="stages need rising steps and one value more"):
            Stages(values, until)
