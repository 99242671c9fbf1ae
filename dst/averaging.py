"""A moving average of a model that is sparse where the model is.

The average is a copy of the model, so writing to it never touches the weights being trained.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .masks import pack, unpack
from .optimizer import SparseOptimizer
from .saved_state import cloned
from .selection import plain_name, unwrapped
from .sparsifier import Sparsifier
from .upkeep import zero_inactive_


class SparseEMA:
    """Hold an exponential moving average of a model, with the model's masks.

    Rule, for every entry w of a tensor that has a mask, at each `update`::

        inactive now                     average = +0.0
        active now, inactive before      average = w
        active now and before            average = decay * average + (1 - decay) * w

    "Before" is the previous `update` (or the construction), whatever the masks were in between: an entry
    that left and came back since keeps its history. Parameters without a mask and floating-point buffers,
    such as the statistics of BatchNorm, are averaged like the third line. Integer buffers, and buffers
    that are not part of the model's `state_dict`, are copied.

    A mask is compared only after its optimizer announced a change. In between the average needs no
    masking of its own: the inactive weights of the model are +0.0 after every optimizer step, and the
    average of zeros is zero.

    Args:
        model: The model that is trained. Wrapped in DistributedDataParallel or `torch.compile` or not,
            before or after, makes no difference.
        optimizer: The sparse optimizer of the model, or all of them where several share it.
        decay: Share of the old average that stays at an update, in [0, 1).

    Attributes:
        module: The averaged model: in eval mode, without gradients, its tensors changed in place. Moved
            to another device or dtype, it stays there; a bfloat16 average stands still at a decay of
            0.9999, so keep it in float32.
        decay: May be set between updates, as for a warm-up.
        updates: How often `update` was called.

    Raises:
        TypeError: If `optimizer` is not a `SparseOptimizer` or a sequence of them.
        ValueError: If the decay is out of range, or an optimizer has no masked tensor in the model.

    Examples:
        >>> model = nn.Linear(4, 1, bias=False)
        >>> from dst.algorithms import static
        >>> optimizer = SparseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model,
        ...                             sparsity=0.5, algorithm=static())
        >>> ema = SparseEMA(model, optimizer, decay=0.9)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> ema.update()
        >>> int(ema.module.weight.count_nonzero())
        2

    Source:
        SLaK's published code (github.com/VITA-Group/SLaK), model_sema.py, ModelEma.update. There a
        newcomer is an active entry whose average is still 0, here one that the masks tell; for an entry
        that grows from 0 the two differ by the value of its first step. The treatment of buffers is that
        of timm's ModelEma, which SLaK shares.
    """

    def __init__(
        self, model: nn.Module, optimizer: SparseOptimizer | Sequence[SparseOptimizer], decay: float = 0.9999
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is the share of the old average that stays, in [0, 1), got {decay}")
        live = unwrapped(model)
        self.module = copy.deepcopy(live).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0
        self._averaged, self._copied = _paired(live, self.module)
        self._masked = _masked(self._averaged, _as_optimizers(optimizer))
        self._masks_before: dict[str, Tensor] = {}
        with torch.no_grad():
            for entry in self._masked:
                mask = entry.mask()
                zero_inactive_(entry.pair.average, mask)
                self._masks_before[entry.pair.name] = pack(mask)
        self._follow()

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the model; call it after each optimizer step."""
        averages = [pair.average for pair in self._averaged]
        # lerp computes average + (1 - decay) * (w - average), which leaves equal values as they are.
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
            averages,
            [pair.live_like(average) for pair, average in zip(self._averaged, averages, strict=True)],
            1 - self.decay,
        )
        for pair in self._copied:
            pair.average.copy_(pair.live)
        if self._masks_may_differ:
            self._apply_changes()
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Return copies of everything a resume needs, as tensors and primitives.

        Names are the plain model's; masks take a bit a weight.
        """
        return {
            "updates": self.updates,
            "decay": self.decay,
            "masks": {name: mask.clone() for name, mask in self._masks_before.items()},
            "module": {plain: cloned(value) for plain, (_, value) in _by_plain_name(self.module).items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a saved state, in place; the optimizer may be loaded before or after.

        Args:
            state_dict: From `state_dict`; it is not changed.

        Raises:
            ValueError: If names or shapes do not fit; nothing is changed then.
        """
        missing = [key for key in ("updates", "decay", "masks", "module") if key not in state_dict]
        if missing:
            raise ValueError(f"the saved average lacks {missing}; it was not written by dst.SparseEMA")
        masks: Mapping[str, Tensor] = state_dict["masks"]
        saved: Mapping[str, Any] = state_dict["module"]
        own = _by_plain_name(self.module)
        _check_names("tensors of the saved average", saved, own)
        _check_names("masks of the saved average", masks, self._masks_before)
        for plain, (_, value) in own.items():
            if isinstance(value, Tensor) and saved[plain].shape != value.shape:
                raise ValueError(
                    f"{plain!r} has shape {tuple(saved[plain].shape)} in the saved average and "
                    f"{tuple(value.shape)} here; load it into an average of the model that was saved"
                )
        self.module.load_state_dict({name: saved[plain] for plain, (name, _) in own.items()})
        self._masks_before = {
            name: masks[name].to(before.device, copy=True) for name, before in self._masks_before.items()
        }
        self.decay = float(state_dict["decay"])
        self.updates = int(state_dict["updates"])
        self._masks_may_differ = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._follow()  # copies of an optimizer forget whom to tell

    def _follow(self) -> None:
        for sparsifier in {id(entry.sparsifier): entry.sparsifier for entry in self._masked}.values():
            sparsifier.on_change(self._on_change)
        self._masks_may_differ = True

    def _on_change(self, name: str, mask: Tensor, dense_gradient: bool) -> None:
        self._masks_may_differ = True

    def _apply_changes(self) -> None:
        for entry in self._masked:
            mask, pair = entry.mask(), entry.pair
            packed, before = pack(mask), self._masks_before[pair.name].to(mask.device)
            if torch.equal(packed, before):
                continue
            average = pair.average
            came = mask & ~unpack(before, mask.shape)
            average.copy_(torch.where(came, pair.live_like(average), average))
            zero_inactive_(average, mask)
            self._masks_before[pair.name] = packed
        self._masks_may_differ = False


