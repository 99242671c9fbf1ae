"""The rule table: which CPU path computes a depthwise convolution of a given shape, dtype and layout.

A table, not a timing at run time: another choice would change the rounding, and a resumed run would no
longer be bit for bit the same. The reasons in this file are measurements; figures, machine and command are
in ``docs/decisions/depthwise-convolution.md``.
"""

from __future__ import annotations

import logging
from enum import Enum
from functools import lru_cache
from typing import NamedTuple

import torch

_logger = logging.getLogger(__name__)

# oneDNN's direct depthwise kernel wants the zero padding on the left and right to be no wider than its block
# of outputs: 6 columns with AVX-512, 4 with AVX2. Wider kernels fall to a path 20 to 80 times slower.
_WIDEST_BY_CAPABILITY = {"AVX512": 13, "AVX2": 9}


def _widest_direct_kernel() -> int:
    if not torch.backends.mkldnn.is_available():
        return 0
    return _WIDEST_BY_CAPABILITY.get(torch.backends.cpu.get_cpu_capability(), 0)


WIDEST_DIRECT_KERNEL = _widest_direct_kernel()
"""The widest kernel the fast NCHW path takes on this machine; 0 where nothing was measured."""

# All pairs of positions are one matrix product a channel: cheap on tiny maps, if the batch is large enough to
# fill it. The bound on the positions keeps its temporaries below those of the convolution.
_MOST_PAIRED_POSITIONS = 36
_LEAST_BATCH_PER_POSITION = 2


class Forward(Enum):
    """The method of the forward pass, and of the input gradient, which is one too."""

    AS_GIVEN = "a convolution in the layout of the input"
    CHANNELS_LAST = "a convolution in channels-last, converted back"
    PRODUCT = "an element-wise product"


class WeightGradient(Enum):
    """The method of the weight's gradient (``cpu.py`` explains each)."""

    STOCK = "stock convolution_backward"
    POSITION_PAIRS = "a matrix product over all pairs of positions"
    PLANES = "a convolution with the batch as groups"
    PADDED_PLANES = "a convolution with the batch as groups, padded beforehand"


class Case(NamedTuple):
    """What the choice depends on; the kernel is the one left after cropping."""

    dtype: torch.dtype
    channels_last: bool
    batch: int
    channels: int
    height: int
    width: int
    kernel_height: int
    kernel_width: int


def _forward(case: Case) -> tuple[Forward, str]:
    if case.kernel_height == case.kernel_width == 1:
        return Forward.PRODUCT, "one live tap"
    if case.dtype == torch.float64:
        return Forward.AS_GIVEN, "float64 has one stock kernel, slower in channels-last"
    if case.channels_last:
        return Forward.AS_GIVEN, "channels-last is fast for every kernel"
    if case.kernel_width > WIDEST_DIRECT_KERNEL:
        return Forward.CHANNELS_LAST, "kernels this wide have no fast NCHW path"
    if case.dtype != torch.float32:
        return Forward.CHANNELS_LAST, "half precision is faster in channels-last, conversions included"
    return Forward.AS_GIVEN, "narrow kernels are fast in NCHW"


def _weight_gradient(case: Case) -> tuple[WeightGradient, str]:
    positions = case.height * case.width
    if positions <= _MOST_PAIRED_POSITIONS and case.batch > _LEAST_BATCH_PER_POSITION * positions:
        return WeightGradient.POSITION_PAIRS, "tiny map, large batch"
    if case.dtype == torch.float64:
        return WeightGradient.STOCK, "float64 has no fast convolution with many groups"
    if min(case.kernel_height, case.kernel_width) <= WIDEST_DIRECT_KERNEL:
        return WeightGradient.PLANES, "the kernel's short side fits the direct kernel"
    return WeightGradient.PADDED_PLANES, "both sides of the kernel are too wide for padding inside"


@lru_cache(maxsize=4096)
def forward_for(case: Case) -> Forward:
    """Return the method of the forward pass; log the choice and its reason the first time."""
    choice, reason = _forward(case)
    _logger.info("depthwise_conv2d %s: %s (%s)", case, choice.value, reason)
    return choice


@lru_cache(maxsize=4096)
def weight_gradient_for(case: Case) -> WeightGradient:
    """Return the method of the weight's gradient; log the choice and its reason the first time."""
    choice, reason = _weight_gradient(case)
    _logger.info("depthwise_conv2d %s: weight gradient by %s (%s)", case, choice.value, reason)
    return choice


@lru_cache(maxsize=64)
def log_stock(reason: str) -> None:
    """Log, once a reason, that the stock operator is used."""
    _logger.info("depthwise_conv2d: stock operator (%s)", reason)
