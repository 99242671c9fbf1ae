"""RepLKNet: 31x31 depthwise kernels with a small kernel beside each, merged for inference.

Paper: Ding, Zhang, Zhou, Han, Ding, Sun, Scaling Up Your Kernels to 31x31, arXiv 2203.06717 (CVPR 2022):
Figure 4 (stem, stages, transitions, RepLK Block and ConvFFN) and Section 4.1 (31B and 31L). Published code:
MIT.
What differs: BatchNorm is the ordinary one (a recipe converts it to SyncBatchNorm); merging folds every
BatchNorm, the published code only those of the large kernels; a layer scale may be added (none by default, as
published).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dst_models.large_kernel import ConvNorm, LargeKernelConv, fold_norm_into_next, merged_copy
from dst_models.layers import DropPath, drop_path_rates, four, layer_scale, reset_layer_scales
from dst_models.registry import register_model

__all__ = ["ConvFFN", "RepLKBlock", "RepLKNet"]


def pointwise(in_chans: int, out_chans: int) -> ConvNorm:
    """Build a 1x1 convolution with BatchNorm."""
    return ConvNorm(nn.Conv2d(in_chans, out_chans, 1, bias=False))


def conv3x3(in_chans: int, out_chans: int, *, stride: int = 1, depthwise: bool = True) -> ConvNorm:
    """Build a 3x3 convolution with BatchNorm."""
    groups = in_chans if depthwise else 1
    return ConvNorm(nn.Conv2d(in_chans, out_chans, 3, stride, padding=1, groups=groups, bias=False))


class ReLUSequential(nn.Sequential):
    """Sequence of layers with a ReLU after each."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layers."""
        for layer in self:
            input = F.relu(layer(input))
        return input


class RepLKBlock(nn.Module):
    """Residual block ``x + drop_path(gamma * pw2(ReLU(K * ReLU(pw1(BN(x))))))`` with a large kernel K.

    Args:
        dim: Channels C.
        inner: Channels of the depthwise layer.
        kernel_size: Side of the large kernel, odd.
        small_kernel: Side of the small kernel beside it; None for none.
        drop_path: Probability of dropping the residual branch of a sample.
        layer_scale_init: Initial gamma; 0 leaves gamma out, as published.

    Source: Ding et al., arXiv 2203.06717, Figure 4.
    """

    def __init__(
        self,
        dim: int,
        inner: int,
        kernel_size: int,
        small_kernel: int | None,
        *,
        drop_path: float = 0.0,
        layer_scale_init: float = 0.0,
    ) -> None:
        super().__init__()
        branches = {"large": (kernel_size, kernel_size)}
        if small_kernel is not None:
            branches["small"] = (small_kernel, small_kernel)
        self.norm = nn.BatchNorm2d(dim)
        self.pw1 = pointwise(dim, inner)
        self.large_kernel = LargeKernelConv(inner, branches)
        self.pw2 = pointwise(inner, dim)
        self.gamma = layer_scale(dim, layer_scale_init)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        y = F.relu(self.large_kernel(F.relu(self.pw1(self.norm(x)))))
        y = self.pw2(y)
        if self.gamma is not None:
            y = self.gamma.view(-1, 1, 1) * y
        return x + self.drop_path(y)


class ConvFFN(nn.Module):
    """Residual block ``x + drop_path(gamma * pw2(GELU(pw1(BN(x)))))``.

    Args:
        dim: Channels C.
        inner: Channels between the two 1x1 convolutions.
        drop_path: Probability of dropping the residual branch of a sample.
        layer_scale_init: Initial gamma; 0 leaves gamma out, as published.

    Source: Ding et al., arXiv 2203.06717, Figure 4.
    """

    def __init__(
        self, dim: int, inner: int, *, drop_path: float = 0.0, layer_scale_init: float = 0.0
    ) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.pw1 = pointwise(dim, inner)
        self.pw2 = pointwise(inner, dim)
        self.gamma = layer_scale(dim, layer_scale_init)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        y = self.pw2(F.gelu(self.pw1(self.norm(x))))
        if self.gamma is not None:
            y = self.gamma.view(-1, 1, 1) * y
        return x + self.drop_path(y)


