from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.small_models import relative_error, scramble
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dst_models.large_kernel import ConvNorm, LargeKernelConv, fold_norm_into_next

odd = st.integers(0, 4).map(lambda half: 2 * half + 1)


def brute_force(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Correlate each channel with its kernel, tap by tap, zeros outside the map."""
    height, width = x.shape[-2:]
    rows, columns = kernel.shape[-2:]
    padded = F.pad(x, (columns // 2, columns // 2, rows // 2, rows // 2))
    out = torch.zeros_like(x)
    for row in range(rows):
        for column in range(columns):
            tap = kernel[:, 0, row, column].view(-1, 1, 1)
            out += tap * padded[..., row : row + height, column : column + width]
    return out


@given(
    shapes=st.lists(st.tuples(odd, odd), min_size=1, max_size=4),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    branch_norm=st.booleans(),
)
@settings(max_examples=60, deadline=None)
@torch.no_grad()
def test_any_branches_on_any_map_before_and_after_merging(
    shapes: list[tuple[int, int]], height: int, width: int, branch_norm: bool
) -> None:
    torch.manual_seed(0)
    branches = {f"branch{index}": shape for index, shape in enumerate(shapes)}
    layer = LargeKernelConv(3, branches, branch_norm=branch_norm).double()
    scramble(layer)
    layer.eval()
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for branch in layer.children():
        conv = branch.conv if branch_norm else branch
        y = brute_force(x, conv.weight)
        if branch_norm:
            bn = branch.bn
            y = F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
        elif conv.bias is not None:
            y = y + conv.bias.view(-1, 1, 1)
        expected += y
    merged = layer.merge()
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(merged(x), expected, rtol=1e-10, atol=1e-10)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in merged.modules())


@pytest.mark.parametrize(
    ("branches", "kept"),
    [
        ({"tall": (51, 5), "wide": (5, 51), "small": (5, 5)}, {"tall": (51, 5), "wide": (5, 51)}),
        ({"large": (31, 31), "small": (5, 5)}, {"large": (31, 31)}),
        ({"large": (7, 7), "small": (7, 7)}, {"large": (7, 7)}),
        ({"large": (7, 7)}, {"large": (7, 7)}),
        ({"tall": (3, 3), "wide": (3, 3)}, {"tall": (3, 3)}),
        ({"tall": (3, 5), "wide": (5, 3)}, {"tall": (3, 5), "wide": (5, 3)}),
        ({"small": (3, 3), "large": (9, 5)}, {"large": (9, 5)}),
    ],
)
def test_merging_leaves_only_kernels_that_fit_into_no_other(
    branches: dict[str, tuple[int, int]], kept: dict[str, tuple[int, int]]
) -> None:
    merged = LargeKernelConv(2, branches).merge()
    assert {name: conv.kernel_size for name, conv in merged.named_children()} == kept
    assert sum(conv.bias is not None for conv in merged.children()) == 1


def test_without_norms_there_is_one_bias() -> None:
    layer = LargeKernelConv(2, {"tall": (5, 3), "wide": (3, 5), "small": (3, 3)}, branch_norm=False)
    assert [conv.bias is not None for conv in layer.children()] == [True, False, False]


@pytest.mark.parametrize("branches", [{}, {"large": (4, 5)}, {"large": (5, 4)}, {"large": (-1, 3)}])
def test_even_kernels_and_no_kernels_are_refused(branches: dict[str, tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="give at least one, with odd sides"):
        LargeKernelConv(2, branches)


def test_merging_keeps_dtype_and_the_original() -> None:
    layer = LargeKernelConv(2, {"large": (5, 5), "small": (3, 3)}).to(torch.bfloat16)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    assert {parameter.dtype for parameter in layer.merge().parameters()} == {torch.bfloat16}
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


@torch.no_grad()
def test_a_strided_convolution_merges_with_its_norm() -> None:
    torch.manual_seed(0)
    layer = ConvNorm(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False)).double()
    scramble(layer)
    layer.eval()
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    assert relative_error(layer.merge()(x), layer(x)) < 1e-12


def test_conv_norm_refuses_a_convolution_with_bias() -> None:
    with pytest.raises(ValueError, match="bias=False"):
        ConvNorm(nn.Conv2d(2, 2, 1))


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(5, 3, 1), nn.Linear(5, 3), nn.Linear(5, 3, bias=False)],
    ids=["conv", "linear", "no bias"],
)
@torch.no_grad()
def test_a_norm_folds_into_the_layer_after_it(layer: nn.Module) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5)
    scramble(norm)
    norm.double().eval()
    layer.double()
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)

    def pooled(y: torch.Tensor) -> torch.Tensor:
        return y.mean((-2, -1)) if isinstance(layer, nn.Linear) else y

    expected = layer(pooled(norm(x)))
    fold_norm_into_next(norm, layer)
    assert relative_error(layer(pooled(x)), expected) < 1e-12
