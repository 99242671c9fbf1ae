from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from recipes.data.digits import open_digits


@pytest.mark.parametrize("split", ["stratified", "file-order"])
def test_the_two_parts_are_the_data_set_and_nothing_else(split):
    train, held_out = open_digits(split)
    assert (len(train), len(held_out)) == (1438, 359)
    raw = load_digits()
    whole = sorted(zip(map(bytes, raw.images.astype(np.uint8)), raw.target.tolist(), strict=True))
    pixels = torch.cat([train.pixels, held_out.pixels]).numpy()
    labels = np.concatenate([train.labels, held_out.labels])
    assert sorted(zip(map(bytes, pixels), labels.tolist(), strict=True)) == whole


def test_file_order_holds_out_the_last_ones_of_the_file():
    _, held_out = open_digits("file-order")
    raw = load_digits()
    np.testing.assert_array_equal(held_out.labels, raw.target[-359:])
    np.testing.assert_array_equal(held_out.pixels[:, 0].numpy(), raw.images[-359:])


def test_stratified_keeps_the_proportions_of_the_classes():
    train, held_out = open_digits(seed=3)
    counts = np.bincount(np.concatenate([train.labels, held_out.labels]))
    assert np.abs(np.bincount(held_out.labels) - 0.2 * counts).max() < 1


def test_the_seed_decides_the_shuffle():
    parts = [open_digits(seed=seed)[1].pixels for seed in (0, 0, 1)]
    assert torch.equal(parts[0], parts[1])
    assert not torch.equal(parts[0], parts[2])


def test_loaded_images_are_between_0_and_1_and_match_the_stated_mean_and_deviation():
    train, held_out = open_digits()
    everything = torch.cat([part.load(range(len(part))) for part in (train, held_out)])
    assert everything.shape == (1797, 1, 8, 8)
    assert (everything.min(), everything.max()) == (0, 1)
    assert float(everything.mean()) == pytest.approx(train.mean[0], abs=1e-3)
    assert float(everything.std()) == pytest.approx(train.std[0], abs=1e-3)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'random': digits has the splits stratified, file-order"):
        open_digits("random")
