"""How many weights are active: exact integers, from layer sparsities and on the way to them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

from .distribution import check_sparsity


def active_counts(
    sizes: Mapping[str, int],
    sparsities: Mapping[str, float],
    *,
    sparsity: float | None = None,
    floor: int = 1,
) -> dict[str, int]:
    """Turn layer sparsities into exact numbers of active weights, by largest remainder.

    The counts sum to round(sum_l (1 - s_l) N_l); each is within one of (1 - s_l) N_l unless the floor moves
    it; equal remainders are settled by name, so the order of the tensors does not matter. A tensor below the
    floor is lifted to it, and the tensors with the most active weights pay, one weight at a time; a tensor of
    sparsity 0 pays only when no other can.

    Args:
        sizes: Name to number of weights N_l.
        sparsities: Name to layer sparsity s_l in [0, 1], for the same names.
        sparsity: The global sparsity S asked for. If sum_l (1 - s_l) N_l agrees with (1 - S) N to 1e-9
            (relative), the total is exactly round((1 - S) N), whatever the layer sparsities lost to rounding.
        floor: Least number of active weights of a tensor (at most its size); a tensor of sparsity exactly 1
            has none.

    Returns:
        Name to number of active weights, Python ints, in the order of `sizes`.

    Raises:
        ValueError: If the names differ, a sparsity is outside [0, 1], or the floor needs more than the total.
        TypeError: If a sparsity is not a number.

    Examples:
        >>> active_counts({"a": 10, "b": 10, "c": 1000}, {"a": 0.75, "b": 0.75, "c": 0.999})
        {'a': 3, 'b': 2, 'c': 1}

    Source:
        Largest remainder: A. Hamilton's method of apportionment.
    """
    if sizes.keys() != sparsities.keys():
        raise ValueError(
            "sizes and sparsities must hold the same names, but "
            f"{sorted(sizes.keys() ^ sparsities.keys())} are in only one of them"
        )
    layer = {name: check_sparsity(sparsities[name], f"sparsity of {name!r}") for name in sizes}
    total = _total(sizes, layer, sparsity)
    counts = _largest_remainder(sizes, layer, total)
    return _lift_to_floor(counts, sizes, layer, floor)


def partial_counts(sizes: Mapping[str, int], targets: Mapping[str, int], reached: float) -> dict[str, int]:
    """Return the active counts when a part of the final sparsity is reached.

    Of R = sum_l R_l weights that are inactive in the end, round(reached R) are taken away now, apportioned
    to the tensors in proportion to R_l by the divisor method of Webster. Unlike largest remainders it is
    monotone: while `reached` rises no tensor's count rises, so a gradual pruning never has to bring a
    weight back for the sake of rounding. At 1 every tensor is at its target.

    Args:
        sizes: Name to the number of weights.
        targets: Name to the active weights in the end, at most the size.
        reached: Part of the final sparsity, in [0, 1]; 0 is dense.

    Returns:
        Name to active weights.

    Raises:
        ValueError: If `reached` lies outside [0, 1].

    Examples:
        >>> partial_counts({"a": 10, "b": 5}, {"a": 4, "b": 2}, 0.5)
        {'a': 7, 'b': 4}

    Source:
        Balinski and Young, Fair Representation, 1982: divisor methods and house monotonicity.
    """
    if not 0 <= reached <= 1:
        raise ValueError(f"the part of the final sparsity that is reached must lie in [0, 1], got {reached}")
    final = {name: size - targets[name] for name, size in sizes.items()}
    total = sum(final.values())
    asked = round(Fraction(reached) * total)
    gone = {name: (2 * asked * part + total) // (2 * total) if total else 0 for name, part in final.items()}
    difference = asked - sum(gone.values())
    while difference > 0:  # at most one round per tensor: rounding misses by less than half of one each
        name = max(final, key=lambda n: (Fraction(final[n], 2 * gone[n] + 1), n))
        gone[name] += 1
        difference -= 1
    while difference < 0:
        name = min((n for n in final if gone[n]), key=lambda n: (Fraction(final[n], 2 * gone[n] - 1), n))
        gone[name] -= 1
        difference += 1
    return {name: size - gone[name] for name, size in sizes.items()}


def _total(sizes: Mapping[str, int], sparsities: Mapping[str, float], sparsity: float | None) -> int:
    # Grouping equal sparsities makes uniform's total Python's own round((1 - s) * N).
    groups: dict[float, int] = {}
    for name, value in sparsities.items():
        groups[value] = groups.get(value, 0) + sizes[name]
    exact = math.fsum((1.0 - value) * size for value, size in groups.items())
    if sparsity is not None:
        asked = (1.0 - check_sparsity(sparsity)) * sum(sizes.values())
        if math.isclose(exact, asked, rel_tol=1e-9):
            return round(asked)
    return round(exact)


def _largest_remainder(
    sizes: Mapping[str, int], sparsities: Mapping[str, float], total: int
) -> dict[str, int]:
    quotas = {name: (1 - Fraction(sparsities[name])) * size for name, size in sizes.items()}
    counts = {name: math.floor(quota) for name, quota in quotas.items()}
    order = sorted(counts, key=lambda name: (counts[name] - quotas[name], name))
    missing = total - sum(counts.values())
    while missing > 0:
        for name in order:
            if missing > 0 and counts[name] < sizes[name]:
                counts[name] += 1
                missing -= 1
    for name in reversed(order):  # the global sparsity may round one below quotas that are all whole
        if missing < 0 and counts[name] > 0:
            counts[name] -= 1
            missing += 1
    return counts


def _lift_to_floor(
    counts: dict[str, int], sizes: Mapping[str, int], sparsities: Mapping[str, float], floor: int
) -> dict[str, int]:
    least = {name: 0 if sparsities[name] == 1.0 else min(floor, sizes[name]) for name in sizes}
    if sum(least.values()) > sum(counts.values()):
        raise ValueError(
            f"{sum(counts.values())} active weights cannot give each of {len(sizes)} tensors the least "
            f"number of {floor}, {sum(least.values())} in all; lower the sparsity or select fewer tensors"
        )
    lifted = {name: max(count, least[name]) for name, count in counts.items()}
    for _ in range(sum(lifted.values()) - sum(counts.values())):
        givers = [name for name in lifted if lifted[name] > least[name]]
        giver = min(givers, key=lambda name: (sparsities[name] == 0.0, -lifted[name], name))
        lifted[giver] -= 1
    return lifted
