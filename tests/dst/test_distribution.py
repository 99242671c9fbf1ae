from __future__ import annotations

import itertools
import math
import random
import warnings
from collections.abc import Mapping
from fractions import Fraction
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dst.counts import active_counts
from dst.distribution import (
    by_pattern,
    check_sparsity,
    er,
    erk,
    uniform,
    uniform_plus,
    warn_if_mostly_dense,
)

Shapes = Mapping[str, tuple[int, ...]]

side = st.integers(1, 80)
linear = st.tuples(side, side)
convolution = st.tuples(side, side, st.integers(1, 9), st.integers(1, 9))
depthwise = st.tuples(side, st.just(1), st.integers(1, 51), st.integers(1, 5))
shapes = st.dictionaries(
    st.text("abcdefgh.", min_size=1, max_size=4),
    st.one_of(linear, convolution, depthwise, st.tuples(side)),
    min_size=1,
    max_size=9,
)
sparsity_values = st.floats(0.0, 1.0)


def meta(sizes: Shapes) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in sizes.items()}


def size_of(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def bisection_oracle(sizes: list[int], raw: list[Fraction], sparsity: float) -> list[Fraction]:
    """Densities min(1, epsilon p) for the epsilon found by bisection in exact arithmetic."""
    budget = (1 - Fraction(sparsity)) * sum(sizes)
    low, high = Fraction(0), 1 / min(raw)
    for _ in range(80):
        middle = (low + high) / 2
        kept = sum(min(1, middle * p) * n for p, n in zip(raw, sizes, strict=True))
        low, high = (middle, high) if kept < budget else (low, middle)
    return [min(Fraction(1), high * p) for p in raw]


def rigl_procedure(sizes: list[int], raw: list[float], sparsity: float) -> list[float]:
    """Make the tensors with the largest raw density dense and solve again, until none exceeds one."""
    dense: set[int] = set()
    while True:
        rest = [i for i in range(len(sizes)) if i not in dense]
        if not rest:
            return [1.0] * len(sizes)
        budget = (1.0 - sparsity) * sum(sizes) - sum(sizes[i] for i in dense)
        epsilon = budget / math.fsum(raw[i] * sizes[i] for i in rest)
        top = max(raw[i] for i in rest)
        if epsilon * top <= 1.0:
            return [1.0 if i in dense else epsilon * raw[i] for i in range(len(sizes))]
        dense |= {i for i in rest if raw[i] == top}


@given(shapes, sparsity_values)
def test_uniform_gives_the_same_everywhere(sizes: Shapes, sparsity: float) -> None:
    assert uniform(meta(sizes), sparsity) == dict.fromkeys(sizes, sparsity)
    first = next(iter(sizes))
    loose = uniform(meta(sizes), sparsity, dense_first=True)
    assert loose == {name: 0.0 if name == first else sparsity for name in sizes}


@given(shapes, sparsity_values, st.sampled_from([1.0, 0.5, 2.0, 0.0]), st.booleans())
def test_erdos_renyi_equals_bisection(sizes: Shapes, sparsity: float, power: float, kernel: bool) -> None:
    rule = erk if kernel else er
    result = rule(meta(sizes), sparsity, power_scale=power)
    raw = []
    for shape in sizes.values():
        shape = shape if kernel else shape[:2]
        density = Fraction(sum(shape), math.prod(shape))
        raw.append(density if power == 1.0 else Fraction(float(density) ** power))
    expected = bisection_oracle([size_of(s) for s in sizes.values()], raw, sparsity)
    assert list(result) == list(sizes)
    for name, density in zip(sizes, expected, strict=True):
        assert abs((1 - Fraction(result[name])) - density) <= 3e-16


@given(shapes, sparsity_values)
def test_erk_equals_the_published_procedure(sizes: Shapes, sparsity: float) -> None:
    raw = [sum(shape) / math.prod(shape) for shape in sizes.values()]
    expected = rigl_procedure([size_of(s) for s in sizes.values()], raw, sparsity)
    result = erk(meta(sizes), sparsity)
    for name, density in zip(sizes, expected, strict=True):
        assert abs((1.0 - result[name]) - density) <= 1e-12


@given(shapes, sparsity_values, st.randoms(use_true_random=False), st.sampled_from([er, erk]))
def test_erdos_renyi_ignores_the_order(sizes: Shapes, sparsity: float, rng: random.Random, rule) -> None:
    shuffled = list(sizes)
    rng.shuffle(shuffled)
    assert rule(meta({name: sizes[name] for name in shuffled}), sparsity) == rule(meta(sizes), sparsity)


@given(shapes, sparsity_values, sparsity_values, st.sampled_from([er, erk]))
def test_erdos_renyi_is_monotone(sizes: Shapes, one: float, two: float, rule) -> None:
    low, high = (rule(meta(sizes), value) for value in sorted((one, two)))
    assert all(low[name] <= high[name] for name in sizes)


@given(shapes, sparsity_values, st.sampled_from([er, erk]))
def test_erdos_renyi_keeps_the_budget_and_caps_only_what_exceeds_one(
    sizes: Shapes, sparsity: float, rule
) -> None:
    result = rule(meta(sizes), sparsity)
    numbers = {name: size_of(shape) for name, shape in sizes.items()}
    total = sum(numbers.values())
    kept = sum((1 - Fraction(result[name])) * numbers[name] for name in sizes)
    assert abs(kept - (1 - Fraction(sparsity)) * total) <= Fraction(1, 10**12) * total
    assert all(0.0 <= value <= 1.0 for value in result.values())
    raw = {n: Fraction(sum(s), math.prod(s)) for n, s in sizes.items()}
    if rule is er:
        raw = {n: Fraction(sum(s[:2]), math.prod(s[:2])) for n, s in sizes.items()}
    free = [name for name in sizes if result[name] > 1e-9]
    if free:
        epsilon = (1 - Fraction(result[free[0]])) / raw[free[0]]
        assert all(epsilon * raw[name] > 1 - Fraction(1, 10**6) for name in sizes if name not in free)


def test_er_ignores_the_kernel_and_erk_does_not() -> None:
    params = meta({"small": (16, 16, 1, 1), "large": (16, 16, 9, 9)})
    assert er(params, 0.9) == pytest.approx({"small": 0.9, "large": 0.9}, abs=1e-15)
    assert erk(params, 0.9)["small"] < erk(params, 0.9)["large"]


@given(shapes, st.floats(0.0, 0.999))
def test_uniform_plus_keeps_the_total(sizes: Shapes, sparsity: float) -> None:
    params = meta(sizes)
    first = next((name for name in sizes if len(sizes[name]) >= 3), None)
    last = next((name for name in reversed(sizes) if len(sizes[name]) == 2), None)
    numbers = {name: size_of(shape) for name, shape in sizes.items()}
    most = sum(n for name, n in numbers.items() if name not in (first, last))
    most += Fraction(4, 5) * numbers.get(last, 0)
    total = sum(numbers.values())
    if Fraction(sparsity) * total > most:
        with pytest.raises(ValueError, match="uniform_plus keeps"):
            uniform_plus(params, sparsity)
        return
    result = uniform_plus(params, sparsity)
    zeros = sum(Fraction(result[name]) * numbers[name] for name in sizes)
    assert abs(zeros - Fraction(sparsity) * total) <= Fraction(1, 10**12) * total
    assert first is None or result[first] == 0.0
    assert last is None or result[last] <= 0.8
    others = {result[name] for name in sizes if name not in (first, last)}
    assert len(others) <= 1
    if last is not None and result[last] < 0.8:
        assert not others or others == {result[last]}


def test_uniform_plus_without_linear_or_convolution() -> None:
    assert uniform_plus(meta({"a": (4, 4), "b": (8, 8)}), 0.5) == {"a": 0.5, "b": 0.5}
    result = uniform_plus(meta({"a": (4, 4, 1, 1), "b": (4, 4, 3, 3)}), 0.5)
    assert result == {"a": 0.0, "b": pytest.approx(80 / 144, abs=1e-15)}


def test_by_pattern_prefers_the_exact_name_then_the_first_pattern() -> None:
    params = meta({"stem.weight": (2, 2), "block.0.weight": (2, 2), "block.1.weight": (2, 2)})
    mapping = {"block.*": 0.1, "*.weight": 0.2, "block.1.weight": 0.3}
    assert by_pattern(params, mapping) == {
        "stem.weight": 0.2,
        "block.0.weight": 0.1,
        "block.1.weight": 0.3,
    }


def test_by_pattern_reads_a_name_with_brackets_as_itself() -> None:
    assert by_pattern(meta({"blocks[0]": (2, 2)}), {"blocks[0]": 0.5}) == {"blocks[0]": 0.5}


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"block.*": 0.1}, "no pattern of the sparsity mapping matches 'stem.weight'"),
        ({"*": 0.1, "blok.*": 0.2}, "'blok.[*]' matches no selected tensor; near names: 'block.weight'"),
        ({"*": 1.1}, r"sparsity of '\*' must lie in \[0, 1\]"),
    ],
)
def test_by_pattern_says_what_is_wrong(mapping: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        by_pattern(meta({"stem.weight": (2, 2), "block.weight": (2, 2)}), mapping)


@pytest.mark.parametrize("value", [True, "0.5", None, 0.5j, [0.5], torch.tensor(0.5)])
def test_a_sparsity_is_a_number(value: object) -> None:
    with pytest.raises(TypeError, match="sparsity must be a number"):
        check_sparsity(value)
    for rule in (uniform, uniform_plus, er, erk):
        with pytest.raises(TypeError, match="sparsity must be a number"):
            rule(meta({"a": (2, 2)}), value)


@pytest.mark.parametrize("value", [-0.1, 1.0001, math.nan, math.inf, 90])
def test_a_sparsity_lies_in_the_unit_interval(value: float) -> None:
    for rule in (uniform, uniform_plus, er, erk):
        with pytest.raises(ValueError, match="must lie in"):
            rule(meta({"a": (2, 2)}), value)


def test_a_distribution_needs_weights() -> None:
    for rule in (uniform, uniform_plus, er, erk):
        with pytest.raises(ValueError, match="at least one tensor"):
            rule({}, 0.5)
        with pytest.raises(ValueError, match="'b' of shape"):
            rule(meta({"a": (2, 2), "b": (0, 2)}), 0.5)


def test_mostly_dense_warns_once() -> None:
    with pytest.warns(UserWarning, match="2 of 3 selected tensors dense") as caught:
        warn_if_mostly_dense({"a": 0.0, "b": 0.0, "c": 0.5})
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_mostly_dense({"a": 0.0, "b": 0.5})  # exactly half
        warn_if_mostly_dense({"a": 0.0, "b": 0.0})  # sparsity 0
        warn_if_mostly_dense({"a": 0.5, "b": 0.5, "c": 0.0})


# ---- counts ----

names = st.text("abcdef", min_size=1, max_size=3)
small = st.dictionaries(names, st.tuples(st.integers(1, 6), sparsity_values), min_size=1, max_size=4)
large = st.dictionaries(
    names,
    st.tuples(st.integers(1, 10**9), st.one_of(st.sampled_from([0.0, 0.4, 0.9, 0.999]), sparsity_values)),
    min_size=1,
    max_size=12,
)


def split(layers: dict[str, tuple[int, float]]) -> tuple[dict[str, int], dict[str, float]]:
    return {n: v[0] for n, v in layers.items()}, {n: v[1] for n, v in layers.items()}


@given(large)
def test_counts_sum_to_the_rounded_total(layers: dict[str, tuple[int, float]]) -> None:
    sizes, sparsities = split(layers)
    counts = active_counts(sizes, sparsities, floor=0)
    quotas = {name: (1 - Fraction(sparsities[name])) * sizes[name] for name in sizes}
    assert list(counts) == list(sizes)
    assert all(type(count) is int for count in counts.values())
    assert abs(sum(counts.values()) - sum(quotas.values())) <= Fraction(1, 2) + Fraction(1, 10**5)
    assert all(abs(counts[name] - quotas[name]) < 1 + Fraction(1, 10**5) for name in sizes)
    assert all(0 <= counts[name] <= sizes[name] for name in sizes)


@given(small)
def test_counts_are_the_nearest_integers_with_their_total(layers: dict[str, tuple[int, float]]) -> None:
    sizes, sparsities = split(layers)
    counts = active_counts(sizes, sparsities, floor=0)
    quotas = [(1 - Fraction(sparsities[name])) * sizes[name] for name in sizes]

    def distance(candidate: tuple[int, ...]) -> Fraction:
        return sum((abs(k - q) for k, q in zip(candidate, quotas, strict=True)), Fraction(0))

    candidates = itertools.product(*(range(n + 1) for n in sizes.values()))
    total = sum(counts.values())
    best = min(distance(candidate) for candidate in candidates if sum(candidate) == total)
    assert distance(tuple(counts.values())) == best


@given(st.dictionaries(names, st.integers(1, 10**8), min_size=1, max_size=12), sparsity_values)
def test_uniform_counts_have_pythons_rounded_total(sizes: dict[str, int], sparsity: float) -> None:
    counts = active_counts(sizes, dict.fromkeys(sizes, sparsity), floor=0)
    assert sum(counts.values()) == round((1 - sparsity) * sum(sizes.values()))


@given(shapes, sparsity_values, st.sampled_from([uniform, er, erk]))
def test_the_global_sparsity_fixes_the_total(sizes: Shapes, sparsity: float, rule) -> None:
    numbers = {name: size_of(shape) for name, shape in sizes.items()}
    counts = active_counts(numbers, rule(meta(sizes), sparsity), sparsity=sparsity, floor=0)
    assert sum(counts.values()) == round((1 - sparsity) * sum(numbers.values()))


def test_a_global_sparsity_that_does_not_fit_is_ignored() -> None:
    sizes, sparsities = {"a": 100, "b": 100}, {"a": 0.0, "b": 0.5}
    assert active_counts(sizes, sparsities, sparsity=0.5) == {"a": 100, "b": 50}


def test_the_total_holds_far_beyond_float32() -> None:
    sizes = {f"layer{i}": 2**24 + 1 + i for i in range(64)}
    counts = active_counts(sizes, dict.fromkeys(sizes, 0.0))
    assert counts == sizes
    counts = active_counts(sizes, dict.fromkeys(sizes, 0.3), sparsity=0.3)
    assert sum(counts.values()) == round((1 - 0.3) * sum(sizes.values()))


def test_equal_remainders_go_by_name() -> None:
    sizes = {"d": 1, "c": 1, "b": 1, "a": 1}
    assert active_counts(sizes, dict.fromkeys(sizes, 0.5), floor=0) == {"d": 0, "c": 0, "b": 1, "a": 1}


@given(large, st.randoms(use_true_random=False), st.integers(0, 3))
def test_counts_ignore_the_order(
    layers: dict[str, tuple[int, float]], rng: random.Random, floor: int
) -> None:
    shuffled = list(layers)
    rng.shuffle(shuffled)
    count = partial(active_counts, floor=floor)
    try:
        expected = count(*split(layers))
    except ValueError:
        return
    assert count(*split({name: layers[name] for name in shuffled})) == expected


@given(large, st.integers(0, 5))
def test_the_floor_is_kept_and_the_total_with_it(layers: dict[str, tuple[int, float]], floor: int) -> None:
    sizes, sparsities = split(layers)
    least = {name: 0 if sparsities[name] == 1.0 else min(floor, sizes[name]) for name in sizes}
    plain = active_counts(sizes, sparsities, floor=0)
    if sum(least.values()) > sum(plain.values()):
        with pytest.raises(ValueError, match="lower the sparsity"):
            active_counts(sizes, sparsities, floor=floor)
        return
    counts = active_counts(sizes, sparsities, floor=floor)
    assert sum(counts.values()) == sum(plain.values())
    assert all(least[name] <= counts[name] <= sizes[name] for name in sizes)
    if all(plain[name] >= least[name] for name in sizes):
        assert counts == plain


def test_the_floor_takes_from_the_largest_and_from_dense_tensors_last() -> None:
    sizes = {"dense": 50, "big": 1000, "other": 900, "tiny": 2, "small": 3}
    sparsities = {"dense": 0.0, "big": 0.98, "other": 0.98, "tiny": 0.98, "small": 0.98}
    assert active_counts(sizes, sparsities, floor=0) == {
        "dense": 50,
        "big": 20,
        "other": 18,
        "tiny": 0,
        "small": 0,
    }
    assert active_counts(sizes, sparsities) == {"dense": 50, "big": 18, "other": 18, "tiny": 1, "small": 1}
    starved = {"dense": 0.0, "tiny": 0.99, "small": 0.99}
    assert active_counts({n: sizes[n] for n in starved}, starved) == {"dense": 48, "tiny": 1, "small": 1}


def test_sparsity_one_means_none_at_all() -> None:
    assert active_counts({"a": 10, "b": 10}, {"a": 1.0, "b": 0.5}) == {"a": 0, "b": 5}
    assert active_counts({"a": 10, "b": 10}, {"a": 1.0, "b": 1.0}, sparsity=1.0) == {"a": 0, "b": 0}


def test_counts_need_the_same_names() -> None:
    with pytest.raises(ValueError, match=r"\['b', 'c'\] are in only one"):
        active_counts({"a": 1, "b": 1}, {"a": 0.5, "c": 0.5})
    with pytest.raises(ValueError, match="sparsity of 'a' must lie"):
        active_counts({"a": 1}, {"a": 1.5})
