"""Read image files: always RGB, on white where they are transparent, and an error that names the file."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from recipes.data.errors import DataError

MAX_PIXELS = 50_000_000
_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


def read_rgb(path: Path) -> Image.Image:
    """Read an image as RGB, on white where it is transparent.

    Raises:
        DataError: if the file is missing, no image, truncated or too large; the message names it.
    """
    try:
        with Image.open(path) as image:
            return _on_white(image)
    except Exception as error:  # a decoder given a damaged file raises whatever it stumbles over
        raise _unreadable(path, error) from error


def is_too_large(path: Path) -> bool:
    """Return whether the header of an image states more than `MAX_PIXELS`; the pixels are not read.

    Raises:
        DataError: if the file is missing or no image; the message names it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return image.width * image.height > MAX_PIXELS
    except Image.DecompressionBombError:
        return True
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: the image cannot be read ({' '.join(str(error).split())})")


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # 16-bit grey: convert("RGB") would clip it at 255, to almost all white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known white; 8 or 16 bits are expected")
    if image.mode not in _WITH_ALPHA and "transparency" not in image.info:
        return image.convert("RGB")
    colour = image.convert("RGBA")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(colour, mask=colour.getchannel("A"))
    return white
