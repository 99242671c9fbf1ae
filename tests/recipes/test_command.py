"""The command line: whole runs of a shrunken recipe, and one clear line for everything that can be wrong."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.tiny_runs import TINY_DIGITS, arguments, differing, write_images, write_train_and_val
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dst.masks import unpack
from recipes.engine import checkpoint
from recipes.engine.command import main
from recipes.engine.state import State
from recipes.slak_imagenet import choose

ROOT = Path(__file__).parents[2]


def run(*argv):
    """Run the recipe in this process; return its exit status."""
    return main(choose, "test", list(map(str, argv)))


def tiny(*argv):
    """Run the shrunken recipe."""
    return run(*arguments(*TINY_DIGITS), *argv)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert (
        tiny("--output", folder, *arguments("run.checkpoint_interval=1", "run.keep=9", "run.log_interval=1"))
        == 0
    )
    return folder


def steps(folder):
    return [int(path.stem[5:]) for path in sorted((folder / "checkpoints").iterdir())]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Leave out the pictures, which cost more than such a run; the run of `finished` has drawn them."""
    monkeypatch.setattr("recipes.engine.classification._draw", lambda job, state, folder: None)


def last_of(folder):
    return checkpoint.load(sorted((folder / "checkpoints").iterdir())[-1])


def test_a_run_leaves_everything_that_is_promised(finished, capsys):
    assert steps(finished) == [1, 2, 3, 4, 5, 6]
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "best.pt",
        "checkpoints",
        "config.json",
        "curves.png",
        "history.csv",
        "kernels.png",
        "mistakes.png",
        "report.json",
        "run.log",
        "sparsity.png",
        "tensorboard",
    }
    report = json.loads((finished / "report.json").read_text())
    content = last_of(finished)
    assert report["accuracy"] == content["history"][-1]["accuracy"]
    assert report["images"] == 1617
    assert report["params"] == sum(
        value.numel()
        for name, value in content["model"].items()
        if "running" not in name and "num_batches" not in name
    )
    sparse = content["optimizer"]["sparse"]
    masks = {name: unpack(bits, sparse["shapes"][name]) for name, bits in sparse["masks"].items()}
    assert report["nonzero"] == report["params"] - sum(int((~mask).sum()) for mask in masks.values())
    for name, mask in masks.items():
        assert not content["model"][name][~mask].any()
        assert not content["ema"]["module"][name][~mask].any()
    assert report["sparsity"] == pytest.approx(0.4, abs=1e-3)
    assert 0.6 <= report["exploration"] <= 1
    assert len((finished / "history.csv").read_text().splitlines()) == 3


def test_every_file_is_read_with_weights_only(finished):
    for path in [finished / "best.pt", *(finished / "checkpoints").iterdir()]:
        torch.load(path, weights_only=True)


def test_the_head_of_the_log_says_what_ran(finished):
    log = (finished / "run.log").read_text()
    for text in (
        "optim.lr = 0.004",
        f"torch = {torch.__version__}",
        "commit = ",
        "device = cpu",
        "effective batch",
    ):
        assert text in log


