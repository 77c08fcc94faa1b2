"""Texts that commands are given: as they stand, from a file or from stdin.

All commands read an argument alike: `@NAME` is the text of a file, `-` is stdin, `@@` begins a text
with an @, and anything else is the text itself. `fill` and `edit`, which are about files, take the
name of a file without @ too.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from ..files import is_text, read_text
from .terminal import fail, say


@dataclass(frozen=True)
class Source:
    """A text and where it is from: `path` is its file, `name` is for messages."""

    text: str
    name: str
    path: Path | None = None


def source_of(given: str, what: str, *, text: bool) -> Source:
    """What an argument stands for; without @ a text if `text` says so, else a file's name.

    Raises:
        Error: the file cannot be read, or is not UTF-8.
        SystemExit: it is no text, or stdin is closed.
    """
    if given == "-":
        return Source(_read_stdin(what), "stdin")
    if given.startswith("@@"):
        return Source(_whole(given[1:], what), "text")
    if given.startswith("@") or not text:
        name = given.removeprefix("@")
        if not name:
            fail(f"{what} is empty, or names no file", code=2)
        path = Path(os.path.expanduser(name))  # Path's own raises where there is no such user
        return Source(read_text(path), str(path), path)
    return Source(_whole(given, what), "text")


def text_of(given: str, what: str) -> str:
    """A text that an argument or option stands for, without the newline that ends a file."""
    source = source_of(given, what, text=True)
    return source.text if source.name == "text" else source.text.rstrip("\n")


def optional_text(given: str | None, what: str) -> str | None:
    """As `text_of`, where there may be none."""
    return None if given is None else text_of(given, what)


def _read_stdin(what: str) -> str:
    if not sys.stdin:  # the shell has closed it
        fail(f"{what} is to be read from stdin, which is closed")
    if sys.stdin.isatty():
        say(f"Reading {what} from the terminal; end it with Ctrl-D.")
    try:
        return _whole(sys.stdin.read(), what)
    except UnicodeDecodeError:
        fail(f"{what} is not UTF-8 text")


def _whole(text: str, what: str) -> str:
    """The text, unless bytes of the command line or of stdin were none."""
    if not is_text(text):
        fail(f"{what} is not UTF-8 text")
    return text
