from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recipes.data.erasing import RandomErasing

CONSTANT = 1e6  # no noise reaches it, so what differs from it was erased


@given(seed=st.integers(0, 10_000), height=st.integers(8, 40), width=st.integers(8, 40))
def test_one_rectangle_of_the_stated_area_and_aspect_is_noise(seed, height, width):
    image = torch.full((3, height, width), CONSTANT)
    erased = RandomErasing(probability=1.0)(image, np.random.default_rng(seed))
    assert torch.equal(image, torch.full_like(image, CONSTANT))
    rows, columns = (set(found.tolist()) for found in torch.where(erased[0] != CONSTANT))
    if not rows:
        return
    assert rows == set(range(min(rows), max(rows) + 1))
    assert columns == set(range(min(columns), max(columns) + 1))
    assert int((erased != CONSTANT).sum()) == 3 * len(rows) * len(columns)
    rounding = (len(rows) + len(columns) + 1) / 2  # each side is rounded by at most one half
    assert 0.02 * height * width - rounding <= len(rows) * len(columns) <= height * width / 3 + rounding
    assert (len(rows) + 0.5) / (len(columns) - 0.5) >= 0.3
    assert (len(rows) - 0.5) / (len(columns) + 0.5) <= 1 / 0.3
    assert len(rows) < height
    assert len(columns) < width


def test_it_happens_as_often_as_stated_and_areas_fill_their_range():
    erasing, rng, image = (
        RandomErasing(probability=0.25),
        np.random.default_rng(0),
        torch.full((1, 64, 64), CONSTANT),
    )
    areas = np.array([float((erasing(image, rng) != CONSTANT).float().mean()) for _ in range(4000)])
    assert abs((areas > 0).mean() - 0.25) < 0.035  # five standard errors
    erased = areas[areas > 0]
    assert erased.min() == pytest.approx(0.02, abs=0.005)
    assert erased.max() == pytest.approx(1 / 3, abs=0.02)
    assert erased.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.015)


def test_the_noise_is_standard_normal_in_each_pixel():
    erasing, rng = RandomErasing(probability=1.0, area=(0.3, 1 / 3)), np.random.default_rng(0)
    values = torch.cat(
        [e[e != CONSTANT] for e in (erasing(torch.full((3, 64, 64), CONSTANT), rng) for _ in range(20))]
    )
    assert abs(float(values.mean())) < 0.02
    assert abs(float(values.std()) - 1) < 0.02


def test_every_channel_has_noise_of_its_own():
    erased = RandomErasing(probability=1.0)(torch.full((2, 16, 16), CONSTANT), np.random.default_rng(0))
    assert not torch.equal(erased[0], erased[1])


def test_probability_zero_returns_the_image_itself():
    image = torch.rand(3, 8, 8)
    assert RandomErasing(probability=0.0)(image, np.random.default_rng(0)) is image


def test_an_image_in_which_nothing_fits_stays():
    image = torch.rand(3, 8, 8)
    assert RandomErasing(probability=1.0, area=(1.5, 2.0))(image, np.random.default_rng(0)) is image
