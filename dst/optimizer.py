"""Wrap any torch optimizer so that it trains sparse; the training loop does not change."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .algorithms import Algorithm
from .counts import active_counts
from .distribution import Distribution, by_pattern, check_sparsity, erk, warn_if_mostly_dense
from .optimizer_state import values_at_rest
from .schedules import Never
from .selection import plain_name, select
from .shards import check_placements, whole
from .sparsifier import Sparsifier

logger = logging.getLogger(__name__)


class SparseOptimizer(Optimizer):
    """Train the selected tensors of a model sparse, with any torch optimizer doing the steps.

    After every `step` the inactive weights are exactly +0.0 and as many weights are active as were
    asked for. The wrapper is a `torch.optim.Optimizer`: learning-rate schedulers, `GradScaler`, hooks,
    closures and `state_dict` work as with the optimizer inside. Its `param_groups`, `state` and
    `defaults` are those of `base`.

    Args:
        base: The optimizer that takes the steps. SparseAdam is refused, as is LBFGS unless the masks
            are static.
        params_or_model: A model, whose tensors `dst.select` chooses, or name -> parameter. Every one
            must be held by `base`. Several wrappers may share one model, each with its own `params`.
        sparsity: Fraction of the weights that are zero, in [0, 1), spread over the tensors by
            `distribution`; or name (or glob) -> fraction, such as from `dst.snip`. Exactly one of
            `sparsity` and `masks` is given.
        masks: Name -> bool tensor, kept bit for bit, such as from `dst.masks_from_weights`. Tensors
            without a mask stay dense.
        distribution: `(params, sparsity) -> name -> sparsity`, such as `dst.erk` or `dst.uniform`.
        algorithm: How the masks change, such as `dst.rigl(total_steps=...)`.
        seed: Of the initial masks and of random growth. The same seed gives the same masks on every
            device and any number of ranks.

    Attributes:
        base: The optimizer inside.
        sparsifier: The engine: masks, counts, step.

    Raises:
        TypeError: If `base` cannot train sparse tensors.
        ValueError: If the arguments contradict each other or do not fit the model.

    Examples:
        >>> import dst
        >>> model = nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 2))
        >>> optimizer = dst.SparseOptimizer(torch.optim.AdamW(model.parameters()), model, sparsity=0.9,
        ...                                 algorithm=dst.set_(total_steps=100, interval=10))
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(4, 20)).square().sum().backward()
        ...     optimizer.step()
        >>> sum(int(model[i].weight.count_nonzero()) for i in (0, 2)) <= 22
        True
        >>> sum(optimizer.sparsifier.counts.values())
        22
    """

    def __init__(
        self,
        base: Optimizer,
        params_or_model: nn.Module | Mapping[str, nn.Parameter],
        *,
        sparsity: float | Mapping[str, float] | None = None,
        masks: Mapping[str, Tensor] | None = None,
        distribution: Distribution = erk,
        algorithm: Algorithm,
        seed: int = 0,
    ) -> None:
        _check_base(base, algorithm)
        if (sparsity is None) == (masks is None):
            given = "neither" if sparsity is None else "both"
            raise ValueError(f"exactly one of sparsity and masks is expected, got {given}")
        self._ready = False
        self.base = base
        # For the hooks and the step that torch patches; its own groups and state are base's.
        super().__init__(base.param_groups, base.defaults)
        self._ready = True
        if distribution is not erk and not isinstance(sparsity, (int, float)):
            raise ValueError(
                "distribution spreads one sparsity over the tensors, but masks or a sparsity for each name "
                "were given; leave distribution out"
            )
        if masks is not None:
            masks = {plain_name(name): whole(mask) for name, mask in masks.items()}
            params = _with_masks(params_or_model, masks)
            counts = {name: int(masks[name].count_nonzero()) for name in params}
        else:
            assert sparsity is not None
            params = _selected(params_or_model)
            counts = _counts(params, sparsity, distribution)
        _check_held(base, params)
        for name, parameter in params.items():
            check_placements(name, parameter)
        self.sparsifier = Sparsifier(params, masks, counts, algorithm=algorithm, seed=seed)

    # --- Training ------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one optimizer step, keep the masks, and update them when it is time.

        Args:
            closure: Reevaluates the model and returns the loss, as for the optimizer inside. Each
                evaluation sees masked weights, and its gradients are masked.

        Returns:
            What the base optimizer returns: the loss if a closure was given.
        """
        engine = self.sparsifier
        loss: float | None = None
        if engine.replaces_next_step:
            if closure is not None:
                loss = self._evaluate(closure)
            engine.mask_gradients()
        else:
            try:
                if closure is not None:
                    loss = self.base.step(lambda: self._evaluate(closure, prepare=True))
                else:
                    engine.before_step()
                    loss = self.base.step()
            except BaseException:
                engine.mask_weights()  # a step that fails half-way leaves no dense model behind
                raise
        engine.after_step(self.base.state, values_at_rest(self.base))
        return loss

    def mask_gradients(self) -> None:
        """Zero the gradients of inactive weights now, as for clipping the norm of the sparse gradient.

        Call it after the last `backward` of a step (and after `scaler.unscale_`), before clipping: gradients
        accumulated afterwards would be added to masked ones. `step` masks in any case, and calling this
        again changes nothing. Under an algorithm that lets dense gradients through, such as `dst.slak`, it
        leaves them as they are.

        Examples:
            >>> import dst
            >>> layer = nn.Linear(4, 1, bias=False)
            >>> optimizer = dst.SparseOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), layer,
            ...                                 sparsity=0.5, algorithm=dst.static())
            >>> layer(torch.ones(1, 4)).sum().backward()
            >>> optimizer.mask_gradients()
            >>> int(layer.weight.grad.count_nonzero())
            2
        """
        self.sparsifier.mask_gradients()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as the base optimizer does."""
        self.sparsifier.forget_gradients()
        self.base.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Hand a new parameter group to the base optimizer; its parameters train dense."""
        if self._ready:
            self.base.add_param_group(param_group)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Name to the bool mask of every tensor that has one; the live tensors, for reading."""
        return dict(self.sparsifier.masks)

    # --- Saving --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state, with masks, counters and seed under the key "sparse".

        Tensors and primitives only: `torch.load(..., weights_only=True)` reads it.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state: dict[str, Any] = {**self.base.state_dict(), "sparse": self.sparsifier.state_dict()}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state = post_hook(self, state) or state
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], *, allow_other_algorithm: bool = False) -> None:
        """Continue from a saved state. No mask is drawn; saved masks, seed and counts replace those here.

        Args:
            state_dict: From `state_dict`; it is not changed.
            allow_other_algorithm: Accept a state that was saved under a different algorithm.

        Raises:
            ValueError: If it has no "sparse" entry or does not fit; nothing is changed then.
        """
        saved = dict(state_dict)  # hooks may change it in place
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            saved = pre_hook(self, saved) or saved
        if "sparse" not in saved:
            raise ValueError(
                "the optimizer state has no entry 'sparse': it was saved by a dense optimizer, not by "
                "dst.SparseOptimizer; load it into .base, and take the masks from the weights with "
                "dst.masks_from_weights(model)"
            )
        sparse: Mapping[str, Any] = saved["sparse"]
        self.sparsifier.check_state_dict(sparse, allow_other_algorithm=allow_other_algorithm)
        self.base.load_state_dict({key: value for key, value in saved.items() if key != "sparse"})
        self.sparsifier.load_state_dict(sparse, allow_other_algorithm=allow_other_algorithm)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"base": self.base, "sparsifier": self.sparsifier, "_ready": True}

    def __repr__(self) -> str:
        active, total = sum(self.sparsifier.counts.values()), _total(self.sparsifier.params)
        return (
            f"SparseOptimizer(\n  {self.sparsifier.algorithm!r},\n"
            f"  {active:,} of {total:,} weights active in {len(self.sparsifier.params)} tensors,\n"
            f"  {self.base!r}\n)"
        )

    # --- The base optimizer's own attributes ---------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The base optimizer's parameter groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, value: list[dict[str, Any]]
    ) -> None:
        if self._ready:
            self.base.param_groups = value

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The base optimizer's state."""
        return self.base.state

    @state.setter
    def state(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, value: defaultdict[Tensor, Any]
    ) -> None:
        if self._ready:
            self.base.state = value

    @property
    def defaults(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The base optimizer's defaults."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        if self._ready:
            self.base.defaults = value

    def _evaluate(self, closure: Callable[[], float], *, prepare: bool = False) -> float:
        self.sparsifier.mask_weights()
        with torch.enable_grad():
            loss = closure()
        if prepare:
            self.sparsifier.before_step()
        return loss


def _check_base(base: Optimizer, algorithm: Algorithm) -> None:
    if not all(callable(getattr(algorithm, method, None)) for method in ("due", "update")):
        raise TypeError(
            "algorithm must be a value with due and update, such as dst.rigl(total_steps=...), "
            f"got {algorithm!r}"
        )
    if isinstance(base, SparseOptimizer) or not isinstance(base, Optimizer):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"base must be a torch.optim.Optimizer that is not itself sparse, got {type(base).__name__}; "
            "several wrappers can share a model by each wrapping its own base"
        )
    if isinstance(base, torch.optim.SparseAdam):
        raise TypeError(
            "SparseAdam takes sparse gradients, masked training has dense ones; use Adam or AdamW instead"
        )
    if isinstance(base, torch.optim.LBFGS) and not isinstance(algorithm.due, Never):
        raise TypeError(
            "LBFGS models the curvature over past steps, which a changing mask makes wrong; "
            "use algorithm=dst.static() or another optimizer"
        )


