"""Large depthwise kernels as a sum of parallel branches, and their exact merging for inference.

Paper: Liu et al., More ConvNets in the 2020s, arXiv 2207.03620, Section 4 (decomposed kernels); Ding et al.,
Scaling Up Your Kernels to 31x31, arXiv 2203.06717, Section 3 (the small kernel beside the large one).
What differs: the published code merges square kernels only; here any branches merge, strips included.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dst_models.ops import DepthwiseConv2d

__all__ = ["ConvNorm", "LargeKernelConv", "fold_norm_into_next", "merged_copy"]

Model = TypeVar("Model", bound=nn.Module)


class ConvNorm(nn.Module):
    """Convolution without bias, then BatchNorm.

    Args:
        conv: The convolution; one that has a bias is refused.

    Examples:
        >>> from torch import nn
        >>> from dst_models.large_kernel import ConvNorm
        >>> ConvNorm(nn.Conv2d(3, 8, 1, bias=False)).merge()
        Conv2d(3, 8, kernel_size=(1, 1), stride=(1, 1))
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        if conv.bias is not None:
            raise ValueError("the convolution before a BatchNorm has a bias; build it with bias=False")
        self.conv = conv
        self.bn = nn.BatchNorm2d(conv.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C', H', W')."""
        return self.bn(self.conv(x))

    def merge(self) -> nn.Conv2d:
        """Return one convolution with bias that equals this pair in eval mode."""
        merged = copy.deepcopy(self.conv)
        weight, bias = _weight_and_bias(self)
        merged.weight = nn.Parameter(weight)
        merged.bias = nn.Parameter(bias)
        return merged


class LargeKernelConv(nn.Module):
    """Sum of parallel depthwise convolutions of one input, stride 1, each followed by BatchNorm.

    ``y = sum_b BN_b(K_b * x)``; without the norms one bias serves the sum.

    Args:
        channels: C.
        branches: Branch name to kernel (height, width), both odd; the names are those of the submodules.
        branch_norm: Put a BatchNorm after each branch.

    Raises:
        ValueError: A kernel side is even, or there is no branch.

    Examples:
        >>> import torch
        >>> from dst_models.large_kernel import LargeKernelConv
        >>> layer = LargeKernelConv(4, {"tall": (51, 5), "wide": (5, 51), "small": (5, 5)}).eval()
        >>> merged = layer.merge()
        >>> [name for name, _ in merged.named_children()]
        ['tall', 'wide']
        >>> x = torch.randn(1, 4, 14, 9)
        >>> torch.allclose(layer(x), merged(x), atol=1e-6)
        True

    Source: Liu et al., arXiv 2207.03620, Section 4 and Figure 1; Ding et al., arXiv 2203.06717, Guideline 3.
    """

    def __init__(
        self, channels: int, branches: Mapping[str, tuple[int, int]], *, branch_norm: bool = True
    ) -> None:
        super().__init__()
        if not branches or any(side < 1 or side % 2 == 0 for kernel in branches.values() for side in kernel):
            raise ValueError(f"the kernels are {dict(branches)}; give at least one, with odd sides")
        for index, (name, kernel) in enumerate(branches.items()):
            conv = DepthwiseConv2d(channels, kernel, bias=not branch_norm and index == 0)
            self.add_module(name, ConvNorm(conv) if branch_norm else conv)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        first, *others = self.children()
        out = first(x)
        for branch in others:
            out = out + branch(x)
        return out

    def merge(self) -> LargeKernelConv:
        """Return the layer with as few convolutions as are equal to this one in eval mode.

        BatchNorms are folded, and each kernel that fits inside another one is padded with zeros to its size
        and added to it: three branches of a decomposed kernel become two, a plain kernel and its small one
        become one.
        """
        kernels: dict[str, Tensor] = {}
        biases: list[Tensor] = []
        # largest first, so that each kernel meets all those it could fit into
        for name, branch in sorted(self.named_children(), key=lambda item: -_conv(item[1]).weight.numel()):
            kernel, bias = _weight_and_bias(branch)
            biases.append(bias)
            host = next((host for host in kernels if _fits(kernel, kernels[host])), name)
            kernels[host] = kernels[host] + _pad_to(kernel, kernels[host]) if host in kernels else kernel
        first = next(iter(kernels.values()))
        shapes = {name: (kernel.shape[-2], kernel.shape[-1]) for name, kernel in kernels.items()}
        merged = LargeKernelConv(len(first), shapes, branch_norm=False).to(first)
        state = {f"{name}.weight": kernel for name, kernel in kernels.items()}
        state[f"{next(iter(kernels))}.bias"] = torch.stack(biases).sum(0)
        merged.load_state_dict(state)
        return merged


def merged_copy(model: Model) -> Model:
    """Copy a model for inference, with every `ConvNorm` and `LargeKernelConv` in it merged.

    Args:
        model: Left as it is.

    Returns:
        A frozen copy in eval mode, whose output equals the model's own in eval mode.
    """
    merged = copy.deepcopy(model)
    _merge_children(merged)
    return merged.eval().requires_grad_(False)


def _merge_children(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, (ConvNorm, LargeKernelConv)):
            setattr(module, name, child.merge())
        else:
            _merge_children(child)


def fold_norm_into_next(norm: nn.BatchNorm2d, layer: nn.Conv2d | nn.Linear) -> None:
    """Fold a BatchNorm into the 1x1 convolution or linear layer that follows it, in place.

    ``W (s x + t) + b = (W s) x + (b + W t)``, exact because no padding lies between.
    """
    scale, shift = _scale_and_shift(norm)
    weight = layer.weight.detach()
    matrix = weight.flatten(1)
    bias = 0.0 if layer.bias is None else layer.bias.detach()
    layer.bias = nn.Parameter(bias + matrix @ shift)
    layer.weight = nn.Parameter((matrix * scale).view_as(weight))


def _scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Write an eval-mode BatchNorm as ``scale * x + shift``."""
    scale = norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias.detach() - norm.running_mean * scale


def _conv(branch: nn.Module) -> nn.Conv2d:
    conv = branch.conv if isinstance(branch, ConvNorm) else branch
    assert isinstance(conv, nn.Conv2d)
    return conv


def _weight_and_bias(branch: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the kernel and the bias of a branch with its BatchNorm, if any, folded in."""
    conv = _conv(branch)
    weight = conv.weight.detach()
    if isinstance(branch, ConvNorm):
        scale, shift = _scale_and_shift(branch.bn)
        return weight * scale.view(-1, 1, 1, 1), shift
    return weight, weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach()


def _fits(kernel: Tensor, host: Tensor) -> bool:
    return all(side <= room for side, room in zip(kernel.shape[-2:], host.shape[-2:], strict=True))


def _pad_to(kernel: Tensor, host: Tensor) -> Tensor:
    """Pad a kernel with zeros on all sides to the host's size; odd sides keep the centre where it is."""
    rows, columns = ((host.shape[dim] - kernel.shape[dim]) // 2 for dim in (-2, -1))
    return F.pad(kernel, (columns, columns, rows, rows))
