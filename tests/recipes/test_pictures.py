"""The pictures: they are there, they are not empty, and they show the numbers they are given."""

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.engine import pictures

HISTORY = [
    {
        "epoch": float(epoch),
        "train_loss": 2.0 / epoch,
        "loss": 1.5 / epoch,
        "accuracy": 1 - 0.5 / epoch,
        "ema_accuracy": 1 - 0.6 / epoch,
        "lr": 1e-3 / epoch,
        "exploration": 1 - 0.4 / epoch,
        "drop_fraction": 0.3 / epoch,
    }
    for epoch in range(1, 9)
]


def kernels(sizes=(9, 7), channels=6, decomposed=True, seed=0):
    """Masks and weights of two stages with two blocks each, named as in SLaK."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for stage, size in enumerate(sizes):
        for block in range(2):
            name = f"stages.{stage}.{block}"
            shapes = {"tall": (size, 3), "wide": (3, size)} if decomposed else {"large": (size, size)}
            for branch, (height, width) in {**shapes, "small": (3, 3)}.items():
                masks[f"{name}.large_kernel.{branch}.conv.weight"] = (channels, 1, height, width)
            masks[f"{name}.pwconv1.weight"] = (4 * channels, channels)
    masks = {name: torch.rand(shape, generator=generator) < 0.6 for name, shape in masks.items()}
    return {name: mask * torch.randn(mask.shape, generator=generator) for name, mask in masks.items()}, masks


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=float)


def assert_is_a_picture(path):
    shown = pixels(path)
    assert min(shown.shape[:2]) > 300
    assert shown.std() > 10
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) > 50


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_curves(tmp_path, rows):
    pictures.draw_curves(HISTORY[:rows], tmp_path / "a.png", "title")
    assert_is_a_picture(tmp_path / "a.png")


def test_curves_without_an_average_and_without_a_drop_fraction(tmp_path):
    rows = [{key: row[key] for key in ("epoch", "train_loss", "loss", "accuracy", "lr")} for row in HISTORY]
    pictures.draw_curves(rows, tmp_path / "a.png", "title")
    assert_is_a_picture(tmp_path / "a.png")


def test_curves_show_the_history(tmp_path):
    pictures.draw_curves(HISTORY, tmp_path / "a.png", "title")
    pictures.draw_curves(HISTORY, tmp_path / "same.png", "title")
    pictures.draw_curves([row | {"accuracy": 0.9} for row in HISTORY], tmp_path / "b.png", "title")
    assert (pixels(tmp_path / "a.png") == pixels(tmp_path / "same.png")).all()
    assert (pixels(tmp_path / "a.png") != pixels(tmp_path / "b.png")).any()


def test_sparsity_by_layer(tmp_path):
    _, masks = kernels()
    pictures.draw_sparsity(masks, tmp_path / "a.png", "title")
    assert_is_a_picture(tmp_path / "a.png")
    sparser = masks | {"stages.0.0.pwconv1.weight": torch.zeros(24, 6, dtype=torch.bool)}
    pictures.draw_sparsity(sparser, tmp_path / "b.png", "title")
    assert (pixels(tmp_path / "a.png") != pixels(tmp_path / "b.png")).any()


@pytest.mark.parametrize("decomposed", [True, False])
def test_kernels(tmp_path, decomposed):
    params, masks = kernels(decomposed=decomposed)
    assert pictures.draw_kernels(params, masks, tmp_path / "a.png", "title")
    assert_is_a_picture(tmp_path / "a.png")
    other, other_masks = kernels(decomposed=decomposed, seed=1)
    pictures.draw_kernels(other, other_masks, tmp_path / "b.png", "title")
    assert (pixels(tmp_path / "a.png") != pixels(tmp_path / "b.png")).mean() > 0.01


def test_a_model_without_large_kernels_has_no_such_picture(tmp_path):
    masks = {"head.weight": torch.ones(4, 4, dtype=torch.bool)}
    assert not pictures.draw_kernels({"head.weight": torch.ones(4, 4)}, masks, tmp_path / "a.png", "title")
    assert not (tmp_path / "a.png").exists()


def test_strips_are_laid_centred_over_each_other():
    tall, wide = torch.full((5, 1), 2.0), torch.full((1, 5), 4.0)
    square = pictures.overlay([tall, wide], 5)
    assert square[2, 2] == 3
    assert square[0, 2] == square[4, 2] == 2
    assert square[2, 0] == square[2, 4] == 4
    assert np.isnan(square).sum() == 16


def test_the_last_block_of_each_stage_is_shown():
    params, masks = kernels()
    assert list(pictures.last_large_kernels(params, masks)) == ["stages.0.1", "stages.1.1"]


@pytest.mark.parametrize(("count", "channels"), [(1, 1), (5, 3), (24, 1)])
def test_mistakes(tmp_path, count, channels):
    generator = torch.Generator().manual_seed(count)
    mistakes = [
        pictures.Mistake(torch.rand(channels, 16, 16, generator=generator), "7", "1", 0.93)
        for _ in range(count)
    ]
    pictures.draw_mistakes(mistakes, tmp_path / "a.png", "title")
    shown = pixels(tmp_path / "a.png")
    assert shown.std() > 10
    assert min(shown.shape[:2]) > 200
