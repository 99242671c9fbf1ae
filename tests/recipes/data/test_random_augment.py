from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageEnhance, ImageOps

from recipes.data import random_augment
from recipes.data.random_augment import OPERATIONS, RandAugment

POLICY = RandAugment.from_string("rand-m9-mstd0.5-inc1")
BY_NAME = {operation.name: operation for operation in OPERATIONS}
# The constants that timm documents for the "increasing" set (timm/data/auto_augment.py, 0.3.2 and 1.0.31):
# the arguments at magnitudes 0, 9 and 10. A signed argument is given by its size.
DOCUMENTED = {
    "Rotate": (0, 27, 30),
    "Posterize": (4, 1, 0),
    "Solarize": (256, 26, 0),
    "SolarizeAdd": (0, 99, 110),
    "ShearX": (0, 0.27, 0.3),
    "ShearY": (0, 0.27, 0.3),
    "TranslateX": (0, 0.405, 0.45),
    "TranslateY": (0, 0.405, 0.45),
}
ENHANCERS = ("Color", "Contrast", "Brightness", "Sharpness")
WITHOUT_ARGUMENT = ("AutoContrast", "Equalize", "Invert")
SIGNED = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")


def noise(width: int = 20, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def apply(name: str, argument: object, image: Image.Image | None = None) -> np.ndarray:
    return np.asarray(BY_NAME[name].apply(image or noise(), argument, POLICY)).astype(int)


def test_the_set_is_timms_increasing_set():
    assert set(BY_NAME) == {*DOCUMENTED, *ENHANCERS, *WITHOUT_ARGUMENT}
    assert len(OPERATIONS) == 15
    assert (
        RandAugment(magnitude=9, magnitude_std=0.5, layers=2, probability=0.5, fill=(124, 116, 104)) == POLICY
    )


@pytest.mark.parametrize("name", DOCUMENTED)
def test_arguments_at_the_documented_magnitudes(name):
    drawn = [BY_NAME[name].draw(magnitude, np.random.default_rng(0)) for magnitude in (0, 9, 10)]
    assert [abs(argument) for argument in drawn] == pytest.approx(DOCUMENTED[name])


@given(name=st.sampled_from(ENHANCERS), magnitude=st.floats(0, 10), seed=st.integers(0, 100))
def test_enhancement_factors_move_away_from_one_to_either_side(name, magnitude, seed):
    factor = BY_NAME[name].draw(magnitude, np.random.default_rng(seed))
    assert abs(factor - 1) == pytest.approx(0.09 * magnitude)
    assert 0.1 <= factor <= 1.9 + 1e-12


@pytest.mark.parametrize("name", [*SIGNED, *ENHANCERS])
def test_both_directions_are_equally_likely(name):
    middle = 1 if name in ENHANCERS else 0
    drawn = np.array([BY_NAME[name].draw(9.0, np.random.default_rng(seed)) for seed in range(400)])
    assert abs((drawn > middle).mean() - 0.5) < 0.13  # five standard errors


@given(name=st.sampled_from(sorted(BY_NAME)), magnitude=st.floats(0, 10), seed=st.integers(0, 9))
def test_every_operation_takes_every_magnitude_and_leaves_its_argument(name, magnitude, seed):
    image = noise()
    operation = BY_NAME[name]
    out = operation.apply(image, operation.draw(magnitude, np.random.default_rng(seed)), POLICY)
    assert (out.size, out.mode) == (image.size, "RGB")
    assert image.tobytes() == noise().tobytes()


@pytest.mark.parametrize("name", ["Rotate", "Solarize", "SolarizeAdd", *SIGNED, *ENHANCERS])
def test_magnitude_zero_changes_nothing(name):
    argument = BY_NAME[name].draw(0.0, np.random.default_rng(0))
    np.testing.assert_array_equal(apply(name, argument), np.asarray(noise()))


def test_point_operations_are_their_definitions():
    image = np.asarray(noise()).astype(int)
    np.testing.assert_array_equal(apply("Invert", None), 255 - image)
    np.testing.assert_array_equal(apply("Solarize", 26), np.where(image < 26, image, 255 - image))
    np.testing.assert_array_equal(
        apply("SolarizeAdd", 99), np.where(image < 128, np.minimum(image + 99, 255), image)
    )
    np.testing.assert_array_equal(apply("Posterize", 1), image & 128)
    np.testing.assert_array_equal(apply("Posterize", 4), np.asarray(ImageOps.posterize(noise(), 4)))
    np.testing.assert_array_equal(apply("Posterize", 0), np.zeros_like(image))
    np.testing.assert_array_equal(apply("AutoContrast", None), np.asarray(ImageOps.autocontrast(noise())))
    np.testing.assert_array_equal(apply("Equalize", None), np.asarray(ImageOps.equalize(noise())))


@pytest.mark.parametrize("name", ENHANCERS)
def test_enhancers_are_pillows(name):
    expected = getattr(ImageEnhance, name)(noise()).enhance(1.81)
    np.testing.assert_array_equal(apply(name, 1.81), np.asarray(expected))


def test_moves_go_by_fractions_of_the_side_and_uncover_the_fill():
    image = np.asarray(noise())
    moved = apply("TranslateX", 0.25)
    np.testing.assert_array_equal(moved[:, :-5], image[:, 5:])
    assert (moved[:, -5:] == POLICY.fill).all()
    moved = apply("TranslateY", -0.1)
    np.testing.assert_array_equal(moved[3:], image[:-3])
    assert (moved[:3] == POLICY.fill).all()


def test_shears_move_rows_and_columns_by_their_distance_from_the_first():
    image = Image.new("RGB", (40, 40))
    image.paste((255, 255, 255), (20, 0, 40, 40))
    edge = [int((row[:, 0] < 128).sum()) for row in apply("ShearX", -0.3, image)]
    assert edge[0] == pytest.approx(20, abs=1)
    assert edge[-1] - edge[0] == pytest.approx(0.3 * 39, abs=1)
    turned = apply("ShearY", -0.3, image.transpose(Image.Transpose.TRANSPOSE)).transpose(1, 0, 2)
    assert [int((row[:, 0] < 128).sum()) for row in turned] == edge


def test_a_rotation_is_about_the_centre():
    image = noise(21, 21)
    expected = image.rotate(90)
    np.testing.assert_array_equal(apply("Rotate", 90, image), np.asarray(expected))


def test_two_operations_are_drawn_each_carried_out_half_of_the_time(monkeypatch):
    seen: list[str] = []

    def record(name):
        return random_augment.Operation(
            name, lambda magnitude, rng: None, lambda image, _, policy: seen.append(name) or image
        )

    monkeypatch.setattr(random_augment, "OPERATIONS", tuple(map(record, BY_NAME)))
    rng, images = np.random.default_rng(0), 6000
    for _ in range(images):
        POLICY(noise(), rng)
    assert abs(len(seen) / images - 1) < 0.05
    counts = np.array([seen.count(name) for name in BY_NAME])
    assert np.abs(counts / images - 1 / 15).max() < 0.02


def test_magnitudes_are_normal_and_clipped():
    rng = np.random.default_rng(0)
    drawn = np.array([POLICY._magnitude(rng) for _ in range(20_000)])
    assert drawn.max() == 10
    assert abs(np.median(drawn) - 9) < 0.03
    assert np.std(drawn[drawn < 10]) == pytest.approx(0.5, abs=0.05)
    assert (drawn == 10).mean() == pytest.approx(
        0.0228, abs=0.006
    )  # a normal is two deviations above its mean
    wide = RandAugment(magnitude=1.0, magnitude_std=5.0)
    drawn = [wide._magnitude(rng) for _ in range(1000)]
    assert (min(drawn), max(drawn)) == (0, 10)


@given(seed=st.integers(0, 10_000))
def test_it_is_a_function_of_the_generator(seed):
    first, again = (POLICY(noise(), np.random.default_rng(seed)) for _ in range(2))
    assert ImageChops.difference(first, again).getbbox() is None


def test_policies_are_read_in_any_order():
    assert RandAugment.from_string("rand-inc1-n3-m7") == RandAugment(magnitude=7, magnitude_std=0.0, layers=3)
    fill = (1, 2, 3)
    assert RandAugment.from_string("rand-m9-inc1", fill).fill == fill


@pytest.mark.parametrize(
    "policy",
    [
        "",
        "rand",
        "rand-m9",
        "rand-m9-inc0",
        "rand-inc1",
        "augmix-m3-inc1",
        "rand-m9-inc1-w0",
        "rand-m9-m8-inc1",
        "rand-mx-inc1",
    ],
)
def test_other_policies_are_refused(policy):
    with pytest.raises(ValueError, match=r"expected rand-m<magnitude>\[-mstd<std>\]\[-n<layers>\]-inc1"):
        RandAugment.from_string(policy)


@pytest.mark.parametrize("policy", ["rand-m11-inc1", "rand-m9-n0-inc1"])
def test_numbers_out_of_range_are_refused(policy):
    with pytest.raises(ValueError, match="expected a magnitude from 0 to 10"):
        RandAugment.from_string(policy)
