"""The 1,797 handwritten digits that scikit-learn carries: 8x8 pixels, 17 grey levels, ten classes.

It is the test set, by 13 writers, of "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak,
1998, UCI Machine Learning Repository).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from recipes.data import splits
from recipes.data.images import TensorImages

SPLITS = ("stratified", "file-order")


def open_digits(
    split: str = "stratified", held_out: float = 0.2, seed: int = 0
) -> tuple[TensorImages, TensorImages]:
    """Return the training and the held-out digits.

    Args:
        split: "stratified" holds out a shuffled part with the classes in proportion. "file-order" holds out
            the end of the file: its writers are largely not those of the rest, which makes it the harder
            figure.
        held_out: fraction to hold out.
        seed: which shuffle, for "stratified".

    Returns:
        Training digits and held-out digits.

    Raises:
        ValueError: if the split has another name.

    Example:
        >>> train, held_out = open_digits()
        >>> len(train), len(held_out)
        (1438, 359)
    """
    from sklearn.datasets import load_digits  # a second's import that no other data set needs

    raw: Any = load_digits()
    everything = TensorImages(
        pixels=torch.from_numpy(raw.images.astype(np.uint8))[:, None],
        white=16,
        labels=raw.target.astype(np.int64),
        classes=tuple("0123456789"),
        mean=(0.3053,),
        std=(0.3760,),
    )
    if split == "stratified":
        train, test = splits.stratified(everything.labels, held_out, seed)
    elif split == "file-order":
        train, test = splits.file_order(len(everything), held_out)
    else:
        raise ValueError(f"split {split!r}: digits has the splits {', '.join(SPLITS)}")
    return everything.subset(train), everything.subset(test)
