"""What a person sees while a run goes: a live bar on a terminal, one plain line an epoch elsewhere."""

from __future__ import annotations

import dataclasses
import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text


@dataclasses.dataclass
class Pace:
    """Measure images a second and the time left, from the clock's readings that it is given.

    The first step of a process is left out, because it also pays for warming up.

    Args:
        total: images of the whole run.
        done: images that were already trained on when the clock started.
    """

    total: int
    done: int = 0
    _first: tuple[float, int] | None = None
    _last: tuple[float, int] | None = None

    def update(self, seconds: float, done: int) -> None:
        """Note that `done` images of the run are trained on at the given reading of the clock."""
        self._first = self._first or (seconds, done)
        self._last = (seconds, done)
        self.done = done

    @property
    def images_per_second(self) -> float:
        """Average since the first step; 0 before the second."""
        if self._first is None or self._last is None or self._last[0] <= self._first[0]:
            return 0.0
        return (self._last[1] - self._first[1]) / (self._last[0] - self._first[0])

    @property
    def seconds_left(self) -> float | None:
        """Images that are left at the pace so far; None before there is a pace."""
        pace = self.images_per_second
        return (self.total - self.done) / pace if pace else None


@dataclasses.dataclass(frozen=True)
class Reading:
    """Hold what the display shows at one moment."""

    step: int
    epoch: int
    loss: float
    score: float | None
    images_per_second: float
    sparsity: float
    seconds_left: float | None

    def __str__(self) -> str:
        score = "-" if self.score is None else f"{self.score:.2%}"
        left = "-" if self.seconds_left is None else clock(self.seconds_left)
        return (
            f"loss {self.loss:.3f} · held out {score} · {self.images_per_second:,.0f} images/s"
            f" · {self.sparsity:.1%} sparse · {left} left"
        )


class Display:
    """Show the progress of a run; a context manager.

    On a terminal there is a live bar with a line of readings under it; elsewhere each epoch leaves one line.

    Args:
        console: where to draw.
        label: stands before the bar.
        epochs: epochs of the whole run.
        steps: optimizer steps of the whole run.
    """

    def __init__(self, console: Console, *, label: str, epochs: int, steps: int) -> None:
        self.console = console
        self.label = label
        self.epochs = epochs
        self.steps = steps
        self._drawn = 0.0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
            MofNCompleteColumn(),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task(label, total=steps)
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def step(self, reading: Reading) -> None:
        """Show a step on the live bar, at most ten times a second; elsewhere nothing."""
        now = time.monotonic()
        if self._live and (now - self._drawn >= 0.1 or reading.step == self.steps):
            self._drawn = now
            self._bar.update(self._task, completed=reading.step, description=self._place(reading))
            self._live.update(
                Group(self._bar, Text(str(reading), overflow="ellipsis", no_wrap=True)), refresh=True
            )

    def epoch(self, reading: Reading) -> None:
        """Note the end of an epoch: on a terminal the bar moves, elsewhere a line is written."""
        self.step(reading)
        if not self._live:
            line = f"{self._place(reading)} · step {reading.step}/{self.steps} · {reading}"
            self.console.print(line, soft_wrap=True, highlight=False)

    def _place(self, reading: Reading) -> str:
        return f"{self.label} · epoch {reading.epoch}/{self.epochs}"


def clock(seconds: float) -> str:
    """Write a duration as minutes and seconds, with hours and days where there are any.

    Example:
        >>> clock(72.4), clock(3600 * 30 + 61)
        ('1:12', '1d 6:01:01')
    """
    whole = max(0, round(seconds))
    days, rest = divmod(whole, 86_400)
    hours, rest = divmod(rest, 3600)
    minutes, second = divmod(rest, 60)
    text = f"{hours}:{minutes:02d}:{second:02d}" if days or hours else f"{minutes}:{second:02d}"
    return f"{days}d {text}" if days else text