@dataclass(frozen=True)
class _Pair:
    """One tensor of the model and its average, found anew each time: modules may replace theirs."""

    name: str
    live_module: nn.Module
    average_module: nn.Module
    attribute: str

    @property
    def live(self) -> Tensor:
        return cast("Tensor", getattr(self.live_module, self.attribute)).detach()

    @property
    def average(self) -> Tensor:
        return cast("Tensor", getattr(self.average_module, self.attribute)).detach()

    def live_like(self, average: Tensor) -> Tensor:
        return self.live.to(device=average.device, dtype=average.dtype)


@dataclass(frozen=True)
class _Masked:
    """An averaged tensor that has a mask."""

    pair: _Pair
    sparsifier: Sparsifier
    name: str

    def mask(self) -> Tensor:
        return self.sparsifier.masks[self.name].to(self.pair.average.device)


def _as_optimizers(optimizer: object) -> list[SparseOptimizer]:
    if isinstance(optimizer, SparseOptimizer):
        return [optimizer]
    given = list(cast("Sequence[object]", optimizer)) if isinstance(optimizer, Sequence) else []
    found = [each for each in given if isinstance(each, SparseOptimizer)]
    if not found or len(found) != len(given):
        raise TypeError(
            f"optimizer must be a dst.SparseOptimizer or a non-empty sequence of them, got {optimizer!r}"
        )
    return found


def _paired(live: nn.Module, average: nn.Module) -> tuple[list[_Pair], list[_Pair]]:
    """Return the pairs to average and the pairs to copy, each tensor once."""
    averaged: list[_Pair] = []
    copied: list[_Pair] = []
    saved = live.state_dict(keep_vars=True).keys()
    seen: set[int] = set()
    for (prefix, owner), other in zip(live.named_modules(), average.modules(), strict=True):
        for attribute, tensor, is_parameter in _own_tensors(owner):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            name = f"{prefix}.{attribute}" if prefix else attribute
            pair = _Pair(plain_name(name), owner, other, attribute)
            continuous = tensor.is_floating_point() or tensor.is_complex()
            (averaged if continuous and (is_parameter or name in saved) else copied).append(pair)
    if not averaged:
        raise ValueError(f"{type(live).__name__} has no floating-point tensor to average")
    return averaged, copied


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    for name, parameter in module.named_parameters(recurse=False):
        yield name, parameter, True
    for name, buffer in module.named_buffers(recurse=False):
        yield name, buffer, False


def _masked(pairs: Sequence[_Pair], optimizers: Sequence[SparseOptimizer]) -> list[_Masked]:
    """Join masks to averages by the identity of the parameter."""
    pair_of = {id(getattr(pair.live_module, pair.attribute)): pair for pair in pairs}
    found: dict[str, _Masked] = {}
    for optimizer in optimizers:
        sparsifier = optimizer.sparsifier
        here = {
            name: pair_of[id(parameter)]
            for name, parameter in sparsifier.params.items()
            if id(parameter) in pair_of
        }
        if not here:
            raise ValueError(
                f"none of the {len(sparsifier.params)} masked tensors belongs to the model, the first is "
                f"{next(iter(sparsifier.params))!r}; give the model whose parameters the optimizer holds"
            )
        for name, pair in here.items():
            if pair.name in found:
                raise ValueError(f"{pair.name!r} has a mask in two of the optimizers; it can have one only")
            found[pair.name] = _Masked(pair, sparsifier, name)
    return list(found.values())


def _by_plain_name(module: nn.Module) -> dict[str, tuple[str, Any]]:
    """Return plain name -> (name in the state dict, value)."""
    state = module.state_dict()
    plain = {plain_name(name): (name, value) for name, value in state.items()}
    if len(plain) != len(state):
        raise ValueError(
            f"two tensors of {type(module).__name__} have one name once the wrappers' path components "
            "'module' and '_orig_mod' are stripped; rename one of the two attributes"
        )
    return plain


def _check_names(what: str, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    different = sorted(saved.keys() ^ own.keys())
    if different:
        where = "saved only" if different[0] in saved else "here only"
        raise ValueError(
            f"the {what} are not those of this model: {len(different)} differ, the first is "
            f"{different[0]!r} ({where}); build the same model and optimizers as were saved"
        )
