"""What a person running a recipe can get wrong, told in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """Say in one line what is wrong with a request; the command line prints it and exits with status 2."""


class NonFiniteError(UserError):
    """Say that the loss or a weight is no longer a number; what was saved before is whole."""


@contextlib.contextmanager
def as_user_error(doing: str) -> Iterator[None]:
    """Turn a rejected value or an unreadable file into a `UserError` that says what was being done.

    Args:
        doing: what the block does, in a few words; stands before the reason.

    Raises:
        UserError: if the block raises `ValueError`, `KeyError`, `TypeError` or `OSError`.

    Example:
        >>> with as_user_error("reading the number"):
        ...     int("x")
        Traceback (most recent call last):
        recipes.engine.errors.UserError: reading the number: invalid literal for int() with base 10: 'x'
    """
    try:
        yield
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise UserError(f"{doing}: {one_line(str(reason))}") from error


def one_line(text: str) -> str:
    r"""Join the lines of a message into one.

    Example:
        >>> one_line("a\n   b")
        'a b'
    """
    return " ".join(text.split())
