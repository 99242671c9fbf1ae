from __future__ import annotations

import re

import pytest
from PIL import Image

from recipes.data import fashion_mnist
from recipes.data.errors import DataError
from recipes.data.image_folder import FolderImages
from recipes.data.images import TensorImages
from recipes.data.sources import open_data


@pytest.fixture
def folder(tmp_path):
    for number in range(12):
        path = tmp_path / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    return tmp_path


def test_digits_by_name():
    train, held_out = open_data("digits")
    assert isinstance(train, TensorImages)
    assert (len(train), len(held_out)) == (1438, 359)
    assert len(open_data("digits", split="file-order", held_out=0.1)[1]) == 180


def test_a_folder_of_images(folder):
    train, held_out = open_data(str(folder), split="stratified", held_out=0.5)
    assert isinstance(train, FolderImages)
    assert (len(train), len(held_out)) == (6, 6)


def test_fashion_mnist_by_name_looks_in_debians_place(monkeypatch, tmp_path):
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "nowhere")
    with pytest.raises(DataError, match="apt install dataset-fashion-mnist"):
        open_data("fashion-mnist")


def test_a_folder_with_one_of_the_four_files_is_taken_for_fashion_mnist(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"")
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte\[\.gz\] is not there"):
        open_data(str(tmp_path))


@pytest.mark.parametrize(
    ("data", "split", "message"),
    [
        ("digits", "folders", "split 'folders': digits has stratified and file-order"),
        ("fashion-mnist", "stratified", "fashion-mnist has a test set of its own"),
        ("{folder}", "file-order", "has folders and stratified"),
        ("{folder}", None, "the folders train/ and val/ are missing"),
        (
            "{folder}/gone",
            None,
            "gone: no such folder; the data sets with a name are digits and fashion-mnist",
        ),
        ("imagnet", None, "imagnet: no such folder"),
    ],
)
def test_each_wrong_request_has_its_line(folder, data, split, message):
    with pytest.raises(DataError, match=re.escape(message)):
        open_data(data.format(folder=folder), split=split)
