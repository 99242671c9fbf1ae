"""Layers that the backbones share: drop path, LayerNorm over channels, downsampling, initialisation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = [
    "DropPath",
    "LayerNorm2d",
    "downsample_layers",
    "drop_path_rates",
    "four",
    "init_weights",
    "layer_scale",
    "require_side",
    "reset_layer_scales",
]


class DropPath(nn.Module):
    """Drop the residual branch of whole samples in training (stochastic depth).

    ``y_n = x_n * b_n / (1 - p)`` with ``b_n`` one Bernoulli(1 - p) draw per sample, so that the mean is kept;
    the identity in eval mode and for p = 0.

    Args:
        drop_prob: p, in [0, 1).

    Raises:
        ValueError: ``drop_prob`` is outside [0, 1).

    Examples:
        >>> import torch
        >>> from dst_models.layers import DropPath
        >>> sorted(set(DropPath(0.5)(torch.ones(64, 2, 2, 2)).flatten().tolist()))
        [0.0, 2.0]

    Source: Huang et al., Deep Networks with Stochastic Depth, arXiv 1603.09382, Section 3.
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= drop_prob < 1.0:
            raise ValueError(f"drop_prob is {drop_prob}; give a probability in [0, 1)")
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """Return x of shape (N, ...), with some samples zeroed and the others scaled up."""
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1.0 - self.drop_prob
        return x * x.new_empty((len(x),) + (1,) * (x.ndim - 1)).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        """Show the probability in the printed model."""
        return f"drop_prob={self.drop_prob:.3f}"


def drop_path_rates(rate: float, depths: Sequence[int]) -> Iterator[float]:
    """Give each block its drop probability, rising linearly from 0 at the first to ``rate`` at the last.

    Examples:
        >>> from dst_models.layers import drop_path_rates
        >>> list(drop_path_rates(0.5, (1, 1, 2, 1)))
        [0.0, 0.125, 0.25, 0.375, 0.5]

    Source: Huang et al., arXiv 1603.09382, Section 3 (linear decay rule).
    """
    last = max(sum(depths) - 1, 1)
    return (rate * block / last for block in range(sum(depths)))


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of an (N, C, H, W) map.

    By permutation: what comes out lies channels-last in memory, which every following layer then keeps. That
    is much faster than taking mean and variance over dimension 1.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each pixel of a (N, C, H, W) map over its channels."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def downsample_layers(in_chans: int, dims: Sequence[int], stem_stride: int) -> nn.ModuleList:
    """Build the patchifying stem and the three halving layers of ConvNeXt.

    Args:
        in_chans: Channels of the image.
        dims: Channels of the four stages.
        stem_stride: Side of the stem's patches in pixels, 4 as published.

    Returns:
        Four modules; the i-th goes before stage i. An odd row or column left over at the end is not seen.

    Source: Liu et al., A ConvNet for the 2020s, arXiv 2201.03545, Sections 2.2 and 2.6.
    """
    stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], stem_stride, stem_stride), LayerNorm2d(dims[0]))
    halve = [nn.Sequential(LayerNorm2d(dim), nn.Conv2d(dim, wider, 2, 2)) for dim, wider in pairwise(dims)]
    return nn.ModuleList([stem, *halve])


def layer_scale(channels: int, init: float) -> nn.Parameter | None:
    """Make the learned factor per channel of a residual branch; None where ``init`` is 0.

    Source: Touvron et al., Going deeper with Image Transformers, arXiv 2103.17239, Section 2 (LayerScale).
    """
    return nn.Parameter(torch.full((channels,), init)) if init > 0 else None


def reset_layer_scales(model: nn.Module, init: float) -> None:
    """Set every `layer_scale` of a model, in place."""
    for name, parameter in model.named_parameters():
        if name.endswith(".gamma"):
            nn.init.constant_(parameter, init)


def init_weights(model: nn.Module, layer_scale_init: float, head_init_scale: float) -> None:
    """Draw convolution and linear weights from N(0, 0.02^2) cut at +-2, zero their biases, reset the rest.

    Args:
        model: Changed in place; may lie on the meta device.
        layer_scale_init: Value of the layer scales.
        head_init_scale: Factor on the weights of ``model.head`` afterwards.

    Source: The published code of ConvNeXt (arXiv 2201.03545) and of SLaK (arXiv 2207.03620), which agree.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif module is not model and hasattr(module, "reset_parameters"):
            module.reset_parameters()
    reset_layer_scales(model, layer_scale_init)
    if isinstance(model.head, nn.Linear):
        with torch.no_grad():
            model.head.weight.mul_(head_init_scale)


def require_side(x: Tensor, side: int) -> None:
    """Raise ValueError where an image is too small to leave a pixel on the last map."""
    height, width = x.shape[-2:]
    if height < side or width < side:
        raise ValueError(
            f"the image is {height}x{width} px; this model needs {side} px a side or a smaller stem_stride"
        )


def four(name: str, values: Sequence[int]) -> tuple[int, int, int, int]:
    """Return a setting of one positive integer a stage as a tuple of four; ValueError where it is none."""
    values = tuple(values)
    if len(values) != 4 or any(not isinstance(value, int) or value < 1 for value in values):
        raise ValueError(f"{name} is {values}; give four positive integers, one a stage")
    return values
