"""The engine: it holds the masks, keeps inactive weights at zero and carries out mask updates.

This is the only module that writes to parameters. It knows nothing of optimizers beyond their
per-weight state, and nothing of algorithms beyond `dst.algorithms.Algorithm`.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .algorithms import Algorithm, Memory, Update
from .counts import partial_counts
from .displaced import Displaced
from .masks import draw, pack, unpack
from .optimizer_state import reset_
from .saved_state import checked_masks, cloned
from .scores import Evidence, LazyEvidence
from .shards import is_sharded, local, part_of, placed_like, whole
from .sync import average_over_ranks, random_keys, several_ranks
from .upkeep import same_layout, zero_inactive_

AtRest = Callable[[nn.Parameter], Mapping[str, float]]
"""The per-weight optimizer state of a weight that has seen zero gradients only, by name."""

OnChange = Callable[[str, Tensor, bool], None]
"""Called with (name, mask, whether the dense gradient is needed at the next step)."""

_DEFAULTS: dict[str, Any] = {
    "needs": frozenset[str](),
    "replaces_step": False,
    "masks_gradients": True,
    "dense_weights": False,
    "newcomers": "zero",
    "sparsity": None,
}


class Sparsifier:
    """Hold the masks of some parameters and train them by an algorithm.

    Users meet it as `SparseOptimizer.sparsifier`; every attribute is for reading.

    Args:
        params: Name to parameter.
        masks: Name to bool tensor of the parameter's shape, kept bit for bit; or None to draw them.
        counts: Name to the active weights of the final masks, used where `masks` is None.
        algorithm: How the masks change.
        seed: Of every random choice.

    Attributes:
        params: Name to parameter.
        masks: Name to bool tensor in the parameter's memory layout, changed in place; for a sharded
            parameter a DTensor in the same shards.
        counts: Name to the number of active weights, Python ints.
        targets: Name to the number of active weights at the final sparsity.
        step: Completed optimizer steps.
        updates: Mask updates so far.
        last_grown: Name to how many weights came in the last mask update.
        algorithm: The algorithm.
        seed: The seed.

    Examples:
        >>> import dst
        >>> weight = nn.Parameter(torch.ones(4))
        >>> Sparsifier({"w": weight}, None, {"w": 1}, algorithm=dst.static(), seed=0).counts
        {'w': 1}
        >>> int(weight.count_nonzero())
        1
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        masks: Mapping[str, Tensor] | None,
        counts: Mapping[str, int],
        *,
        algorithm: Algorithm,
        seed: int,
    ) -> None:
        self.params = dict(params)
        self.algorithm = algorithm
        self.seed = operator.index(seed)
        self.step = 0
        self.updates = 0
        self.targets = dict(counts)
        self.last_grown: dict[str, int] = {}
        self._memory: Memory = {}
        self._callbacks: list[OnChange] = []
        self._dense_gradients: dict[str, Tensor] = {}
        self._dense_weights: dict[str, Tensor] = {}
        self._dense_in_place = False  # whether the model holds the dense weights, for the base's step
        self._changed: set[str] = set()  # tensors whose new mask was not announced yet
        self._dense_announced = self._dense_next
        self.counts = dict(counts) if masks is not None else self._wanted(0)
        self.masks: dict[str, Tensor] = {}
        self._explored: dict[str, Tensor] = {}  # of the whole tensors, on every rank
        for name, parameter in self.params.items():
            mask = whole(masks[name]) if masks is not None else self._drawn(name)
            self.masks[name] = _laid_out_as(parameter, part_of(mask, parameter))
            self._explored[name] = pack(mask).to(parameter.device)
        if self._trait("dense_weights"):
            self._dense_weights = {n: p.detach().clone() for n, p in self.params.items()}
        self._warn_of_other_zeros()
        # Real trainers load the model, wrap it and load the optimizer. Until the first step the values
        # that this first mask destroys are kept, so that loading other masks loses nothing.
        self._displaced: dict[str, Displaced] | None = {}
        for name, parameter in self.params.items():
            part = local(parameter).detach()
            values = part[~self._mask(name)]
            self._zero(name)
            self._displaced[name] = Displaced.after(part, values)

    # --- What trains ---------------------------------------------------------------------------

    @property
    def replaces_next_step(self) -> bool:
        """Whether the next optimizer step is replaced by a mask update."""
        changeable = any(p.requires_grad and self.counts[n] < p.numel() for n, p in self.params.items())
        return self._trait("replaces_step") and self.algorithm.due(self.step + 1) and changeable

    @property
    def explored(self) -> dict[str, int]:
        """Name to how many of its weights were ever active."""
        return {
            name: int(unpack(bits, self.params[name].shape).count_nonzero())
            for name, bits in self._explored.items()
        }

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Zero the gradients of inactive weights, keeping the dense ones first if the next update reads them.

        Calling it again changes nothing. Under an algorithm that lets dense gradients through
        (`masks_gradients` False) the gradients stay as they are.
        """
        if not self._trait("masks_gradients"):
            return
        if self._needs("grad") and self.algorithm.due(self.step + 1):
            self._keep_dense_gradients()
        for name, parameter in self.params.items():
            gradient = parameter.grad
            if gradient is None or self.counts[name] == parameter.numel():
                continue
            if gradient.layout != torch.strided:
                raise ValueError(
                    f"the gradient of {name!r} is {gradient.layout}; masked training needs dense gradients, "
                    "such as an embedding with sparse=False gives"
                )
            zero_inactive_(local(gradient), self._mask(name))

    @torch.no_grad()
    def mask_weights(self) -> None:
        """Set the inactive weights to exactly +0.0, storing dense ones that the base has trained first."""
        if self._dense_in_place:
            for name, weights in self._dense_weights.items():
                local(weights).copy_(local(self.params[name]))
            self._dense_in_place = False
        for name in self.params:
            self._zero(name)

    @torch.no_grad()
    def before_step(self) -> None:
        """Prepare gradients, and weights that the base trains densely, for the base optimizer's step."""
        self.mask_gradients()
        for name, weights in self._dense_weights.items():
            # Active weights are taken as they stand: somebody may have loaded others since the last step.
            parameter = local(self.params[name])
            parameter.copy_(torch.where(self._mask(name), parameter, local(weights)))
        self._dense_in_place = bool(self._dense_weights)

    @torch.no_grad()
    def after_step(self, state: Mapping[Tensor, Any], at_rest: AtRest) -> None:
        """Count the step, zero the inactive weights and update the masks if it is time.

        Args:
            state: The base optimizer's state; the per-weight part of what left or came is reset.
            at_rest: Gives the per-weight state of a fresh weight.
        """
        self._displaced = None
        self.step += 1
        self.mask_weights()
        if self.algorithm.due(self.step):
            self._update(state, at_rest)
        self.forget_gradients()
        self._announce()

    def weights(self, name: str) -> Tensor:
        """Return what an algorithm judges: the dense weights behind the mask, where there are any."""
        return self._dense_weights.get(name, self.params[name].detach())

    def forget_gradients(self) -> None:
        """Drop dense gradients kept for an update, as when a step is skipped and the gradients cleared."""
        self._dense_gradients.clear()

    def on_change(self, callback: OnChange) -> None:
        """Call back with (name, mask, dense gradient needed at the next step), now and at each change.

        Args:
            callback: Called for every tensor at once now, after a load, and after each step at which
                its mask or the need for dense gradients has changed. Copies of the optimizer do not
                inherit it.
        """
        self._callbacks.append(callback)
        for name, mask in self.masks.items():
            callback(name, mask, self._dense_next)

    # --- What is saved -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resume needs, as tensors and primitives; masks at a bit a weight.

        Every tensor in it is whole and the same on every rank, so that any number of ranks can load it.
        With sharded parameters all ranks must call this together.
        """
        return {
            "step": self.step,
            "updates": self.updates,
            "seed": self.seed,
            "algorithm": repr(self.algorithm),
            "shapes": {name: list(parameter.shape) for name, parameter in self.params.items()},
            "targets": dict(self.targets),
            "masks": {name: pack(whole(mask)) for name, mask in self.masks.items()},
            "explored": {name: bits.clone() for name, bits in self._explored.items()},
            # Of a dict torch.distributed.checkpoint loads those keys only that the state of a fresh optimizer
            # has; so all names are here from the start, and a memory that is lost is noticed.
            "last_grown": {name: self.last_grown.get(name, 0) for name in self.params},
            "memory": cloned(self._memory),
            "memory_keys": list(self._memory),
            "dense_weights": {name: whole(weights).clone() for name, weights in self._dense_weights.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any], *, allow_other_algorithm: bool = False) -> None:
        """Continue from a saved state; no mask is drawn and the argument is not changed.

        Before the first step, weights that the constructor's mask had set to zero are put back first,
        unless they were written to since, as by loading the model after wrapping it.

        Args:
            state_dict: From `state_dict`.
            allow_other_algorithm: Accept a state that was saved under a different algorithm.

        Raises:
            ValueError: If tensors, shapes, entries or the algorithm do not fit; nothing is changed then.
        """
        masks = self.check_state_dict(state_dict, allow_other_algorithm=allow_other_algorithm)
        self._restore_displaced()
        self.step = int(state_dict["step"])
        self.updates = int(state_dict["updates"])
        self.seed = int(state_dict["seed"])
        self.targets = {name: int(state_dict["targets"][name]) for name in self.params}
        last_grown = state_dict["last_grown"] if self.updates else {}
        self.last_grown = {str(name): int(grown) for name, grown in last_grown.items()}
        same = state_dict["algorithm"] == repr(self.algorithm)
        self._memory = cloned(state_dict["memory"]) if same else {}
        for name, parameter in self.params.items():
            self._mask(name).copy_(part_of(masks[name], parameter))
            self.counts[name] = int(masks[name].count_nonzero())
            self._explored[name] = state_dict["explored"][name].to(parameter.device, copy=True)
            self._zero(name)
            if name in self._dense_weights:  # another algorithm may have kept none: then the sparse ones
                dense = state_dict["dense_weights"].get(name, parameter)
                local(self._dense_weights[name]).copy_(part_of(dense, parameter))
        self.forget_gradients()
        self._changed.update(self.params)
        self._announce()

    def check_state_dict(
        self, state_dict: Mapping[str, Any], *, allow_other_algorithm: bool = False
    ) -> dict[str, Tensor]:
        """Refuse a state that does not fit, changing nothing; see `load_state_dict`.

        Returns:
            Name to bool mask.
        """
        masks = checked_masks(
            state_dict, self.params, repr(self.algorithm), allow_other_algorithm=allow_other_algorithm
        )
        lost = [key for key in state_dict.get("memory_keys", []) if key not in state_dict["memory"]]
        if lost:
            raise ValueError(
                f"the algorithm's memory {lost[0]!r} was not loaded: torch.distributed.checkpoint loads only "
                "the keys that a fresh optimizer has; give it (optimizer.sparsifier.state_dict(),), a tuple, "
                "which it keeps in one piece"
            )
        same = state_dict["algorithm"] == repr(self.algorithm)
        theirs = {name: weights.shape for name, weights in state_dict["dense_weights"].items()}
        ours = {name: weights.shape for name, weights in self._dense_weights.items()}
        if same and theirs != ours:
            raise ValueError(f"the saved dense_weights are {theirs}, expected {ours}: a damaged file")
        return masks

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_callbacks": [], "_dense_gradients": {}}

    # --- One mask update -----------------------------------------------------------------------

    def _update(self, state: Mapping[Tensor, Any], at_rest: AtRest) -> None:
        names = self._updatable()
        wanted = self._wanted(self.step) if self._trait("sparsity") else self.counts
        outcome = self.algorithm.update(
            self.step,
            {name: wanted[name] for name in names},
            LazyEvidence(names, lambda name: self._evidence(name, state)),
            self._memory,
        )
        result = outcome if isinstance(outcome, Update) else Update(*outcome)
        self._check(result.masks)
        self._memory = result.memory
        self.last_grown = dict.fromkeys(self.params, 0)
        for name, mask in result.masks.items():
            self._write(name, mask, result.restarted.get(name), state, at_rest)
        self.updates += 1
        self._changed.update(result.masks)

    def _write(
        self,
        name: str,
        new: Tensor,
        restarted: Tensor | None,
        state: Mapping[Tensor, Any],
        at_rest: AtRest,
    ) -> None:
        parameter, old = self.params[name], whole(self.masks[name])
        came = new & ~old
        changed = old ^ new
        self.last_grown[name] = int(came.count_nonzero())
        if restarted is not None:
            came, changed = came | restarted, changed | restarted
        self._mask(name).copy_(part_of(new, parameter))
        self.counts[name] = int(new.count_nonzero())
        self._explored[name] |= pack(new)
        if name in self._dense_weights:
            local(parameter).copy_(local(self._dense_weights[name]))
            self._zero(name)
        else:
            zero_inactive_(local(parameter), part_of(~changed, parameter))
        if parameter in state:
            self._restart(parameter, state[parameter], at_rest, changed, came, new)

    def _restart(
        self,
        parameter: nn.Parameter,
        state: Mapping[str, Any],
        at_rest: AtRest,
        changed: Tensor,
        came: Tensor,
        new: Tensor,
    ) -> None:
        """Reset the optimizer state of the weights that left or came, as the algorithm wants it."""
        newcomers = self._trait("newcomers")
        if newcomers == "zero":
            parts = {
                key: local(value) if isinstance(value, Tensor) else value for key, value in state.items()
            }
            changed, new = part_of(changed, parameter), part_of(new, parameter)
            reset_(parts, at_rest(parameter), changed, None, new)
        elif newcomers == "mean":  # over the whole tensor
            values = at_rest(parameter)
            wholes = {key: whole(state[key]) for key in values if isinstance(state.get(key), Tensor)}
            reset_(wholes, values, changed, came, new)
            for key, value in wholes.items():
                if is_sharded(state[key]):
                    local(state[key]).copy_(part_of(value, state[key]))

    def _check(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            if name not in self.params:
                raise ValueError(f"the algorithm returned a mask for {name!r}, which is not a sparse tensor")
            if mask.dtype != torch.bool or mask.shape != self.params[name].shape:
                raise ValueError(
                    f"the algorithm returned a {mask.dtype} mask of shape {tuple(mask.shape)} for {name!r}; "
                    f"expected bool of shape {tuple(self.params[name].shape)}"
                )

    def _updatable(self) -> list[str]:
        """Return the tensors an update may touch: trained ones, with a gradient where one is read."""
        names = [name for name, parameter in self.params.items() if parameter.requires_grad]
        if not self._needs("grad"):
            return names
        has = torch.tensor([self.params[name].grad is not None for name in names], dtype=torch.int32)
        if several_ranks() and names:  # all ranks must take the same way through the collectives
            has = has.to(self.params[names[0]].device)
            dist.all_reduce(has, op=dist.ReduceOp.MAX)
        return [name for name, some in zip(names, has.tolist(), strict=True) if some]

    def _evidence(self, name: str, state: Mapping[Tensor, Any]) -> Evidence:
        parameter = self.params[name]
        return Evidence(
            weight=whole(self.weights(name)),
            mask=whole(self.masks[name]),
            grad=self._gradient(name) if self._needs("grad") else None,
            state=_whole_state(state.get(parameter, {})) if self._needs("state") else {},
            keys=self._keys(name, self.step) if self._needs("keys") else None,
        )

    def _gradient(self, name: str) -> Tensor:
        """Return the dense gradient of a tensor, averaged over ranks, as a tensor of its own."""
        parameter = self.params[name]
        gradient = self._dense_gradients.get(name)
        if gradient is None:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        # Whoever shards a parameter reduces its gradient, over the ranks that it is to be reduced over.
        return whole(gradient) if is_sharded(gradient) else average_over_ranks(gradient)

    def _keep_dense_gradients(self) -> None:
        # A gradient whose inactive entries are all zero was masked before, or has nothing to lose.
        # Its identity cannot tell: DDP and set_to_none=False bring the same tensor back.
        for name, parameter in self.params.items():
            gradient = parameter.grad
            if gradient is not None and bool(local(gradient).masked_fill(self._mask(name), 0).any()):
                self._dense_gradients[name] = gradient.detach().clone()

    # --- Small parts ---------------------------------------------------------------------------

    def _trait(self, name: str) -> Any:
        return getattr(self.algorithm, name, _DEFAULTS[name])

    def _needs(self, what: str) -> bool:
        """Tell whether the algorithm reads some evidence: "grad", "state" or "keys"."""
        return what in self._trait("needs")

    @property
    def _dense_next(self) -> bool:
        reads = self._needs("grad") and self.algorithm.due(self.step + 1)
        return reads or not self._trait("masks_gradients")

    def _wanted(self, step: int) -> dict[str, int]:
        """Return the active counts wanted at a step."""
        reached = self._trait("sparsity")
        if reached is None:
            return dict(self.targets)
        sizes = {name: parameter.numel() for name, parameter in self.params.items()}
        return partial_counts(sizes, self.targets, reached(step))

    def _drawn(self, name: str) -> Tensor:
        parameter = self.params[name]
        keys = self._keys(name, 0)
        return draw(keys, self.counts[name]).to(parameter.device)

    def _keys(self, name: str, step: int) -> Tensor:
        """Return the int32 random keys of a tensor at a step, in its shape."""
        parameter = self.params[name]
        index = torch.arange(parameter.numel(), dtype=torch.int32, device=parameter.device)
        return random_keys(self.seed, step, name, index).view(parameter.shape)

    def _mask(self, name: str) -> Tensor:
        """Return this rank's part of a mask, on its parameter's device and in its memory layout."""
        part, mask = local(self.params[name]), local(self.masks[name])
        if mask.device != part.device or not same_layout(mask, part):
            self.masks[name] = _laid_out_as(self.params[name], mask)
            self._changed.add(name)  # those who hold the old one are told
            self._explored[name] = self._explored[name].to(part.device)
        return local(self.masks[name])

    def _zero(self, name: str) -> None:
        if self.counts[name] < self.params[name].numel():
            zero_inactive_(local(self.params[name]).detach(), self._mask(name))

    def _restore_displaced(self) -> None:
        for name, displaced in (self._displaced or {}).items():
            parameter, inactive = local(self.params[name]), ~self._mask(name)
            if displaced.fits(parameter) and not parameter.detach()[inactive].any():
                parameter[inactive] = displaced.values.to(parameter)
        self._displaced = None

    def _warn_of_other_zeros(self) -> None:
        zeros = sum(
            int(((local(parameter).detach() == 0) & self._mask(name)).count_nonzero())
            for name, parameter in self.params.items()
        )
        total = sum(local(parameter).numel() for parameter in self.params.values())  # on this rank
        if zeros > 0.01 * total:
            warnings.warn(
                f"{zeros:,} of the {total:,} selected weights are exactly zero where the new masks are "
                "active: if this model was trained sparse, its masks are not these; take them with "
                "masks=dst.masks_from_weights(model), or load the optimizer's state before the first step",
                UserWarning,
                stacklevel=4,
            )

    def _announce(self) -> None:
        dense, changed = self._dense_next, self._changed
        if dense != self._dense_announced:
            changed = set(self.params)
        for callback in self._callbacks:
            for name in self.params:
                if name in changed:
                    callback(name, self.masks[name], dense)
        self._changed, self._dense_announced = set(), dense


def _laid_out_as(parameter: Tensor, mask: Tensor) -> Tensor:
    """Copy this rank's part of a mask to a parameter's device and strides, also where those leave gaps."""
    part = local(parameter)
    laid = torch.empty_strided(part.size(), part.stride(), dtype=torch.bool, device=part.device).copy_(mask)
    return placed_like(laid, parameter)


def _whole_state(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: whole(value) if isinstance(value, Tensor) else value for key, value in state.items()}
