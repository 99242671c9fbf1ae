"""Depthwise convolution with large, non-square kernels.

``depthwise_conv2d`` is the one door; ``reference.py`` says what it means, ``rules.py`` which path is taken
where, ``cpu.py`` how each path computes it.
"""

from __future__ import annotations

from dst_models.ops.depthwise import depthwise_conv2d
from dst_models.ops.layer import DepthwiseConv2d
from dst_models.ops.reference import depthwise_conv2d_reference, use_reference

__all__ = ["DepthwiseConv2d", "depthwise_conv2d", "depthwise_conv2d_reference", "use_reference"]
