"""Randomness that depends on *what* is drawn for, never on who draws it or when.

A generator is a function of (seed, stream, first, second). Nothing is drawn from a global generator or from a
loader worker's own, so that the number of workers, the number of ranks and a restart in the middle leave
every image as it is. Philox is counter-based: the seed and the stream are its key, the other two numbers
the upper half of its counter, so that two generators never share a block of output (each has 2^128 of its
own).

Source: J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC
2011.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What a generator is for; two streams of one seed have nothing in common."""

    SAMPLE = 1
    ORDER = 2
    MIXING = 3
    SPLIT = 4


def generator(seed: int, stream: Stream, first: int = 0, second: int = 0) -> np.random.Generator:
    """Return the generator of a seed, a stream and two more numbers.

    Args:
        seed: the run's seed, 0 to 2^64 - 1.
        stream: what is drawn.
        first: for instance the epoch or the step, 0 to 2^64 - 1.
        second: for instance the sample's index, 0 to 2^64 - 1.

    Raises:
        ValueError: if a number does not fit 64 bits without a sign.

    Example:
        >>> a = generator(0, Stream.SAMPLE, 3, 17).random()
        >>> b = generator(0, Stream.SAMPLE, 3, 17).random()
        >>> a == b
        True
    """
    try:
        key = np.array([seed, stream], np.uint64)
        counter = np.array([0, 0, first, second], np.uint64)
    except OverflowError:
        given = f"seed {seed}, key ({first}, {second})"
        raise ValueError(f"{given}: each number must be between 0 and 2^64 - 1") from None
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def sample_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Return the generator of everything random about one sample in one epoch."""
    return generator(seed, Stream.SAMPLE, epoch, index)
