"""What a first mask set to zero, kept until it is sure that nobody wants it back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Displaced:
    """The values that a mask has set to zero in a tensor.

    Args:
        values: One-dimensional, the entries where the mask is inactive, in row-major order.
        version: The tensor's version after they were set to zero.
        bits: The sum of the tensor's bits after that.
    """

    values: Tensor
    version: int
    bits: int

    @classmethod
    def after(cls, tensor: Tensor, values: Tensor) -> Displaced:
        """Note what was displaced, once the tensor holds zeros in its place."""
        return cls(values, tensor._version, _sum_of_bits(tensor))

    def fits(self, tensor: Tensor) -> bool:
        """Tell whether nobody has given the tensor other values since.

        The bits tell it. Versions do not: copies count from another one, DistributedDataParallel's
        constructor writes the same weights again, and writes to `.data` count none.
        """
        if tensor.dtype == self.values.dtype:
            return _sum_of_bits(tensor) == self.bits
        return tensor._version == self.version


def _sum_of_bits(tensor: Tensor) -> int:
    """Add up the bits of a tensor's entries, as integers: the same in any memory layout."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().view(integer).sum(dtype=torch.int64))
