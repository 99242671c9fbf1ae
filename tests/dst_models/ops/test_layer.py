from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from dst_models.ops import DepthwiseConv2d, depthwise_conv2d


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kernel", [3, (5, 51), (7, 1)])
def test_is_the_convolution_it_says_it_is(kernel: int | tuple[int, int], bias: bool) -> None:
    torch.manual_seed(0)
    layer = DepthwiseConv2d(6, kernel, bias=bias)
    height, width = layer.kernel_size
    torch.manual_seed(0)
    stock = nn.Conv2d(6, 6, layer.kernel_size, padding=(height // 2, width // 2), groups=6, bias=bias)
    assert isinstance(layer, nn.Conv2d)
    assert layer.state_dict().keys() == stock.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), stock.parameters(), strict=True))
    for x in (torch.randn(2, 6, 9, 7), torch.randn(2, 6, 9, 7).contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(layer(x), stock(x))
        with torch.no_grad():
            torch.testing.assert_close(layer.eval()(x), stock(x))


def test_device_and_dtype() -> None:
    layer = DepthwiseConv2d(4, 5, bias=True, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    assert layer(torch.empty(1, 4, 8, 8, device="meta", dtype=torch.bfloat16)).shape == (1, 4, 8, 8)


@pytest.mark.parametrize("kernel", [4, (3, 2)])
def test_even_kernels_are_refused(kernel: int | tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="odd kernel sides"):
        DepthwiseConv2d(4, kernel)


@pytest.mark.parametrize("training", [False, True])
def test_an_exported_graph_holds_stock_operators_only(training: bool) -> None:
    layer = DepthwiseConv2d(4, (5, 9), bias=True).train(training)
    x = torch.randn(2, 4, 9, 9)
    program = torch.export.export(layer, (x,))
    assert "dst_models" not in str(program.graph)
    assert "aten.conv2d" in str(program.graph)
    exported = program.module()
    torch.testing.assert_close(exported(x), layer(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("trace", [torch.jit.trace, lambda layer, x: torch.fx.symbolic_trace(layer)])
def test_a_traced_graph_holds_stock_operators_only(trace) -> None:
    layer = DepthwiseConv2d(4, (5, 9)).eval()
    x = torch.randn(2, 4, 9, 9)
    traced = trace(layer, x)
    assert "dst_models::" not in str(traced.graph)  # the namespace of the operators
    assert "conv" in str(traced.graph)
    torch.testing.assert_close(traced(x), layer(x))


def test_a_compiled_layer_uses_the_operator() -> None:
    layer = DepthwiseConv2d(4, (5, 9))
    x = torch.randn(2, 4, 9, 9)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), depthwise_conv2d(x, layer.weight))


def test_copies_and_pickles() -> None:
    layer = DepthwiseConv2d(4, (5, 9))
    x = torch.randn(2, 4, 9, 9)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
