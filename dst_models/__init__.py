"""SLaK and its relatives: large-kernel convolutional networks by name, with published weights and merging."""

from __future__ import annotations

from dst_models.checkpoints import from_official
from dst_models.convnext import ConvNeXt
from dst_models.erf import area_ratio, effective_receptive_field
from dst_models.ops import DepthwiseConv2d, depthwise_conv2d
from dst_models.registry import create_model, list_models, register_model
from dst_models.replknet import RepLKNet
from dst_models.slak import SLaK

__all__ = [
    "ConvNeXt",
    "DepthwiseConv2d",
    "RepLKNet",
    "SLaK",
    "area_ratio",
    "create_model",
    "depthwise_conv2d",
    "effective_receptive_field",
    "from_official",
    "list_models",
    "register_model",
]
