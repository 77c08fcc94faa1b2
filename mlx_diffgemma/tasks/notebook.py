"""A draft as HTML: notebooks show its tokens coloured as a terminal does."""

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

# Colours of accepted tokens by entropy, in nats: the first whose bound is not exceeded.
COLOURS = ((0.1, "green"), (1.0, "yellow"), (float("inf"), "red"))

# The same for pages, where they are read on white and on black.
_CSS = {"green": "#1f9d3f", "yellow": "#b58900", "red": "#d83a34"}

_NOISE = "opacity:.45"


def colour_of(entropy: float) -> str:
    """How an accepted token is coloured."""
    return next(colour for bound, colour in COLOURS if entropy <= bound)


@dataclass(frozen=True)
class Cell:
    """A token of a draft: its text, whether it is accepted, how sure the model is of it."""

    text: str
    accepted: bool
    entropy: float
    probability: float


def html_of(cells: Iterable[Cell], folded: int, caption: str) -> str:
    """The answer on the canvas, a span a token, and a line below it.

    Of thoughts and tool calls only the number of their tokens is told, `folded`.
    """
    told = f'<i style="{_NOISE}">[thoughts and calls: {folded} tokens]</i>\n' if folded else ""
    return (
        f'<pre style="white-space:pre-wrap">{told}{"".join(map(_span, cells))}\n'
        f'<span style="color:#1a8f9c">{escape(caption)}</span></pre>'
    )


def _span(cell: Cell) -> str:
    style = f"font-weight:bold;color:{_CSS[colour_of(cell.entropy)]}" if cell.accepted else _NOISE
    return f'<span style="{style}" title="{cell.probability:.0%}">{escape(cell.text)}</span>'
