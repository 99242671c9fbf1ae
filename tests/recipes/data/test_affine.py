from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from recipes.data.affine import Affine
from recipes.data.keyed import sample_generator

PLAIN = {"mean": (0.0,), "std": (1.0,)}


class Fixed:
    """Stand in for a generator: every uniform draw is the number given."""

    def __init__(self, *draws: float) -> None:
        self.draws = np.array(draws)

    def random(self, size: int) -> np.ndarray:
        assert size == len(self.draws)
        return self.draws


def images(count: int = 2, side: int = 8) -> torch.Tensor:
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(0))


def generators(count: int, epoch: int = 0) -> list[np.random.Generator]:
    return [sample_generator(0, epoch, index) for index in range(count)]


def test_without_ranges_an_image_of_the_same_size_is_left_as_it_is():
    stored = images()
    torch.testing.assert_close(Affine(8, **PLAIN)(stored, generators(2)), stored)


def test_without_ranges_it_is_torchs_bilinear_resize_inside_the_border():
    stored = images()
    resized = F.interpolate(stored, size=(32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(
        Affine(32, **PLAIN)(stored, generators(2))[..., 2:-2, 2:-2], resized[..., 2:-2, 2:-2]
    )


def test_a_quarter_turn_moves_every_pixel_to_its_place():
    stored = images(1)
    turned = Affine(8, **PLAIN, degrees=90)(stored, [Fixed(1.0, 0.5, 0.5, 0.5, 0.5, 0.5)])
    torch.testing.assert_close(
        turned, stored.rot90(-1, (2, 3)), atol=1e-5, rtol=0
    )  # clockwise: y points down


def test_a_move_by_two_pixels_moves_by_two_pixels_and_uncovers_black():
    stored = images(1)
    moved = Affine(8, **PLAIN, translate=0.25)(stored, [Fixed(0.5, 0.5, 0.5, 1.0, 0.0, 0.5)])
    expected = torch.zeros_like(stored)
    expected[..., :-2, 2:] = stored[..., 2:, :-2]
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=0)


def test_a_mirrored_image_is_flipped():
    stored = images(1)
    flipped = Affine(8, **PLAIN, mirror=0.5)(stored, [Fixed(0.5, 0.5, 0.5, 0.5, 0.5, 0.49)])
    torch.testing.assert_close(flipped, stored.flip(3))


def test_half_the_size_is_drawn_in_the_middle():
    stored = torch.ones(1, 1, 8, 8)
    small = Affine(16, **PLAIN, scale=(0.5, 2.0))(stored, [Fixed(0.5, 0.5, 0.0, 0.5, 0.5, 0.5)])
    assert torch.equal(small[0, 0, 5:11, 5:11], torch.ones(6, 6))
    assert float(small[0, 0, :3].sum()) == 0


@given(draws=st.lists(st.floats(0, 0.999), min_size=6, max_size=6))
def test_the_map_is_the_stated_product_of_matrices(draws):
    affine = Affine(8, **PLAIN, degrees=30, translate=0.2, scale=(0.5, 1.5), shear=20, mirror=0.5)
    angle, shear = math.radians(30) * (2 * draws[0] - 1), math.radians(20) * (2 * draws[1] - 1)
    size, move = 0.5 + draws[2], 0.4 * np.array([2 * draws[3] - 1, 2 * draws[4] - 1])
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    forward = rotation @ np.array([[1, math.tan(shear)], [0, 1]]) * size
    if draws[5] < 0.5:
        forward = forward @ np.diag([-1, 1])
    inverse = affine._inverse_maps(np.array([draws]))[0]
    points = np.array([[0.3, -0.9, 0.0], [0.8, 0.1, 0.0]])
    there = forward @ points + move[:, None]
    np.testing.assert_allclose(inverse[:, :2] @ there + inverse[:, 2:], points, atol=1e-9)


def test_a_sample_does_not_depend_on_the_batch_it_is_in():
    affine = Affine(16, **PLAIN, degrees=20, translate=0.1, scale=(0.8, 1.2), shear=10, mirror=0.5)
    stored = images(5)
    together = affine(stored, generators(5))
    alone = [affine(stored[i : i + 1], [sample_generator(0, 0, i)]) for i in range(5)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together, affine(stored, generators(5, epoch=1)))


def test_values_are_normalised_and_one_channel_is_repeated():
    out = Affine(4, mean=(0.25,), std=(0.5,), channels=3)(torch.full((1, 1, 4, 4), 0.75), generators(1))
    torch.testing.assert_close(out, torch.ones(1, 3, 4, 4))


@pytest.mark.parametrize("shape", [(1, 1, 8, 7), (1, 2, 8, 8)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="expected square images of 1 or 3 channels"):
        Affine(8, **PLAIN, channels=3)(torch.zeros(shape), generators(1))
