"""How sparse each tensor is: a global sparsity becomes layer sparsities, and these become exact counts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from fractions import Fraction
from numbers import Real

from torch import Tensor

from .selection import near_names

Distribution = Callable[[Mapping[str, Tensor], float], dict[str, float]]


def uniform(params: Mapping[str, Tensor], sparsity: float, *, dense_first: bool = False) -> dict[str, float]:
    """Give every tensor the same sparsity: s_l = S.

    Args:
        params: Name to tensor, in the model's order.
        sparsity: Global fraction of zeros S, in [0, 1].
        dense_first: Keep the first tensor dense without making the others sparser, as RigL's "uniform" does;
            the model then holds more than (1 - S) of its weights.

    Returns:
        Name to layer sparsity.

    Raises:
        TypeError: If `sparsity` is not a number.
        ValueError: If `sparsity` is outside [0, 1], or `params` or one of its tensors is empty.

    Examples:
        >>> import torch
        >>> uniform({"a": torch.zeros(4, 4), "b": torch.zeros(2, 4)}, 0.5)
        {'a': 0.5, 'b': 0.5}

    Source:
        Evci et al., Rigging the Lottery, ICML 2020, section 3 (1) "Uniform".
    """
    sparsity = check_sparsity(sparsity)
    sparsities = dict.fromkeys(_sizes(params), sparsity)
    if dense_first:
        sparsities[next(iter(sparsities))] = 0.0
    return sparsities


def uniform_plus(params: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    """Keep the first convolution dense, at least 20 % of the last linear layer, and share the rest equally.

    The two exceptions are compensated: the other tensors share one sparsity, chosen so that the whole still
    has sparsity S. Gale et al. state the exceptions and report the sparsity of the whole; the released code
    of the LAMP paper, whose baseline bears the name "Uniform+", fixes the total in the same way, and only so
    are methods compared at equal numbers of weights. The first convolution is the first tensor of three or
    more dimensions, the last linear layer the last of two dimensions.

    Args:
        params: Name to tensor, in the model's order.
        sparsity: Global fraction of zeros S, in [0, 1].

    Returns:
        Name to layer sparsity.

    Raises:
        TypeError: If `sparsity` is not a number.
        ValueError: If `sparsity` is outside [0, 1] or higher than the two exceptions allow, or `params` or
            one of its tensors is empty.

    Examples:
        >>> import torch
        >>> shapes = {"conv": (4, 1, 5, 5), "hidden": (30, 30), "head": (10, 10)}
        >>> params = {name: torch.zeros(shape) for name, shape in shapes.items()}
        >>> {name: round(value, 3) for name, value in uniform_plus(params, 0.8).items()}
        {'conv': 0.0, 'hidden': 0.889, 'head': 0.8}

    Source:
        Gale et al., The State of Sparsity in Deep Neural Networks, 2019, section 5.2; Lee et al.,
        Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021, section 4 (baseline "Uniform+")
        and its released code.
    """
    asked = check_sparsity(sparsity)
    sizes = _sizes(params)
    first = next((name for name in params if params[name].dim() >= 3), None)
    last = next((name for name in reversed(list(params)) if params[name].dim() == 2), None)
    total, tail = sum(sizes.values()), sizes.get(last or "", 0)
    free = total - sizes.get(first or "", 0) - tail
    zeros, most = Fraction(asked) * total, free + Fraction(4, 5) * tail
    if zeros > most:
        raise ValueError(
            f"uniform_plus keeps {first!r} dense and a fifth of {last!r}, so these tensors reach a sparsity "
            f"of {float(most / total):.6g} at most, but {asked!r} was asked for; ask for less or use uniform"
        )
    shared = zeros / (free + tail) if zeros else Fraction(0)
    if shared > Fraction(4, 5):
        shared = (zeros - Fraction(4, 5) * tail) / free
    sparsities = dict.fromkeys(sizes, float(shared))
    if first is not None:
        sparsities[first] = 0.0
    if last is not None:
        sparsities[last] = float(min(shared, Fraction(4, 5)))
    return sparsities


def er(params: Mapping[str, Tensor], sparsity: float, *, power_scale: float = 1.0) -> dict[str, float]:
    """Spread the weights by the Erdos-Renyi rule: density proportional to (n_in + n_out) / (n_in n_out).

    Densities are min(1, epsilon p_l ** power_scale) with the one epsilon that keeps (1 - S) of all weights;
    the kernel's height and width play no part. It is solved in rational arithmetic, so the result does not
    depend on the order of the tensors.

    Args:
        params: Name to tensor; n_out and n_in are the first two dimensions as they stand.
        sparsity: Global fraction of zeros S, in [0, 1].
        power_scale: Exponent of the raw density; 0 gives uniform.

    Returns:
        Name to layer sparsity.

    Raises:
        TypeError: If `sparsity` is not a number.
        ValueError: If `sparsity` is outside [0, 1], or `params` or one of its tensors is empty.

    Examples:
        >>> import torch
        >>> er({"a": torch.zeros(10, 10), "b": torch.zeros(40, 40)}, 0.9)
        {'a': 0.66, 'b': 0.915}

    Source:
        Mocanu et al., Scalable training of artificial neural networks with adaptive sparse connectivity,
        2018, Methods; Evci et al., Rigging the Lottery, ICML 2020, section 3 (1).
    """
    shapes = {name: tuple(tensor.shape)[:2] for name, tensor in params.items()}
    return _water_filling(_sizes(params), shapes, check_sparsity(sparsity), power_scale)


def erk(params: Mapping[str, Tensor], sparsity: float, *, power_scale: float = 1.0) -> dict[str, float]:
    """Spread the weights by the Erdos-Renyi-Kernel rule: density proportional to sum(shape) / prod(shape).

    Densities are min(1, epsilon p_l ** power_scale), p_l = (n_out + n_in + h + w) / (n_out n_in h w), with
    the one epsilon that keeps (1 - S) of all weights. It is solved in rational arithmetic, so the result does
    not depend on the order of the tensors. The shape is used as it stands: a depthwise kernel has n_in = 1.

    Args:
        params: Name to tensor.
        sparsity: Global fraction of zeros S, in [0, 1].
        power_scale: Exponent of the raw density; 0 gives uniform.

    Returns:
        Name to layer sparsity.

    Raises:
        TypeError: If `sparsity` is not a number.
        ValueError: If `sparsity` is outside [0, 1], or `params` or one of its tensors is empty.

    Examples:
        >>> import torch
        >>> sparsities = erk({"conv": torch.zeros(8, 4, 3, 3), "head": torch.zeros(10, 80)}, 0.8)
        >>> {name: round(value, 4) for name, value in sparsities.items()}
        {'conv': 0.8741, 'head': 0.7733}

    Source:
        Evci et al., Rigging the Lottery, ICML 2020, section 3 (1) "Erdos-Renyi-Kernel".
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in params.items()}
    return _water_filling(_sizes(params), shapes, check_sparsity(sparsity), power_scale)


