"""ConvNeXt: a plain convolutional network with 7x7 depthwise kernels.

Paper: Liu, Mao, Wu, Feichtenhofer, Darrell, Xie, A ConvNet for the 2020s, arXiv 2201.03545: Figure 4 (block),
Section 2.2 (depths and patchify stem), Section 2.6 (downsampling), Section 3 (variants). Published code: MIT.
What differs: LayerNorm over channels works by permutation (equal, faster); smaller inputs may use a smaller
stem stride. Parameter names are those of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dst_models.large_kernel import merged_copy
from dst_models.layers import (
    DropPath,
    downsample_layers,
    drop_path_rates,
    four,
    init_weights,
    layer_scale,
    require_side,
)
from dst_models.ops import DepthwiseConv2d
from dst_models.registry import register_model

__all__ = ["ConvNeXt", "ConvNeXtBlock"]


class ConvNeXtBlock(nn.Module):
    """Residual block ``x + drop_path(gamma * W2 GELU(W1 LN(K * x)))`` with a 7x7 depthwise kernel K.

    Args:
        dim: Channels C.
        drop_path: Probability of dropping the residual branch of a sample.
        layer_scale_init: Initial gamma; 0 leaves gamma out.

    Source: Liu et al., arXiv 2201.03545, Figure 4.
    """

    def __init__(self, dim: int, *, drop_path: float = 0.0, layer_scale_init: float = 1e-6) -> None:
        super().__init__()
        self.dwconv = DepthwiseConv2d(dim, 7, bias=True)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = layer_scale(dim, layer_scale_init)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.pwconv2(self.act(self.pwconv1(y)))
        if self.gamma is not None:
            y = self.gamma * y
        return x + self.drop_path(y.permute(0, 3, 1, 2))


class ConvNeXt(nn.Module):
    """ConvNeXt classifier and backbone.

    Args:
        depths: Blocks of each of the four stages.
        dims: Channels of each stage.
        stem_stride: Side of the stem's patches in pixels.
        in_chans: Channels of the image.
        num_classes: Outputs of the head; 0 leaves the head out.
        drop_path_rate: Drop probability of the last block; rises linearly from 0 at the first.
        layer_scale_init: Initial layer scale; 0 leaves it out.
        head_init_scale: Factor on the head's initial weights.

    Raises:
        ValueError: ``depths`` or ``dims`` is not four positive integers.

    Examples:
        >>> import torch
        >>> from dst_models.convnext import ConvNeXt
        >>> model = ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=10)
        >>> [tuple(m.shape) for m in model.forward_features(torch.zeros(2, 3, 64, 64))]
        [(2, 8, 16, 16), (2, 16, 8, 8), (2, 24, 4, 4), (2, 32, 2, 2)]
        >>> model(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10])

    Source: Liu et al., arXiv 2201.03545, Section 2.
    """

    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        *,
        stem_stride: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        layer_scale_init: float = 1e-6,
        head_init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        depths, self.dims = four("depths", depths), four("dims", dims)
        self.strides = tuple(stem_stride * 2**stage for stage in range(4))
        self.layer_scale_init = layer_scale_init
        self.head_init_scale = head_init_scale
        self.downsample_layers = downsample_layers(in_chans, self.dims, stem_stride)
        rates = drop_path_rates(drop_path_rate, depths)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    ConvNeXtBlock(dim, drop_path=next(rates), layer_scale_init=layer_scale_init)
                    for _ in range(depth)
                )
            )
            for dim, depth in zip(self.dims, depths, strict=True)
        )
        self.norm = nn.LayerNorm(self.dims[-1], eps=1e-6)
        self.head = nn.Linear(self.dims[-1], num_classes) if num_classes else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Draw all weights anew, as published; also what a model moved from the meta device needs."""
        init_weights(self, self.layer_scale_init, self.head_init_scale)

    def forward_features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the outputs of the four stages, (N, dims[i], H // strides[i], W // strides[i]) each."""
        require_side(x, self.strides[-1])
        maps: list[Tensor] = []
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
            maps.append(x)
        return maps[0], maps[1], maps[2], maps[3]

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_chans, H, W) to logits (N, num_classes)."""
        return self.head(self.norm(self.forward_features(x)[-1].mean((-2, -1))))

    def merge(self) -> ConvNeXt:
        """Return a frozen copy for inference; this network has nothing to merge."""
        return merged_copy(self)


VARIANTS: dict[str, dict[str, Any]] = {
    "convnext_tiny": {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)},
    "convnext_small": {"depths": (3, 3, 27, 3), "dims": (96, 192, 384, 768)},
    "convnext_base": {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)},
}


@register_model
def convnext_tiny(**overrides: Any) -> ConvNeXt:
    """Build ConvNeXt-T: 28.6M parameters, 4.5 GMACs at 224 px."""
    return ConvNeXt(**VARIANTS["convnext_tiny"] | overrides)


@register_model
def convnext_small(**overrides: Any) -> ConvNeXt:
    """Build ConvNeXt-S: 50.2M parameters, 8.7 GMACs at 224 px."""
    return ConvNeXt(**VARIANTS["convnext_small"] | overrides)


@register_model
def convnext_base(**overrides: Any) -> ConvNeXt:
    """Build ConvNeXt-B: 88.6M parameters, 15.4 GMACs at 224 px."""
    return ConvNeXt(**VARIANTS["convnext_base"] | overrides)
