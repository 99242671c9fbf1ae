"""Lay text out in columns, and keep what a file says from steering the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def table(lines: Sequence[Sequence[str]], left: int = 2) -> str:
    """Return a table: a head, a rule, rows, a rule and a last row of totals.

    Args:
        lines: The head, the rows and the totals, all of one length.
        left: How many columns hold text; those are flush left, the others flush right.

    Returns:
        The table without a line break at its end.

    Examples:
        >>> print(str(table([["tensor", "active"], ["fc", "12"], ["total", "12"]], left=1)))
        tensor  active
        --------------
        fc          12
        --------------
        total       12
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    rule = "-" * max(map(len, text))
    return "\n".join([text[0], rule, *text[1:-1], rule, text[-1]])


def printable(text: str) -> str:
    r"""Replace line breaks, control characters and broken Unicode, as in a name read from a file.

    Examples:
        >>> printable("fc\x1b[2J.weight")
        'fc?[2J.weight'
    """
    return "".join(character if character.isprintable() else "?" for character in text)


def times(shape: Sequence[int]) -> str:
    """Write a shape.

    Examples:
        >>> times((8, 3, 3))
        '8x3x3'
    """
    return "x".join(map(str, shape))
