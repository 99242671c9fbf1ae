"""Every variant of the recipe, shrunken, through two steps, a mask update, an evaluation and its report."""

import json

import pytest
from helpers.tiny_runs import TINY_MODEL, arguments, write_fashion, write_images, write_train_and_val

from recipes.engine.command import main
from recipes.slak_imagenet import VARIANTS, choose

TWO_STEPS = (
    *TINY_MODEL,
    "data.size=16",
    "data.workers=0",
    "optim.epochs=2",
    "optim.warmup_epochs=1",
    "optim.accumulation=1",
    "sparse.interval=1",
    "sparse.snip_batch=4",
    "run.device=cpu",
    "run.threads=1",
    "run.eval_interval=1",
)


def data_arguments(variant, folder):
    """Return `--data`, `--model` and what makes each epoch one step."""
    if variant == "digits":
        return [
            "--data",
            "digits",
            *arguments("optim.batch_size=100", "data.held_out=0.93", "data.second_split=none"),
        ]
    if variant == "fashion-mnist":
        return ["--data", str(write_fashion(folder)), *arguments("optim.batch_size=8")]
    make = write_images if variant == "slak_micro" else write_train_and_val
    images = str(make(folder, images=6))
    return ["--data", images, "--model", variant, *arguments("optim.batch_size=6")]


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_steps(variant, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("recipes.engine.classification._draw", lambda job, state, folder: None)
    folder = tmp_path / "run"
    argv = [*data_arguments(variant, tmp_path / "data"), *arguments(*TWO_STEPS), "--output", str(folder)]
    assert main(choose, "test", argv) == 0, capsys.readouterr().err
    stored = json.loads((folder / "config.json").read_text())
    published = VARIANTS[variant]()
    assert stored["name"] == published.name
    assert stored["sparse"]["drop_fraction"] == published.sparse.drop_fraction
    report = json.loads((folder / "report.json").read_text())
    assert report["sparsity"] == pytest.approx(0.4, abs=2e-3)
    assert report["exploration"] > 0.6
    assert report["nonzero"] < report["params"]
    assert report["sparse_macs"] < report["macs"]


@pytest.mark.parametrize(
    ("variant", "drop_path", "drop_fraction", "interval"),
    [("slak_tiny", 0.1, 0.5, 2000), ("slak_small", 0.4, 0.3, 100), ("slak_base", 0.5, 0.3, 100)],
)
def test_the_published_recipe(variant, drop_path, drop_fraction, interval):
    """The values of arXiv:2207.03620, section 5 and appendix A, and of the published README."""
    config = VARIANTS[variant]()
    assert config.model.name == variant
    assert config.model.drop_path_rate == drop_path
    assert (config.model.width_factor, config.model.layer_scale_init) == (1.3, 1e-6)
    assert (config.sparse.drop_fraction, config.sparse.interval) == (drop_fraction, interval)
    assert (config.sparse.sparsity, config.sparse.distribution, config.sparse.algorithm) == (
        0.4,
        "snip",
        "slak",
    )
    optim = config.optim
    assert (optim.lr, optim.lr_batch, optim.min_lr, optim.weight_decay) == (4e-3, 4096, 1e-6, 0.05)
    assert optim.batch_size * optim.accumulation == 4096
    assert (optim.epochs, optim.warmup_epochs, optim.ema_decay, optim.label_smoothing) == (
        300,
        20,
        0.9999,
        0.1,
    )
    assert (config.data.size, config.data.mixup, config.data.cutmix) == (224, 0.8, 1.0)
    assert (config.augment.policy, config.augment.erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert config.augment.interpolation == "bicubic"
