"""The one place that knows how many processes train together."""

from __future__ import annotations

import os


def rank() -> int:
    """Return the index of this process among those that train together; 0 for a single process."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return how many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Return whether this process writes files and talks to the screen."""
    return rank() == 0
