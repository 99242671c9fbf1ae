"""Read the idx format of MNIST and its relatives, plain or gzipped, and trust nothing in the file.

Two zero bytes, one byte for the type (8 = unsigned byte), one for the number of dimensions, each dimension as
a big-endian 32-bit number, then the data in C order. Source: Y. LeCun, C. Cortes, C. J. C. Burges, "The MNIST
database", file formats.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from recipes.data.errors import DataError

_UNSIGNED_BYTE = 8


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read an idx file of unsigned bytes.

    Args:
        path: the file; gzipped if its name ends in `.gz`.
        dimensions: how many dimensions it must have.

    Returns:
        A uint8 array of the shape that the file states.

    Raises:
        DataError: if the file cannot be read, is something else, or is shorter or longer than it states.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _parse(file, path, dimensions)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: the file cannot be read or is damaged ({error})") from error


def _parse(file: BinaryIO | gzip.GzipFile, path: Path, dimensions: int) -> np.ndarray:
    magic = file.read(4)
    expected = bytes([0, 0, _UNSIGNED_BYTE, dimensions])
    if magic != expected:
        raise DataError(f"{path}: the magic number is {magic.hex() or 'missing'}, expected {expected.hex()}")
    header = file.read(4 * dimensions)
    if len(header) < 4 * dimensions:
        raise DataError(f"{path}: the file ends inside its header")
    shape = struct.unpack(f">{dimensions}I", header)
    size = math.prod(shape)
    content = _read_up_to(file, size)
    if len(content) < size:
        raise DataError(f"{path}: the file is truncated, {len(content):,} of {size:,} bytes are there")
    if file.read(1):
        raise DataError(f"{path}: the file goes on after the {size:,} bytes that its header states")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _read_up_to(file: BinaryIO | gzip.GzipFile, size: int) -> bytes:
    """Read at most `size` bytes without reserving memory for what a damaged header promises."""
    chunks, missing = [], size
    while missing and (chunk := file.read(min(missing, 1 << 20))):
        chunks.append(chunk)
        missing -= len(chunk)
    return b"".join(chunks)
