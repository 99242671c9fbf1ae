from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from recipes.data.errors import DataError
from recipes.data.reading import MAX_PIXELS, is_too_large, read_rgb


def first_pixel(path) -> tuple[int, ...]:
    image = read_rgb(path)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("LA", (50, 0), (255, 255, 255)),
        ("I;16", 0x8000, (128, 128, 128)),
    ],
)
def test_every_mode_becomes_rgb_on_white(tmp_path, mode, colour, expected):
    path = tmp_path / "image.png"
    Image.new(mode, (3, 2), colour).save(path)
    assert first_pixel(path) == expected


@pytest.mark.parametrize(
    ("transparency", "expected"), [(None, (200, 0, 0)), (0, (255, 255, 255)), (1, (200, 0, 0))]
)
def test_palettes_with_and_without_a_transparent_entry(tmp_path, transparency, expected):
    image = Image.new("P", (2, 2), 0)
    image.putpalette([200, 0, 0, 0, 200, 0])
    path = tmp_path / "image.png"
    image.save(path, **({} if transparency is None else {"transparency": transparency}))
    assert first_pixel(path) == expected


def test_a_transparent_colour_without_alpha_is_white(tmp_path):
    path = tmp_path / "image.png"
    Image.new("RGB", (2, 2), (1, 2, 3)).save(path, transparency=(1, 2, 3))
    assert first_pixel(path) == (255, 255, 255)


def test_cmyk_is_converted(tmp_path):
    path = tmp_path / "image.jpg"
    Image.new("CMYK", (8, 8), (0, 0, 0, 255)).save(path)
    assert max(first_pixel(path)) < 10


@pytest.mark.parametrize("name", ["noise.png", "photo.jpg"])
def test_a_truncated_file_is_named(tmp_path, name):
    path = tmp_path / name
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match=f"{re.escape(str(path))}: the image cannot be read") as caught:
        read_rgb(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_image_is_named(tmp_path, content):
    path = tmp_path / "image.png"
    path.write_bytes(content)
    for read in (read_rgb, is_too_large):
        with pytest.raises(DataError, match=re.escape(str(path))):
            read(path)


def test_a_missing_file_is_named(tmp_path):
    for read in (read_rgb, is_too_large):
        with pytest.raises(DataError, match=r"gone\.png: the image cannot be read"):
            read(tmp_path / "gone.png")


def test_pixels_without_a_known_white_are_refused(tmp_path):
    path = tmp_path / "image.tif"
    Image.new("F", (2, 2), 0.5).save(path)
    with pytest.raises(DataError, match="pixels of mode F have no known white"):
        read_rgb(path)


@pytest.mark.parametrize("side", [10, 7_072, 10_000, 30_000])
def test_large_images_are_known_by_their_header(tmp_path, side):
    header = tmp_path / "image.pgm"
    header.write_bytes(b"P5 %d %d 255\n" % (side, side))
    assert is_too_large(header) == (side * side > MAX_PIXELS)


def test_an_image_beyond_pillows_guard_is_refused_in_one_line(tmp_path):
    path = tmp_path / "image.pgm"
    path.write_bytes(b"P5 30000 30000 255\n")
    with pytest.raises(DataError, match="decompression bomb"):
        read_rgb(path)
