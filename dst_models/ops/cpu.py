"""The CPU paths of the depthwise convolution, in plain PyTorch.

With ``p = kh // 2``, ``q = kw // 2`` and ``x`` zero outside the map, everything follows from

    forward           y[n, c, h, w]  = sum_ij  weight[c, i, j] * x[n, c, h + i - p, w + j - q]
    input gradient    dx             = the forward of the gradient with the kernel turned by 180 degrees
    weight gradient   dw[c, i, j]    = sum_nhw g[n, c, h, w]   * x[n, c, h + i - p, w + j - q]

The functions here take tensors without autograd and are exact up to the order of summation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

from dst_models.ops.rules import Case, Forward, WeightGradient, forward_for, weight_gradient_for

_P = ParamSpec("_P")

# Planes are converted in portions of at most this many bytes: larger temporaries are returned to the system
# after each call, and the page faults of the next one cost as much as the convolution.
_PORTION_BYTES = 8 * 2**20


def is_channels_last(x: Tensor) -> bool:
    """Return whether ``x`` is channels-last and not NCHW as well (one channel, one pixel)."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def live_taps(kernel: int, size: int) -> int:
    """Return how many of ``kernel`` centred taps can meet data on a map of ``size``, at least one."""
    return min(kernel, max(2 * size - 1, 1))


def _plain(weight: Tensor) -> Tensor:
    """Return ``weight`` with NCHW strides, also where the one input channel makes them ambiguous."""
    _, _, height, width = weight.shape
    return weight.contiguous().as_strided(weight.shape, (height * width, height * width, width, 1))


def _crop(weight: Tensor, height: int, width: int) -> Tensor:
    """Drop the taps that meet only padding on a map of ``height`` x ``width``."""
    kernel_height, kernel_width = weight.shape[2:]
    live_height, live_width = live_taps(kernel_height, height), live_taps(kernel_width, width)
    top, left = (kernel_height - live_height) // 2, (kernel_width - live_width) // 2
    if top or left:
        weight = weight[:, :, top : top + live_height, left : left + live_width]
    return _plain(weight)


def _without_autocast(function: Callable[_P, Tensor]) -> Callable[_P, Tensor]:
    """Keep a surrounding autocast from casting what the convolutions and products inside are given."""

    @wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    return wrapper


