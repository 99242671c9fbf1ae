"""One forward pass that counts: how often each weight of a model is used on one sample."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .undisturbed import undisturbed

logger = logging.getLogger(__name__)

_CONVOLUTION = nn.modules.conv._ConvNd  # pyright: ignore[reportPrivateUsage]
_TRANSPOSED = nn.modules.conv._ConvTransposeNd  # pyright: ignore[reportPrivateUsage]
_UNKNOWN = (nn.RNNBase, nn.RNNCellBase, nn.Bilinear)


@dataclass(slots=True)
class Work:
    """Multiply-accumulates of one module on one sample, over all its calls.

    Args:
        macs: With all weights.
        sparse_macs: With the active weights alone.
        output: Size of the last output without the batch.
    """

    macs: int = 0
    sparse_macs: int = 0
    output: tuple[int, ...] | None = None


def forward_work(
    model: nn.Module, size: tuple[int, ...], dtype: torch.dtype | None, masks: Mapping[int, Tensor]
) -> dict[nn.Module, Work]:
    """Pass one sample through a model in eval mode and count the work of each module.

    The pass is made on the meta device, with stand-ins for parameters and buffers; a model that cannot do
    that runs on its own device, which is logged. Modes, attributes and buffers are afterwards as they were.

    Args:
        model: A module that no wrapper surrounds.
        size: Size of the sample without the batch.
        dtype: Type of the sample; None for the model's floating-point type.
        masks: Identity (`id`) of a parameter to its bool mask; one without a mask is dense.

    Returns:
        Module to work, for each module that was called and is counted.

    Examples:
        >>> linear = nn.Linear(3, 2)
        >>> forward_work(linear, (5, 3), None, {})[linear]
        Work(macs=30, sparse_macs=30, output=(5, 2))
    """
    tally = _Tally(masks)
    undo = [remove for module in model.modules() if (remove := tally.watch(module)) is not None]
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    dtype = dtype or first.dtype
    try:
        # A compiled submodule runs uncompiled: nothing is gained from compiling one pass.
        with _evaluating(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            try:
                with _on_meta(model):
                    model(torch.empty(1, *size, dtype=dtype))
            except Exception as error:
                if first.device.type == "meta":
                    raise
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                logger.warning("counting on %s, as the meta device failed (%s)", first.device, reason)
                tally.work.clear()
                with undisturbed([first]):
                    model(torch.zeros(1, *size, dtype=dtype, device=first.device))
    finally:
        for remove in undo:
            remove()
    return tally.work


class _Tally:
    """Work by module, gathered by forward hooks; the numbers of active weights are read before the pass."""

    def __init__(self, masks: Mapping[int, Tensor]) -> None:
        self._masks = masks
        self.work: dict[nn.Module, Work] = {}

    def watch(self, module: nn.Module) -> Callable[[], None] | None:
        """Hook a module of a known kind and return how to undo it."""
        if isinstance(module, (_CONVOLUTION, nn.Linear)):
            hook = self._weight_hook(self._sizes(module.weight))
        elif isinstance(module, nn.MultiheadAttention):
            hook = self._attention_hook(module)
        else:
            if isinstance(module, _UNKNOWN):
                logger.warning("the MACs of %s modules are not counted", type(module).__name__)
            return None
        return module.register_forward_hook(hook, with_kwargs=True).remove

    def _sizes(self, weight: Tensor, rows: slice = slice(None)) -> tuple[int, int]:
        """Return how many weights these rows have, and how many of them are active."""
        total, mask = weight[rows].numel(), self._masks.get(id(weight))
        return total, total if mask is None else int(mask[rows].count_nonzero())

    def _add(self, module: nn.Module, positions: int, sizes: tuple[int, int]) -> Work:
        work = self.work.setdefault(module, Work())
        work.macs += positions * sizes[0]
        work.sparse_macs += positions * sizes[1]
        return work

    def _weight_hook(self, sizes: tuple[int, int]) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
            if isinstance(module, _TRANSPOSED):
                positions = (args[0] if args else kwargs["input"]).numel() // module.in_channels
            elif isinstance(module, _CONVOLUTION):
                positions = output.numel() // module.out_channels
            else:
                positions = output.numel() // module.out_features
            self._add(module, positions, sizes).output = tuple(output.shape[1:])

        return hook

    def _attention_hook(self, attention: nn.MultiheadAttention) -> Callable[..., None]:
        width, packed = attention.embed_dim, cast("Tensor | None", attention.in_proj_weight)
        if packed is not None:
            parts = [self._sizes(packed, slice(i * width, (i + 1) * width)) for i in range(3)]
        else:
            split = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
            parts = [self._sizes(cast("Tensor", weight)) for weight in split]
        out = self._sizes(attention.out_proj.weight)

        def hook(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Any) -> None:
            inputs = [*args[:3], *(kwargs[key] for key in ("query", "key", "value")[len(args) :])]
            shape = list(output[0].shape)
            shape.pop(0 if module.batch_first else len(shape) - 2)
            for x, sizes in zip(inputs, parts, strict=True):
                self._add(module, x.numel() // x.shape[-1], sizes).output = tuple(shape)
            # The output projection is used by the attention itself; its own module is never called.
            self._add(module.out_proj, inputs[0].numel() // width, out).output = tuple(shape)

        return hook


@contextmanager
def _on_meta(model: nn.Module) -> Generator[None]:
    """Put meta tensors in the place of all parameters and buffers, and then the tensors back.

    `torch.func.functional_call` does the same but, in torch 2.13, leaves stand-ins behind in a model that
    holds a module twice.
    """
    tables = [
        cast("dict[str, Tensor | None]", table)
        for module in model.modules()
        for table in (module._parameters, module._buffers)  # pyright: ignore[reportPrivateUsage]
    ]
    saved = [(table, dict(table)) for table in tables]
    stand_ins: dict[int, Tensor] = {}
    try:
        for table, original in saved:
            for name, tensor in original.items():
                if tensor is not None:
                    table[name] = stand_ins.setdefault(id(tensor), _stand_in(tensor))
        with torch.device("meta"):  # for the tensors that the model makes on its way
            yield
    finally:
        for table, original in saved:
            table.clear()
            table.update(original)


def _stand_in(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


@contextmanager
def _evaluating(model: nn.Module) -> Generator[None]:
    """Run in eval mode, then give back modes and attributes: a cache may have been filled with meta."""
    saved = [(module, dict(module.__dict__)) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, attributes in saved:
            module.__dict__.clear()
            module.__dict__.update(attributes)
