"""The receptive-field recipe: shrunken runs, weights from files, and one line for what can be wrong."""

import argparse
import json
import sys
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_runs import TINY_MODEL, arguments, write_images
from PIL import Image
from torch import nn

import dst_models
from dst_models import area_ratio, effective_receptive_field
from recipes.data.image_folder import IMAGENET_MEAN, IMAGENET_STD
from recipes.engine import checkpoint, overrides
from recipes.erf import networks
from recipes.erf.images import find, noise, photographs
from recipes.slak_erf import main
from recipes.slak_imagenet import digits

SMALL = ("--pixels", "64", "--device", "cpu")


class Residual(nn.Module):
    """Like torchvision's ResNets: no forward_features, maps from direct children, then a vector."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.layer = nn.Conv2d(4, 6, 3, 2, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.pool(self.layer(self.stem(x))).flatten(1))


@pytest.fixture
def own(monkeypatch):
    """The name under which `Residual` is importable."""
    monkeypatch.setitem(sys.modules, "own_models", argparse.Namespace(Residual=Residual, one=int))
    return "own_models:Residual"


def tiny_slak(**overrides: Any) -> dst_models.SLaK:
    """Build a SLaK that costs nothing."""
    small = {"depths": (1, 1, 1, 1), "dims": (4, 4, 8, 8), "kernel_sizes": (7, 5, 5, 5), "small_kernel": 3}
    return dst_models.SLaK(**{**small, "width_factor": 1.0, **overrides})


@pytest.fixture
def tiny(monkeypatch):
    """The name under which it is known while the test runs."""
    monkeypatch.setitem(dst_models.registry._ENTRIES, "tiny_slak", tiny_slak)
    return "tiny_slak"


def run(*argv):
    return main(list(map(str, argv)))


def error_of(capsys, *argv):
    """Run what cannot be; return its one line."""
    assert run(*argv) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    return text


def test_a_run_leaves_table_picture_report_and_scores(tiny, own, tmp_path, capsys):
    assert run("--models", tiny, own, "--images", 2, *SMALL, "--output", tmp_path) == 0
    told = capsys.readouterr().out
    assert "2 smooth random noise images at 64 px" in told
    assert "Random weights" in told
    assert {path.name for path in tmp_path.iterdir()} == {"erf.png", "report.json", "scores.npz"}
    assert (tmp_path / "erf.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "report.json").read_text())
    assert [model["model"] for model in report["models"]] == [tiny, own]
    with np.load(tmp_path / "scores.npz") as scores:
        for model, name in zip(report["models"], (tiny, own), strict=True):
            score = torch.from_numpy(scores[name])
            assert score.shape == (64, 64)
            for measure, log in (("log10(score + 1)", True), ("score", False)):
                for share, found in model["area_ratios"][measure].items():
                    assert (found["side"], found["ratio"]) == area_ratio(score, float(share), log=log)
                    assert f"{found['ratio']:.1%}" in told


def test_random_weights_are_measured_with_settled_norms(own, tmp_path):
    assert run("--models", own, *SMALL, "--output", tmp_path) == 0
    network = networks.random_network(own, seed=0)
    image = next(noise(1, 3, 64, 0))
    unsettled = effective_receptive_field(network.model, [image], features=network.features)
    networks.settle_norms(network, image)
    expected = effective_receptive_field(network.model, [image], features=network.features)
    assert not torch.allclose(unsettled, expected)
    with np.load(tmp_path / "scores.npz") as scores:
        torch.testing.assert_close(torch.from_numpy(scores[own]), expected.float())


def test_the_same_seed_gives_the_same_field(tiny, tmp_path):
    reports = []
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        assert run("--models", tiny, *SMALL, "--seed", seed, "--output", tmp_path / name) == 0
        reports.append(json.loads((tmp_path / name / "report.json").read_text())["models"][0]["mean_score"])
    assert reports[0] == reports[1] != reports[2]


def test_the_last_map_of_a_foreign_model_is_its_last_child_with_a_plane(own):
    network = networks.random_network(own, seed=0)
    images = torch.randn(1, 3, 64, 64)
    network.model.eval()
    expected = network.model.layer(network.model.stem(images))
    torch.testing.assert_close(network.features(images), expected)
    assert not any(child._forward_hooks for child in network.model.children())


def test_settled_norms_leave_standard_maps_and_eval_mode(own):
    network = networks.random_network(own, seed=0)
    image = next(noise(1, 3, 64, 0))
    networks.settle_norms(network, image)
    norm = network.model.stem[1]
    assert norm.momentum == 0.1
    assert not any(module.training for module in network.model.modules())
    settled = network.model.stem[:2](image[None])
    torch.testing.assert_close(settled.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(settled.var((0, 2, 3)), torch.ones(4), atol=1e-2, rtol=0)


def test_a_checkpoint_of_a_recipe_brings_its_config(tmp_path):
    config = overrides.apply(digits(), [*arguments(*TINY_MODEL)[1::2], "data.size=16"])
    model = networks.build_model(config.model, classes=10, channels=1)
    file = tmp_path / "best.pt"
    checkpoint.save({"config": overrides.to_primitives(config), "model": dict(model.state_dict())}, file)
    network = networks.trained_network("slak_micro", file)
    assert network.channels == 1
    for name, value in network.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    output = tmp_path / "out"
    assert (
        run("--models", "slak_micro", "--checkpoint", f"slak_micro={file}", *SMALL, "--output", output) == 0
    )
    assert json.loads((output / "report.json").read_text())["models"][0]["weights"] == str(file)


def test_a_published_file_with_its_arguments_is_read(tiny, own, tmp_path):
    for name, make in ((tiny, lambda: dst_models.create_model(tiny, num_classes=7)), (own, Residual)):
        model = make()
        file = tmp_path / "published.pth"
        state = {f"module.{key}" if name == tiny else key: v for key, v in model.state_dict().items()}
        if name == tiny:
            state = {
                key.replace(".tall.", ".LoRA1.")
                .replace(".wide.", ".LoRA2.")
                .replace(".small.", ".small_conv."): v
                for key, v in state.items()
            }
        torch.save({"model": state, "args": argparse.Namespace(lr=1.0)}, file)
        network = networks.trained_network(name, file)
        for key, value in network.model.state_dict().items():
            assert torch.equal(value, model.state_dict()[key])


def test_images_are_spread_over_the_folder_and_normalised(tmp_path):
    folder = write_images(tmp_path, classes=2, images=4)
    files = find(folder, 4)
    assert [(file.parent.name, file.stem) for file in files] == [
        ("class_0", "0"),
        ("class_0", "2"),
        ("class_1", "0"),
        ("class_1", "2"),
    ]
    colour = next(photographs(files, 3, 24))
    raw = np.asarray(Image.open(files[0]), np.float64) / 255  # already of 24 pixels: nothing to resize
    for channel, (mean, std) in enumerate(zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)):
        expected = torch.from_numpy((raw[..., channel] - mean) / std).float()
        torch.testing.assert_close(colour[channel], expected)
    grey = next(photographs(files, 1, 24))
    torch.testing.assert_close(grey[0], colour.mean(0))


def test_noise_is_smooth_and_standard():
    first, second = noise(2, 3, 100, 0)
    assert first.shape == (3, 100, 100)
    assert not torch.equal(first, second)
    assert abs(float(first.mean())) < 1e-5
    assert float(first.std()) == pytest.approx(1)
    assert float((first[:, 1:] - first[:, :-1]).std()) < 0.5


def test_measured_on_a_folder(tiny, tmp_path, capsys):
    folder = write_images(tmp_path / "data", classes=1, images=2)
    assert run("--models", tiny, "--data", folder, "--images", 2, *SMALL, "--output", tmp_path / "out") == 0
    assert "2 images of a folder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--models", "slak_tinny"], "did you mean slak_tiny"),
        (["--models", "nowhere:model"], "nowhere:model gives no model"),
        (["--models", "own_models:one"], "returns int"),
        (["--pixels", "32"], "at least 64"),
        (["--images", "0"], "at least 1"),
        (["--data", "no-such-folder"], "there is no such folder"),
        (["--checkpoint", "slak_tiny"], "NAME=FILE"),
        (["--checkpoint", "a=b", "--checkpoint", "a=c"], "given twice"),
        (["--models", "slak_tiny", "--checkpoint", "slak_tiny=no-such-file"], "there is no such checkpoint"),
        (["--device", "nonsense"], "torch cannot use it"),
    ],
)
def test_what_cannot_be_is_one_line(own, argv, message, capsys, tmp_path):
    line = error_of(capsys, *argv, "--output", tmp_path / "out")
    assert message in line


def test_a_model_that_fails_and_several_processes_are_one_line(own, tmp_path, capsys, monkeypatch):
    def blind():
        model = Residual()
        nn.init.zeros_(model.layer.weight)
        return model

    def broken(self, x):
        raise RuntimeError("not enough\nmemory")

    monkeypatch.setattr(Residual, "forward", broken)
    given = ("--models", own, *SMALL, "--output", tmp_path)
    assert "own_models:Residual: not enough memory" in error_of(capsys, *given)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "own_models", argparse.Namespace(Residual=blind))
    assert "zero everywhere" in error_of(capsys, *given)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in error_of(capsys, *given)


def test_files_that_do_not_fit_are_one_line(tiny, own, tmp_path, capsys):
    (tmp_path / "noise.pt").write_bytes(b"not a file of torch")
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    torch.save({"weight": torch.ones(3)}, tmp_path / "other.pt")
    torch.save(dst_models.create_model(tiny, depths=(2, 1, 1, 1)).state_dict(), tmp_path / "deeper.pt")
    write_images(tmp_path / "data", classes=1, images=1)
    given = ("--output", tmp_path / "out", *SMALL)
    for name, file, message in (
        (tiny, "noise.pt", "cannot be read"),
        (tiny, "tensor.pt", "a state dict is expected"),
        (tiny, "other.pt", "have no place"),
        (tiny, "deeper.pt", "have no place"),
        (own, "other.pt", "does not fit"),
    ):
        line = error_of(capsys, "--models", name, "--checkpoint", f"{name}={tmp_path / file}", *given)
        assert message in line
        assert file in line
    line = error_of(capsys, "--data", tmp_path / "data", "--images", 2, *given)
    assert "it has 1 images and --images is 2" in line
