"""What a terminal shows while a canvas is denoised. Strings in, nothing of MLX."""

import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
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
from .keyboard import in_foreground, silenced
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

# What is longer than a row is cut, so that a line takes one row whatever a terminal thinks of the
# widths of its characters.
NO_WRAP, WRAP = "\x1b[?7l", "\x1b[?7h"

ERASE_BELOW = "\r\x1b[J"


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


def descriptor_of(console: Console) -> int | None:
    """The descriptor of a console's terminal; None where it only looks like one, as in tests."""
    try:
        return console.file.fileno()
    except OSError:
        return None


class Frame:
    """Lines at the bottom of a terminal that are redrawn in place; `erase` leaves no trace.

    Between frames the cursor stands where the first line begins: terminals keep it there when the
    window changes and they rewrap their lines, or do not, so no rows are counted. Rich's own `Live`
    counts the rows as they were drawn, and leaves some behind. A frame takes half of the window at
    most: the lines of one that becomes narrower must not scroll away, where nothing erases them.
    One write a frame, so nothing flickers. Drawing happens on the caller's thread: no timer runs
    beside MLX.
    """

    def __init__(self, console: Console):
        self._console = console
        self._descriptor = descriptor_of(console)
        self._drawn = False

    def draw(self, content: Styled) -> None:
        """Put these lines in the place of the last ones; the lowest that fit are shown.

        Nothing is drawn in the background, where it would stand amid what another process shows.
        """
        if self._descriptor is not None and not in_foreground(self._descriptor):
            return
        size = self._console.size
        lines = content.wrap(self._console, size.width)[-max(1, size.height // 2) :]
        with self._console.capture() as drawn:
            self._console.print(Styled("\n").join(lines), end="", soft_wrap=True)
        up = f"\x1b[{len(lines) - 1}A" if len(lines) > 1 else ""
        self._drawn = True
        self._write(
            f"{BEGIN_FRAME}{HIDE_CURSOR}{NO_WRAP}{ERASE_BELOW}{drawn.get()}\r{up}{WRAP}{END_FRAME}"
        )

    def erase(self) -> None:
        """Remove the lines from the screen; the cursor stands where they began."""
        if self._drawn:
            self._write(f"{ERASE_BELOW}{SHOW_CURSOR}")
            self._drawn = False

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
        live: draw drafts in place, where the console can. Nothing that is typed is echoed then.
        rendered: show Markdown as it is meant, where drafts are drawn and stdout is a terminal.
    """

    def __init__(self, console: Console, out: TextIO, *, live: bool, rendered: bool = False):
        self._console = console
        self._out = out
        self._frame = Frame(console) if live and can_draw(console) else None
        # Text on stdout shares the screen with the frame only if it goes to a terminal too.
        self._shared = self._frame is not None and out.isatty()
        self._rendered = rendered and self._shared
        self._held = ""
        self._open = False  # the last line printed does not end yet
        self._begun = False  # a block of Markdown was shown
        self._notes: list[str] = []
        self._started = time.perf_counter()
        self._silence = ExitStack()

    @property
    def live(self) -> bool:
        """Whether drafts are drawn."""
        return self._frame is not None

    def __enter__(self) -> "Screen":
        if self._frame is not None:
            self._silence.enter_context(silenced(descriptor_of(self._console)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._silence:
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

    def step(self, draft: Draft) -> None:
        """Draw how far a step got, without its canvas."""
        self._line(progress(draft))

    def reading(self, done: int, total: int) -> None:
        """Draw how far a long prompt has been read."""
        self._line(f"read {done} of {total} tokens")

    def _line(self, line: str) -> None:
        if self._frame is not None:
            end = "\n" if self._held else ""
            self._frame.draw(Styled(f"{self._held}{end}").append(line, style="cyan"))

    def text(self, text: str) -> None:
        """Print text that is final."""
        if not self._shared:
            self._print(text)
            return
        self._held += visible(text)
        if self._rendered:
            from . import markdown

            complete, rest = markdown.complete(self._held)
        else:
            complete, newline, rest = self._held.rpartition("\n")
            complete += newline
        self._final(complete, rest)

    def note(self, line: str) -> None:
        """Say something on stderr, once the answer is complete: it would tear a line apart."""
        self._notes.append(line)

    def end(self) -> None:
        """The answer is complete: its line ends, even if it is empty."""
        self._flush()
        if self._open or not self._rendered:
            self._print("\n")

    def _flush(self) -> None:
        self._final(self._held, "")

    def _final(self, complete: str, rest: str) -> None:
        """Print what changes no more, and hold the rest."""
        self._held = rest
        if self._frame is not None:
            self._frame.erase()
        if not self._rendered:
            self._print(complete)
        elif complete.strip():
            from . import markdown

            if self._begun:
                self._print("\n")
            markdown.show(complete, Console(file=self._out, highlight=False))
            self._begun = True

    def _print(self, text: str) -> None:
        if text:
            write(text, self._out)
            self._open = not text.endswith("\n")


def watch(
    events: Iterator[Item], tokenizer: Tokenizer, *, live: bool, lines: bool
) -> Generator[Item, None, None]:
    """Pass events on while showing drafts on stderr.

    `live` redraws the canvas in place on a terminal; `lines` prints a line a step elsewhere. Drafts
    are passed on after they are shown, all else when no canvas is on the screen.
    """
    console = Console(stderr=True, highlight=False)
    drawing = live and can_draw(console)
    frame = Frame(console)
    with silenced(descriptor_of(console) if drawing else None):
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
        (style_of(accepted, settled, entropy), piece)
        for accepted, settled, entropy, visible, piece in zip(
            draft.accepted[: draft.end],
            draft.settled,
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


def style_of(accepted: bool, settled: bool, entropy: float) -> str:
    """How a token is drawn: noise is dim, what is accepted bold, and what is settled is quiet."""
    if not accepted:
        return "dim"
    return colour_of(entropy) if settled else f"bold {colour_of(entropy)}"


def progress(draft: Draft, seconds: float | None = None) -> str:
    """One line on how far a step got; with `seconds` since the question, at what rate."""
    line = (
        f"canvas {draft.canvas + 1}, step {draft.step}/{draft.steps}, "
        f"{sum(draft.accepted)}/{len(draft.accepted)} accepted"
    )
    steps = draft.step - draft.first_step + 1
    share = draft.decoded / (steps * len(draft.accepted))
    if share < 1:
        line += f", {share:.0%} decoded"
    if not seconds:
        return line
    tokens = draft.canvas * len(draft.accepted) + sum(draft.accepted)
    return f"{line}, {tokens / seconds:.0f} tokens/s"


def summary(done: Done) -> str:
    """One line of statistics."""
    cached = f" ({done.cached_tokens} of them cached)" if done.cached_tokens else ""
    likely = ""
    if done.mean_log_probability is not None and done.least_log_probability is not None:
        likely = f"log-probability of a token {done.mean_log_probability:.3f} in the mean and "
        likely += f"{done.least_log_probability:.3f} at least; "
    return (
        f"{done.prompt_tokens} prompt tokens{cached} in {done.prompt_seconds:.2f} s; "
        f"{done.generated_tokens} tokens in {done.generation_seconds:.2f} s, "
        f"{done.canvases} canvas{'es' if done.canvases > 1 else ''}, "
        f"{done.denoising_steps} steps: {done.tokens_per_forward:.1f} tokens per forward pass, "
        f"{done.positions_per_token:.1f} positions per token, "
        f"{done.tokens_per_second:.1f} tokens/s; peak memory {done.peak_memory / 1e9:.2f} GB; "
        f"{likely}finished: {done.finish_reason.replace('_', ' ')}"
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
        ("positions per token", "", lambda r: r.median.positions_per_token),
        ("peak memory", "GB", lambda r: r.median.peak_memory / 1e9),
    ]
    for name, unit, number in rows:
        values = [number(report) for report in reports]
        # Three digits, but no exponents: 1,710 and 0.0632.
        shown = [f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in values]
        shown = [f"{value} {unit}".strip() for value in shown]
        ratio = f"{values[-1] / values[0]:.2f}" if values[0] else ""
        table.add_row(name, *shown, *[ratio] * (len(values) == 2))
    return table
