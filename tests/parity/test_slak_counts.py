"""Parameter counts of the full-size models, as published or counted on the published code."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dst_models import create_model

# SLaK at width 1.3: printed by the published code, https://github.com/VITA-Group/SLaK/issues/12
DENSE = {
    "slak_tiny": 50_703_838,
    "slak_small": 91_131_820,
    "slak_base": 157_950_792,
    "convnext_tiny": 28_589_128,
    "convnext_small": 50_223_688,
    "convnext_base": 88_591_464,
    "replknet31_base": 79_864_168,
    "replknet31_large": 172_671_016,
}
# the matrices and kernels, all of which SLaK makes sparse
MASKABLE = {"slak_tiny": 50_576_524, "slak_small": 90_878_758, "slak_base": 157_613_790}
# in millions, at width 1.0
NARROW = {"slak_tiny": 30.82, "slak_small": 55.57, "slak_base": 95.72}


def meta_model(name: str, **overrides: object) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **overrides)


def count(model: nn.Module, ndims: tuple[int, ...] = (1, 2, 4)) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.ndim in ndims)


@pytest.mark.parametrize(("name", "expected"), DENSE.items())
def test_parameters(name: str, expected: int) -> None:
    assert count(meta_model(name)) == expected


@pytest.mark.parametrize(("name", "expected"), MASKABLE.items())
def test_maskable_weights(name: str, expected: int) -> None:
    assert count(meta_model(name), (2, 4)) == expected


@pytest.mark.parametrize(("name", "millions"), NARROW.items())
def test_parameters_at_width_one(name: str, millions: float) -> None:
    assert round(count(meta_model(name, width_factor=1.0)) / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("name", "dims"),
    [
        ("slak_tiny", (124, 249, 499, 998)),
        ("slak_small", (124, 249, 499, 998)),
        ("slak_base", (166, 332, 665, 1331)),
        ("slak_large", (249, 499, 998, 1996)),
    ],
)
def test_widths_are_truncated(name: str, dims: tuple[int, ...]) -> None:
    assert meta_model(name).dims == dims


def test_slak_tiny_has_95_maskable_tensors() -> None:
    """Stem, three downsampling layers, five kernels and matrices in each of 18 blocks, head."""
    assert sum(parameter.ndim > 1 for parameter in meta_model("slak_tiny").parameters()) == 95