def by_pattern(params: Mapping[str, Tensor], mapping: Mapping[str, float]) -> dict[str, float]:
    """Read each tensor's sparsity from a mapping of names or globs.

    A tensor's exact name wins; otherwise the first pattern, in the mapping's order, that matches it.

    Args:
        params: Name to tensor.
        mapping: Name or glob (case-sensitive) to sparsity in [0, 1].

    Returns:
        Name to layer sparsity, in the order of `params`.

    Raises:
        ValueError: If a tensor has no match, a pattern matches no tensor, or a sparsity is outside [0, 1].
        TypeError: If a sparsity is not a number.

    Examples:
        >>> import torch
        >>> params = {"stem.weight": torch.zeros(4, 4), "head.weight": torch.zeros(4, 4)}
        >>> by_pattern(params, {"*": 0.9, "head.weight": 0.5})
        {'stem.weight': 0.9, 'head.weight': 0.5}
    """
    values = {
        pattern: check_sparsity(value, f"sparsity of {pattern!r}") for pattern, value in mapping.items()
    }
    for pattern in values:
        if pattern not in params and not any(fnmatchcase(name, pattern) for name in params):
            raise ValueError(
                f"sparsity pattern {pattern!r} matches no selected tensor; near names: "
                f"{near_names(pattern, params)}"
            )
    return {name: values[_first_match(name, values)] for name in params}


