"""SET with signs apart and unfired-first growth against references of their own."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from helpers.updates import check_values, largest, magnitudes, run, smallest
from hypothesis import given
from hypothesis import strategies as st

import dst
from dst.methods.evolution import SignedMagnitude, UnfiredFirst
from dst.schedules import Constant, Cosine, Every


def signs_apart(weights: list[float], active: set[int], k: int) -> set[int]:
    """Give each of k departures to the sign that is owed most by Webster's method, closest to zero first."""
    signs = [[i for i in active if weights[i] > 0], [i for i in active if weights[i] < 0]]
    neither = sorted(active - {*signs[0], *signs[1]})
    leaving = neither[:k]
    queues = [sorted(sign, key=lambda i: (abs(weights[i]), i)) for sign in signs]
    taken = [0, 0]
    for _ in range(k - len(leaving)):
        open_to = [at for at in (0, 1) if taken[at] < len(queues[at])]
        at = min(open_to, key=lambda a: (Fraction(2 * taken[a] + 1, 2 * len(queues[a])), queues[a][taken[a]]))
        leaving.append(queues[at][taken[at]])
        taken[at] += 1
    return set(leaving)


@pytest.mark.parametrize("fraction", [0.3, 0.77])
def test_set_signed_is_the_reference(fraction: float):
    updates = 0
    for one in run(dst.set_signed(total_steps=200, interval=1, drop_fraction=fraction), 200):
        kept = {"dense.weight": one.before["dense.weight"]}
        for name, active in one.before.items():
            if name in kept:
                continue
            k = math.floor(fraction * len(active))
            leaving = signs_apart(one.weights[name], active, k)
            kept[name] = active - leaving
            for sign in (1, -1):  # of each sign its own fraction, to the next weight
                among = {i for i in active if sign * one.weights[name][i] > 0}
                gone = among & leaving
                assert gone == smallest(magnitudes(one.weights[name]), among, len(gone))
                assert abs(len(gone) - fraction * len(among)) < 2
            assert one.after[name] == kept[name] | largest(one.keys[name], one.inactive(name, kept[name]), k)
        check_values(one, kept)
        updates += 1
    assert updates == 199


@given(
    st.lists(
        st.sampled_from([-3.0, -1.0, -0.0, 0.0, 0.5, 1.0, math.inf, -math.inf]), min_size=1, max_size=40
    ),
    st.data(),
)
def test_pruning_by_signed_magnitude_is_websters_method(values: list[float], data: st.DataObject):
    mask = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    active = {i for i, on in enumerate(mask) if on}
    k = data.draw(st.integers(0, len(active)))
    seen = dst.Evidence(torch.tensor(values), torch.tensor(mask), None, {}, None)
    kept = dst.prune(SignedMagnitude()(seen), seen.mask, k)
    assert {i for i in active if not kept[i]} == signs_apart(values, active, k)


def test_nan_leaves_first():
    weight = torch.tensor([1.0, math.nan, -3.0])
    seen = dst.Evidence(weight, torch.ones(3, dtype=torch.bool), None, {}, None)
    assert dst.prune(SignedMagnitude()(seen), seen.mask, 1).tolist() == [True, False, True]


@pytest.mark.parametrize("interval", [1, 3])
def test_itop_is_the_reference(interval: int):
    end = 120
    fired: dict[str, set[int]] = {}
    second_hand = fresh = 0
    for one in run(dst.itop(total_steps=end, interval=interval), end):
        fraction = 0.005 + 0.495 * (1 + math.cos(math.pi * (one.step / end))) / 2
        kept = {"dense.weight": one.before["dense.weight"]}
        for name, active in one.before.items():
            if name in kept:
                continue
            ever = fired.setdefault(name, set(active))
            k = math.ceil(fraction * len(active))
            kept[name] = active - smallest(magnitudes(one.weights[name]), active, k)
            candidates = one.inactive(name, kept[name])
            first = largest(one.keys[name], candidates - ever, k)
            then = largest(one.keys[name], candidates & ever, k - len(first))
            assert one.after[name] == kept[name] | first | then
            fired[name] = ever | one.after[name]
            fresh, second_hand = fresh + len(first), second_hand + len(then)
            assert one.optimizer.sparsifier.explored[name] == len(fired[name])
        check_values(one, kept)
    assert fresh > 100
    assert second_hand > 100


def test_unfired_first_explores_faster_than_random():
    unfired, random = dst.itop(total_steps=60, interval=3), dst.itop(total_steps=60, interval=3).rule
    ends = [list(run(algorithm, 15))[-1].optimizer.sparsifier.explored for algorithm in (unfired, random)]
    assert sum(ends[0].values()) > sum(ends[1].values())


def test_only_random_growth_goes_unfired_first():
    with pytest.raises(ValueError, match="unfired-first growth is random growth, but the rule grows by Grad"):
        UnfiredFirst(dst.rigl(total_steps=1000))


def test_what_the_presets_are():
    assert dst.set_signed(total_steps=1000) == dst.PruneAndGrow(
        due=Every(100, stop=1000), prune=SignedMagnitude(), drop_fraction=Constant(0.3)
    )
    assert dst.itop(total_steps=10_000) == UnfiredFirst(
        dst.PruneAndGrow(
            due=Every(1500, stop=10_000),
            drop_fraction=Cosine(0.5, 10_000, end=0.005),
            rounding=math.ceil,
        )
    )
    for preset in (dst.set_signed, dst.itop):
        with pytest.raises(ValueError, match=r"drop_fraction must lie in \[0, 1\]"):
            preset(total_steps=10, interval=1, drop_fraction=1.1)
        with pytest.raises(ValueError, match="total_steps must be at least 1"):
            preset(total_steps=0)