@_without_autocast
def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve without dead taps by the method of the rule table; the output has the layout of ``x``."""
    channels_last = is_channels_last(x)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=layout)
    weight = _crop(weight, *x.shape[2:])
    kernel_height, kernel_width = weight.shape[2:]
    method = forward_for(Case(x.dtype, channels_last, *x.shape, kernel_height, kernel_width))
    if method is Forward.PRODUCT:
        y = x * weight.view(1, -1, 1, 1)
        y = y if bias is None else y + bias.view(-1, 1, 1)
    else:
        x = x.contiguous(memory_format=torch.channels_last if method is Forward.CHANNELS_LAST else layout)
        padding = (kernel_height // 2, kernel_width // 2)
        y = F.conv2d(x, weight, bias, padding=padding, groups=weight.shape[0])
    return y.contiguous(memory_format=layout)


@_without_autocast
def weight_gradient(grad: Tensor, x: Tensor, kernel_height: int, kernel_width: int) -> Tensor:
    """Return dw, shape (C, 1, kh, kw), in the dtype of ``x``; zero at the taps that meet only padding."""
    channels, height, width = x.shape[1:]
    if x.numel() == 0:
        return x.new_zeros(channels, 1, kernel_height, kernel_width)
    live_height, live_width = live_taps(kernel_height, height), live_taps(kernel_width, width)
    case = Case(x.dtype, is_channels_last(x), *x.shape, live_height, live_width)
    compute = _WEIGHT_GRADIENTS[weight_gradient_for(case)]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    gradient = compute(grad.to(dtype), x.to(dtype), live_height, live_width).to(x.dtype)
    dead_height, dead_width = kernel_height - live_height, kernel_width - live_width
    if dead_height or dead_width:
        gradient = F.pad(gradient, (dead_width // 2, dead_width // 2, dead_height // 2, dead_height // 2))
    return gradient.contiguous()


def _stock(grad: Tensor, x: Tensor, kernel_height: int, kernel_width: int) -> Tensor:
    weight = x.new_empty(x.shape[1], 1, kernel_height, kernel_width)
    padding = [kernel_height // 2, kernel_width // 2]
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], x.shape[1], [False, True, False]
    )[1]


def _position_pairs(grad: Tensor, x: Tensor, kernel_height: int, kernel_width: int) -> Tensor:
    """Multiply the gradient at every position with x at every position; sum the pairs of one displacement.

    The pairs are one matrix product a channel over the batch. After padding, the pairs of a displacement lie
    on a diagonal of (h, h') and of (w, w'), which a view with summed strides reads without a copy.
    """
    batch, channels, height, width = x.shape
    positions = height * width
    rows = grad.contiguous().view(batch, channels, positions).permute(1, 2, 0)
    columns = x.contiguous().view(batch, channels, positions).transpose(0, 1)
    pairs = torch.bmm(rows, columns).view(channels, height, width, height, width).transpose(2, 3)
    p, q = kernel_height // 2, kernel_width // 2
    pairs = F.pad(pairs, (q, q, 0, 0, p, p))  # channel, h, h', w, w'
    c, h, h_other, w, w_other = pairs.stride()
    diagonals = pairs.as_strided(
        (channels, kernel_height, kernel_width, height, width),
        (c, h_other, w_other, h + h_other, w + w_other),
    )
    return diagonals.sum((3, 4)).unsqueeze(1)


def _planes(grad: Tensor, x: Tensor, kernel_height: int, kernel_width: int) -> Tensor:
    """Correlate every plane (n, c) of x with its plane of the gradient; sum over the batch.

    A convolution with N * C groups whose kernels are the gradient's planes and whose outputs are kh x kw.
    The short side of the kernel lies along the width, where the direct kernel limits the padding.
    """
    if kernel_width > kernel_height:
        turned = _planes(grad.transpose(2, 3), x.transpose(2, 3), kernel_width, kernel_height)
        return turned.transpose(2, 3)
    return _correlate(grad, x, (kernel_height // 2, kernel_width // 2), 0)


def _padded_planes(grad: Tensor, x: Tensor, kernel_height: int, kernel_width: int) -> Tensor:
    """Do the same with x padded along the width beforehand: no limit on the padding, one more copy."""
    return _correlate(grad, x, (kernel_height // 2, 0), kernel_width // 2)


def _correlate(grad: Tensor, x: Tensor, padding: tuple[int, int], padding_before: int) -> Tensor:
    batch, channels, height, width = x.shape
    image_bytes = channels * height * width * x.element_size()
    portions = min(batch, -(-batch * image_bytes // _PORTION_BYTES))
    total: Tensor | None = None
    for grad_part, x_part in zip(grad.chunk(portions), x.chunk(portions), strict=True):
        planes = x_part.contiguous().view(-1, height, width)
        if padding_before:
            planes = F.pad(planes, (padding_before, padding_before))
        kernels = grad_part.contiguous().view(-1, height, width)
        groups = kernels.shape[0]
        products = F.conv2d(planes.unsqueeze(0), kernels.unsqueeze(1), padding=padding, groups=groups)
        part = products.reshape(-1, channels, *products.shape[2:]).sum(0)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total.unsqueeze(1)


_WEIGHT_GRADIENTS = {
    WeightGradient.STOCK: _stock,
    WeightGradient.POSITION_PAIRS: _position_pairs,
    WeightGradient.PLANES: _planes,
    WeightGradient.PADDED_PLANES: _padded_planes,
}
