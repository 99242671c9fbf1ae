"""The one exception of the data package: what is wrong with the data, in one line."""

from __future__ import annotations


class DataError(ValueError):
    r"""Say in one line what is wrong with a data set and where.

    A loader's worker process hands an exception on with its whole traceback as the message. The traceback's
    last line is what was raised, and that is what this one prints.

    Example:
        >>> print(DataError("Traceback ...\nrecipes.data.errors.DataError: cat.png: not an image\n"))
        cat.png: not an image
    """

    def __str__(self) -> str:
        last = super().__str__().rstrip().rpartition("\n")[2]
        return last.removeprefix(f"{__name__}.{type(self).__name__}: ")
