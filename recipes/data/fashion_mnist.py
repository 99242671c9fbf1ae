"""Fashion-MNIST: 60,000 + 10,000 grey images of clothes, 28x28 pixels, ten classes.

Nothing is downloaded here. Debian's package `dataset-fashion-mnist` carries the four files, and a folder with
them does. Source: H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST", arXiv:1708.07747.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from recipes.data.errors import DataError
from recipes.data.idx import read_idx
from recipes.data.images import TensorImages

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def open_fashion_mnist(folder: str | Path | None = None) -> tuple[TensorImages, TensorImages]:
    """Return the training and the test images.

    Args:
        folder: where the four files are, each plain or with `.gz`; Debian's place if not given.

    Returns:
        Training images and test images.

    Raises:
        DataError: if a file is missing, damaged or not what it should be.
    """
    place = DEBIAN_FOLDER if folder is None else Path(folder)
    train_images, train_labels, test_images, test_labels = (_find(place, name) for name in FILES)
    return _read(train_images, train_labels), _read(test_images, test_labels)


def has_fashion_mnist(folder: str | Path) -> bool:
    """Return whether any of the four files is in this folder."""
    return any((Path(folder) / (name + end)).is_file() for name in FILES for end in ("", ".gz"))


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(
        f"{folder}: {name}[.gz] is not there; Fashion-MNIST needs {', '.join(FILES)} "
        f"(each plain or .gz) in one folder, or Debian's package: apt install dataset-fashion-mnist"
    )


def _read(images: Path, labels: Path) -> TensorImages:
    pixels, classes = read_idx(images, dimensions=3), read_idx(labels, dimensions=1)
    if not len(pixels) or pixels.shape[1:] != (28, 28):
        raise DataError(f"{images}: the images are {pixels.shape}, expected at least one of 28 x 28")
    if len(pixels) != len(classes):
        raise DataError(f"{labels}: {len(classes):,} labels for {len(pixels):,} images in {images.name}")
    if classes.max() >= len(CLASSES):
        raise DataError(f"{labels}: there is a label {classes.max()}, expected 0 to {len(CLASSES) - 1}")
    return TensorImages(
        pixels=torch.from_numpy(pixels.copy())[:, None],
        white=255,
        labels=classes.astype(np.int64),
        classes=CLASSES,
        mean=(0.2860,),
        std=(0.3530,),
    )
