from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dst_models.ops import depthwise, depthwise_conv2d, depthwise_conv2d_reference, use_reference

LAYOUTS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}
PATHS = {"eager": depthwise_conv2d, "operator": torch.ops.dst_models.depthwise_conv2d.default}

odd = st.integers(0, 5).map(lambda half: 2 * half + 1)


def leaves(shape: tuple[int, ...], kernel: tuple[int, int], dtype=torch.float32, layout="NCHW", seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    weight = torch.randn(shape[1], 1, *kernel, generator=generator).to(dtype)
    bias = torch.randn(shape[1], generator=generator).to(dtype)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


def value_and_gradients(operator, inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    y = operator(*inputs)
    return (y.detach(), *torch.autograd.grad(y, inputs, grad))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 8), st.integers(1, 8)),
    height=odd,
    width=odd,
    seed=st.integers(0, 2**31),
)
def test_value_and_gradients_agree_with_the_reference(
    path: str, layout: str, shape: tuple[int, int, int, int], height: int, width: int, seed: int
) -> None:
    inputs = leaves(shape, (height, width), layout=layout, seed=seed)
    grad = torch.randn(shape)
    double = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
    expected = value_and_gradients(depthwise_conv2d_reference, double, grad.double())
    for ours, exact in zip(value_and_gradients(PATHS[path], inputs, grad), expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5 * max(1, shape[0]))


