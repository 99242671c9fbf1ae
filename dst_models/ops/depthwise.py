"""Depthwise convolution: stride 1, zero padding ``k // 2``, any odd kernel, any layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dst_models.ops import cpu, operators
from dst_models.ops.reference import depthwise_conv2d_reference, reference_is_forced
from dst_models.ops.rules import WIDEST_DIRECT_KERNEL, log_stock


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve every channel with its own kernel, stride 1, zero padding to the same size.

    ``y[n, c, h, w] = bias[c] + sum_ij weight[c, 0, i, j] * x[n, c, h + i - kh // 2, w + j - kw // 2]``,
    where ``x`` is zero outside the map. On the CPU (float32, bfloat16, float16) the forward pass and both
    gradients take the path that ``rules.py`` names for the shape; float64 and other devices take the stock
    operator. On CUDA that is cuDNN or PyTorch's own kernel: nothing of this package was measured there.
    Works under ``torch.compile(fullgraph=True)``, ``torch.export``, autocast and repeated differentiation.

    Args:
        x: Activations, shape (N, C, H, W), NCHW or channels-last, contiguous or not; N may be 0.
        weight: Kernels, shape (C, 1, kh, kw), kh and kw odd, dtype and device of ``x`` (under autocast,
            any).
        bias: One value a channel, shape (C,), or None.

    Returns:
        Activations of the shape of ``x``; on the fast paths in its layout, with a non-contiguous ``x``
        counted as NCHW.

    Raises:
        ValueError: If the shapes do not fit each other, or a side of the kernel is even.

    Examples:
        >>> import torch
        >>> x = torch.randn(2, 8, 14, 14)
        >>> y = depthwise_conv2d(x, torch.randn(8, 1, 51, 5))
        >>> tuple(y.shape)
        (2, 8, 14, 14)
    """
    _check(x, weight, bias)
    stock = _reason_for_stock(x)
    if stock is not None:
        if not torch.compiler.is_compiling():
            log_stock(stock)
        return depthwise_conv2d_reference(x, weight, bias)
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        x, weight, bias = _autocast(x, weight, bias)
    _check_dtype(x, weight, bias)
    if not (_is_plain(x) and _is_plain(weight)):
        return operators.conv(x, weight, bias)
    if not torch.is_grad_enabled():
        return cpu.forward(x, weight, bias)
    return _Eager.apply(x, weight, bias)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 4 or weight.dim() != 4:
        raise ValueError(
            f"depthwise_conv2d takes x of shape (N, C, H, W) and weight of shape (C, 1, kh, kw), "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    channels, per_group, kernel_height, kernel_width = weight.shape
    if channels != x.shape[1] or per_group != 1:
        raise ValueError(
            f"depthwise_conv2d needs weight of shape (C, 1, kh, kw) with the C = {x.shape[1]} channels of x, "
            f"got {tuple(weight.shape)}"
        )
    if kernel_height % 2 == 0 or kernel_width % 2 == 0:
        raise ValueError(
            f"depthwise_conv2d keeps the map's size and needs odd kernel sides, "
            f"got {kernel_height} x {kernel_width}"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != channels):
        raise ValueError(
            f"depthwise_conv2d needs bias of shape ({channels},) or None, got {tuple(bias.shape)}"
        )


def _check_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise ValueError(
            f"depthwise_conv2d needs one dtype for all (outside autocast), "
            f"got x {x.dtype}, weight {weight.dtype}" + ("" if bias is None else f", bias {bias.dtype}")
        )


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as autocast does before a convolution: every floating dtype but float64."""
    dtype = torch.get_autocast_dtype("cpu")

    def cast(tensor: Tensor) -> Tensor:
        keep = tensor.dtype == torch.float64 or not tensor.is_floating_point()
        return tensor if keep else tensor.to(dtype)

    return cast(x), cast(weight), None if bias is None else cast(bias)


def _reason_for_stock(x: Tensor) -> str | None:
    """Return why the stock operator is to be used, None for the fast paths."""
    if reference_is_forced():
        return "forced by use_reference()"
    if x.device.type not in ("cpu", "meta"):
        return f"no fast path on {x.device.type}"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"no fast path for {x.dtype}"
    if WIDEST_DIRECT_KERNEL == 0:
        return "the fast paths were measured with oneDNN on AVX-512 and AVX2 only"
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "inside a torch.func transform"
    return None


def _is_plain(tensor: Tensor) -> bool:
    """Return whether nothing watches ``tensor``: no compiler, dispatch mode or subclass."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and type(tensor) in (Tensor, nn.Parameter)
    )


class _Eager(torch.autograd.Function):
    """Call the CPU paths directly: on small maps the dispatch to the operators costs more than the work.

    ``forward`` takes the context itself, since a separate ``setup_context`` costs 30 microseconds a call.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        operators.save_for_conv(ctx, (x, weight, bias), x)
        return cpu.forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if torch.is_grad_enabled() or not _is_plain(grad):  # create_graph=True, or a counter looks on
            return operators.conv_backward(ctx, grad)
        x, weight = ctx.saved_tensors
        x_needs_grad, weight_needs_grad, bias_needs_grad = ctx.needs_input_grad
        return (
            cpu.forward(grad, weight.flip(2, 3), None) if x_needs_grad else None,
            cpu.weight_gradient(grad, x, *ctx.kernel_size) if weight_needs_grad else None,
            grad.sum((0, 2, 3)) if bias_needs_grad else None,
        )
