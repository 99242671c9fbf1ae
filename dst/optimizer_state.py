"""What an optimizer remembers of one weight, and what it would remember of a fresh one."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_said: set[str] = set()  # what the log was told, once each

# Running means of squared gradients by the names torch's optimizers and most others give them.
SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "exp_inf", "sum", "acc_delta"})


def values_at_rest(base: torch.optim.Optimizer) -> Callable[[nn.Parameter], Mapping[str, float]]:
    """Return a function that tells what the optimizer holds for an entry that has seen zero gradients only.

    Zero is not always right: Adamax holds 1e-8, Rprop the learning rate, Adagrad its initial sum. So a
    fresh optimizer of the same class and options is run one step on a tiny zero parameter with a zero
    gradient, and its state is read. Only state with one entry a weight is reported: step counts and
    factored moments belong to no single weight.

    Args:
        base: The optimizer; it is not touched.

    Returns:
        From one of its parameters to: name of the state, such as "exp_avg", to the value at rest. It runs
        an optimizer once for each parameter group and kind of shape.

    Examples:
        >>> weight = nn.Parameter(torch.ones(2, 2))
        >>> values_at_rest(torch.optim.Adagrad([weight], initial_accumulator_value=0.5))(weight)
        {'sum': 0.5}
    """
    group_of = {id(p): group for group in base.param_groups for p in group["params"]}
    known: dict[object, Mapping[str, float]] = {}

    def at_rest(parameter: nn.Parameter) -> Mapping[str, float]:
        group = group_of[id(parameter)]
        # Sides that differ tell state of the tensor's shape from a preconditioner of (rows, rows).
        shape = tuple(min(2 + place, size) for place, size in enumerate(parameter.shape))
        key = (id(group), shape, parameter.dtype, parameter.device)
        if key not in known:
            known[key] = _probed(base, group, parameter, shape)
        return known[key]

    return at_rest


def _probed(
    base: torch.optim.Optimizer, group: dict[str, Any], parameter: nn.Parameter, shape: tuple[int, ...]
) -> Mapping[str, float]:
    tiny = nn.Parameter(torch.zeros(shape).to(parameter))
    tiny.grad = torch.zeros_like(tiny)
    try:
        probe = _fresh(base, group, tiny)
        # Below torch's hook wrapper: global step hooks are not told of a step that is not a step.
        step = type(probe).step
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            getattr(step, "__wrapped__", step)(probe)
        state = cast("Mapping[str, Any]", probe.state[tiny])
    except Exception as error:
        # A class that cannot be built from its own groups, such as one with extra constructor
        # arguments, is the user's: say what is assumed of it rather than refuse to train.
        _say_once(
            f"could not find out what {type(base).__name__} holds for a fresh weight ({error}); its "
            "per-weight state is reset to 0"
        )
        state = cast("Mapping[str, Any]", base.state.get(parameter, {}))
        return {key: 0.0 for key, value in state.items() if _is_per_weight(value, parameter)}
    return {key: float(value.reshape(-1)[0]) for key, value in state.items() if _is_per_weight(value, tiny)}


def reset_(
    state: Mapping[str, Any],
    at_rest: Mapping[str, float],
    changed: Tensor,
    newcomers: Tensor | None,
    active: Tensor,
) -> None:
    """Set the per-weight optimizer state of changed entries to what it is at rest.

    Args:
        state: The optimizer's state of one tensor; written to.
        at_rest: From `values_at_rest`.
        changed: bool: entries that left or came.
        newcomers: bool: entries whose second moments start at the mean over the active entries that
            did not change; None to leave them at rest too.
        active: bool: the new mask.
    """
    for key, value in at_rest.items():
        entries = state.get(key)
        if not isinstance(entries, Tensor) or entries.shape != changed.shape:
            continue
        if not entries.is_floating_point():
            _say_once(
                f"the optimizer's {key} is {entries.dtype}, not a float: it is not reset for new weights"
            )
            continue
        entries.masked_fill_(changed, value)
        if newcomers is not None and key in SECOND_MOMENTS:
            settled = entries.masked_select(active & ~newcomers)
            if settled.numel():
                entries.masked_fill_(newcomers, settled.mean())


def _fresh(base: torch.optim.Optimizer, group: dict[str, Any], tiny: nn.Parameter) -> torch.optim.Optimizer:
    """Build an optimizer of the same class and options over one other parameter."""
    accepted = inspect.signature(type(base).__init__).parameters
    defaults = {key: value for key, value in base.defaults.items() if key in accepted}
    options = {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
    return type(base)([{**options, "params": [tiny]}], **defaults)


def _is_per_weight(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == parameter.shape


def _say_once(sentence: str) -> None:
    if sentence not in _said:
        _said.add(sentence)
        logger.warning(sentence)
