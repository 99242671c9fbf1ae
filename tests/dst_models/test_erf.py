"""Effective receptive field: networks whose field is known exactly, and squares counted by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dst_models import area_ratio, create_model, effective_receptive_field

TINY = {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "layer_scale_init": 1.0}
TINY_SLAK = {**TINY, "kernel_sizes": (7, 7, 5, 5), "small_kernel": 3, "width_factor": 1.0}


def ones_conv(kernel: int | tuple[int, int], stride: int = 1, channels: int = 1) -> nn.Conv2d:
    """A convolution of ones that keeps the size."""
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    conv = nn.Conv2d(channels, channels, (height, width), stride, (height // 2, width // 2), bias=False)
    nn.init.ones_(conv.weight)
    return conv


def field(model: nn.Module, side: int = 32, channels: int = 1) -> Tensor:
    return effective_receptive_field(model, torch.ones(1, channels, side, side), features=model)


def box(side: int, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """Zeros with ones in the rows and columns from..to, both included."""
    expected = torch.zeros(side, side, dtype=torch.float64)
    expected[rows[0] : rows[1] + 1, columns[0] : columns[1] + 1] = 1
    return expected


@pytest.mark.parametrize("side", [32, 33])
@pytest.mark.parametrize("kernel", [1, 3, 7, 11])
def test_one_convolution_sees_its_kernel(kernel, side):
    middle, reach = side // 2, kernel // 2
    expected = box(side, (middle - reach, middle + reach), (middle - reach, middle + reach))
    torch.testing.assert_close(field(ones_conv(kernel), side), expected, rtol=0, atol=0)
    assert area_ratio(expected, 1.0) == (kernel, kernel**2 / side**2)


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_two_stacked_see_2k_minus_1_with_triangular_weights(kernel):
    """d/dx of the sum is the number of ways through the first kernel: k - |distance| in each direction."""
    ways = (kernel - (torch.arange(32) - 16).abs()).clamp(min=0).double()
    score = field(nn.Sequential(ones_conv(kernel), ones_conv(kernel)))
    torch.testing.assert_close(score, torch.outer(ways, ways), rtol=0, atol=0)
    assert area_ratio(score, 1.0)[0] == 2 * kernel - 1


def test_a_strip_of_51x5_sees_a_strip():
    torch.testing.assert_close(field(ones_conv((51, 5)), 64), box(64, (32 - 25, 32 + 25), (30, 34)))


def test_a_strip_longer_than_the_image_sees_what_is_there():
    torch.testing.assert_close(field(ones_conv((51, 5)), 32), box(32, (0, 31), (14, 18)))


def test_a_strided_convolution_is_looked_at_where_its_middle_lies():
    """At stride 4, 32 pixels make 8 outputs; the middle one, 4, lies over pixel 16."""
    torch.testing.assert_close(field(ones_conv(3, stride=4)), box(32, (15, 17), (15, 17)))


def test_patches_see_their_patch():
    conv = nn.Conv2d(1, 2, 8, 8, bias=False)
    nn.init.ones_(conv.weight)
    torch.testing.assert_close(field(conv), 2 * box(32, (16, 23), (16, 23)))


def test_channels_are_summed():
    torch.testing.assert_close(field(ones_conv(3, channels=3), channels=3), 9 * box(32, (15, 17), (15, 17)))


def test_both_rectifications():
    """Outputs under zero do not count, nor do gradients under zero."""
    conv = nn.Conv2d(1, 2, (1, 3), padding=(0, 1), bias=False)
    conv.weight.data = torch.tensor([[2.0, 3.0, -1.0], [-1.0, -1.0, 5.0]])[:, None, None]
    image = torch.zeros(1, 1, 8, 8)
    image[..., 4] = 1.0  # the outputs are 3 and -1: the second is rectified away
    score = effective_receptive_field(conv, image, features=conv)
    assert score[4].tolist() == [0, 0, 0, 2, 3, 0, 0, 0]
    assert score.sum() == 5


def test_images_are_averaged_and_may_come_one_by_one():
    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.square()

    images = torch.tensor([1.0, 2.0, 6.0])[:, None, None, None].expand(3, 1, 4, 4)
    square = Square()
    one_by_one = effective_receptive_field(square, (image for image in images), features=square)
    torch.testing.assert_close(one_by_one, effective_receptive_field(square, images, features=square))
    assert one_by_one[2, 2] == 6.0  # d/dx x^2 = 2, 4, 12
    assert one_by_one.sum() == 6.0


@pytest.mark.parametrize("name", ["slak_tiny", "convnext_tiny", "replknet31_base"])
def test_models_by_name_use_their_last_map(name):
    overrides = {"dims": TINY["dims"], "depths": TINY["depths"]} if "replk" in name else TINY
    torch.manual_seed(0)
    model = create_model(name, **overrides)
    images = torch.randn(2, 3, 64, 64)
    score = effective_receptive_field(model, images)
    model.eval()
    pixels = images.clone().requires_grad_()
    last = model.forward_features(pixels)[-1]
    last[:, :, last.shape[2] // 2, last.shape[3] // 2].relu().sum().backward()
    expected = pixels.grad.relu().sum(1).mean(0).double()
    torch.testing.assert_close(score, expected, rtol=1e-3, atol=1e-6 * float(expected.max()))
    assert score.count_nonzero() > 32 * 32


def test_a_model_whose_forward_features_returns_one_map():
    class One(nn.Module):
        def forward_features(self, x: Tensor) -> Tensor:
            return 2 * x

    assert effective_receptive_field(One(), torch.ones(1, 1, 4, 4)).sum() == 2


def test_nothing_of_the_model_changes():
    torch.manual_seed(0)
    model = create_model("slak_tiny", **TINY_SLAK)
    model.stages[0].eval()
    model.head.weight.requires_grad_(False)
    parameter = model.norm.weight
    parameter.grad = torch.full_like(parameter, 7.0)
    modes = [module.training for module in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(1, 3, 32, 32)
    copy = images.clone()
    with torch.no_grad():
        effective_receptive_field(model, images)
    assert modes == [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    assert wanted == [p.requires_grad for p in model.parameters()]
    assert [p.grad for p in model.parameters() if p is not parameter] == [None] * (len(wanted) - 1)
    assert bool((parameter.grad == 7).all())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(images, copy)
    assert not images.requires_grad


def test_the_model_is_restored_after_an_error():
    model = create_model("convnext_tiny", **TINY)
    with pytest.raises(ValueError, match="needs 32 px"):
        effective_receptive_field(model, torch.ones(1, 3, 8, 8))
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "no images"),
        ([torch.ones(4, 4)], ValueError, r"\(C, H, W\)"),
        ([torch.ones(1, 4, 4, dtype=torch.uint8)], TypeError, "floating point"),
        ([torch.ones(1, 4, 4), torch.ones(1, 5, 5)], ValueError, "one size"),
        ([torch.ones(1, 4, 4), torch.full((1, 4, 4), math.inf)], ValueError, "image 1 is not finite"),
    ],
)
def test_images_that_cannot_be(images, error, message):
    with pytest.raises(error, match=message):
        effective_receptive_field(nn.Identity(), images, features=lambda x: x * x.square())


def test_maps_that_cannot_be():
    image = torch.ones(1, 1, 4, 4)
    with pytest.raises(TypeError, match="forward_features"):
        effective_receptive_field(nn.Identity(), image)
    with pytest.raises(ValueError, match=r"\(1, D, h, w\)"):
        effective_receptive_field(nn.Identity(), image, features=lambda x: x.mean((-2, -1)))
    with pytest.raises(ValueError, match="depend"):
        effective_receptive_field(nn.Identity(), image, features=lambda x: x.detach())


def by_counting(score: Tensor, share: float, log: bool) -> int:
    """Grow the square until it holds enough, in Python's exact sums."""
    size, middle = len(score), len(score) // 2
    values = [[math.log10(v + 1) if log else v for v in row] for row in score.tolist()]
    total = math.fsum(map(math.fsum, values))
    for radius in range(size):
        rows = range(max(0, middle - radius), min(size, middle + radius + 1))
        if math.fsum(values[i][j] for i in rows for j in rows) >= share * total * (1 - 1e-9):
            return min(2 * radius + 1, size)
    raise AssertionError


