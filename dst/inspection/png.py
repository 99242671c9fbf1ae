"""Write a grey picture as a PNG file."""

from __future__ import annotations

import struct
import zlib

import torch
from torch import Tensor

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def png(image: Tensor) -> bytes:
    r"""Encode a grey picture.

    Args:
        image: Float, (1, height, width) as from `dst.mask_image`; 0 is black, 1 white.

    Returns:
        The bytes of a PNG file: 8-bit greyscale, without loss of the 256 levels.

    Examples:
        >>> png(torch.ones(1, 2, 3))[:8]
        b'\x89PNG\r\n\x1a\n'

    Source:
        PNG specification (W3C, third edition), sections 5 and 11.2.
    """
    levels = (image.squeeze(0) * 255).round().to(torch.uint8)
    height, width = levels.shape
    rows = b"".join(b"\0" + bytes(row.tolist()) for row in levels)  # filter type 0 before each row
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows, 9)) + _chunk(b"IEND", b"")
    )


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
