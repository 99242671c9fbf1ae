"""Checkpoint files: whole or not there, proved before they are believed, and never run."""

import os
import pickle
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.tiny_runs import differing

from recipes.engine import checkpoint
from recipes.engine.checkpoint import CheckpointFolder
from recipes.engine.errors import UserError

ROOT = Path(__file__).parents[2]


def content(value: float = 1.0) -> dict:
    return {"weights": {"a": torch.full((64, 33), value), "b": torch.tensor([float("nan"), -0.0])}, "step": 7}


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path):
    checkpoint.save(content(), tmp_path / "new" / "a.pt")
    loaded = checkpoint.load(tmp_path / "new" / "a.pt")
    assert loaded.pop("format") == checkpoint.FORMAT
    assert differing(loaded, content()) == []
    assert os.listdir(tmp_path / "new") == ["a.pt"]


def test_only_the_last_ones_are_kept_in_order_of_steps(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=3)
    for step in (5, 9, 10, 100, 1000):
        folder.save(step, content(step))
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    assert [path.name for path in folder.files()] == [
        "step-000000010.pt",
        "step-000000100.pt",
        "step-000001000.pt",
    ]
    path, loaded = folder.latest()
    assert path == folder.files()[-1]
    assert loaded["weights"]["a"][0, 0] == 1000
    assert [path.name for path in folder.later_than(99)] == ["step-000000100.pt", "step-000001000.pt"]


def test_there_is_nothing_to_load_in_a_new_folder(tmp_path):
    assert CheckpointFolder(tmp_path / "none").latest() is None
    with pytest.raises(ValueError, match="at least one"):
        CheckpointFolder(tmp_path, keep=0)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def flip_a_weight(path):
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    raw[largest.header_offset + 2000] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("damage", [cut, empty, flip_a_weight])
def test_a_damaged_newest_file_is_reported_and_passed_over(tmp_path, caplog, damage):
    folder = CheckpointFolder(tmp_path)
    folder.save(1, content(1.0))
    damage(folder.save(2, content(2.0)))
    path, loaded = folder.latest()
    assert path.name == "step-000000001.pt"
    assert loaded["weights"]["a"].unique().tolist() == [1.0]
    assert "step-000000002.pt: the file is damaged" in caplog.text
    damage(path)
    with pytest.raises(UserError, match="none of the 2 checkpoints can be read"):
        folder.latest()


def test_a_flipped_bit_passes_torch_load_which_is_why_checksums_are_read(tmp_path):
    path = CheckpointFolder(tmp_path).save(1, content())
    flip_a_weight(path)
    assert len(torch.load(path, weights_only=True)["weights"]["a"].unique()) == 2


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil-was-here",))


def test_a_file_never_runs_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "x": Evil()}, "evil.pt")
    with pytest.raises(UserError, match="more than tensors and primitives"):
        checkpoint.load(Path("evil.pt"))
    Path("evil.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="damaged or no checkpoint"):
        checkpoint.load(Path("evil.pkl"))
    assert not Path("evil-was-here").exists()


def test_a_foreign_file_is_told_from_ours(tmp_path):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="not a checkpoint of these recipes"):
        checkpoint.load(tmp_path / "other.pt")
    with pytest.raises(UserError, match="there is no such checkpoint file"):
        checkpoint.load(tmp_path / "absent.pt")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")]
)
def test_a_full_disk_loses_nothing_that_was_there(tmp_path, monkeypatch, error):
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(1, content(1.0))

    def fail(obj, path):
        Path(path).write_bytes(b"half of a checkpoint")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match="could not be written"):
        folder.save(2, content(2.0))
    assert os.listdir(tmp_path) == ["step-000000001.pt"]
    assert folder.latest()[1]["weights"]["a"][0, 0] == 1


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def interrupted(temporary):
        temporary.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_atomically(path, interrupted)
    assert os.listdir(tmp_path) == ["a.txt"]
    assert path.read_text() == "old"


SAVE_FOR_EVER = """
import sys, torch
from pathlib import Path
from recipes.engine.checkpoint import CheckpointFolder
folder, step = CheckpointFolder(Path(sys.argv[1])), 0
while True:
    step += 1
    folder.save(step, {"a": torch.full((300_000,), float(step))})
    print(step, flush=True)
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    rng = random.Random(0)
    for _ in range(5):
        command = [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline().strip() == "1"
            time.sleep(rng.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
        path, loaded = CheckpointFolder(tmp_path).latest()
        assert (loaded["a"] == int(path.stem[5:])).all()
        assert path == CheckpointFolder(tmp_path).files()[-1]
        for left in tmp_path.iterdir():
            left.unlink()
