from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dst_models.ops import cpu, depthwise_conv2d_reference
from dst_models.ops.rules import WIDEST_DIRECT_KERNEL, Forward, WeightGradient

LAYOUTS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}
FAST = [method for method in WeightGradient if method is not WeightGradient.STOCK]

odd = st.integers(0, 7).map(lambda half: 2 * half + 1)
sides = st.integers(1, 9)
shapes = st.tuples(st.integers(1, 4), st.integers(1, 5), sides, sides)


def tensors(shape: tuple[int, ...], kernel: tuple[int, int], layout: str, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    x, grad = (tensor.contiguous(memory_format=LAYOUTS[layout]) for tensor in (x, grad))
    weight = torch.randn(shape[1], 1, *kernel, generator=generator).to(dtype)
    return x, weight, grad


def weight_gradient_oracle(grad: Tensor, x: Tensor, kernel: tuple[int, int]) -> Tensor:
    """Take one inner product a tap, in float64."""
    height, width = x.shape[2:]
    p, q = kernel[0] // 2, kernel[1] // 2
    padded = F.pad(x.double(), (q, q, p, p))
    rows = []
    for i in range(kernel[0]):
        shifts = (padded[:, :, i : i + height, j : j + width] for j in range(kernel[1]))
        rows.append([(grad.double() * shift).sum((0, 2, 3)) for shift in shifts])
    return torch.stack([torch.stack(row, 1) for row in rows], 1).unsqueeze(1)


def error(value: Tensor, operator: Callable[..., Tensor], *inputs: Tensor | tuple[int, int]) -> float:
    """Return the largest error against ``operator`` in float64, relative to the sum of absolute products."""
    exact = operator(*(item.double() if isinstance(item, Tensor) else item for item in inputs))
    size = operator(*(item.double().abs() if isinstance(item, Tensor) else item for item in inputs))
    return ((value.double() - exact).abs() / size.clamp_min(1e-30)).max().item()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", FAST)
@settings(deadline=None, max_examples=40)
@given(shape=shapes, height=odd, width=odd, seed=st.integers(0, 2**31))
def test_every_weight_gradient_method_is_exact(
    method: WeightGradient, layout: str, shape: tuple[int, int, int, int], height: int, width: int, seed: int
) -> None:
    kernel = cpu.live_taps(height, shape[2]), cpu.live_taps(width, shape[3])
    x, _, grad = tensors(shape, kernel, layout, seed=seed)
    result = cpu._WEIGHT_GRADIENTS[method](grad, x, *kernel)
    assert result.shape == (shape[1], 1, *kernel)
    assert error(result, weight_gradient_oracle, grad, x, kernel) < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(deadline=None, max_examples=60)
@given(shape=shapes, height=odd, width=odd, seed=st.integers(0, 2**31))
def test_forward_and_weight_gradient_for_any_shape(
    layout: str, shape: tuple[int, int, int, int], height: int, width: int, seed: int
) -> None:
    x, weight, grad = tensors(shape, (height, width), layout, seed=seed)
    y = cpu.forward(x, weight, None)
    assert error(y, depthwise_conv2d_reference, x, weight) < 1e-6
    assert y.is_contiguous(memory_format=LAYOUTS[layout])
    result = cpu.weight_gradient(grad, x, height, width)
    assert error(result, weight_gradient_oracle, grad, x, (height, width)) < 1e-6


@pytest.mark.parametrize("method", list(Forward))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_forward_method_is_exact(method: Forward, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "forward_for", lambda case: method)
    kernel = (1, 1) if method is Forward.PRODUCT else (9, 17)
    x, weight, _ = tensors((2, 5, 12, 7), kernel, layout)
    bias = torch.randn(5)
    assert error(cpu.forward(x, weight, bias), depthwise_conv2d_reference, x, weight, bias) < 1e-6


@pytest.mark.skipif(WIDEST_DIRECT_KERNEL == 0, reason="another backend may order the sum differently")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", [(51, 5), (5, 51), (31, 31), (13, 3), (7, 7)])
@pytest.mark.parametrize("size", [(14, 14), (7, 7), (4, 9), (2, 2)])
def test_cropping_dead_taps_changes_no_bit(
    layout: str, kernel: tuple[int, int], size: tuple[int, int]
) -> None:
    """The taps left out multiply padding only, and the order of the others is kept (oneDNN, float32)."""
    x, weight, _ = tensors((2, 20, *size), kernel, layout)
    cropped = cpu._crop(weight, *size)
    padding = (cropped.shape[2] // 2, cropped.shape[3] // 2)
    y = F.conv2d(x, cropped, padding=padding, groups=20)
    assert torch.equal(y, depthwise_conv2d_reference(x, weight))


def test_live_taps() -> None:
    assert [cpu.live_taps(47, size) for size in (0, 1, 2, 14, 24, 50)] == [1, 1, 3, 27, 47, 47]
    # SLaK's stage 3 at 224 px: 20 of 47 rows lie outside the map wherever the kernel is centred.
    assert tuple(cpu._crop(torch.empty(3, 1, 47, 5), 14, 14).shape) == (3, 1, 27, 5)


def test_dead_taps_get_a_zero_gradient() -> None:
    x, _, grad = tensors((2, 3, 4, 6), (15, 5), "NCHW")
    result = cpu.weight_gradient(grad, x, 15, 5)
    assert torch.count_nonzero(result[:, :, :4]) == torch.count_nonzero(result[:, :, 11:]) == 0
    assert torch.count_nonzero(result[:, :, 4:11]) == result[:, :, 4:11].numel()


@pytest.mark.parametrize("bytes_at_once", [1, 3 * 6 * 6 * 4, 2 * 3 * 6 * 6 * 4])
@pytest.mark.parametrize("method", [cpu._planes, cpu._padded_planes])
def test_portions_of_the_batch_add_up(method, bytes_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, grad = tensors((5, 3, 6, 6), (7, 3), "channels-last")
    whole = method(grad, x, 7, 3)
    monkeypatch.setattr(cpu, "_PORTION_BYTES", bytes_at_once)
    torch.testing.assert_close(method(grad, x, 7, 3), whole, rtol=1e-5, atol=1e-5)


def test_a_weight_with_ambiguous_strides_leaves_the_layout_alone() -> None:
    """One input channel makes a kernel NCHW and channels-last at once; oneDNN goes by the strides."""
    x, weight, _ = tensors((2, 4, 9, 9), (5, 3), "NCHW")
    marked = weight.as_strided(weight.shape, (15, 1, 3, 1))
    assert F.conv2d(x, marked, padding=(2, 1), groups=4).stride(1) == 1
    plain = cpu._plain(marked)
    assert plain.stride() == (15, 15, 3, 1)
    assert F.conv2d(x, plain, padding=(2, 1), groups=4).stride(1) == 81
    assert torch.equal(cpu.forward(x, marked, None), cpu.forward(x, weight, None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 4, 14, 9), (40, 4, 3, 3)])
def test_half_precision(dtype: torch.dtype, layout: str, shape: tuple[int, ...]) -> None:
    x, weight, grad = tensors(shape, (9, 15), layout, dtype)
    y = cpu.forward(x, weight, None)
    assert y.dtype == dtype
    assert error(y, depthwise_conv2d_reference, x, weight) < torch.finfo(dtype).eps
    result = cpu.weight_gradient(grad, x, 9, 15)
    assert result.dtype == dtype
    # Accumulated in float32, over the batch too: one rounding at the end.
    exact = weight_gradient_oracle(grad.double(), x.double(), (9, 15))
    size = weight_gradient_oracle(grad.double().abs(), x.double().abs(), (9, 15))
    assert ((result.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6 * size).all()