def _selected(params_or_model: nn.Module | Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    if isinstance(params_or_model, nn.Module):
        return select(params_or_model)
    params = {plain_name(name): parameter for name, parameter in params_or_model.items()}
    _check_params(params)
    vectors = [name for name, parameter in params.items() if parameter.dim() < 2]
    if vectors:
        logger.warning(
            "%d of the tensors to be made sparse have fewer than two dimensions, such as %r: biases and "
            "norms are usually kept dense, as dst.select(model) does",
            len(vectors),
            vectors[0],
        )
    return params


def _with_masks(
    params_or_model: nn.Module | Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]
) -> dict[str, nn.Parameter]:
    """Return the parameters that the masks name, each with a mask of its shape."""
    if isinstance(params_or_model, nn.Module):
        named = params_or_model.named_parameters(remove_duplicate=False)
        params = {plain_name(name): parameter for name, parameter in named}
    else:
        params = {plain_name(name): parameter for name, parameter in params_or_model.items()}
    if not masks:
        raise ValueError("masks is empty: give at least one name -> bool tensor")
    for name, mask in masks.items():
        if name not in params:
            raise ValueError(
                f"masks names {name!r}, which is not among the parameters {list(params)[:5]} ..."
            )
        if mask.dtype != torch.bool or mask.shape != params[name].shape:
            raise ValueError(
                f"the mask of {name!r} must be bool of shape {tuple(params[name].shape)}, "
                f"got {mask.dtype} of shape {tuple(mask.shape)}"
            )
    chosen = {name: params[name] for name in masks}
    _check_params(chosen)
    return chosen


