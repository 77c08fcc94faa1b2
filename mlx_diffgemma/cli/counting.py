"""How far long work has come, and how long it will still take: a bar, or lines now and then."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .terminal import say

# Seconds between two lines where there is no terminal to draw a bar on.
BETWEEN_LINES = 10.0


class Counter:
    """Counts what is done of `total` pieces of work that take about equally long."""

    def __init__(self, what: str, total: int, progress: Progress | None, *, quiet: bool):
        self._what, self._total, self._quiet = what, total, quiet
        self._progress = progress
        self._task = progress.add_task(what, total=total) if progress else None
        self._done = 0
        self._begun = self._told = time.monotonic()

    def advance(self) -> None:
        """Count one more."""
        self._done += 1
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task)
            return
        now = time.monotonic()
        if not self._quiet and now - self._told >= BETWEEN_LINES:
            self._told = now
            left = (now - self._begun) / self._done * (self._total - self._done)
            say(f"{self._done} of {self._total} {self._what}, about {spoken(left)} left")

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """While open, no bar is drawn: rich would send what is printed to stderr, above it."""
        if self._progress is None:
            yield
            return
        self._progress.stop()
        yield
        self._progress.start()


@contextmanager
def counting(what: str, total: int, *, quiet: bool) -> Iterator[Counter]:
    """A counter whose bar is on stderr, if that is a terminal, and gone in the end."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield Counter(what, total, None, quiet=quiet)
        return
    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        yield Counter(what, total, progress, quiet=quiet)


def spoken(seconds: float) -> str:
    """A time as a sentence says it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