def test_the_tensorboard_log_can_be_read_back(finished):
    events = EventAccumulator(str(finished / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/learning_rate", "masks/sparsity", "masks/exploration_rate"} <= set(
        tags["scalars"]
    )
    assert {"epoch/accuracy", "epoch/ema_accuracy", "epoch/loss"} <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert all(event.value == pytest.approx(0.4, abs=1e-3) for event in events.Scalars("masks/sparsity"))
    assert any("tall" in tag for tag in tags["images"])
    assert tags["histograms"]


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_resume_from_a_file_ends_bit_equal(finished, tmp_path, step):
    """2 is right after a mask update, 3 the end of an epoch."""
    file = finished / "checkpoints" / f"step-{step:09d}.pt"
    assert tiny("--resume", file, "--output", tmp_path / "run") == 0
    assert differing(last_of(finished), last_of(tmp_path / "run")) == []


@pytest.mark.slow
def test_resume_in_a_new_process_with_workers_ends_bit_equal(finished, tmp_path):
    file = finished / "checkpoints" / "step-000000002.pt"
    command = [sys.executable, "recipes/slak_imagenet.py", "--resume", file, "--output", tmp_path / "run"]
    done = subprocess.run([*command, *arguments("data.workers=2")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert differing(last_of(finished)["model"], last_of(tmp_path / "run")["model"]) == []
    assert differing(last_of(finished)["optimizer"], last_of(tmp_path / "run")["optimizer"]) == []


def test_the_same_command_goes_on_after_a_crash_and_past_a_damaged_file(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for name in ("report.json", "best.pt"):
        (folder / name).unlink()
    for step in (5, 6):
        (folder / "checkpoints" / f"step-{step:09d}.pt").write_bytes(b"PK\x03\x04 cut short")
    assert tiny("--output", folder, *arguments("run.checkpoint_interval=1", "run.keep=9")) == 0
    captured = capsys.readouterr()
    assert "step-000000004.pt: step 4" in captured.out
    again, before = last_of(folder), last_of(finished)
    assert again.pop("config") != before.pop("config")  # another interval of the log
    assert differing(before, again) == []


def test_a_finished_run_is_reported_again_and_not_changed(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    assert tiny("--output", folder) == 0
    assert "nothing is left to train" in capsys.readouterr().out
    assert differing(last_of(finished), last_of(folder)) == []


def test_resume_without_output_goes_on_in_the_folder_of_the_checkpoint(finished, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copy(finished / "config.json", folder)
    file = Path(shutil.copy(finished / "checkpoints" / "step-000000004.pt", folder / "checkpoints"))
    assert run("--resume", file) == 0
    assert steps(folder)[-1] == 6
    assert differing(last_of(finished)["model"], last_of(folder)["model"]) == []


def test_evaluation_alone_prints_the_accuracy_of_the_run_and_writes_nothing(
    finished, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    file = finished / "checkpoints" / "step-000000006.pt"
    assert run("--eval", file) == 0
    row = last_of(finished)["history"][-1]
    out = capsys.readouterr().out
    assert f"weights             accuracy {row['accuracy']:.4f}" in out
    assert f"moving average      accuracy {row['ema_accuracy']:.4f}" in out
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_prints_config_counts_and_arithmetic_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert tiny("--dry-run", "--seed", "5", *arguments("optim.accumulation=3")) == 0
    out = capsys.readouterr().out
    for text in (
        "run.seed = 5",
        "model.depths = 1,1,1,1",
        "60 images x 3 accumulated x 1 process = 180 a step",
        "180 // 180 = 1 an epoch, 2 in 2 epochs",
        "40.0",
        "non-zero",
        "MACs an image",
    ):
        assert text in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_dry_run_of_imagenet_needs_no_data_and_shows_the_published_counts(capsys):
    assert run("--model", "slak_tiny", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "128 images x 32 accumulated x 1 process = 4096 a step" in out
    assert "1,281,167 // 4096 = 312 an epoch, 93,600 in 300 epochs" in out
    assert "published for a batch of 4096 and used as it stands" in out
    assert "50,703,838 dense, 30,473,228 non-zero" in out


def test_another_batch_shows_what_the_linear_rule_would_give(capsys):
    assert tiny("--dry-run", *arguments("optim.lr_batch=120", "optim.lr=0.004")) == 0
    assert "this batch of 60 would have 0.002: --set optim.lr=0.002" in capsys.readouterr().out


def test_the_file_order_figure_stands_beside_the_shuffled_one(tmp_path, capsys):
    folder = tmp_path / "run"
    assert tiny("--output", folder, *arguments("data.second_split=file-order")) == 0
    report = json.loads((folder / "report.json").read_text())
    assert report["second_split"]["split"] == "file-order"
    assert report["second_split"]["images"] == report["images"] == 1617
    assert json.loads((folder / "file-order" / "config.json").read_text())["data"]["split"] == "file-order"
    out = capsys.readouterr().out
    assert "held-out accuracy" in out
    assert "file-order accuracy" in out


# What can be wrong: one line on stderr, status 2, nothing written.


def refused(capsys, tmp_path, *argv):
    """Run what must be refused; return the one line."""
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert run(*argv) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    return lines[0]


TO = ("--output", "out")


def test_a_bad_path(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "nowhere" in refused(capsys, tmp_path, "--data", tmp_path / "nowhere", *TO)


def test_a_folder_without_train_and_val(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "data" / "train")
    assert "val/ is missing" in refused(capsys, tmp_path, "--data", "data", *TO)


def test_an_empty_class_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_train_and_val(tmp_path / "data")
    for path in (tmp_path / "data" / "train" / "class_1").iterdir():
        path.unlink()
    assert "class_1: there is no image" in refused(capsys, tmp_path, "--data", "data", *TO)


def test_an_unreadable_image_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_train_and_val(tmp_path / "data")
    (tmp_path / "data" / "train" / "class_1" / "2.png").write_bytes(b"not a picture")
    small = arguments(
        "optim.batch_size=4", "data.workers=0", "data.size=16", "optim.epochs=1", "optim.warmup_epochs=0"
    )
    assert run("--data", "data", "--model", "slak_micro", *small, *TO) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "class_1/2.png: the image cannot be read" in lines[0]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("--set", "optim.larning_rate=1"), "did you mean"),
        (("--set", "optim.lr=x"), "expected a number"),
        (("--set", "optim.lr"), "expected key=value"),
        (("--set", "sparse.sparsity=1.5"), "sparse.sparsity is 1.5"),
        (("--set", "model.name=slak_huge"), "no model is named 'slak_huge'"),
        (("--set", "model.depths=1,2"), "depths is (1, 2)"),
        (("--set", "model.kernel_sizes=8,8,8,8"), "odd"),
        (("--set", "data.split=nonsense"), "split 'nonsense'"),
        (("--set", "augment.flip=2"), "flip is 2.0"),
        (("--set", "optim.batch_size=100000"), "do not fill one step"),
        (("--set", "run.device=cuda:77"), "run.device=cuda:77"),
        (("--set", "run.device=abacus"), "run.device=abacus"),
        (("--seed", "-1"), "run.seed is -1"),
        (("--data", "digits", "--model", "slak_base"), "slak_micro"),
        (("--data", "folder", "--model", "resnet50"), "models with a recipe"),
        (("--model", "slak_tiny"), "--data PATH"),
        (("--resume", "nowhere.pt"), "nowhere.pt: there is no such checkpoint file"),
        (("--eval", "nowhere.pt"), "nowhere.pt: there is no such checkpoint file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_request_that_cannot_be_is_told_in_one_line(tmp_path, monkeypatch, capsys, argv, told):
    monkeypatch.chdir(tmp_path)
    assert told in refused(capsys, tmp_path, *argv, *TO)


def test_several_processes_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in refused(capsys, tmp_path, "--output", tmp_path / "out")


def test_the_folder_of_another_run_is_left_alone(finished, capsys):
    line = refused(capsys, finished, *arguments(*TINY_DIGITS), "--output", finished, "--seed", "9")
    assert "holds a different run (run.seed: 0 -> 9" in line


def test_a_folder_with_other_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("mine")
    assert "not of a run" in refused(capsys, tmp_path, *arguments(*TINY_DIGITS), "--output", tmp_path)


def test_resume_with_other_settings_is_refused(finished, tmp_path, capsys):
    file = finished / "checkpoints" / "step-000000003.pt"
    wider = arguments(*TINY_DIGITS, "model.dims=8,8,8,8")
    line = refused(
        capsys, tmp_path, *wider, "--data", "digits", "--resume", file, "--output", tmp_path / "out"
    )
    assert "different run (model.dims: 4,4,8,8 -> 8,8,8,8)" in line


def test_resume_of_an_older_step_into_a_folder_that_is_further_is_refused(finished, capsys):
    file = finished / "checkpoints" / "step-000000002.pt"
    line = refused(capsys, finished, "--resume", file, "--output", finished)
    assert "already holds step-000000006.pt" in line


def test_resume_with_more_images_than_before_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "data", images=10)
    small = arguments(*TINY_DIGITS, "data.held_out=0.2", "optim.batch_size=4", "data.workers=0")
    command = ["--data", "data", "--model", "slak_micro", *small, *TO]
    assert run(*command) == 0
    capsys.readouterr()
    Path("out/report.json").unlink()
    for name in ("class_0", "class_1"):
        for number in range(5):
            shutil.copy(f"data/{name}/{number}.png", f"data/{name}/again_{number}.png")
    line = refused(capsys, tmp_path, *command)
    assert "does not fit the data: the saved sampler has length 16, this one 24" in line


def test_evaluation_of_another_shape_is_refused(finished, tmp_path, capsys):
    line = refused(capsys, tmp_path, "--eval", finished / "best.pt", "--set", "model.dims=8,8,8,8")
    assert "the checkpoint is of another model: " in line
    assert "tensors differ" in line


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path, capsys):
    (tmp_path / "a.pt").write_bytes(b"hello")
    assert "damaged or no checkpoint" in refused(capsys, tmp_path, "--eval", tmp_path / "a.pt")
    torch.save({"format": 1, "config": {}}, tmp_path / "b.pt")
    assert "another recipe or version" in refused(capsys, tmp_path, "--eval", tmp_path / "b.pt")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, capsys):
    folder = tmp_path / "run"
    wild = arguments("optim.lr=1e30", "optim.warmup_epochs=0", "optim.min_lr=0", "run.checkpoint_interval=1")
    assert tiny("--output", folder, *wild) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "the loss is" in lines[0]
    assert "the last checkpoint is" in lines[0]
    for path in (folder / "checkpoints").iterdir():
        checkpoint.load(path)
    assert not (folder / "report.json").exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path, capsys, monkeypatch):
    real = State.state_dict

    def spoiling(state):
        content = real(state)
        with torch.no_grad():
            next(state.model.parameters()).fill_(torch.nan)  # after the first checkpoint
        return content

    monkeypatch.setattr(State, "state_dict", spoiling)
    monkeypatch.setattr("recipes.engine.training.math.isfinite", lambda value: True)
    folder = tmp_path / "run"
    assert tiny("--output", folder, *arguments("run.checkpoint_interval=1")) == 2
    assert "is not finite at step 2, which is not saved" in capsys.readouterr().err
    assert steps(folder) == [1]


def test_unknown_arguments_end_with_status_2(capsys):
    with pytest.raises(SystemExit) as caught:
        run("--bogus")
    assert caught.value.code == 2


@pytest.mark.slow
def test_the_script_runs_as_a_script_and_stops_on_a_signal(tmp_path):
    command = [sys.executable, "recipes/slak_imagenet.py", "--output", tmp_path / "run"]
    many = arguments(*TINY_DIGITS, "optim.epochs=2000", "run.eval_interval=2000")
    with subprocess.Popen(
        [*command, *many], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if "epoch 2/2000" in line:
                process.send_signal(signal.SIGTERM)
                break
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from there" in out
    assert len(steps(tmp_path / "run")) == 1


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_bit_equal(tmp_path):
    more = arguments(*TINY_DIGITS, "optim.epochs=40", "run.checkpoint_interval=1")
    command = [sys.executable, "recipes/slak_imagenet.py", *more, "--output"]
    assert run(*more, "--output", tmp_path / "whole") == 0
    rng = random.Random(0)
    kills = 0
    while not (tmp_path / "killed" / "report.json").exists():
        with subprocess.Popen(
            [*command, tmp_path / "killed"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            for line in process.stdout:
                if kills < 4 and " · epoch " in line:
                    time.sleep(rng.uniform(0, 0.5))
                    process.kill()
                    kills += 1
                    break
            process.stdout.read()
    assert kills == 4
    assert differing(last_of(tmp_path / "whole"), last_of(tmp_path / "killed")) == []


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        run("--help")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for option in ("--data", "--model", "--output", "--seed", "--set", "--dry-run", "--resume", "--eval"):
        assert option in out
