"""Answers as Markdown on a terminal, block by block as they become final."""

from collections.abc import Iterable, Iterator

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console
from rich.markdown import Markdown
from rich.segment import Segment

from .terminal import visible

# Of a narrower window, tables and quotes would leave nothing.
NARROWEST = 20


def complete(text: str) -> tuple[str, str]:
    """The blocks that nothing can change any more, and the rest: the last one may go on."""
    blocks = [token for token in _parsed(text) if token.level == 0 and token.map]
    if len(blocks) < 2:
        return "", text
    assert blocks[-1].map is not None
    lines = text.split("\n")
    at = blocks[-1].map[0]
    return "\n".join(lines[:at]) + "\n", "\n".join(lines[at:])


def show(text: str, console: Console) -> None:
    """Print Markdown; in it nothing moves the cursor.

    HTML is text, and lines end where the model ended them.
    """
    if console.width < NARROWEST:
        console.print(visible(text), markup=False, emoji=False, highlight=False, soft_wrap=True)
        return
    # Links are written out: a name might hide where they go. Of the colours, the terminal's own.
    shown = Markdown("", hyperlinks=False, code_theme="ansi_dark")
    shown.parsed = _parsed(visible(text))
    lines = Segment.split_lines(console.render(shown, console.options))
    console.print(_Lines(lines), end="", soft_wrap=True)


class _Lines:
    """Lines as they were made, but for blanks at their ends, which narrower windows would wrap."""

    def __init__(self, lines: Iterable[list[Segment]]):
        self._lines = lines

    def __rich_console__(self, console: Console, options: object) -> Iterator[Segment]:
        for line in self._lines:
            shown = [
                # An entity of Markdown may name any character.
                Segment(visible(segment.text), segment.style)
                for segment in line
                if not segment.control
            ]
            while shown and not shown[-1].text.strip(" "):
                shown.pop()
            if shown:
                yield from shown[:-1]
                yield Segment(shown[-1].text.rstrip(" "), shown[-1].style)
            yield Segment.line()


def _parsed(text: str) -> list[Token]:
    tokens = (
        MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).parse(text)
    )
    for token in tokens:
        for child in token.children or []:
            if child.type == "softbreak":
                child.type = "hardbreak"
    return tokens
