"""SLaK: sparse large-kernel network, ConvNeXt with 51x51 kernels decomposed into strips.

Paper: Liu, Chen, Chen, Chen, Xiao, Wu, Karkkainen, Pechenizkiy, Mocanu, Wang, More ConvNets in the 2020s:
Scaling up Kernels Beyond 51x51 using Sparsity, arXiv 2207.03620 (ICLR 2023): Figure 1 and Section 4 (block),
Table 1 (kernel sizes by stage). Published code: MIT.
What differs: BatchNorm is the ordinary one (a recipe converts it to SyncBatchNorm) and may be left out;
decomposed kernels merge for inference; LayerNorm over channels works by permutation (equal, faster). The
model is dense: its sparsity is the optimizer's business. ``width_factor`` is 1.3 by default, the width of the
published results at 40 % sparsity; 1.0 gives the dense width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dst_models.large_kernel import LargeKernelConv, merged_copy
from dst_models.layers import (
    DropPath,
    downsample_layers,
    drop_path_rates,
    four,
    init_weights,
    layer_scale,
    require_side,
)
from dst_models.registry import register_model

__all__ = ["SLaK", "SLaKBlock", "kernel_branches"]


def kernel_branches(
    kernel_size: int, small_kernel: int | None, decomposed: bool = True
) -> dict[str, tuple[int, int]]:
    """Give the depthwise kernels that together stand for one large kernel.

    ``tall`` MxN and ``wide`` NxM when decomposed, else ``large`` MxM; and ``small`` NxN where N < M.

    Args:
        kernel_size: M, odd.
        small_kernel: N, odd; None for a plain kernel with no small one beside it.
        decomposed: Use strips.

    Returns:
        Branch name to (height, width).

    Raises:
        ValueError: A decomposed kernel has no ``small_kernel``, the short side of its strips.

    Examples:
        >>> from dst_models.slak import kernel_branches
        >>> kernel_branches(51, 5)
        {'tall': (51, 5), 'wide': (5, 51), 'small': (5, 5)}
        >>> kernel_branches(31, 5, decomposed=False)
        {'large': (31, 31), 'small': (5, 5)}

    Source: Liu et al., arXiv 2207.03620, Section 4 and Figure 1; N < M as in the published code.
    """
    if decomposed and small_kernel is None:
        raise ValueError("small_kernel is None with decomposed=True; give the strips' short side, such as 5")
    branches = {"large": (kernel_size, kernel_size)}
    if decomposed and small_kernel is not None:
        branches = {"tall": (kernel_size, small_kernel), "wide": (small_kernel, kernel_size)}
    if small_kernel is not None and small_kernel < kernel_size:
        branches["small"] = (small_kernel, small_kernel)
    return branches


class SLaKBlock(nn.Module):
    """Residual block ``x + drop_path(gamma * W2 GELU(W1 LN(sum_b BN_b(K_b * x))))``.

    Args:
        dim: Channels C.
        branches: Depthwise kernels by name, as `kernel_branches` gives them.
        branch_norm: Put a BatchNorm after each of them.
        drop_path: Probability of dropping the residual branch of a sample.
        layer_scale_init: Initial gamma; 0 leaves gamma out.

    Source: Liu et al., arXiv 2207.03620, Figure 1; the rest of the block as in arXiv 2201.03545, Figure 4.
    """

    def __init__(
        self,
        dim: int,
        branches: dict[str, tuple[int, int]],
        *,
        branch_norm: bool = True,
        drop_path: float = 0.0,
        layer_scale_init: float = 1e-6,
    ) -> None:
        super().__init__()
        self.large_kernel = LargeKernelConv(dim, branches, branch_norm=branch_norm)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = layer_scale(dim, layer_scale_init)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        y = self.norm(self.large_kernel(x).permute(0, 2, 3, 1))
        y = self.pwconv2(self.act(self.pwconv1(y)))
        if self.gamma is not None:
            y = self.gamma * y
        return x + self.drop_path(y.permute(0, 3, 1, 2))


class SLaK(nn.Module):
    """SLaK classifier and backbone.

    Args:
        depths: Blocks of each of the four stages.
        dims: Channels of each stage before widening; the model's ``dims`` are ``int(dim * width_factor)``.
        kernel_sizes: Kernel side M of each stage, odd.
        small_kernel: N, odd: the strips' short side and the side of the small kernel beside them.
        width_factor: Factor on ``dims``.
        decomposed: MxN and NxM strips; False for plain MxM kernels.
        branch_norm: Put a BatchNorm after each depthwise branch.
        stem_stride: Side of the stem's patches in pixels.
        in_chans: Channels of the image.
        num_classes: Outputs of the head; 0 leaves the head out.
        drop_path_rate: Drop probability of the last block; rises linearly from 0 at the first.
        layer_scale_init: Initial layer scale; 0 leaves it out.
        head_init_scale: Factor on the head's initial weights.

    Raises:
        ValueError: A setting by stage is not four positive integers, a kernel side is even, or
            ``small_kernel`` is None with ``decomposed``.

    Examples:
        >>> import torch
        >>> from dst_models.slak import SLaK
        >>> model = SLaK((1, 1, 1, 1), (8, 16, 24, 32), kernel_sizes=(13, 11, 9, 7), num_classes=10)
        >>> [tuple(m.shape) for m in model.forward_features(torch.zeros(2, 3, 64, 64))]
        [(2, 10, 16, 16), (2, 20, 8, 8), (2, 31, 4, 4), (2, 41, 2, 2)]
        >>> model(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10])

    Source: Liu et al., arXiv 2207.03620, Sections 4 and 5.
    """

    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        *,
        kernel_sizes: Sequence[int] = (51, 49, 47, 13),
        small_kernel: int | None = 5,
        width_factor: float = 1.3,
        decomposed: bool = True,
        branch_norm: bool = True,
        stem_stride: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        layer_scale_init: float = 1e-6,
        head_init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        depths, dims = four("depths", depths), four("dims", dims)
        self.dims = four("dims times width_factor", [int(dim * width_factor) for dim in dims])
        self.strides = tuple(stem_stride * 2**stage for stage in range(4))
        self.layer_scale_init = layer_scale_init
        self.head_init_scale = head_init_scale
        self.downsample_layers = downsample_layers(in_chans, self.dims, stem_stride)
        rates = drop_path_rates(drop_path_rate, depths)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    SLaKBlock(
                        dim,
                        kernel_branches(kernel_size, small_kernel, decomposed),
                        branch_norm=branch_norm,
                        drop_path=next(rates),
                        layer_scale_init=layer_scale_init,
                    )
                    for _ in range(depth)
                )
            )
            for dim, depth, kernel_size in zip(
                self.dims, depths, four("kernel_sizes", kernel_sizes), strict=True
            )
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

    def merge(self) -> SLaK:
        """Return a frozen copy for inference whose output equals this model's in eval mode.

        BatchNorms are folded and the small kernel is added into a larger one: two depthwise convolutions a
        block when decomposed, else one.
        """
        return merged_copy(self)


_TINY: dict[str, Any] = {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)}
_SMALL: dict[str, Any] = {"depths": (3, 3, 27, 3), "dims": (96, 192, 384, 768)}
_BASE: dict[str, Any] = {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)}
_K31: dict[str, Any] = {"kernel_sizes": (31, 29, 27, 13)}
_K61: dict[str, Any] = {"kernel_sizes": (61, 59, 57, 13)}

# Depths and widths: arXiv 2201.03545, Section 3, as SLaK keeps them. Kernel sizes: arXiv 2207.03620, Table 1.
# slak_large has no published result: its layout is that of the published code (models/SLaK.py).
# slak_micro is ours, for 32 px: kernels reach 2H - 1 on maps of side H = 16, 8, 4, 2, and a tap beyond that
# would never meet data.
VARIANTS: dict[str, dict[str, Any]] = {
    "slak_micro": {
        "depths": (1, 1, 2, 1),
        "dims": (16, 32, 64, 128),
        "kernel_sizes": (31, 15, 7, 3),
        "small_kernel": 3,
        "stem_stride": 2,
    },
    "slak_tiny": _TINY,
    "slak_tiny_k31": _TINY | _K31,
    "slak_tiny_k61": _TINY | _K61,
    "slak_small": _SMALL,
    "slak_small_k31": _SMALL | _K31,
    "slak_small_k61": _SMALL | _K61,
    "slak_base": _BASE,
    "slak_base_k31": _BASE | _K31,
    "slak_base_k61": _BASE | _K61,
    "slak_large": {"depths": (3, 3, 27, 3), "dims": (192, 384, 768, 1536)},
}


@register_model
def slak_micro(**overrides: Any) -> SLaK:
    """Build a SLaK of 0.45M parameters for images of 32 px."""
    return SLaK(**VARIANTS["slak_micro"] | overrides)


@register_model
def slak_tiny(**overrides: Any) -> SLaK:
    """Build SLaK-T: 50.7M parameters dense, 30.5M non-zero at 40 % sparsity."""
    return SLaK(**VARIANTS["slak_tiny"] | overrides)


@register_model
def slak_tiny_k31(**overrides: Any) -> SLaK:
    """Build SLaK-T with kernels of 31."""
    return SLaK(**VARIANTS["slak_tiny_k31"] | overrides)


@register_model
def slak_tiny_k61(**overrides: Any) -> SLaK:
    """Build SLaK-T with kernels of 61."""
    return SLaK(**VARIANTS["slak_tiny_k61"] | overrides)


@register_model
def slak_small(**overrides: Any) -> SLaK:
    """Build SLaK-S: 91.1M parameters dense, 54.8M non-zero at 40 % sparsity."""
    return SLaK(**VARIANTS["slak_small"] | overrides)


@register_model
def slak_small_k31(**overrides: Any) -> SLaK:
    """Build SLaK-S with kernels of 31."""
    return SLaK(**VARIANTS["slak_small_k31"] | overrides)


@register_model
def slak_small_k61(**overrides: Any) -> SLaK:
    """Build SLaK-S with kernels of 61."""
    return SLaK(**VARIANTS["slak_small_k61"] | overrides)


@register_model
def slak_base(**overrides: Any) -> SLaK:
    """Build SLaK-B: 158.0M parameters dense, 94.9M non-zero at 40 % sparsity."""
    return SLaK(**VARIANTS["slak_base"] | overrides)


@register_model
def slak_base_k31(**overrides: Any) -> SLaK:
    """Build SLaK-B with kernels of 31."""
    return SLaK(**VARIANTS["slak_base_k31"] | overrides)


@register_model
def slak_base_k61(**overrides: Any) -> SLaK:
    """Build SLaK-B with kernels of 61."""
    return SLaK(**VARIANTS["slak_base_k61"] | overrides)


@register_model
def slak_large(**overrides: Any) -> SLaK:
    """Build SLaK-L, for which no result is published."""
    return SLaK(**VARIANTS["slak_large"] | overrides)
