"""The custom operators ``dst_models::depthwise_conv2d`` and ``dst_models::depthwise_conv2d_weight_grad``.

They stand for the CPU paths in compiled and exported graphs, under dispatch modes (FLOP counting, fake
tensors) and wherever a derivative is itself differentiated. Each is the other's derivative:

    conv(x, w)               dx = conv(g, turn(w))      dw = weight_grad(g, x)
    weight_grad(g, x)  . v   dg = conv(x, v)            dx = conv(g, turn(v))

with ``turn`` the rotation of a kernel by 180 degrees, so both are differentiable any number of times.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dst_models.ops import cpu

# Kept alive here: the registrations end with the object.
_library = torch.library.Library("dst_models", "DEF")
_library.define("depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.define(
    "depthwise_conv2d_weight_grad(Tensor grad, Tensor x, SymInt kernel_height, SymInt kernel_width) -> Tensor"
)
conv = torch.ops.dst_models.depthwise_conv2d.default
weight_grad = torch.ops.dst_models.depthwise_conv2d_weight_grad.default


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    layout = torch.channels_last if cpu.is_channels_last(x) else torch.contiguous_format
    return torch.empty_like(x, memory_format=layout)


def _weight_gradient_fake(grad: Tensor, x: Tensor, kernel_height: int, kernel_width: int) -> Tensor:
    return x.new_empty(x.shape[1], 1, kernel_height, kernel_width)


def save_for_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep what the backward pass reads: x for the weight's gradient, the weight for the input's."""
    x, weight, _ = inputs
    x_needs_grad, weight_needs_grad = ctx.needs_input_grad[:2]
    ctx.kernel_size = weight.shape[2:]
    ctx.save_for_backward(x if weight_needs_grad else None, weight if x_needs_grad else None)


def conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight and bias as differentiable operators."""
    x, weight = ctx.saved_tensors
    x_needs_grad, weight_needs_grad, bias_needs_grad = ctx.needs_input_grad[:3]
    return (
        conv(grad, weight.flip(2, 3), None) if x_needs_grad else None,
        weight_grad(grad, x, *ctx.kernel_size) if weight_needs_grad else None,
        grad.sum((0, 2, 3)) if bias_needs_grad else None,
    )


def _save_for_weight_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _weight_grad_backward(ctx: Any, along: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    grad, x = ctx.saved_tensors
    grad_needs_grad, x_needs_grad = ctx.needs_input_grad[:2]
    return (
        conv(x, along, None) if grad_needs_grad else None,
        conv(grad, along.flip(2, 3), None) if x_needs_grad else None,
        None,
        None,
    )


_library.impl("depthwise_conv2d", cpu.forward, "CPU")
_library.impl("depthwise_conv2d_weight_grad", cpu.weight_gradient, "CPU")
torch.library.register_fake(conv, _forward_fake, lib=_library)
torch.library.register_fake(weight_grad, _weight_gradient_fake, lib=_library)
torch.library.register_autograd(conv, conv_backward, setup_context=save_for_conv, lib=_library)
torch.library.register_autograd(
    weight_grad, _weight_grad_backward, setup_context=_save_for_weight_grad, lib=_library
)


@register_flop_formula(torch.ops.dst_models.depthwise_conv2d)
def _conv_flops(x_shape: torch.Size, weight_shape: torch.Size, *_: Any, out_shape: Any, **__: Any) -> int:
    """Return two operations a tap and output, padding included, as torch counts a convolution."""
    return 2 * math.prod(x_shape) * math.prod(weight_shape[2:])


@register_flop_formula(torch.ops.dst_models.depthwise_conv2d_weight_grad)
def _weight_grad_flops(
    grad_shape: torch.Size, x_shape: torch.Size, kernel_height: int, kernel_width: int, *_: Any, **__: Any
) -> int:
    """Return the same number: every product of the forward pass occurs once."""
    return 2 * math.prod(x_shape) * kernel_height * kernel_width
