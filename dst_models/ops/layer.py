"""The depthwise convolution as a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dst_models.ops.depthwise import depthwise_conv2d


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution with stride 1 and zero padding to the same size.

    An ``nn.Conv2d`` with ``groups = channels``, so that counters, initialisers and pruning tools that go by
    modules see what they know; ``weight`` has shape (C, 1, kh, kw). The forward pass calls
    ``depthwise_conv2d``, in training and in evaluation. While a graph is exported (``torch.export``,
    ``torch.onnx``, ``torch.jit.trace``) or traced by ``torch.fx`` it is the plain convolution, so that the
    graph holds stock operators only.

    Args:
        channels: Channels in and out.
        kernel_size: One odd side, or (height, width).
        bias: Whether to add a learned value a channel.
        device: Where the parameters live.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If a side of the kernel is even.

    Examples:
        >>> import torch
        >>> layer = DepthwiseConv2d(8, (5, 51))
        >>> tuple(layer(torch.randn(1, 8, 14, 14)).shape), layer.padding
        ((1, 8, 14, 14), (2, 25))
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int],
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        if height % 2 == 0 or width % 2 == 0:
            raise ValueError(
                f"DepthwiseConv2d keeps the map's size and needs odd kernel sides, got {height} x {width}"
            )
        super().__init__(
            channels,
            channels,
            (height, width),
            padding=(height // 2, width // 2),
            groups=channels,
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``input`` of shape (N, C, H, W) to the same shape."""
        if _is_leaving(input):
            return super().forward(input)
        return depthwise_conv2d(input, self.weight, self.bias)


def _is_leaving(input: Tensor) -> bool:
    """Return whether the graph being recorded will run without this package."""
    return (
        torch.compiler.is_exporting()
        or torch.jit.is_tracing()
        or torch.onnx.is_in_onnx_export()
        or isinstance(input, torch.fx.Proxy)
    )
