"""Runs of the recipes that are over in a second: shrunken configs, image folders, and their comparison."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

TINY_MODEL = (
    "model.depths=1,1,1,1",
    "model.dims=4,4,8,8",
    "model.kernel_sizes=7,5,3,3",
    "model.small_kernel=3",
    "model.width_factor=1",
    "model.stem_stride=2",
)
TINY_DIGITS = (
    *TINY_MODEL,
    "data.size=16",
    "data.held_out=0.9",  # 180 digits to train on
    "data.second_split=none",
    "data.evaluation_batch=1000",
    "optim.batch_size=60",
    "optim.epochs=2",
    "optim.warmup_epochs=1",
    "sparse.interval=2",
    "run.threads=1",
    "run.device=cpu",
    "run.eval_interval=1",
)
"""Three steps an epoch, six in all, mask updates after steps 2, 4 and 6."""


def arguments(*assignments: str) -> list[str]:
    """Return `--set` for each assignment."""
    return [part for text in assignments for part in ("--set", text)]


def write_images(folder: Path, classes: int = 2, images: int = 4, side: int = 24) -> Path:
    """Write PNG files of noise around a colour for each class: `folder/class_<i>/<j>.png`."""
    rng = np.random.default_rng(0)
    for index in range(classes):
        place = folder / f"class_{index}"
        place.mkdir(parents=True)
        for number in range(images):
            pixels = rng.integers(0, 100, (side, side, 3)) + 150 * np.eye(3, dtype=int)[index % 3]
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{number}.png")
    return folder


def write_train_and_val(folder: Path, **kwargs: int) -> Path:
    """Write two such folders, `train/` and `val/`."""
    for part in ("train", "val"):
        write_images(folder / part, **kwargs)
    return folder


def write_fashion(folder: Path, images: int = 8) -> Path:
    """Write the four files of Fashion-MNIST with a few random pictures."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part in ("train", "t10k"):
        pixels = rng.integers(0, 256, (images, 28, 28), dtype=np.uint8)
        labels = (np.arange(images) % 10).astype(np.uint8)
        with gzip.open(folder / f"{part}-images-idx3-ubyte.gz", "wb") as file:
            file.write(bytes([0, 0, 8, 3]) + struct.pack(">3I", *pixels.shape) + pixels.tobytes())
        with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(bytes([0, 0, 8, 1]) + struct.pack(">I", images) + labels.tobytes())
    return folder


def differing(one: Any, other: Any, path: str = "") -> list[str]:
    """Return where two nested contents of checkpoints differ by any bit; the clock does not count."""
    if path.endswith(".seconds"):
        return []
    if type(one) is not type(other):
        return [f"{path}: {type(one).__name__} and {type(other).__name__}"]
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        return [] if same and one.numpy().tobytes() == other.numpy().tobytes() else [path]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{path}: keys {sorted(map(str, one.keys() ^ other.keys()))}"]
        return [text for key in one for text in differing(one[key], other[key], f"{path}.{key}")]
    if isinstance(one, list):
        if len(one) != len(other):
            return [f"{path}: lengths {len(one)} and {len(other)}"]
        return [
            text
            for i, pair in enumerate(zip(one, other, strict=True))
            for text in differing(*pair, f"{path}.{i}")
        ]
    return [] if one == other or (one != one and other != other) else [f"{path}: {one} and {other}"]
