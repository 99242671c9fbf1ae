"""What an optimizer remembers of one weight, and what it would remember of a fresh one."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_told: set[type] = set()  # optimizer classes that the log has named; each is named once

# Running means of squared gradients by the names torch's optimizers and most others give them.
SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "exp_inf", "sum", "acc_delta"})


def values_at_rest(base: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, float]:
    """Return what the optimizer holds for an entry that has seen zero gradients only.

    Zero is not always right: Adamax holds 1e-8, Rprop the learning rate, Adagrad its initial sum. So a
    fresh optimizer of the same class and options is run one step on a tiny zero parameter with a zero
    gradient, and its state is read. Only state with one entry a weight is reported: step counts and
    factored moments belong to no single weight.

    Args:
        base: The optimizer; it is not touched.
        parameter: One of its parameters.

    Returns:
        Name of the state, such as "exp_avg", to the value of an entry at rest.

    Example:
        >>> weight = nn.Parameter(torch.ones(2, 2))
        >>> values_at_rest(torch.optim.Adagrad([weight], initial_accumulator_value=0.5), weight)
        {'sum': 0.5}
    """
    group = next(g for g in base.param_groups if any(p is parameter for p in g["params"]))
    tiny = nn.Parameter(torch.zeros([min(2, size) for size in parameter.shape]).to(parameter))
    tiny.grad = torch.zeros_like(tiny)
    try:
        probe = _fresh(base, group, tiny)
        # Below torch's hook wrapper: global step hooks are not told of a step that is not a step.
        step = type(probe).step
        with torch.no_grad(), torch.random.fork_rng():
            getattr(step, "__wrapped__", step)(probe)
    except Exception as error:
        # A class that cannot be built from its own groups, such as one with extra constructor
        # arguments, is the user's: say what is assumed of it rather than refuse to train.
        if type(base) not in _told:
            _told.add(type(base))
            logger.warning(
                "could not find out what %s holds for a fresh weight (%s); its per-weight state is reset to 0",
                type(base).__name__,
                error,
            )
        state = cast("Mapping[str, Any]", base.state.get(parameter, {}))
        return {key: 0.0 for key, value in state.items() if _is_per_weight(value, parameter)}
    state = cast("Mapping[str, Any]", probe.state[tiny])
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
