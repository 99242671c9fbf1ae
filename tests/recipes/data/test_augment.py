from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from recipes.data.augment import EvaluationTransform, TrainTransform, normalised, random_crop_box
from recipes.data.erasing import RandomErasing
from recipes.data.keyed import sample_generator
from recipes.data.random_augment import RandAugment

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


@given(width=st.integers(1, 500), height=st.integers(1, 500), seed=st.integers(0, 100))
def test_a_crop_lies_inside_and_keeps_its_ranges(width, height, seed):
    left, top, right, bottom = random_crop_box((width, height), SCALE, RATIO, np.random.default_rng(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    if min(width, height) >= 20 and RATIO[0] <= width / height <= RATIO[1]:
        columns, rows = right - left, bottom - top
        rounding = (columns + rows + 1) / 2
        assert SCALE[0] * width * height - rounding <= columns * rows
        assert (columns + 0.5) / (rows - 0.5) >= RATIO[0]
        assert (columns - 0.5) / (rows + 0.5) <= RATIO[1]


def test_crop_areas_are_uniform_and_ratios_symmetric():
    rng = np.random.default_rng(0)
    boxes = np.array([random_crop_box((1000, 1000), (0.1, 0.5), RATIO, rng) for _ in range(4000)])
    columns, rows = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    areas = columns * rows / 1e6
    assert np.quantile(areas, [0.25, 0.5, 0.75]) == pytest.approx([0.2, 0.3, 0.4], abs=0.02)
    assert np.mean(np.log(columns / rows)) == pytest.approx(0, abs=0.015)
    assert np.std(np.log(columns / rows)) == pytest.approx(2 * math.log(4 / 3) / math.sqrt(12), abs=0.01)


@pytest.mark.parametrize(("size", "box"), [((30, 900), (0, 430, 30, 470)), ((900, 30), (430, 0, 470, 30))])
def test_where_no_crop_fits_it_is_the_largest_central_one_within_the_ratio(size, box):
    assert random_crop_box(size, (1.0, 1.0), RATIO, np.random.default_rng(0)) == box


def test_a_crop_is_resized_without_looking_beyond_its_edge():
    image = Image.new("RGB", (64, 64), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 32, 64))
    seen = 0
    for seed in range(40):
        left, _, right, _ = random_crop_box((64, 64), (0.1, 0.2), RATIO, np.random.default_rng(seed))
        out = TrainTransform(size=24, scale=(0.1, 0.2), flip=0.0, **PLAIN)(
            [image], [np.random.default_rng(seed)]
        )
        if right <= 32 or left >= 32:
            seen += 1
            assert len(out[0].flatten(1).unique(dim=1).T) == 1
    assert seen > 5


def test_the_published_recipe_is_a_function_of_the_key_alone():
    transform = TrainTransform(
        size=32,
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
        random_augment=RandAugment.from_string("rand-m9-mstd0.5-inc1"),
        erasing=RandomErasing(0.25),
    )
    pictures = [noise(50, 40), noise(33, 70), noise(8, 8)]
    keys = [(epoch, index) for epoch in range(4) for index in range(3)]
    outputs = {key: transform([pictures[key[1]]], [sample_generator(0, *key)])[0] for key in keys}
    together = transform(pictures, [sample_generator(0, 2, index) for index in range(3)])
    assert torch.equal(together, torch.stack([outputs[2, index] for index in range(3)]))
    assert all(not torch.equal(outputs[0, 0], outputs[epoch, 0]) for epoch in (1, 2, 3))
    assert all(output.shape == (3, 32, 32) and output.dtype == torch.float32 for output in outputs.values())


def test_flips_are_as_frequent_as_stated():
    image = noise(16, 16)
    transform = TrainTransform(size=16, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.25, **PLAIN)
    plain = normalised(image, *PLAIN.values())
    outputs = [transform([image], [np.random.default_rng(seed)])[0] for seed in range(800)]
    flipped = [torch.equal(output, plain.flip(2)) for output in outputs]
    assert all(f or torch.equal(output, plain) for f, output in zip(flipped, outputs, strict=True))
    assert abs(np.mean(flipped) - 0.25) < 0.08  # five standard errors


@pytest.mark.parametrize(
    ("size", "resized"), [((300, 200), (384, 256)), ((200, 301), (256, 385)), ((9, 9), (256, 256))]
)
def test_evaluation_takes_the_centre_of_the_resized_image(size, resized):
    image = noise(*size)
    out = EvaluationTransform(224, **PLAIN)([image], [np.random.default_rng(0)])[0]
    whole = torch.from_numpy(np.array(image.resize(resized, Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    top, left = round((resized[1] - 224) / 2), round((resized[0] - 224) / 2)
    torch.testing.assert_close(out, whole[:, top : top + 224, left : left + 224])


def test_evaluation_draws_nothing():
    rng = np.random.default_rng(0)
    EvaluationTransform(16, **PLAIN)([noise(20, 30)], [rng])
    assert rng.bit_generator.state == np.random.default_rng(0).bit_generator.state


def test_normalising_subtracts_the_mean_and_divides_by_the_deviation():
    out = normalised(Image.new("RGB", (2, 3), (255, 0, 51)), (0.5, 0.25, 0.2), (0.5, 0.25, 0.1))
    torch.testing.assert_close(out[:, 0, 0], torch.tensor([1.0, -1.0, 0.0]))
    assert out.shape == (3, 3, 2)
