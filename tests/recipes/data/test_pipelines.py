from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recipes.data.affine import Affine
from recipes.data.augment import EvaluationTransform, TrainTransform
from recipes.data.digits import open_digits
from recipes.data.erasing import RandomErasing
from recipes.data.image_folder import IMAGENET_MEAN, IMAGENET_STD, FolderImages
from recipes.data.pipelines import Augmentation, transforms
from recipes.data.random_augment import RandAugment

PHOTOS = FolderImages(Path("nowhere"), np.array([b"a.png"]), np.array([0]), ("a",))


def test_the_defaults_are_the_published_imagenet_recipe():
    training, evaluation = transforms(PHOTOS, 224, Augmentation())
    assert training == TrainTransform(
        size=224,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        scale=(0.08, 1.0),
        ratio=(3 / 4, 4 / 3),
        flip=0.5,
        random_augment=RandAugment(9.0, 0.5, 2, 0.5, (124, 116, 104), Image.Resampling.BICUBIC),
        erasing=RandomErasing(0.25),
        interpolation=Image.Resampling.BICUBIC,
    )
    assert evaluation == EvaluationTransform(
        224, IMAGENET_MEAN, IMAGENET_STD, 0.875, Image.Resampling.BICUBIC
    )


def test_what_is_switched_off_is_absent():
    training, evaluation = transforms(
        PHOTOS, 64, Augmentation(policy=None, erasing=0.0, interpolation="bilinear")
    )
    assert training.random_augment is None
    assert training.erasing is None
    assert training.interpolation == evaluation.interpolation == Image.Resampling.BILINEAR


def test_images_in_memory_are_moved_by_an_affine_map_and_evaluated_without():
    digits, _ = open_digits()
    augmentation = Augmentation(flip=0.0, degrees=10, translate=0.1, zoom=(0.8, 1.2), shear=5)
    training, evaluation = transforms(digits, 32, augmentation, channels=1)
    assert training == Affine(32, digits.mean, digits.std, 1, 10, 0.1, (0.8, 1.2), 5, 0.0)
    assert evaluation == Affine(32, digits.mean, digits.std, 1)


def test_channels_that_cannot_be_made_are_refused():
    with pytest.raises(ValueError, match="channels is 1: it must be 3 for images from folders"):
        transforms(PHOTOS, 32, Augmentation(), channels=1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("flip", 1.1),
        ("erasing", -0.1),
        ("crop_scale", (0.5,)),
        ("crop_scale", (0.9, 0.5)),
        ("crop_scale", (0.5, 1.5)),
        ("crop_ratio", (0.0, 1.0)),
        ("zoom", (2.0, 1.0)),
        ("evaluation_crop", 0.0),
        ("interpolation", "nearest"),
        ("degrees", -1.0),
        ("translate", 2.0),
        ("shear", 90.0),
    ],
)
def test_each_field_is_checked_and_named(field, value):
    with pytest.raises(ValueError, match=f"{field} is .*: it must be"):
        Augmentation(**{field: value})


def test_a_policy_is_checked_when_it_is_stated():
    with pytest.raises(ValueError, match="policy 'rand-m9'"):
        Augmentation(policy="rand-m9")