class RepLKNet(nn.Module):
    """RepLKNet classifier and backbone.

    Args:
        depths: Pairs of RepLK Block and ConvFFN in each of the four stages.
        dims: Channels of each stage.
        kernel_sizes: Side of the large kernel of each stage, odd.
        small_kernel: Side of the small kernel beside it, odd; None for none.
        dw_ratio: Channels of the depthwise layers over ``dims``.
        ffn_ratio: Inner channels of the ConvFFN over ``dims``.
        in_chans: Channels of the image.
        num_classes: Outputs of the head; 0 leaves the head out.
        drop_path_rate: Drop probability of the last pair; rises linearly from 0 at the first.
        layer_scale_init: Initial layer scale; 0 leaves it out, as published.

    Raises:
        ValueError: A setting by stage is not four positive integers, or a kernel side is even.

    Examples:
        >>> import torch
        >>> from dst_models.replknet import RepLKNet
        >>> model = RepLKNet((1, 1, 1, 1), (8, 12, 16, 24), kernel_sizes=(13, 11, 9, 7), num_classes=10)
        >>> [tuple(m.shape) for m in model.forward_features(torch.zeros(2, 3, 64, 64))]
        [(2, 8, 16, 16), (2, 12, 8, 8), (2, 16, 4, 4), (2, 24, 2, 2)]
        >>> model(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10])

    Source: Ding et al., arXiv 2203.06717, Section 4.1. Initialisation is torch's own, as published.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 18, 2),
        dims: Sequence[int] = (128, 256, 512, 1024),
        *,
        kernel_sizes: Sequence[int] = (31, 29, 27, 13),
        small_kernel: int | None = 5,
        dw_ratio: float = 1.0,
        ffn_ratio: float = 4.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        layer_scale_init: float = 0.0,
    ) -> None:
        super().__init__()
        depths, self.dims = four("depths", depths), four("dims", dims)
        self.strides = (4, 8, 16, 32)
        self.layer_scale_init = layer_scale_init
        width = self.dims[0]
        self.stem = ReLUSequential(
            conv3x3(in_chans, width, stride=2, depthwise=False),
            conv3x3(width, width),
            pointwise(width, width),
            conv3x3(width, width, stride=2),
        )
        self.transitions = nn.ModuleList(
            ReLUSequential(pointwise(dim, wider), conv3x3(wider, wider, stride=2))
            for dim, wider in pairwise(self.dims)
        )
        rates = drop_path_rates(drop_path_rate, depths)
        self.stages = nn.ModuleList()
        for dim, depth, kernel_size in zip(
            self.dims, depths, four("kernel_sizes", kernel_sizes), strict=True
        ):
            blocks: list[nn.Module] = []
            for _ in range(depth):
                common = {"drop_path": next(rates), "layer_scale_init": layer_scale_init}
                blocks.append(RepLKBlock(dim, int(dim * dw_ratio), kernel_size, small_kernel, **common))
                blocks.append(ConvFFN(dim, int(dim * ffn_ratio), **common))
            self.stages.append(nn.Sequential(*blocks))
        self.norm = nn.BatchNorm2d(self.dims[-1])
        self.head = nn.Linear(self.dims[-1], num_classes) if num_classes else nn.Identity()

    def init_weights(self) -> None:
        """Draw all weights anew, as published; also what a model moved from the meta device needs."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        reset_layer_scales(self, self.layer_scale_init)

    def forward_features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the outputs of the four stages, (N, dims[i], H / strides[i], W / strides[i]) rounded up."""
        maps: list[Tensor] = []
        for downsample, stage in zip([self.stem, *self.transitions], self.stages, strict=True):
            x = stage(downsample(x))
            maps.append(x)
        return maps[0], maps[1], maps[2], maps[3]

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_chans, H, W) to logits (N, num_classes)."""
        return self.head(self.norm(self.forward_features(x)[-1]).mean((-2, -1)))

    def merge(self) -> RepLKNet:
        """Return a frozen copy for inference whose output equals this model's in eval mode.

        Every BatchNorm is folded into the convolution before or after it, the small kernels into the large
        ones.
        """
        merged = merged_copy(self)
        pairs = [(block, block.pw1) for stage in merged.stages for block in stage]
        for owner, following in [*pairs, (merged, merged.head)]:
            if isinstance(following, (nn.Conv2d, nn.Linear)) and not isinstance(owner.norm, nn.Identity):
                fold_norm_into_next(owner.norm, following)
                owner.norm = nn.Identity()
        return merged.requires_grad_(False)


VARIANTS: dict[str, dict[str, Any]] = {
    "replknet31_base": {"depths": (2, 2, 18, 2), "dims": (128, 256, 512, 1024)},
    "replknet31_large": {"depths": (2, 2, 18, 2), "dims": (192, 384, 768, 1536)},
}


@register_model
def replknet31_base(**overrides: Any) -> RepLKNet:
    """Build RepLKNet-31B: 79.9M parameters before merging."""
    return RepLKNet(**VARIANTS["replknet31_base"] | overrides)


@register_model
def replknet31_large(**overrides: Any) -> RepLKNet:
    """Build RepLKNet-31L: 172.7M parameters before merging."""
    return RepLKNet(**VARIANTS["replknet31_large"] | overrides)
