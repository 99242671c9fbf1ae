"""The run folder: one folder, one run, and nothing of another is touched."""

import dataclasses
import json

import pytest

from recipes.engine.errors import UserError
from recipes.engine.folder import RunFolder, default_folder
from recipes.slak_imagenet import digits, imagenet_tiny

CONFIG = digits()


def changed(**run):
    return dataclasses.replace(CONFIG, run=dataclasses.replace(CONFIG.run, **run))


def test_a_new_folder_is_claimed_with_its_config_and_again_by_the_same_run(tmp_path):
    folder = RunFolder(tmp_path / "a" / "b")
    folder.claim(CONFIG)
    before = (folder.path / "config.json").read_text()
    assert json.loads(before)["optim"]["lr"] == CONFIG.optim.lr
    folder.claim(CONFIG)
    folder.claim(changed(keep=7, threads=1))
    assert (folder.path / "config.json").read_text() == before


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: changed(seed=3), r"different run \(run.seed: 0 -> 3\); --output another folder"),
        (imagenet_tiny, r"different run \(name: digits -> imagenet-slak_tiny; .* and \d+ more\)"),
    ],
)
def test_the_folder_of_another_run_is_refused(tmp_path, make, told):
    folder = RunFolder(tmp_path / "a")
    folder.claim(CONFIG)
    with pytest.raises(UserError, match=told):
        folder.claim(make())


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="holds files that are not of a run"):
        RunFolder(tmp_path).claim(CONFIG)
    with pytest.raises(UserError, match="is a file"):
        RunFolder(tmp_path / "thesis.tex").claim(CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": 1}', "\xff"])
def test_a_config_that_cannot_be_read_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="is not the config of a run of this recipe"):
        RunFolder(tmp_path).claim(CONFIG)


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        RunFolder(tmp_path / "file" / "inner").claim(CONFIG)


def test_the_default_folder_is_the_configs_own_until_its_run_is_finished(tmp_path):
    first = default_folder(tmp_path, "digits", CONFIG)
    assert default_folder(tmp_path, "digits", changed(keep=5)) == first
    assert default_folder(tmp_path, "digits", changed(seed=1)) != first
    RunFolder(first).claim(CONFIG)
    assert default_folder(tmp_path, "digits", CONFIG) == first
    RunFolder(first).report.write_text("{}")
    assert default_folder(tmp_path, "digits", CONFIG).name == f"{first.name}-2"
