from __future__ import annotations

import os
import re

import numpy as np
import pytest
from PIL import Image

from recipes.data.errors import DataError
from recipes.data.image_folder import open_image_folder


def put(path, colour=(255, 0, 0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path)
    return path


@pytest.fixture
def imagenet(tmp_path):
    for part, count in (("train", 3), ("val", 2)):
        for name in ("n02", "n01", "n10"):
            for number in range(count):
                put(tmp_path / part / name / f"{number}.JPEG", (50 * number, 0, 0))
    return tmp_path


@pytest.fixture
def single(tmp_path):
    for name, count in (("cat", 10), ("dog", 20)):
        for number in range(count):
            put(tmp_path / name / "deep" / f"{number}.png", (number, 0, 0))
    return tmp_path


def names(images) -> list[str]:
    return [str(images.path(index).relative_to(images.root)) for index in range(len(images))]


def test_imagenets_layout(imagenet):
    train, val = open_image_folder(imagenet)
    assert train.classes == val.classes == ("n01", "n02", "n10")
    assert names(train)[:4] == ["n01/0.JPEG", "n01/1.JPEG", "n01/2.JPEG", "n02/0.JPEG"]
    np.testing.assert_array_equal(train.labels, np.repeat([0, 1, 2], 3))
    np.testing.assert_array_equal(val.labels, np.repeat([0, 1, 2], 2))
    assert [image.size for image in train.load([0, 8])] == [(4, 4), (4, 4)]


def test_a_class_that_val_lacks_is_told_and_the_others_keep_their_index(imagenet, caplog):
    for path in (imagenet / "val" / "n02").iterdir():
        path.unlink()
    (imagenet / "val" / "n02").rmdir()
    _, val = open_image_folder(imagenet)
    np.testing.assert_array_equal(val.labels, [0, 0, 2, 2])
    assert "no images of n02" in caplog.text


def test_a_single_folder_is_split_in_proportion(single):
    train, held_out = open_image_folder(single, "stratified", held_out=0.2, seed=1)
    assert (len(train), len(held_out)) == (24, 6)
    np.testing.assert_array_equal(np.bincount(held_out.labels), [2, 4])
    assert sorted(names(train) + names(held_out)) == sorted(
        f"{name}/deep/{number}.png" for name, count in (("cat", 10), ("dog", 20)) for number in range(count)
    )
    again = open_image_folder(single, "stratified", held_out=0.2, seed=1)[1]
    assert names(again) == names(held_out)


def test_links_inside_a_split_folder_are_left_out_and_told(single, caplog):
    (single / "dog" / "twin.png").symlink_to(single / "cat" / "deep" / "0.png")
    train, held_out = open_image_folder(single, "stratified")
    assert len(train) + len(held_out) == 30
    assert "1 links to images of the same folder left out, such as dog/twin.png" in caplog.text


def test_links_that_lead_elsewhere_are_followed(single, tmp_path_factory):
    elsewhere = put(tmp_path_factory.mktemp("elsewhere") / "cow" / "0.png").parent
    put(elsewhere / "1.png")
    (single / "cow").symlink_to(elsewhere)
    train, held_out = open_image_folder(single, "stratified")
    assert train.classes == ("cat", "cow", "dog")
    assert len(train) + len(held_out) == 32


def test_a_circle_of_links_is_walked_once(imagenet):
    (imagenet / "train" / "n01" / "again").symlink_to(imagenet / "train" / "n01")
    assert len(open_image_folder(imagenet)[0]) == 9


def test_huge_images_are_left_out_of_a_split_and_told(single, caplog):
    (single / "cat" / "huge.pgm").write_bytes(b"P5 30000 30000 255\n")
    train, held_out = open_image_folder(single, "stratified")
    assert len(train) + len(held_out) == 30
    assert "1 images of more than 50,000,000 pixels left out, such as cat/huge.pgm" in caplog.text


def test_files_of_other_kinds_are_told(imagenet, caplog):
    (imagenet / "train" / "n01" / "notes.txt").write_text("")
    assert len(open_image_folder(imagenet)[0]) == 9
    assert "1 files are no images by their names, such as n01/notes.txt" in caplog.text


def test_names_that_are_no_text_are_kept(imagenet):
    name = b"caf\xe9.JPEG"
    try:
        os.rename(
            imagenet / "train" / "n01" / "0.JPEG", os.fsencode(imagenet / "train" / "n01") + b"/" + name
        )
    except OSError:
        pytest.skip("this file system takes text only")
    train, _ = open_image_folder(imagenet)
    assert name in [os.path.basename(os.fsencode(train.path(index))) for index in range(3)]
    assert len(train.load(range(len(train)))) == 9


def lose(*parts):
    def change(root):
        folder = root.joinpath(*parts)
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()

    return change


def empty(*parts):
    return lambda root: [path.unlink() for path in root.joinpath(*parts).iterdir()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose(), "{root}: there is no such folder"),
        (lose("train"), "{root}: the folder train/ is missing"),
        (lose("val"), "{root}: the folder val/ is missing"),
        (empty("train", "n02"), "{root}/train/n02: there is no image in this class folder"),
        (empty("val", "n10"), "{root}/val/n10: there is no image in this class folder"),
        (
            lambda root: put(root / "val" / "cat" / "0.png"),
            "{root}/val: cat not among the 3 classes of train/",
        ),
        (
            lambda root: [lose("train", name)(root) for name in ("n01", "n02", "n10")],
            "{root}/train: there is no class folder",
        ),
        (
            lambda root: [lose(part)(root) for part in ("train", "val")],
            "{root}: the folders train/ and val/ are missing",
        ),
    ],
)
def test_each_fault_of_imagenets_layout_has_its_line(imagenet, change, message):
    change(imagenet)
    with pytest.raises(DataError, match=re.escape(message.format(root=imagenet))) as caught:
        open_image_folder(imagenet)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (empty("cat", "deep"), "{root}/cat: there is no image in this class folder"),
        (lambda root: (root / "cow").mkdir(), "{root}/cow: there is no image in this class folder"),
        (
            lambda root: (root / "cat" / "0.png").write_bytes(b"no"),
            "{root}/cat/0.png: the image cannot be read",
        ),
        (lambda root: put(root / "train" / "0.png"), "{root}: it has a folder train/"),
    ],
)
def test_each_fault_of_a_single_folder_has_its_line(single, change, message):
    change(single)
    with pytest.raises(DataError, match=re.escape(message.format(root=single))):
        open_image_folder(single, "stratified")


def test_a_class_of_links_only_is_refused(single):
    (single / "cow").mkdir()
    (single / "cow" / "0.png").symlink_to(single / "cat" / "deep" / "0.png")
    with pytest.raises(DataError, match="cow: there is no usable image in this class folder"):
        open_image_folder(single, "stratified")


def test_an_unreadable_image_is_named_when_it_is_asked_for(imagenet):
    (imagenet / "train" / "n02" / "1.JPEG").write_bytes(b"no")
    train, _ = open_image_folder(imagenet)
    with pytest.raises(DataError, match=r"n02/1\.JPEG: the image cannot be read"):
        train.load([3, 4])


def test_an_unknown_split_is_refused(imagenet):
    with pytest.raises(ValueError, match="'random': a folder of images has the splits folders, stratified"):
        open_image_folder(imagenet, "random")
