from __future__ import annotations

from recipes.data.errors import DataError


def test_a_message_from_a_worker_is_its_last_line():
    line = "cat.png: the image cannot be read (broken: at 7)"
    assert str(DataError(line)) == line
    wrapped = (
        f"Caught DataError in worker 0.\nTraceback:\n  File x\n{DataError.__module__}.DataError: {line}\n"
    )
    assert str(DataError(wrapped)) == line
