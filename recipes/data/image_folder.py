"""Images in folders, one folder a class: ImageNet's layout, or a single folder that is split here.

`split="folders"` takes `PATH/train/<class>/**` and `PATH/val/<class>/**`, `split="stratified"` takes
`PATH/<class>/**`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from recipes.data import splits
from recipes.data.errors import DataError
from recipes.data.reading import MAX_PIXELS, is_too_large, read_rgb

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SPLITS = ("folders", "stratified")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class FolderImages:
    """Find images by path and read them when they are asked for.

    Args:
        root: the folder that the names start from.
        names: path of each image below `root`, as bytes in one array: a list of a million Python strings
            would be copied into every loader process, page by page, as their reference counts change.
        labels: int64 array (N,).
        classes: the classes' names.
        mean: mean of each channel in [0, 1].
        std: standard deviation of each channel in [0, 1].
    """

    root: Path
    names: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        """Return the path of an image."""
        return self.root / os.fsdecode(self.names[index])

    def load(self, indices: Sequence[int]) -> list[Image.Image]:
        """Return RGB images.

        Raises:
            DataError: if a file cannot be read; the message names it.
        """
        return [read_rgb(self.path(index)) for index in indices]

    def subset(self, indices: Sequence[int] | np.ndarray) -> FolderImages:
        """Return the images of these indices, in their order, as a data set of its own."""
        return replace(self, names=self.names[indices], labels=self.labels[indices])


def open_image_folder(
    path: str | Path, split: str = "folders", held_out: float = 0.2, seed: int = 0
) -> tuple[FolderImages, FolderImages]:
    """Return the training and the held-out images of a folder.

    Classes are the names of the training folders, sorted. A single folder that is split is looked through
    more closely, since nobody has prepared it: a link to an image of the same folder is left out, or one
    image could stand on both sides; so is an image of more than 50 million pixels, which would take
    seconds and a gigabyte to read. The log says how many.

    Args:
        path: the folder.
        split: "folders" takes `train/` and `val/`; "stratified" splits one folder of classes.
        held_out: fraction to hold out, for "stratified".
        seed: which shuffle, for "stratified".

    Raises:
        DataError: if a folder is missing or empty, the classes do not match, or (when splitting) a file is no
            image.
        ValueError: if the split has another name.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder")
    parts = [name for name in ("train", "val") if (root / name).is_dir()]
    if split == "folders":
        return _two_folders(root, parts)
    if split != "stratified":
        raise ValueError(f"split {split!r}: a folder of images has the splits {', '.join(SPLITS)}")
    if parts:
        raise DataError(f"{root}: it has a folder {parts[0]}/, so its split is 'folders', not 'stratified'")
    everything = _usable(_scan(root, _class_names(root)))
    train, test = splits.stratified(everything.labels, held_out, seed)
    return everything.subset(train), everything.subset(test)


def _two_folders(root: Path, parts: Sequence[str]) -> tuple[FolderImages, FolderImages]:
    if not parts:
        hint = "split='stratified' splits a single folder of classes"
        raise DataError(f"{root}: the folders train/ and val/ are missing; {hint}")
    for name in ("train", "val"):
        if name not in parts:
            raise DataError(f"{root}: the folder {name}/ is missing")
    classes, found = _class_names(root / "train"), _class_names(root / "val")
    unknown, unseen = sorted(set(found) - set(classes)), sorted(set(classes) - set(found))
    if unknown:
        raise DataError(f"{root / 'val'}: {_some(unknown)} not among the {len(classes)} classes of train/")
    if unseen:
        _logger.warning("%s: no images of %s", root / "val", _some(unseen))
    return _scan(root / "train", classes), _scan(root / "val", classes, only=found)


def _class_names(folder: Path) -> tuple[str, ...]:
    folders = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    names = sorted(name for name in folders if not name.startswith("."))
    if not names:
        raise DataError(f"{folder}: there is no class folder in it, expected {folder.name}/<class>/<images>")
    return tuple(names)


def _scan(root: Path, classes: tuple[str, ...], only: Sequence[str] | None = None) -> FolderImages:
    names: list[bytes] = []
    labels: list[int] = []
    others: list[str] = []
    for label, name in enumerate(classes):
        if only is not None and name not in only:
            continue
        files = sorted(_files(root, name))
        images = [file for file in files if file.lower().endswith(SUFFIXES)]
        if not images:
            raise DataError(f"{root / name}: there is no image in this class folder")
        others += [file for file in files if not file.lower().endswith(SUFFIXES)]
        names += map(os.fsencode, images)
        labels += [label] * len(images)
    if others:
        _logger.warning("%s: %d files are no images by their names, such as %s", root, len(others), others[0])
    return FolderImages(root, np.array(names, dtype=np.bytes_), np.array(labels, dtype=np.int64), classes)


def _files(root: Path, name: str) -> Iterator[str]:
    """Yield the paths below `root` of all files under the folder `name`; a circle of links is walked once."""
    seen: set[str] = set()
    for folder, inner, files in os.walk(root / name, onerror=_refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        inner.sort()
        below = os.path.relpath(folder, root)
        yield from (os.path.join(below, file) for file in files)


def _usable(images: FolderImages) -> FolderImages:
    """Leave out links that stay inside the folder and images that are too large, and say so."""
    real_root = images.root.resolve()
    kept, links, large = [], [], []
    for index in range(len(images)):
        path = images.path(index)
        if path.is_symlink() and path.resolve().is_relative_to(real_root):
            links.append(path)
        elif is_too_large(path):
            large.append(path)
        else:
            kept.append(index)
    _warn_left_out(images.root, links, "links to images of the same folder")
    _warn_left_out(images.root, large, f"images of more than {MAX_PIXELS:,} pixels")
    result = images.subset(kept)
    for label in np.flatnonzero(np.bincount(result.labels, minlength=len(images.classes)) == 0):
        raise DataError(
            f"{images.root / images.classes[label]}: there is no usable image in this class folder"
        )
    return result


def _warn_left_out(root: Path, paths: Sequence[Path], what: str) -> None:
    if paths:
        _logger.warning("%s: %d %s left out, such as %s", root, len(paths), what, paths[0].relative_to(root))


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename}: the folder cannot be read ({error.strerror})")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
