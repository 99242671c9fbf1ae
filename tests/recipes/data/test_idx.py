from __future__ import annotations

import contextlib
import gzip
import math
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from recipes.data.errors import DataError
from recipes.data.idx import read_idx

arrays = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=6))


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def read(content: bytes, dimensions: int, suffix: str = "") -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file{suffix}"
        path.write_bytes(content)
        return read_idx(path, dimensions)


@given(arrays, st.booleans())
def test_what_is_written_is_read(array, zipped):
    content = idx_bytes(array)
    found = read(gzip.compress(content) if zipped else content, array.ndim, ".gz" if zipped else "")
    np.testing.assert_array_equal(found, array)
    assert found.shape == array.shape


@given(arrays, st.data())
def test_every_truncation_is_an_error(array, data):
    content = idx_bytes(array)
    length = data.draw(st.integers(0, len(content) - 1))
    with pytest.raises(DataError):
        read(content[:length], array.ndim)
    zipped = gzip.compress(content)
    with pytest.raises(DataError):
        read(zipped[: data.draw(st.integers(0, len(zipped) - 1))], array.ndim, ".gz")


@given(
    content=st.binary(max_size=64), dimensions=st.integers(1, 3), zipped=st.sampled_from(["", "raw", "inner"])
)
def test_arbitrary_bytes_are_an_error_or_an_array_of_the_stated_shape(content, dimensions, zipped):
    content = gzip.compress(content) if zipped == "inner" else content
    with contextlib.suppress(DataError):  # anything else that is raised fails the test
        assert read(content, dimensions, ".gz" if zipped else "").ndim == dimensions


@given(shape=st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=3), body=st.binary(max_size=64))
def test_a_header_that_promises_too_much_reserves_nothing(shape, body):
    content = bytes([0, 0, 8, 3]) + struct.pack(">3I", *shape) + body
    if math.prod(shape) == len(body):
        assert read(content, 3).shape == tuple(shape)
    else:
        with pytest.raises(DataError, match=r"truncated|goes on"):
            read(content, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "magic number is missing, expected 00000801"),
        (b"\0\0\x08\x03\0\0\0\1", "magic number is 00000803, expected 00000801"),
        (b"\0\0\x0d\x01\0\0\0\1", "magic number is 00000d01"),
        (b"\0\0\x08\x01\0\0", "ends inside its header"),
        (b"\0\0\x08\x01\0\0\0\3ab", "truncated, 2 of 3 bytes"),
        (b"\0\0\x08\x01\0\0\0\1ab", "goes on after the 1 bytes"),
    ],
)
def test_each_fault_has_its_line_and_names_the_file(content, message):
    with pytest.raises(DataError, match=message) as caught:
        read(content, 1)
    assert "/file: " in str(caught.value)


def test_a_damaged_gzip_stream_is_an_error():
    zipped = bytearray(gzip.compress(idx_bytes(np.arange(200, dtype=np.uint8))))
    zipped[12] ^= 0xFF
    with pytest.raises(DataError, match="cannot be read or is damaged"):
        read(bytes(zipped), 1, ".gz")


def test_a_missing_file_is_an_error(tmp_path):
    for name in ("gone", "gone.gz"):
        with pytest.raises(DataError, match=f"{name}: the file cannot be read"):
            read_idx(tmp_path / name, 1)
