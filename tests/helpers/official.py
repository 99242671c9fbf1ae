"""Small models of the published code: their inputs, outputs and weights, stored as data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dst_models import create_model

FIXTURES = Path(__file__).parents[1] / "fixtures"


@dataclass(frozen=True)
class Official:
    """A published model with its input, its logits and its state dict under the published names."""

    config: dict
    input: Tensor
    logits: Tensor
    state: dict[str, Tensor]


def load_official(family: str) -> Official:
    """Read the fixture of ``slak``, ``convnext`` or ``replknet``."""
    with np.load(FIXTURES / f"{family}_official_tiny.npz") as stored:
        arrays = dict(stored)
    state = {key.removeprefix("state/"): torch.tensor(value) for key, value in arrays.items() if "/" in key}
    config = json.loads(str(arrays["config"]))
    return Official(config, torch.tensor(arrays["input"]), torch.tensor(arrays["logits"]), state)


def our_model(family: str, config: dict) -> nn.Module:
    """Build our model of a fixture's configuration."""
    if family == "replknet":
        return create_model(
            "replknet31_base",
            depths=config["layers"],
            dims=config["channels"],
            kernel_sizes=config["large_kernel_sizes"],
            **{key: config[key] for key in ("small_kernel", "dw_ratio", "ffn_ratio", "num_classes")},
        )
    size = {key: config[key] for key in ("depths", "dims", "num_classes")}
    if family == "convnext":
        return create_model("convnext_tiny", **size)
    *kernel_sizes, small_kernel = config["kernel_size"]
    return create_model(
        "slak_tiny",
        **size,
        kernel_sizes=kernel_sizes,
        small_kernel=small_kernel,
        width_factor=config["width_factor"],
        decomposed=config["decom"],
    )
