from __future__ import annotations

import pytest
import torch

from dst_models.ops import depthwise_conv2d, depthwise_conv2d_reference, use_reference
from dst_models.ops.reference import reference_is_forced


def by_definition(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Sum over the taps that lie on the map, one output at a time."""
    _, channels, height, width = x.shape
    kernel_height, kernel_width = weight.shape[2:]
    y = torch.zeros_like(x)
    for h in range(height):
        for w in range(width):
            for i in range(kernel_height):
                for j in range(kernel_width):
                    row, column = h + i - kernel_height // 2, w + j - kernel_width // 2
                    if 0 <= row < height and 0 <= column < width:
                        y[:, :, h, w] += weight[:, 0, i, j] * x[:, :, row, column]
    return y if bias is None else y + bias.view(1, channels, 1, 1)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (7, 3), (3, 7), (1, 5), (11, 13)])
@pytest.mark.parametrize("size", [(1, 1), (5, 5), (3, 6)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_reference_is_the_definition(kernel: tuple[int, int], size: tuple[int, int], with_bias: bool) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    weight = torch.randn(3, 1, *kernel, dtype=torch.float64)
    bias = torch.randn(3, dtype=torch.float64) if with_bias else None
    torch.testing.assert_close(
        depthwise_conv2d_reference(x, weight, bias), by_definition(x, weight, bias), rtol=1e-12, atol=1e-12
    )


def test_switch_nests_and_is_restored_after_an_error() -> None:
    assert not reference_is_forced()
    with use_reference():
        assert reference_is_forced()
        with use_reference(False):
            assert not reference_is_forced()
        assert reference_is_forced()
    with pytest.raises(ValueError, match="odd"), use_reference():
        depthwise_conv2d(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 2, 3))
    assert not reference_is_forced()


def test_switch_gives_the_stock_graph() -> None:
    x, weight = torch.randn(1, 2, 6, 6), torch.randn(2, 1, 5, 3, requires_grad=True)
    with use_reference():
        stock = depthwise_conv2d(x, weight)
    assert stock.grad_fn is not None
    assert stock.grad_fn.name() == "ConvolutionBackward0"
    ours = depthwise_conv2d(x, weight)
    assert ours.grad_fn is not None
    assert ours.grad_fn.name() != "ConvolutionBackward0"
