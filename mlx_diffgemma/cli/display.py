"""What a terminal shows while a canvas is denoised. Strings in, nothing of MLX."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text as Styled

from ..diffusion.guards import Guard
from ..tasks.notebook import colour_of
from ..tasks.request import Done, Draft, Item, Notice
from ..text.tokenizer import Tokenizer
from .terminal import say, visible, write

if TYPE_CHECKING:
    from ..measure.bench import Report


NOTICES: dict[Guard, str] = {
    "empty": "the answer would have been empty",
    "not_converged": "the canvas did not converge",
    "repetition": "the answer went round in circles: stopped",
    "thinking_budget": "enough thought: now the answer",
}

KEPT = "only what is certain is kept (--guards none keeps all)"

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"

# Terminals that know it draw what stands between at once; others ignore it.
BEGIN_FRAME, END_FRAME = "\x1b[?2026h", "\x1b[?2026l"

ERASE_BELOW = "\x1b[J"


def told(notice: Notice) -> str:
    """One line on what a guard did."""
    end = "tried again" if notice.again else KEPT if notice.guard == "not_converged" else ""
    return f"[{NOTICES[notice.guard]}{': ' * bool(end)}{end}]"


def tell(console: Console, line: str, style: str = "") -> None:
    """A line as it stands, whatever brackets, colons and escapes it holds."""
    shown = visible(line) if console.is_terminal else line
    console.print(Styled(shown, style=style), soft_wrap=True)


def can_draw(console: Console) -> bool:
    """Whether a canvas can be redrawn in place: a terminal, not a dumb one, and colours wanted."""
    plain = console.is_dumb_terminal or console.no_color or "NO_COLOR" in os.environ
    return console.is_terminal and not plain


def rows_of(widths: Sequence[int], columns: int) -> int:
    """Rows that lines of these widths take; terminals rewrap them when they become narrower."""
    return sum(max(1, -(-width // columns)) for width in widths)


class Frame:
    """Lines at the bottom of a terminal that are redrawn in place; `erase` leaves no trace.

    One write a frame, so nothing flickers. Rich's own `Live` counts the lines of a frame as they
    were drawn, and leaves some behind when the window has become narrower since. Drawing happens on
    the caller's thread: no timer runs beside MLX.
    """

    def __init__(self, console: Console):
        self._console = console
        self._widths: list[int] = []

    def draw(self, content: Styled) -> None:
        """Put these lines in the place of the last ones; the lowest that fit are shown."""
        size = self._console.size
        lines = content.wrap(self._console, size.width)[1 - size.height :]
        with self._console.capture() as drawn:
            self._console.print(Styled("\n").join(lines), end="", soft_wrap=True)
        self._write(f"{BEGIN_FRAME}{HIDE_CURSOR}{self._back()}{drawn.get()}{END_FRAME}")
        self._widths = [line.cell_len for line in lines]

    def erase(self) -> None:
        """Remove the lines from the screen; the cursor stands where they began."""
        if self._widths:
            self._write(f"{self._back()}{SHOW_CURSOR}")
            self._widths = []

    def _back(self) -> str:
        if not self._widths:
            return ""
        up = rows_of(self._widths, self._console.size.width) - 1
        return f"\r\x1b[{up}A{ERASE_BELOW}" if up else f"\r{ERASE_BELOW}"

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()


class Screen:
    """Where one answer appears: final text on stdout, drafts below it while they change.

    A line that is not complete stays in the frame: erasing it would take the frame's first row,
    which used to hold the end of the text before.

    Args:
        console: of stderr; drafts, notes and progress go there.
        out: stdout.
        live: draw drafts in place, where the console can.
    """

    def __init__(self, console: Console, out: TextIO, *, live: bool):
        self._console = console
        self._out = out
        self._frame = Frame(console) if live and can_draw(console) else None
        # Text on stdout shares the screen with the frame only if it goes to a terminal too.
        self._shared = out.isatty()
        self._held = ""
        self._open = False  # the last line printed does not end yet
        self._notes: list[str] = []
        self._started = time.perf_counter()

    @property
    def live(self) -> bool:
        """Whether drafts are drawn."""
        return self._frame is not None

    def __enter__(self) -> "Screen":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._flush()
        if self._open:
            self._print("\n")
        for line in self._notes:
            tell(self._console, line, "dim")

    def draft(self, draft: Draft, pieces: Sequence[str]) -> None:
        """Draw a step; `pieces` holds the text of each canvas token."""
        if self._frame is None:
            return
        seconds = time.perf_counter() - self._started
        self._frame.draw(Styled(self._held) + draw(draft, pieces, seconds))

    def reading(self, done: int, total: int) -> None:
        """Draw how far a long prompt has been read."""
        if self._frame is not None:
            self._frame.draw(Styled(f"read {done} of {total} tokens", style="cyan"))

    def text(self, text: str) -> None:
        """Print text that is final."""
        if self._frame is None or not self._shared:
            self._print(text)
            return
        complete, newline, rest = (self._held + visible(text)).rpartition("\n")
        self._frame.erase()
        self._print(complete + newline)
        self._held = rest

    def note(self, line: str) -> None:
        """Say something on stderr, once the answer is complete: it would tear a line apart."""
        self._notes.append(line)

    def end(self) -> None:
        """The answer is complete: its line ends, even if it is empty."""
        self._flush()
        self._print("\n")

    def _flush(self) -> None:
        if self._frame is not None:
            self._frame.erase()
        self._print(self._held)
        self._held = ""

    def _print(self, text: str) -> None:
        if text:
            write(text, self._out)
            self._open = not text.endswith("\n")


def watch(
    events: Iterator[Item], tokenizer: Tokenizer, *, live: bool, lines: bool
) -> Iterator[Item]:
    """Pass events on while showing drafts on stderr.

    `live` redraws the canvas in place on a terminal; `lines` prints a line a step elsewhere. Drafts
    are passed on after they are shown, all else when no canvas is on the screen.
    """
    console = Console(stderr=True, highlight=False)
    drawing = live and can_draw(console)
    frame = Frame(console)
    try:
        for event in events:
            if not isinstance(event, Draft):
                frame.erase()
            elif drawing:
                frame.draw(draw(event, tokenizer.pieces(event.tokens)))
            elif lines:
                say(f"{progress(event)} | {event.text!r}")
            yield event
    finally:
        frame.erase()


def draw(draft: Draft, pieces: Sequence[str], seconds: float | None = None) -> Styled:
    """The answer on the canvas, then a line of progress.

    Accepted tokens are bright, coloured by the model's confidence, noise is dim. Thoughts and tool
    calls are folded to a count.
    """
    drawn = Styled()
    hidden = draft.visible[: draft.end].count(False)
    if hidden:
        drawn.append(f"[thoughts and calls: {hidden} tokens]\n", style="dim italic")
    styles = [
        (style_of(accepted, entropy), piece)
        for accepted, entropy, visible, piece in zip(
            draft.accepted[: draft.end],
            draft.entropies,
            draft.visible,
            pieces,
            strict=False,
        )
        if visible
    ]
    for style, run in groupby(styles, key=lambda pair: pair[0]):
        drawn.append(visible("".join(piece for _, piece in run)), style=style)
    drawn.append(f"\n{progress(draft, seconds)}", style="cyan")
    return drawn


def style_of(accepted: bool, entropy: float) -> str:
    """How a token is drawn."""
    if not accepted:
        return "dim"
    return f"bold {colour_of(entropy)}"


def progress(draft: Draft, seconds: float | None = None) -> str:
    """One line on how far a step got; with `seconds` since the question, at what rate."""
    line = (
        f"canvas {draft.canvas + 1}, step {draft.step}/{draft.steps}, "
        f"{sum(draft.accepted)}/{len(draft.accepted)} accepted"
    )
    if not seconds:
        return line
    tokens = draft.canvas * len(draft.accepted) + sum(draft.accepted)
    return f"{line}, {tokens / seconds:.0f} tokens/s"


def summary(done: Done) -> str:
    """One line of statistics."""
    cached = f" ({done.cached_tokens} of them cached)" if done.cached_tokens else ""
    return (
        f"{done.prompt_tokens} prompt tokens{cached} in {done.prompt_seconds:.2f} s; "
        f"{done.generated_tokens} tokens in {done.generation_seconds:.2f} s, "
        f"{done.canvases} canvas{'es' if done.canvases > 1 else ''}, "
        f"{done.denoising_steps} steps: {done.tokens_per_forward:.1f} tokens per forward pass, "
        f"{done.tokens_per_second:.1f} tokens/s; peak memory {done.peak_memory / 1e9:.2f} GB; "
        f"finished: {done.finish_reason.replace('_', ' ')}"
    )


def bench_table(reports: "Sequence[Report]") -> Table:
    """A column for each checkpoint; of two, the second as a ratio to the first."""
    table = Table("")
    for name in (*(report.model for report in reports), *["ratio"] * (len(reports) == 2)):
        table.add_column(Styled(visible(name)), justify="right", overflow="fold")
    rows: list[tuple[str, str, Callable[[Report], float]]] = [
        ("load", "s", lambda r: r.load_seconds),
        ("load, peak memory", "GB", lambda r: r.load_peak_memory / 1e9),
        ("prefill", "tokens/s", lambda r: r.median.prefill_tokens_per_second),
        ("first draft", "s", lambda r: r.median.first_draft_seconds),
        ("step", "s", lambda r: r.median.step_seconds),
        ("canvas", "s", lambda r: r.median.canvas_seconds),
        ("end to end", "tokens/s", lambda r: r.median.tokens_per_second),
        ("steps per canvas", "", lambda r: r.median.steps_per_canvas),
        ("tokens per forward pass", "", lambda r: r.median.tokens_per_forward),
        ("peak memory", "GB", lambda r: r.median.peak_memory / 1e9),
    ]
    for name, unit, number in rows:
        values = [number(report) for report in reports]
        # Three digits, but no exponents: 1,710 and 0.0632.
        shown = [f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in values]
        shown = [f"{value} {unit}".strip() for value in shown]
        table.add_row(name, *shown, *[f"{values[-1] / values[0]:.2f}"] * (len(values) == 2))
    return table
