"""How far a conversion is: bars on a terminal, now and then a line elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from .terminal import say, visible

if TYPE_CHECKING:
    from rich.console import Console

    from ..convert import Fetched, Written

# Seconds until the first line, and between lines.
FIRST_LINE, NEXT_LINE = 2.0, 10.0


class Progress(Protocol):
    """Is told of each slice that was fetched or converted."""

    def __call__(self, event: "Fetched | Written") -> None: ...


@contextmanager
def progress(what: str) -> Iterator[Progress]:
    """Show progress on stderr; `what` is looked at until there is any."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines()
        return
    with console.status(Text(visible(f"reading the headers of {what}"))) as status:
        bars = Bars(console)
        try:

            def show(event: "Fetched | Written") -> None:
                status.stop()
                bars(event)

            yield show
        finally:
            bars.stop()


class Bars:
    """A bar for what is fetched, if anything is, and one for what is converted."""

    def __init__(self, console: "Console"):
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn()
        self._bars = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
        self._tasks: dict[str, int] = {}

    def __call__(self, event: "Fetched | Written") -> None:
        name = _doing(event)
        if name not in self._tasks:
            self._bars.start()
            self._tasks[name] = self._bars.add_task(name, total=event.bytes_total)
        self._bars.update(self._tasks[name], completed=event.bytes_done)  # type: ignore[arg-type]

    def stop(self) -> None:
        self._bars.stop()


class Lines:
    """A line of both now and then, for logs."""

    def __init__(self) -> None:
        self._next = time.monotonic() + FIRST_LINE
        self._done: dict[str, str] = {}

    def __call__(self, event: "Fetched | Written") -> None:
        from rich.filesize import decimal

        done, total = decimal(event.bytes_done), decimal(event.bytes_total)
        self._done[_doing(event)] = f"{_doing(event)} {done} of {total}"
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + NEXT_LINE
            say(", ".join(self._done.values()))


def _doing(event: "Fetched | Written") -> str:
    from ..convert import Fetched

    return "fetching" if isinstance(event, Fetched) else "converting"
