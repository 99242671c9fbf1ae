from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from recipes.data.errors import DataError
from recipes.data.fashion_mnist import DEBIAN_FOLDER, FILES, has_fashion_mnist, open_fashion_mnist


def write(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("train", 7), ("t10k", 3)):
        write(tmp_path / f"{name}-images-idx3-ubyte.gz", rng.integers(0, 256, (count, 28, 28)))
        write(tmp_path / f"{name}-labels-idx1-ubyte", rng.integers(0, 10, count))
    return tmp_path


def test_plain_and_gzipped_files_are_read(folder):
    train, test = open_fashion_mnist(folder)
    assert (len(train), len(test), len(train.classes)) == (7, 3, 10)
    pixels = np.random.default_rng(0).integers(0, 256, (7, 28, 28)).astype(np.uint8)
    np.testing.assert_array_equal(train.pixels[:, 0].numpy(), pixels)
    np.testing.assert_allclose(train.load([2])[0, 0].numpy(), pixels[2] / np.float32(255))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named_with_the_package(folder, name):
    for path in folder.glob(f"{name}*"):
        path.unlink()
    with pytest.raises(DataError, match="apt install dataset-fashion-mnist") as caught:
        open_fashion_mnist(folder)
    assert f"{name}[.gz] is not there" in str(caught.value)
    assert all(file in str(caught.value) for file in FILES)
    assert has_fashion_mnist(folder)


def test_an_empty_folder_has_no_fashion_mnist(tmp_path):
    assert not has_fashion_mnist(tmp_path)


@pytest.mark.parametrize(
    ("file", "array", "message"),
    [
        (
            "train-images-idx3-ubyte.gz",
            np.zeros((7, 28, 27)),
            r"\(7, 28, 27\), expected at least one of 28 x 28",
        ),
        ("train-images-idx3-ubyte.gz", np.zeros((0, 28, 28)), "expected at least one"),
        ("t10k-labels-idx1-ubyte", np.zeros(4), "4 labels for 3 images"),
        ("t10k-labels-idx1-ubyte", np.array([0, 10, 1]), "a label 10, expected 0 to 9"),
        ("t10k-images-idx3-ubyte.gz", np.zeros(4), "magic number is 00000801, expected 00000803"),
    ],
)
def test_files_that_do_not_fit_are_refused(folder, file, array, message):
    write(folder / file, array)
    with pytest.raises(DataError, match=message):
        open_fashion_mnist(folder)


@pytest.mark.skipif(
    not DEBIAN_FOLDER.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed"
)
def test_debians_package_is_the_published_data():
    train, test = open_fashion_mnist()
    assert (len(train), len(test)) == (60_000, 10_000)
    assert set(np.bincount(train.labels)) == {6000}
    assert float((train.pixels.float() / 255).mean()) == pytest.approx(train.mean[0], abs=1e-4)
