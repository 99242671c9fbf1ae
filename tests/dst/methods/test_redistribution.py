"""SNFS against a reference of its own, and the apportionment against laws that define it."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from helpers.updates import SPARSITY, check_values, largest, magnitudes, run, smallest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import dst
from dst.methods.redistribution import Momentum, Redistributed, apportioned
from dst.schedules import Constant, Cosine, Every

BASES = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
}
SPARSE = [name for name, value in SPARSITY.items() if value]


def momentum(state: dict[str, list[float]]) -> list[float]:
    if "momentum_buffer" in state:
        return [abs(value) for value in state["momentum_buffer"]]
    # In float32, as the library divides.
    moment, square = torch.tensor(state["exp_avg"]), torch.tensor(state["exp_avg_sq"])
    return (moment.abs() / (square.sqrt() + 1e-8)).tolist()


def one_by_one(total: int, share: dict[str, float], room: dict[str, int]) -> dict[str, int]:
    """Fill whoever is due more than its room, one at a time, then round the rest by largest remainder."""
    given, rest, names = dict.fromkeys(room, 0), total, [name for name in room if room[name]]
    while True:
        whole = sum(Fraction(share[name]) for name in names)
        due = {name: rest * Fraction(share[name]) / whole for name in names}
        over = [name for name in names if due[name] >= room[name]]
        if not over:
            break
        for name in over:
            given[name] = room[name]
            rest -= room[name]
            names.remove(name)
        if not names:
            return given
    given |= {name: math.floor(due[name]) for name in names}
    order = sorted(names, key=lambda name: (given[name] - due[name], name))
    for name in order[: total - sum(given.values())]:
        given[name] += 1
    return given


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("loud", [1.0, 30.0], ids=["even", "one layer loud"])
def test_snfs_is_the_reference(base: str, loud: float):
    total, end = sum((120, 189, 36, 20)), 300
    moved = spilled = updates = 0
    for one in run(dst.snfs(total_steps=end, interval=2), end, base=BASES[base], scale={"head.weight": loud}):
        fraction = 0.25 * (1 + math.cos(math.pi * (one.step / end)))
        score = {name: momentum(one.state[name]) for name in SPARSE}
        kept, share = {"dense.weight": one.before["dense.weight"]}, {}
        for name in SPARSE:
            active = one.before[name]
            k = min(math.ceil(fraction * len(active)), len(active) - 1)
            kept[name] = active - smallest(magnitudes(one.weights[name]), active, k)
            values = torch.tensor(score[name], dtype=torch.float64)[sorted(active)]
            share[name] = float(values.mean())
        freed = sum(len(one.before[name] - kept[name]) for name in SPARSE)
        room = {name: len(one.inactive(name, kept[name])) for name in SPARSE}
        coming = one_by_one(freed, share, room)
        for name in SPARSE:
            assert one.after[name] == kept[name] | largest(
                score[name], one.inactive(name, kept[name]), coming[name]
            )
            assert len(one.after[name]) >= 1
        assert len(one.after["dense.weight"]) == 20
        assert sum(map(len, one.after.values())) == sum(map(len, one.before.values())) < total
        check_values(one, kept, regrown="keep")
        updates += 1
        moved += any(len(one.after[name]) != len(one.before[name]) for name in SPARSE)
        spilled += any(coming[name] == room[name] for name in SPARSE)
    assert updates == 149
    assert moved > 40
    if loud > 1 and base == "SGD":
        assert spilled > 100


def test_the_bases_moments_are_those_of_dense_gradients():
    for one in run(dst.snfs(total_steps=40, interval=5), 40, base=BASES["Adam"]):
        for name in SPARSE:
            assert any(one.state[name]["exp_avg"][i] for i in one.inactive(name, one.before[name]))


def test_no_layer_dies():
    all_leave = Redistributed(
        dst.PruneAndGrow(
            due=Every(1),
            grow=Momentum(),
            drop_fraction=Constant(1.0),
            rounding=math.ceil,
            masks_gradients=False,
            newcomers="keep",
            regrown="keep",
        )
    )
    # Both others could take all, so nothing but the floor is left in the quiet one.
    counts = [len(one.after["fc.weight"]) for one in run(all_leave, 60, scale={"fc.weight": 1e-9})]
    assert counts[-1] == min(counts) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_momentum_moves_nothing_between_layers(bad: float):
    mask = torch.tensor([True, True, False, False])
    seen = {
        name: dst.Evidence(torch.tensor([1.0, 2.0, 0.0, 0.0]), mask, None, {"momentum_buffer": m}, None)
        for name, m in {"a": torch.full((4,), bad), "b": torch.full((4,), bad)}.items()
    }
    algorithm = Redistributed(
        dst.PruneAndGrow(due=Every(1), grow=Momentum(), drop_fraction=Constant(0.5), masks_gradients=False)
    )
    outcome = algorithm.update(1, {"a": 2, "b": 2}, seen, {})
    assert {name: int(m.count_nonzero()) for name, m in outcome.masks.items()} == {"a": 2, "b": 2}


def test_a_base_without_momentum_raises():
    weight = nn.Parameter(torch.randn(6, 6))
    for base in (torch.optim.RMSprop([weight]), torch.optim.Adagrad([weight])):
        optimizer = dst.SparseOptimizer(
            base, {"w": weight}, sparsity=0.5, algorithm=dst.snfs(total_steps=9, interval=1)
        )
        weight.grad = torch.randn(6, 6)
        with pytest.raises(ValueError, match=r"keeps no momentum, only \[.*use SGD with momentum"):
            optimizer.step()


def test_a_tensor_without_gradient_keeps_its_mask():
    params = {name: nn.Parameter(torch.randn(6, 6)) for name in "ab"}
    optimizer = dst.SparseOptimizer(
        BASES["SGD"](list(params.values())),
        params,
        sparsity=0.5,
        algorithm=dst.snfs(total_steps=9, interval=1),
    )
    mask = optimizer.masks["b"].clone()
    for _ in range(4):
        params["a"].grad = torch.randn(6, 6)
        optimizer.step()
    assert torch.equal(optimizer.masks["b"], mask)
    assert optimizer.sparsifier.counts == {"a": 18, "b": 18}


@given(st.data())
def test_an_apportionment_is_exact_fits_and_is_fair(data: st.DataObject):
    names = [f"n{i}" for i in range(data.draw(st.integers(1, 6)))]
    room = {name: data.draw(st.integers(0, 50)) for name in names}
    numbers = st.sampled_from([0.0, 1e-30, 0.5, 1.0, 3.0, 1e20, math.nan, math.inf])
    share = {name: data.draw(numbers) for name in names}
    otherwise = {name: data.draw(st.integers(0, 5)) for name in names}
    total = data.draw(st.integers(0, sum(room.values())))
    given_ = apportioned(total, share, room, otherwise=otherwise)
    assert list(given_) == names
    assert sum(given_.values()) == total
    assert all(0 <= given_[name] <= room[name] for name in names)
    parts = {name: Fraction(share[name]) if math.isfinite(share[name]) else Fraction(0) for name in names}
    for a in names:
        for b in names:  # who has room left is not passed by one with less to claim
            if given_[a] < room[a] and parts[a] > parts[b]:
                assert given_[a] >= given_[b]


def test_an_apportionment_that_does_not_fit_raises():
    with pytest.raises(ValueError, match="5 weights do not fit into the room of 4"):
        apportioned(5, {"a": 1.0}, {"a": 4}, otherwise={"a": 1})


def test_spilling_by_hand():
    room = {"a": 3, "b": 10, "c": 10}
    assert apportioned(13, {"a": 8, "b": 1, "c": 1}, room, otherwise=room) == {"a": 3, "b": 5, "c": 5}
    assert apportioned(12, {"a": 8, "b": 0, "c": 0}, room, otherwise={"a": 1, "b": 2, "c": 1}) == {
        "a": 3,
        "b": 6,
        "c": 3,
    }


def test_what_snfs_is():
    rule = dst.snfs(total_steps=1000, interval=50, stop=0.5).rule
    assert rule == dst.PruneAndGrow(
        due=Every(50, stop=500),
        grow=Momentum(),
        drop_fraction=Cosine(0.5, 500),
        rounding=math.ceil,
        masks_gradients=False,
        newcomers="keep",
        regrown="keep",
    )
    assert dst.snfs(total_steps=1000).needs == {"state"}