def _check_params(params: Mapping[str, nn.Parameter]) -> None:
    if not params:
        raise ValueError("no parameters were given: expected name -> parameter, as from dst.select(model)")
    owners: dict[int, str] = {}
    for name, parameter in params.items():
        if not parameter.is_floating_point():
            raise ValueError(f"{name!r} must be a floating-point parameter, got {parameter.dtype}")
        if id(parameter) in owners:
            raise ValueError(
                f"{owners[id(parameter)]!r} and {name!r} are one tied parameter and can have one mask only; "
                "give it one name"
            )
        owners[id(parameter)] = name


def _check_held(base: Optimizer, params: Mapping[str, nn.Parameter]) -> None:
    held = {id(parameter) for group in base.param_groups for parameter in group["params"]}
    strangers = [name for name, parameter in params.items() if id(parameter) not in held]
    if strangers:
        raise ValueError(
            f"{len(strangers)} of {len(params)} tensors are not held by {type(base).__name__}, the first is "
            f"{strangers[0]!r}; give the optimizer all of them, or pass only those it holds as params"
        )


def _counts(
    params: Mapping[str, nn.Parameter], sparsity: float | Mapping[str, float], distribution: Distribution
) -> dict[str, int]:
    sizes = {name: parameter.numel() for name, parameter in params.items()}
    if isinstance(sparsity, Mapping):
        return active_counts(sizes, by_pattern(params, sparsity))
    if check_sparsity(sparsity) == 1:
        raise ValueError("sparsity is the fraction of zeros, in [0, 1): with 1 no weight is left to train")
    sparsities = distribution(params, sparsity)
    if set(sparsities) != set(params):
        raise ValueError(
            "the distribution must return a sparsity for each name it is given, it differs in "
            f"{sorted(set(sparsities) ^ set(params))[:3]}"
        )
    warn_if_mostly_dense(sparsities)
    return active_counts(sizes, sparsities, sparsity=sparsity)


def _total(params: Mapping[str, Tensor]) -> int:
    return sum(parameter.numel() for parameter in params.values())
