"""From what a person typed after `--data` to a data set."""

from __future__ import annotations

from pathlib import Path

from recipes.data import digits, fashion_mnist, image_folder
from recipes.data.errors import DataError
from recipes.data.image_folder import FolderImages
from recipes.data.images import TensorImages

ImageSet = TensorImages | FolderImages


def open_data(
    data: str, split: str | None = None, held_out: float = 0.2, seed: int = 0
) -> tuple[ImageSet, ImageSet]:
    """Open a data set by name or path.

    Args:
        data: "digits", "fashion-mnist" (Debian's package), a folder with Fashion-MNIST's four files, or a
            folder of images.
        split: how to hold out: "stratified" (default) or "file-order" for digits; "folders" (default) or
            "stratified" for a folder of images; nothing else has a choice.
        held_out: fraction to hold out, where a data set is split here.
        seed: which shuffle, where a data set is split here.

    Returns:
        The images to train on and those held out.

    Raises:
        DataError: if the data cannot be used, in one line.
    """
    fashion = data == "fashion-mnist" or fashion_mnist.has_fashion_mnist(data)
    choices = digits.SPLITS if data == "digits" else () if fashion else image_folder.SPLITS
    if split is not None and split not in choices:
        raise DataError(
            f"split {split!r}: {data} has {' and '.join(choices) if choices else 'a test set of its own'}"
        )
    if data == "digits":
        return digits.open_digits(split or "stratified", held_out, seed)
    if fashion:
        return fashion_mnist.open_fashion_mnist(None if data == "fashion-mnist" else data)
    if not Path(data).is_dir():
        raise DataError(f"{data}: no such folder; the data sets with a name are digits and fashion-mnist")
    return image_folder.open_image_folder(data, split or "folders", held_out, seed)
