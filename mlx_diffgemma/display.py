"""What a terminal shows while a canvas is denoised. Strings in, nothing of MLX."""

from collections.abc import Sequence
from itertools import groupby
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text as Styled

from .generation import Done, Draft


class LiveCanvas:
    """Draws a canvas in place, step by step; `erase` leaves no trace of it.

    Nothing is drawn where the console is not a terminal. Drawing happens in `show`, on the
    caller's thread: no timer runs beside MLX.
    """

    def __init__(self, console: Console):
        self._console = console
        self._live: Live | None = None

    def __enter__(self) -> "LiveCanvas":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.erase()

    def show(self, draft: Draft, pieces: Sequence[str]) -> None:
        """Redraw with this step; `pieces` holds the text of each canvas token."""
        if not self._console.is_terminal or self._console.is_dumb_terminal:
            return
        if self._live is None:
            self._live = Live(
                console=self._console, transient=True, auto_refresh=False, vertical_overflow="crop"
            )
            self._live.start()
        self._live.update(draw(draft, pieces), refresh=True)

    def erase(self) -> None:
        """Remove the canvas from the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def draw(draft: Draft, pieces: Sequence[str]) -> Styled:
    """The canvas up to its end token: accepted tokens bright, the rest dim, then a step count."""
    drawn = Styled()
    shown = zip(draft.accepted[: draft.end], pieces, strict=False)
    for accepted, run in groupby(shown, key=lambda pair: pair[0]):
        text = "".join(piece for _, piece in run)
        drawn.append(text, style="bold" if accepted else "dim")
    drawn.append(f"\n{progress(draft)}", style="cyan")
    return drawn


def progress(draft: Draft) -> str:
    """One line on how far a step got."""
    return (
        f"canvas {draft.canvas + 1}, step {draft.step}/{draft.steps}, "
        f"{sum(draft.accepted)}/{len(draft.accepted)} accepted"
    )


def summary(done: Done) -> str:
    """One line of statistics."""
    return (
        f"{done.prompt_tokens} prompt tokens in {done.prompt_seconds:.2f} s; "
        f"{done.generated_tokens} tokens in {done.generation_seconds:.2f} s, "
        f"{done.canvases} canvas{'es' if done.canvases > 1 else ''}, "
        f"{done.denoising_steps} steps: {done.tokens_per_forward:.1f} tokens per forward pass, "
        f"{done.tokens_per_second:.1f} tokens/s; peak memory {done.peak_memory / 1e9:.2f} GB; "
        f"finished: {done.finish_reason.replace('_', ' ')}"
    )
