"""How a data set without a fixed test set is split in two."""

from __future__ import annotations

import numpy as np

from recipes.data.keyed import Stream, generator


def stratified(labels: np.ndarray, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold out a shuffled part with the classes in proportion.

    `round(held_out * N)` samples are held out; each class gives its share rounded down or up by largest
    remainder, and always keeps one sample for training.

    Args:
        labels: int array (N,) of class indices.
        held_out: fraction to hold out, between 0 and 1.
        seed: which shuffle.

    Returns:
        The indices to train on and the indices held out, each ascending.

    Raises:
        ValueError: if the fraction leaves nothing on one side or a class without a training sample.

    Example:
        >>> train, test = stratified(np.array([0] * 10 + [1] * 5), 0.2, seed=0)
        >>> len(train), len(test), int((test < 10).sum())
        (12, 3, 2)
    """
    total = _held_out_count(len(labels), held_out)
    classes, counts = np.unique(labels, return_counts=True)
    shares = held_out * counts
    quotas = np.floor(shares).astype(np.int64)
    open_classes = [c for c in np.argsort(quotas - shares, kind="stable") if quotas[c] < counts[c] - 1]
    missing = total - int(quotas.sum())
    if missing > len(open_classes):
        raise ValueError(
            f"holding out {held_out} of {len(labels)} samples leaves a class without a training sample"
        )
    quotas[open_classes[:missing]] += 1
    order = generator(seed, Stream.SPLIT).permutation(len(labels))
    chosen = [order[labels[order] == c][:quota] for c, quota in zip(classes, quotas, strict=True)]
    held = np.zeros(len(labels), dtype=bool)
    held[np.concatenate(chosen)] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def file_order(length: int, held_out: float) -> tuple[np.ndarray, np.ndarray]:
    """Hold out the last part in file order.

    Args:
        length: number of samples N.
        held_out: fraction to hold out; `round(held_out * N)` samples.

    Returns:
        The indices to train on and the indices held out, each ascending.
    """
    first = length - _held_out_count(length, held_out)
    return np.arange(first), np.arange(first, length)


def _held_out_count(length: int, held_out: float) -> int:
    count = round(held_out * length)
    if not 0 < count < length:
        raise ValueError(f"holding out {held_out} of {length} samples leaves nothing on one side")
    return count