@pytest.mark.parametrize("kernel", [(51, 5), (5, 51), (15, 17), (3, 3)])
@pytest.mark.parametrize("size", [(14, 14), (9, 20), (1, 1), (1, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_on_every_map(kernel: tuple[int, int], size: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = leaves((2, 4, *size), kernel, dtype)
    grad = torch.randn(2, 4, *size).to(dtype)
    double = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
    expected = value_and_gradients(depthwise_conv2d_reference, double, grad.double())
    tolerance = 1e-12 if dtype == torch.float64 else max(1e-6, 2 * torch.finfo(dtype).eps)
    for ours, exact in zip(value_and_gradients(depthwise_conv2d, inputs, grad), expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=tolerance * exact.abs().max().item())


NON_CONTIGUOUS = {
    "every other column": lambda x: x[..., ::2],
    "transposed": lambda x: x.transpose(2, 3),
    "some channels": lambda x: x[:, 1:4],
    "flipped batch expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "rows of channels-last": lambda x: x.contiguous(memory_format=torch.channels_last)[:, :, 1:5],
}


@pytest.mark.parametrize("view", NON_CONTIGUOUS)
def test_non_contiguous_input_and_gradient(view: str) -> None:
    base = torch.randn(3, 5, 8, 8)
    x = NON_CONTIGUOUS[view](base).detach().requires_grad_()
    weight = torch.randn(x.shape[1], 1, 7, 3, requires_grad=True)
    grad = NON_CONTIGUOUS[view](torch.randn(3, 5, 8, 8))
    ours = value_and_gradients(depthwise_conv2d, (x, weight), grad)
    expected = value_and_gradients(depthwise_conv2d_reference, (x, weight), grad)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_keeps_the_layout(layout: str) -> None:
    x, weight, _ = leaves((2, 4, 9, 7), (5, 31), layout=layout)
    assert depthwise_conv2d(x, weight).is_contiguous(memory_format=LAYOUTS[layout])


def test_only_the_gradients_asked_for_are_computed() -> None:
    x, weight, bias = leaves((2, 3, 6, 6), (3, 5))
    (grad,) = torch.autograd.grad(depthwise_conv2d(x.detach(), weight, bias.detach()).sum(), weight)
    assert grad.shape == weight.shape
    (grad,) = torch.autograd.grad(depthwise_conv2d(x, weight.detach()).sum(), x)
    assert grad.shape == x.shape
    assert not depthwise_conv2d(x.detach(), weight.detach()).requires_grad
    with torch.no_grad():
        assert not depthwise_conv2d(x, weight).requires_grad


@pytest.mark.parametrize(
    ("shape", "kernel"), [((2, 2, 4, 5), (3, 7)), ((2, 2, 3, 2), (7, 3)), ((5, 2, 1, 2), (3, 3))]
)
def test_first_and_second_derivatives(shape: tuple[int, ...], kernel: tuple[int, int]) -> None:
    inputs = leaves(shape, kernel, torch.float64)
    assert torch.autograd.gradcheck(PATHS["operator"], inputs)
    assert torch.autograd.gradgradcheck(PATHS["operator"], inputs)


def test_second_derivative_in_float32_by_the_fast_paths() -> None:
    x, weight, _ = leaves((3, 4, 10, 6), (15, 3))

    def penalty(operator) -> tuple[Tensor, ...]:
        (grad,) = torch.autograd.grad(operator(x, weight).square().sum(), x, create_graph=True)
        if operator is depthwise_conv2d:
            assert "dst_models_depthwise_conv2d" in grad.grad_fn.name()
        return torch.autograd.grad(grad.square().sum(), (x, weight))

    for a, b in zip(penalty(depthwise_conv2d), penalty(depthwise_conv2d_reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_operators_are_registered_soundly(bias: bool, layout: str) -> None:
    x, weight, b = leaves((2, 3, 6, 5), (3, 7), layout=layout)
    torch.library.opcheck(PATHS["operator"], (x, weight, b if bias else None))
    gradient = torch.ops.dst_models.depthwise_conv2d_weight_grad.default
    torch.library.opcheck(gradient, (torch.randn_like(x).requires_grad_(), x, 3, 7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", ["eager", "compiled"])
def test_autocast_casts_as_for_a_stock_convolution(dtype: torch.dtype, path: str) -> None:
    x, weight, bias = leaves((2, 4, 9, 9), (7, 3))
    operator = depthwise_conv2d
    if path == "compiled":
        operator = torch.compile(depthwise_conv2d, backend="aot_eager", fullgraph=True)

    def run(operator) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype=dtype):
            y = operator(x, weight, bias)
        return (y.detach(), *torch.autograd.grad(y.float().square().sum(), (x, weight, bias)))

    for a, b in zip(run(operator), run(depthwise_conv2d_reference), strict=True):
        assert a.dtype == b.dtype
        scale = b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=0, atol=4 * torch.finfo(dtype).eps * scale)


def test_backward_inside_autocast_keeps_its_precision() -> None:
    x, weight, _ = leaves((2, 4, 9, 9), (7, 3))
    outside = torch.autograd.grad(depthwise_conv2d(x, weight).square().sum(), (x, weight))
    y = depthwise_conv2d(x, weight).square().sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(y, (x, weight))
    for a, b in zip(inside, outside, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic: bool) -> None:
    compiled = torch.compile(depthwise_conv2d, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for shape in [(2, 4, 9, 9), (3, 4, 8, 10)]:
        inputs = leaves(shape, (5, 31), layout="channels-last")
        grad = torch.randn(shape).contiguous(memory_format=torch.channels_last)
        ours = value_and_gradients(compiled, inputs, grad)
        for a, b in zip(ours, value_and_gradients(depthwise_conv2d, inputs, grad), strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_with_inductor() -> None:
    def block(x: Tensor, tall: Tensor, wide: Tensor) -> Tensor:
        return torch.relu(depthwise_conv2d(x, tall) + depthwise_conv2d(x, wide))

    x, tall, _ = leaves((2, 4, 9, 9), (31, 5))
    wide = torch.randn(4, 1, 5, 31, requires_grad=True)
    grad = torch.randn(2, 4, 9, 9)
    ours = value_and_gradients(torch.compile(block, fullgraph=True), (x, tall, wide), grad)
    for a, b in zip(ours, value_and_gradients(block, (x, tall, wide), grad), strict=True):
        torch.testing.assert_close(a, b)


def test_a_compiled_graph_follows_the_switch() -> None:
    graphs: list[str] = []

    def record(module: torch.fx.GraphModule, _: list[Tensor]):
        graphs.append(str(module.graph))
        return module.forward

    compiled = torch.compile(depthwise_conv2d, backend=record, fullgraph=True)
    x, weight, _ = leaves((2, 4, 9, 9), (5, 3))
    compiled(x, weight)
    with use_reference():
        compiled(x, weight)
    assert ["dst_models.depthwise_conv2d" in graph for graph in graphs] == [True, False]


class _Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 1, 3, 7))

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x, self.weight)


def test_exports_with_dynamic_sizes() -> None:
    model = _Functional()
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    program = torch.export.export(model, (torch.randn(2, 4, 9, 9),), dynamic_shapes=(sizes,))
    assert "dst_models.depthwise_conv2d" in str(program.graph)
    exported = program.module()
    x = torch.randn(5, 4, 6, 13)
    assert torch.equal(exported(x), model(x))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_are_two_a_tap_and_output_in_each_of_three_passes(device: str) -> None:
    """Stock counters are wrong in the backward pass of a depthwise convolution."""
    x = torch.randn(2, 64, 14, 14, device=device, requires_grad=True)
    weight = torch.randn(64, 1, 51, 5, device=device, requires_grad=True)
    forward = 2 * (2 * 64 * 14 * 14) * (51 * 5)
    with FlopCounterMode(display=False) as counter:
        y = depthwise_conv2d(x, weight)
        assert counter.get_total_flops() == forward
        y.sum().backward()
    assert counter.get_total_flops() == 3 * forward
    stock = FlopCounterMode(display=False)
    with stock:
        depthwise_conv2d_reference(x, weight)
    assert stock.get_total_flops() == forward


def test_flops_of_a_backward_pass_whose_forward_pass_was_not_counted() -> None:
    x, weight, _ = leaves((2, 3, 6, 6), (51, 5))
    y = depthwise_conv2d(x, weight).sum()
    with FlopCounterMode(display=False) as counter:
        y.backward()
    assert counter.get_total_flops() == 2 * 2 * x.numel() * 51 * 5


def test_torch_func_transforms_take_the_stock_operator() -> None:
    x, weight, _ = leaves((2, 3, 6, 6), (3, 5))
    loss = lambda w: depthwise_conv2d(x.detach(), w).square().sum()  # noqa: E731
    expected = torch.autograd.grad(loss(weight), weight)[0]
    torch.testing.assert_close(torch.func.grad(loss)(weight.detach()), expected, rtol=1e-4, atol=1e-4)
    stacked = torch.randn(4, 2, 3, 6, 6)
    mapped = torch.func.vmap(lambda part: depthwise_conv2d(part, weight.detach()))(stacked)
    assert mapped.shape == stacked.shape


def test_same_call_same_bits() -> None:
    inputs = leaves((4, 16, 14, 14), (5, 47), layout="channels-last")
    grad = torch.randn(4, 16, 14, 14)
    first, second = (value_and_gradients(depthwise_conv2d, inputs, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_without_a_measured_backend_the_stock_operator_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depthwise, "WIDEST_DIRECT_KERNEL", 0)
    x, weight, _ = leaves((1, 2, 5, 5), (3, 3))
    y = depthwise_conv2d(x, weight)
    assert y.grad_fn is not None
    assert y.grad_fn.name() == "ConvolutionBackward0"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3, 4), (3, 1, 3, 3)), "shape \\(N, C, H, W\\)"),
        (((2, 3, 4, 4), (3, 3, 3)), "shape \\(N, C, H, W\\)"),
        (((2, 3, 4, 4), (4, 1, 3, 3)), "C = 3 channels"),
        (((2, 3, 4, 4), (3, 3, 3, 3)), "C = 3 channels"),
        (((2, 3, 4, 4), (3, 1, 3, 4)), "odd kernel sides, got 3 x 4"),
        (((2, 3, 4, 4), (3, 1, 3, 3), (4,)), "bias of shape \\(3,\\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        depthwise_conv2d(*(torch.zeros(shape) for shape in shapes))


def test_mixed_dtypes_are_refused_outside_autocast() -> None:
    x, weight = torch.zeros(1, 2, 4, 4), torch.zeros(2, 1, 3, 3, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"one dtype.*float32.*bfloat16"):
        depthwise_conv2d(x, weight)
