"""Models of each family small enough for a test, and weights at which every part of them matters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dst_models import create_model

_SIZE = {"depths": (1, 1, 2, 1), "dims": (6, 9, 12, 15), "num_classes": 7}
_KERNELS = {"kernel_sizes": (13, 11, 9, 7)}

SMALL: dict[str, tuple[str, dict]] = {
    "slak": ("slak_tiny", _SIZE | _KERNELS),
    "slak plain": ("slak_tiny", _SIZE | _KERNELS | {"decomposed": False}),
    "slak plain, no small kernel": (
        "slak_tiny",
        _SIZE | _KERNELS | {"decomposed": False, "small_kernel": None},
    ),
    "slak without norms": ("slak_tiny", _SIZE | _KERNELS | {"branch_norm": False}),
    "slak, small kernel the larger": ("slak_tiny", _SIZE | {"kernel_sizes": (3, 5, 7, 5)}),
    "convnext": ("convnext_tiny", _SIZE),
    "replknet": ("replknet31_base", _SIZE | _KERNELS),
    "replknet, no small kernel": (
        "replknet31_base",
        _SIZE | _KERNELS | {"small_kernel": None, "dw_ratio": 1.5},
    ),
    "replknet, layer scale": (
        "replknet31_base",
        _SIZE | _KERNELS | {"layer_scale_init": 0.5, "ffn_ratio": 2},
    ),
}


def small_model(case: str, **overrides: object) -> nn.Module:
    """Build the model of a case, in eval mode, with weights and statistics from `scramble`."""
    name, settings = SMALL[case]
    torch.manual_seed(0)
    model = create_model(name, **settings | overrides)
    scramble(model)
    return model.eval()


@torch.no_grad()
def scramble(model: nn.Module) -> None:
    """Draw all weights and statistics so that no layer is close to the identity or to zero."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.normal_(std=1.4 * module.weight[0].numel() ** -0.5)
        elif isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            module.weight.uniform_(0.5, 1.5)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.3, 1.3)
        if getattr(module, "bias", None) is not None:
            module.bias.normal_(std=0.2)
        if getattr(module, "gamma", None) is not None:
            module.gamma.uniform_(0.2, 1.0)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest expected magnitude."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()
