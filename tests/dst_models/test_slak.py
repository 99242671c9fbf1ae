from __future__ import annotations

import pytest
import torch
from torch import nn

from dst_models import DepthwiseConv2d, create_model
from dst_models.slak import VARIANTS, SLaK, kernel_branches

SMALL = {"depths": (1, 1, 1, 1), "dims": (4, 6, 8, 10), "num_classes": 5}


def test_published_kernels_have_their_sides() -> None:
    model = create_model("slak_tiny", **SMALL | {"dims": (4, 4, 4, 4)})
    sides = [
        [branch.conv.kernel_size for branch in stage[0].large_kernel.children()] for stage in model.stages
    ]
    assert sides == [[(m, 5), (5, m), (5, 5)] for m in (51, 49, 47, 13)]


@pytest.mark.parametrize(("suffix", "sides"), [("k31", (31, 29, 27, 13)), ("k61", (61, 59, 57, 13))])
@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_scaled_kernels_change_nothing_else(size: str, suffix: str, sides: tuple[int, ...]) -> None:
    scaled = VARIANTS[f"slak_{size}_{suffix}"]
    assert scaled["kernel_sizes"] == sides
    assert scaled | {"kernel_sizes": None} == VARIANTS[f"slak_{size}"] | {"kernel_sizes": None}


@pytest.mark.parametrize("kernel_size", [7, 31, 101])
@pytest.mark.parametrize("small_kernel", [3, 5, 7, 9])
@pytest.mark.parametrize("decomposed", [True, False])
@torch.no_grad()
def test_any_kernel_keeps_the_map(kernel_size: int, small_kernel: int, decomposed: bool) -> None:
    kernels = {"kernel_sizes": (kernel_size,) * 4, "small_kernel": small_kernel, "decomposed": decomposed}
    model = SLaK(**SMALL, **kernels).eval()
    shapes = [tuple(m.shape) for m in model.forward_features(torch.randn(1, 3, 64, 33))]
    assert shapes == [(1, 5, 16, 8), (1, 7, 8, 4), (1, 10, 4, 2), (1, 13, 2, 1)]
    has_small = "small" in dict(model.stages[0][0].large_kernel.named_children())
    assert has_small == (small_kernel < kernel_size)


@pytest.mark.parametrize("side", [1, 2, 7, 13, 14, 28, 56])
@pytest.mark.parametrize("extra", [0, 3])
@torch.no_grad()
def test_a_block_keeps_maps_of_every_size(side: int, extra: int) -> None:
    model = SLaK(**SMALL, kernel_sizes=(51, 49, 47, 13)).eval()
    x = torch.randn(1, model.dims[0], side, side + extra)
    assert model.stages[0][0](x).shape == x.shape


def test_no_tap_of_slak_micro_is_dead_at_32_px() -> None:
    """A tap meets data only where the kernel is at most 2H - 1 long on a map of side H."""
    model = create_model("slak_micro", num_classes=10)
    for module in model.modules():
        if getattr(module, "gamma", None) is not None:
            nn.init.ones_(module.gamma)
    model(torch.randn(8, 3, 32, 32)).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 4:
            assert torch.count_nonzero(parameter.grad) == parameter.numel(), name


def test_merging_leaves_two_convolutions_a_block_or_one() -> None:
    for decomposed, expected in ((True, 2), (False, 1)):
        merged = SLaK(**SMALL, decomposed=decomposed).merge()
        convolutions = [module for module in merged.modules() if isinstance(module, DepthwiseConv2d)]
        assert len(convolutions) == expected * 4


def test_a_decomposed_kernel_needs_a_short_side() -> None:
    with pytest.raises(ValueError, match="give the strips' short side"):
        kernel_branches(51, None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"depths": (1, 1, 1)}, "depths is .* give four positive integers"),
        ({"dims": (1, 2, 3, 0)}, "dims is .* give four positive integers"),
        ({"kernel_sizes": (51, 49, 47, 13, 5)}, "kernel_sizes is .* give four positive integers"),
        ({"kernel_sizes": (50, 49, 47, 13)}, "odd sides"),
        ({"small_kernel": 4}, "odd sides"),
        ({"width_factor": 0.1}, "dims times width_factor is .* give four positive integers"),
    ],
)
def test_bad_settings_raise_one_clear_sentence(override: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model("slak_tiny", **SMALL | override)


def test_an_image_too_small_for_the_last_map_is_refused() -> None:
    model = SLaK(**SMALL)
    with pytest.raises(ValueError, match="the image is 31x64 px; this model needs 32 px a side"):
        model(torch.zeros(1, 3, 31, 64))