@given(
    size=st.integers(1, 12),
    share=st.sampled_from([0.2, 0.3, 0.5, 0.99, 1.0]) | st.floats(0.01, 1.0),
    log=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_square_is_the_one_found_by_counting(size, share, log, seed):
    score = torch.rand(size, size, generator=torch.Generator().manual_seed(seed)) ** 4 * 100
    side, ratio = area_ratio(score, share, log=log)
    assert side == by_counting(score.double(), share, log)
    assert ratio == side**2 / size**2


def test_log_and_plain_on_a_map_made_by_hand():
    """Nine in the middle pixel: 9 / (9 + 24) of the plain score, log10(10) / (1 + 24 log10 2) of the log."""
    score = torch.ones(5, 5)
    score[2, 2] = 9
    assert area_ratio(score, 9 / 33, log=False) == (1, 1 / 25)
    assert area_ratio(score, 9 / 33) == (3, 9 / 25)
    assert area_ratio(score, 1 / (1 + 24 * math.log10(2))) == (1, 1 / 25)


@pytest.mark.parametrize(("size", "ties"), [(10, {1: 1, 9: 3, 25: 5, 49: 7, 81: 9, 100: 10}), (5, {9: 3})])
def test_a_square_that_holds_exactly_the_share_is_enough(size, ties):
    """On an even map the square of side S - 1 leaves out the first row and column; the next is all of it."""
    for pixels, side in ties.items():
        assert area_ratio(torch.ones(size, size), pixels / size**2)[0] == side
        if pixels < size**2:
            assert area_ratio(torch.ones(size, size), pixels / size**2 + 1e-6)[0] == min(side + 2, size)


def test_only_log_depends_on_the_scale():
    """Small, the logarithm is as the score itself; large, all that is not zero counts nearly alike."""
    score = torch.full((9, 9), 0.01)
    score[4, 4] = 1.0
    for scale in (1e-6, 1.0, 1e6):
        assert area_ratio(scale * score, 0.5, log=False)[0] == 1
    assert [area_ratio(scale * score, 0.5)[0] for scale in (1e-6, 1e6)] == [1, 7]


@pytest.mark.parametrize(
    ("score", "share", "message"),
    [
        (torch.ones(4, 4), 0.0, "share"),
        (torch.ones(4, 4), 1.1, "share"),
        (torch.ones(4, 4), math.nan, "share"),
        (torch.ones(4, 5), 0.5, "square map"),
        (torch.ones(4), 0.5, "square map"),
        (torch.zeros(4, 4), 0.5, "zero everywhere"),
        (-torch.ones(4, 4), 0.5, "not negative"),
        (torch.full((4, 4), math.nan), 0.5, "finite"),
    ],
)
def test_scores_and_shares_that_cannot_be(score, share, message):
    with pytest.raises(ValueError, match=message):
        area_ratio(score, share)
