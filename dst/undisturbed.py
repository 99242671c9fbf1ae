"""Run a model without leaving a trace in it."""

from __future__ import annotations

import random
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook


@contextmanager
def undisturbed(parameters: Sequence[Tensor]) -> Generator[None]:
    """Give back random generators and the buffers and modes of every module that runs as they were."""
    accelerators = {p.device for p in parameters if p.device.type not in ("cpu", "meta")}
    device_type = next((device.type for device in accelerators), "cuda")
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    seen: dict[nn.Module, tuple[bool, dict[str, tuple[Tensor, Tensor] | None]]] = {}

    def remember(module: nn.Module, _: object) -> None:
        # A parent may write to its children before they run (DistributedDataParallel broadcasts
        # their buffers), so a module is remembered with all below it. A compiled graph is seen from outside.
        if torch.compiler.is_compiling() or module in seen:
            return
        for child in module.modules():
            if child not in seen:
                seen[child] = (child.training, _copied_buffers(child))

    hook = register_module_forward_pre_hook(remember)
    try:
        with (
            torch.random.fork_rng([device.index for device in accelerators], device_type=device_type),
            warnings.catch_warnings(),
        ):
            # A compiled module warns that global hooks also see its outer shell, which is what is wanted.
            warnings.filterwarnings("ignore", message="Using `torch.compile.* when there are global hooks")
            yield
    finally:
        hook.remove()
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        for module, (training, buffers) in seen.items():
            module.training = training
            _restore_buffers(module, buffers)


def _copied_buffers(module: nn.Module) -> dict[str, tuple[Tensor, Tensor] | None]:
    return {
        name: None if buffer is None else (buffer, buffer.detach().clone())
        for name, buffer in module._buffers.items()  # pyright: ignore[reportPrivateUsage]
    }


@torch.no_grad()
def _restore_buffers(module: nn.Module, saved: Mapping[str, tuple[Tensor, Tensor] | None]) -> None:
    current = module._buffers  # pyright: ignore[reportPrivateUsage]
    current.clear()
    for name, pair in saved.items():
        current[name] = None if pair is None else pair[0].copy_(pair[1])
