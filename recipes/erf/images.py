"""The images that a receptive field is averaged over: smooth noise, or a folder of photographs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from recipes.data.image_folder import IMAGENET_MEAN, IMAGENET_STD, SUFFIXES
from recipes.data.reading import read_rgb
from recipes.engine.errors import UserError

GRAIN = 8  # pixels between the independent values that smooth noise runs through


def noise(count: int, channels: int, pixels: int, seed: int) -> Iterator[Tensor]:
    """Yield smooth random images (channels, pixels, pixels), about standard normal.

    Independent normal values every 8 pixels, with cubic interpolation between them.
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = -(-pixels // GRAIN)
    for _ in range(count):
        values = torch.randn(1, channels, coarse, coarse, generator=generator)
        smooth = F.interpolate(values, size=(pixels, pixels), mode="bicubic", align_corners=False)[0]
        yield (smooth - smooth.mean()) / smooth.std()


def find(folder: Path, count: int) -> list[Path]:
    """Return `count` images of a folder and the folders in it, evenly spread over their sorted paths.

    Raises:
        UserError: if there is no such folder, or it has fewer images.
    """
    if not folder.is_dir():
        raise UserError(f"--data {folder}: there is no such folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if len(files) < count:
        raise UserError(f"--data {folder}: it has {len(files)} images and --images is {count}")
    return [files[index * len(files) // count] for index in range(count)]


def photographs(files: list[Path], channels: int, pixels: int) -> Iterator[Tensor]:
    """Yield images (channels, pixels, pixels), resized and normalised as ImageNet's; grey for one channel.

    The whole image is resized to a square, as published.

    Raises:
        DataError: if a file cannot be read; the message names it.
    """
    mean, std = np.array(IMAGENET_MEAN, np.float32), np.array(IMAGENET_STD, np.float32)
    for file in files:
        image = read_rgb(file).resize((pixels, pixels), Image.Resampling.BICUBIC)
        values = (np.asarray(image, np.float32) / 255 - mean) / std
        tensor = torch.from_numpy(values).movedim(-1, 0)
        yield tensor if channels == 3 else tensor.mean(0, keepdim=True).expand(channels, -1, -1)
