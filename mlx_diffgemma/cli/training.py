"""How a run of fine-tuning looks: a bar and lines on a terminal, lines alone elsewhere."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from .counting import spoken
from .terminal import say, visible

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from ..training.events import Event, Trained, Validated


@contextmanager
def interruptible(told: str) -> Iterator[Callable[[], bool]]:
    """Tells whether Ctrl-C was pressed, which does not end anything by itself; the second does.

    `told` is said at the first. A request to terminate counts as well.
    """
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        with suppress(OSError):  # not by way of a stream, in which this may be amid a line
            os.write(2, f"\n{told}\n".encode())

    before = {number: signal.signal(number, press) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: pressed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def waiting(what: str, *, quiet: bool) -> Iterator[None]:
    """Say on a terminal what takes its time, while it does."""
    from rich.console import Console

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield
        return
    with console.status(what):
        yield


class Display:
    """Shows events on stderr; `total` are all iterations."""

    def __init__(self, folder: Path, total: int, bars: "Progress | None", quiet: bool):
        self._folder, self._total, self._quiet = folder, total, quiet
        self._bars = bars
        self._task: TaskID | None = None
        self._measuring: TaskID | None = None
        self._first: tuple[int, float] | None = None  # iteration, and when it was over

    def __call__(self, event: "Event") -> None:
        """Show an event."""
        from ..training import events as told

        match event:
            case told.Started():
                went = f", {event.iteration} of them done" if event.iteration else ""
                self._say(
                    f"{event.parameters:,} parameters are trained on {event.examples:,} examples "
                    f"in {event.iters:,} iterations{went}"
                )
            case told.Stepped():
                self._step(event.iteration)
            case told.Measuring():
                self._measure(event.what, event.done, event.total)
            case told.Trained():
                self._say(self._report(event))
            case told.Validated():
                self._say(f"{_place(event.iteration, event.of)}: {losses(event)}")
            case told.Succeeded():
                self._say(
                    f"{_place(event.iteration, event.of)}: {event.right} of {event.cases} answers "
                    f"are exactly right ({spoken(event.seconds)})"
                )
            case told.Saved(best=True):
                self._say(f"{self._folder / event.file} has iteration {event.iteration} now")
            case told.Saved():
                self._say(f"{self._folder / event.file} is written")

    def _report(self, event: "Trained") -> str:
        from rich.filesize import decimal

        return (
            f"iteration {event.iteration} of {self._total}: loss {event.loss:.3f} (denoising "
            f"{event.denoising:.3f}, reading {event.reading:.3f}), learning rate "
            f"{event.learning_rate:.2e}, {event.tokens_per_second:.0f} tokens/s, "
            f"{decimal(event.peak_memory)}{self._left(event.iteration)}"
        )

    def _step(self, iteration: int) -> None:
        if self._first is None:
            self._first = iteration, time.monotonic()
        if self._bars is None:
            return
        if self._task is None:
            self._task = self._bars.add_task("training", total=self._total)
        self._bars.update(self._task, completed=iteration)

    def _left(self, iteration: int) -> str:
        """How long the rest takes, measurements included, once that is known."""
        assert self._first is not None
        first, began = self._first
        if iteration in (first, self._total):
            return ""
        seconds = (time.monotonic() - began) / (iteration - first) * (self._total - iteration)
        return f", {spoken(seconds)} left"

    def _measure(self, what: str, done: int, total: int) -> None:
        """A bar of its own for what is measured, while it is."""
        if self._bars is None:
            return
        if self._measuring is None:
            self._measuring = self._bars.add_task(f"measuring {what}", total=total)
        self._bars.update(self._measuring, completed=done)
        if done == total:
            self._bars.remove_task(self._measuring)
            self._measuring = None

    def _say(self, line: str) -> None:
        if self._quiet:
            return
        if self._bars is None:
            say(line)
            return
        from rich.text import Text

        self._bars.console.print(Text(visible(line)))


@contextmanager
def displaying(folder: Path, total: int, *, quiet: bool) -> Iterator[Display]:
    """A display whose bar is gone in the end."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Left

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield Display(folder, total, None, quiet)
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Left()
    with Progress(*columns, console=console, transient=True) as bars:
        yield Display(folder, total, bars, quiet)


def losses(event: "Validated") -> str:
    """Losses by how much of the canvas is noise."""
    from ..training.events import LEVELS

    parts = [f"{level:.0%} {each:.3f}" for level, each in zip(LEVELS, event.denoising, strict=True)]
    return (
        f"loss {event.loss:.3f} (by noise {', '.join(parts)}), reading {event.reading:.3f} "
        f"({spoken(event.seconds)})"
    )


def _place(iteration: int, of: str) -> str:
    return "test" if of == "test" else f"iteration {iteration}, validation"
