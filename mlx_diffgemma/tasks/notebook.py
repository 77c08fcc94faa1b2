"""A draft as HTML: notebooks show its tokens coloured as a terminal does."""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .request import Draft

# Colours of accepted tokens by entropy, in nats: the first whose bound is not exceeded.
COLOURS = ((0.1, "green"), (1.0, "yellow"), (float("inf"), "red"))

# The same for pages, where they are read on white and on black.
_CSS = {"green": "#1f9d3f", "yellow": "#b58900", "red": "#d83a34"}

_NOISE = "opacity:.45"


def colour_of(entropy: float) -> str:
    """How an accepted token is coloured."""
    return next(colour for bound, colour in COLOURS if entropy <= bound)


def html_of(draft: "Draft", pieces: Sequence[str]) -> str:
    """The answer on the canvas, a span a token, then a line of progress; `pieces` are texts of
    tokens. Thoughts and tool calls are folded to a count."""
    shown = [i for i in range(draft.end) if draft.visible[i]]
    hidden = draft.end - len(shown)
    folded = f'<i style="{_NOISE}">[thoughts and calls: {hidden} tokens]</i>\n' if hidden else ""
    return (
        f'<pre style="white-space:pre-wrap">{folded}'
        f"{''.join(_span(draft, i, pieces[i]) for i in shown)}\n"
        f'<span style="color:#1a8f9c">canvas {draft.canvas + 1}, step {draft.step}/{draft.steps}, '
        f"{sum(draft.accepted)}/{len(draft.accepted)} accepted</span></pre>"
    )


def _span(draft: "Draft", at: int, piece: str) -> str:
    style = _NOISE
    if draft.accepted[at]:
        style = f"font-weight:bold;color:{_CSS[colour_of(draft.entropies[at])]}"
    return f'<span style="{style}" title="{draft.probabilities[at]:.0%}">{escape(piece)}</span>'
