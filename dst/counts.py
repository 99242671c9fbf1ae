"""How many weights are active on the way to the final sparsity: exact integers that never rise."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction


def partial_counts(sizes: Mapping[str, int], targets: Mapping[str, int], share: float) -> dict[str, int]:
    """Return the active counts when a share of the weights that shall go is gone.

    Of R = sum_l R_l weights that are inactive in the end, round(share R) are taken away now, apportioned
    to the tensors in proportion to R_l by the divisor method of Webster. Unlike largest remainders it is
    monotone: while the share rises no tensor's count rises, so a gradual pruning never has to bring a
    weight back for the sake of rounding. At share 1 every tensor is at its target.

    Args:
        sizes: Name to the number of weights.
        targets: Name to the active weights in the end, at most the size.
        share: In [0, 1].

    Returns:
        Name to active weights.

    Raises:
        ValueError: If the share lies outside [0, 1].

    Example:
        >>> partial_counts({"a": 10, "b": 5}, {"a": 4, "b": 2}, 0.5)
        {'a': 7, 'b': 4}

    Source:
        Balinski and Young, Fair Representation, 1982: divisor methods and house monotonicity.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of the final sparsity must lie in [0, 1], got {share}")
    final = {name: size - targets[name] for name, size in sizes.items()}
    total = sum(final.values())
    asked = round(Fraction(share) * total)
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
