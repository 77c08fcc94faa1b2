"""Where text of others meets a terminal: none of it may move the cursor or write the clipboard.

What goes to a file or a pipe stays as it is. Answers go to stdout, everything else to stderr.
"""

import json
import re
import sys
from typing import NoReturn, TextIO

# Control characters but newline and tab, what turns the direction of writing around, and halves of
# characters, which no terminal can be sent.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Text in which characters that a terminal would obey are spelled out, as `\\x1b`."""
    return _CONTROL.sub(lambda found: _escaped(found[0]), text)


def quoted(value: object) -> str:
    """A JSON value in one line, as something to agree to is shown.

    Nothing in it is invisible: widthless characters and odd spaces are spelled out too.
    """
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def write(text: str, stream: TextIO) -> None:
    """Text to a stream at once: as it is, or visible where the stream is a terminal."""
    stream.write(visible(text) if stream.isatty() else text)
    stream.flush()


def put(text: str, end: str = "\n") -> None:
    """Write part of the answer, to stdout."""
    write(text + end, sys.stdout)


def say(*lines: str) -> None:
    """Write lines to stderr."""
    write("\n".join(lines) + "\n", sys.stderr)


def fail(sentence: str, code: int = 1) -> NoReturn:
    """End with an expected failure: one sentence, no traceback."""
    say(f"error: {sentence}")
    raise SystemExit(code)


def _escaped(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