def warn_if_mostly_dense(sparsities: Mapping[str, float]) -> None:
    """Warn when a distribution leaves more than half of the tensors dense although it makes others sparse.

    Erdos-Renyi rules do this to networks of many small tensors: ERK at sparsity 0.4 keeps 67 of SLaK-T's 95
    tensors dense, all its large kernels among them.

    Args:
        sparsities: Name to layer sparsity.

    Examples:
        >>> warn_if_mostly_dense({"a": 0.0, "b": 0.5})
    """
    dense = sum(value == 0.0 for value in sparsities.values())
    if len(sparsities) > dense > len(sparsities) / 2:
        warnings.warn(
            f"the distribution leaves {dense} of {len(sparsities)} selected tensors dense; "
            "use uniform or snip if these were meant to be sparse",
            UserWarning,
            stacklevel=2,
        )


def check_sparsity(value: object, what: str = "sparsity") -> float:
    """Return a sparsity as a float, or say what is wrong with it.

    Args:
        value: A real number in [0, 1].
        what: What the number is, for the message.

    Returns:
        The number as a Python float.

    Raises:
        TypeError: If `value` is not a number (a bool is not).
        ValueError: If `value` is NaN or outside [0, 1].

    Examples:
        >>> check_sparsity(0.9)
        0.9
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{what} must be a number in [0, 1], got {value!r} of type {type(value).__name__}")
    if not 0.0 <= float(value) <= 1.0:
        raise ValueError(f"{what} must lie in [0, 1] (the fraction of zeros), got {value!r}")
    return float(value)


def _sizes(params: Mapping[str, Tensor]) -> dict[str, int]:
    if not params:
        raise ValueError("a distribution needs at least one tensor, got an empty mapping")
    for name, tensor in params.items():
        if tensor.numel() == 0:
            raise ValueError(f"tensor {name!r} of shape {tuple(tensor.shape)} has no elements; leave it out")
    return {name: tensor.numel() for name, tensor in params.items()}


def _water_filling(
    sizes: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]], sparsity: float, power_scale: float
) -> dict[str, float]:
    """Solve sum_l min(1, epsilon p_l) N_l = (1 - S) N, with p_l = (sum(shape) / prod(shape)) ** power_scale.

    The left side grows with epsilon, so tensors are capped in falling order of p_l until none of the rest
    exceeds one; in rational arithmetic the outcome is the unique solution, whatever the order of equal p_l.
    """
    raw = {name: _raw_density(shape, power_scale) for name, shape in shapes.items()}
    budget = (1 - Fraction(sparsity)) * sum(sizes.values())
    mass = sum((raw[name] * size for name, size in sizes.items()), Fraction(0))
    epsilon = budget / mass
    capped: set[str] = set()
    for name in sorted(sizes, key=raw.__getitem__, reverse=True):
        if epsilon * raw[name] < 1:
            break
        capped.add(name)
        budget -= sizes[name]
        mass -= raw[name] * sizes[name]
        epsilon = budget / mass if mass else Fraction(0)
    return {name: 0.0 if name in capped else float(1 - epsilon * raw[name]) for name in sizes}


def _raw_density(shape: tuple[int, ...], power_scale: float) -> Fraction:
    density = Fraction(sum(shape), math.prod(shape)) if shape else Fraction(1)
    return density if power_scale == 1.0 else Fraction(float(density) ** power_scale)


def _first_match(name: str, patterns: Mapping[str, float]) -> str:
    if name in patterns:
        return name
    for pattern in patterns:
        if fnmatchcase(name, pattern):
            return pattern
    raise ValueError(
        f"no pattern of the sparsity mapping matches {name!r}; add it, or a last pattern '*', or leave it "
        f"out of the selection (patterns: {', '.join(map(repr, patterns))})"
    )
