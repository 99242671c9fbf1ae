"""The meaning of the depthwise convolution, and the switch that goes back to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor


def depthwise_conv2d_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve every channel with its own kernel by the stock ``torch.nn.functional.conv2d``.

    ``y[n, c, h, w] = bias[c] + sum_ij weight[c, 0, i, j] * x[n, c, h + i - kh // 2, w + j - kw // 2]``,
    where ``x`` is zero outside the map. This is the definition every fast path is tested against.

    Args:
        x: Activations, shape (N, C, H, W).
        weight: Kernels, shape (C, 1, kh, kw), kh and kw odd.
        bias: One value a channel, shape (C,), or None.

    Returns:
        Activations of the same shape as ``x``.

    Examples:
        >>> import torch
        >>> x = torch.ones(1, 1, 1, 4)
        >>> depthwise_conv2d_reference(x, torch.ones(1, 1, 1, 3)).flatten().tolist()
        [2.0, 3.0, 3.0, 2.0]
    """
    kernel_height, kernel_width = weight.shape[-2:]
    padding = (kernel_height // 2, kernel_width // 2)
    return F.conv2d(x, weight, bias, padding=padding, groups=weight.shape[0])


# A list in the module: torch.compile guards its element in every version of the range, which a class
# attribute is not.
_forced = [False]


@contextmanager
def use_reference(enabled: bool = True) -> Iterator[None]:
    """Compute every depthwise convolution called inside the block by the stock operator.

    The choice is made in the forward pass; the backward pass of what was computed inside stays stock, also
    when it runs outside. The switch holds for the whole process, all threads. A graph that
    ``torch.compile`` has already made is compiled again when the switch has another position.

    Args:
        enabled: False switches the fast paths on again inside an outer block.

    Examples:
        >>> import torch
        >>> from dst_models.ops import depthwise_conv2d
        >>> x, weight = torch.randn(1, 2, 6, 6), torch.randn(2, 1, 5, 3)
        >>> with use_reference():
        ...     y = depthwise_conv2d(x, weight)
        >>> torch.allclose(y, depthwise_conv2d(x, weight), atol=1e-5)
        True
    """
    before, _forced[0] = _forced[0], enabled
    try:
        yield
    finally:
        _forced[0] = before


def reference_is_forced() -> bool:
    """Return whether ``use_reference`` is in force."""
    return _forced[0]
