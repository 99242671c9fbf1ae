from __future__ import annotations

import torch
import torch.nn.functional as F
from helpers.small_models import relative_error, small_model
from torch import Tensor, nn

from dst_models import create_model


def reference(state: dict[str, Tensor], depths: tuple[int, ...], x: Tensor) -> Tensor:
    """Write Figure 4 of arXiv 2203.06717 down as functions of the state dict, without a module."""

    def norm(key: str, y: Tensor) -> Tensor:
        stats = [state[f"{key}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(y, *stats, eps=1e-5)

    def conv(key: str, y: Tensor, stride: int = 1) -> Tensor:
        weight = state[f"{key}.conv.weight"]
        groups = y.shape[1] // weight.shape[1]
        y = F.conv2d(y, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)
        return norm(f"{key}.bn", y)

    for layer, stride in enumerate((2, 1, 1, 2)):
        x = conv(f"stem.{layer}", x, stride).relu()
    for stage, depth in enumerate(depths):
        for pair in range(depth):
            key = f"stages.{stage}.{2 * pair}"
            y = conv(f"{key}.pw1", norm(f"{key}.norm", x)).relu()
            y = conv(f"{key}.large_kernel.large", y) + conv(f"{key}.large_kernel.small", y)
            x = x + conv(f"{key}.pw2", y.relu())
            key = f"stages.{stage}.{2 * pair + 1}"
            x = x + conv(f"{key}.pw2", F.gelu(conv(f"{key}.pw1", norm(f"{key}.norm", x))))
        if stage < 3:
            x = conv(f"transitions.{stage}.0", x).relu()
            x = conv(f"transitions.{stage}.1", x, 2).relu()
    return F.linear(norm("norm", x).mean((2, 3)), state["head.weight"], state["head.bias"])


@torch.no_grad()
def test_the_network_is_that_of_figure_4() -> None:
    model = small_model("replknet").double()
    x = torch.randn(2, 3, 70, 65, dtype=torch.float64)
    expected = reference(model.state_dict(), (1, 1, 2, 1), x)
    assert (expected[0] - expected[1]).abs().max() > 0.01 * expected.abs().max()
    assert relative_error(model(x), expected) < 1e-12


def test_merging_leaves_no_batch_norm_and_one_depthwise_convolution_a_block() -> None:
    merged = small_model("replknet").merge()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in merged.modules())
    blocks = [module for module in merged.modules() if hasattr(module, "large_kernel")]
    assert len(blocks) == 5
    assert all(len(list(block.large_kernel.children())) == 1 for block in blocks)


@torch.no_grad()
def test_merging_without_a_head_keeps_the_final_norm() -> None:
    model = small_model("replknet", num_classes=0).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert relative_error(model.merge()(x), model(x)) < 1e-10


@torch.no_grad()
def test_ratios_set_the_inner_widths() -> None:
    model = create_model(
        "replknet31_base",
        depths=(1, 1, 1, 1),
        dims=(8, 8, 8, 8),
        dw_ratio=1.5,
        ffn_ratio=3,
        small_kernel=None,
    )
    large, ffn = model.stages[0]
    assert large.large_kernel.large.conv.weight.shape == (12, 1, 31, 31)
    assert ffn.pw1.conv.weight.shape == (24, 8, 1, 1)
    assert model.eval()(torch.zeros(1, 3, 1, 1)).shape == (1, 1000)
