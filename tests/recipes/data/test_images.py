from __future__ import annotations

import numpy as np
import torch

from recipes.data.affine import Affine
from recipes.data.images import KeyedImages, TensorImages

IMAGES = TensorImages(
    pixels=torch.arange(3 * 16, dtype=torch.uint8).view(3, 1, 4, 4),
    white=64,
    labels=np.array([2, 0, 1]),
    classes=("a", "b", "c"),
    mean=(0.0,),
    std=(1.0,),
)
TRANSFORM = Affine(4, mean=(0.0,), std=(1.0,), degrees=20)


def test_images_are_loaded_as_shares_of_white():
    loaded = IMAGES.load([2, 0])
    assert loaded.shape == (2, 1, 4, 4)
    assert torch.equal(loaded[1].flatten(), torch.arange(16) / 64)
    assert torch.equal(loaded[0].flatten(), torch.arange(32, 48) / 64)


def test_a_subset_keeps_order_labels_and_the_rest():
    subset = IMAGES.subset([2, 0])
    assert torch.equal(subset.pixels, IMAGES.pixels[[2, 0]])
    np.testing.assert_array_equal(subset.labels, [1, 2])
    assert (subset.classes, subset.white) == (IMAGES.classes, 64)


def test_each_part_of_the_key_and_the_seed_change_what_comes_out():
    keyed = KeyedImages(IMAGES, TRANSFORM, seed=0)
    plain, _ = keyed[0, 1]
    assert torch.equal(keyed[0, 1][0], plain)
    assert not torch.equal(keyed[1, 1][0], plain)
    assert not torch.equal(KeyedImages(IMAGES, TRANSFORM, seed=1)[0, 1][0], plain)
    twins = IMAGES.subset([1, 1])
    first, second = KeyedImages(twins, TRANSFORM, seed=0).__getitems__([(0, 0), (0, 1)])[0]
    assert not torch.equal(first, second)


def test_a_batch_carries_its_labels_and_one_sample_is_the_one_of_its_batch():
    keyed = KeyedImages(IMAGES, TRANSFORM, seed=3)
    images, labels = keyed.__getitems__([(2, 2), (5, 0)])
    assert labels.tolist() == [1, 2]
    assert labels.dtype == torch.int64
    image, label = keyed[5, 0]
    assert torch.equal(image, images[1])
    assert int(label) == 2
    assert len(keyed) == 3
