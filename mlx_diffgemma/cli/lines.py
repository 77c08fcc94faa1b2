"""Messages as they are typed: how a prompt is asked for them, and what a message is."""

import sys
import termios
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from select import select
from typing import Protocol

from ..distributed.launch import place

BLOCK = '"""'

# What a command takes: words of which one is meant, or what is on the disk.
FILES, DIRECTORIES = "files", "directories"
Arguments = Mapping[str, Sequence[str]]


class Lines(Protocol):
    """Where messages come from."""

    def read(self, text: str = "") -> str:
        """A message, of which `text` stands in the prompt already.

        Raises:
            EOFError: there are no more.
            KeyboardInterrupt: by Ctrl-C.
        """

    def ask(self, question: str) -> str:
        """What answers a question; what was typed before it was asked does not."""

    def ahead(self) -> AbstractContextManager[Callable[[], None]]:
        """While open, nothing typed is echoed; what is given takes it for the next `read`."""

    def aside(self) -> AbstractContextManager[None]:
        """While open, the terminal is as other programs expect it."""


class Plain:
    """Lines from a pipe, or from a terminal that can do nothing."""

    def __init__(self) -> None:
        self._terminal = sys.stdin.isatty()

    def read(self, text: str = "") -> str:
        """A line, with those that it goes on over, or that were pasted with it."""
        apart = self._waiting()  # typed ahead, one after another
        lines = self._line("> ")
        while (more := open_ended(lines)) or (not apart and self._waiting()):
            try:
                line = self._line(". " if more else "")
            except EOFError:
                break
            lines = f"{continued(lines)}\n{line}"
        return lines if lines.strip() else text

    def ask(self, question: str) -> str:
        """A line from the terminal; nothing from a pipe, where nobody is asked."""
        if not self._terminal:
            return ""
        with suppress(termios.error):
            termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)
        return self._line(question)

    def ahead(self) -> AbstractContextManager[Callable[[], None]]:
        """Nothing is drawn here, so nothing is kept from the screen."""
        return nullcontext(lambda: None)

    def aside(self) -> AbstractContextManager[None]:
        """Nothing was changed."""
        return nullcontext()

    def _line(self, prompt: str) -> str:
        try:
            return input(prompt if self._terminal else "")
        except KeyboardInterrupt:
            print(file=sys.stderr)  # the terminal wrote ^C
            raise

    def _waiting(self) -> bool:
        return self._terminal and bool(select([sys.stdin], [], [], 0)[0])


def deaf() -> bool:
    """Whether nothing can be typed any more after Ctrl-C: it ends what `mlx.launch` passes on."""
    return place().size > 1 and not sys.stdin.isatty()


def echoes() -> bool:
    """Whether what is typed shows. Through ssh, `mlx.launch` has a terminal that does not show it:
    what arrives are lines, which somebody has edited elsewhere."""
    try:
        return bool(termios.tcgetattr(sys.stdin.fileno())[3] & termios.ECHO)
    except termios.error:
        return False


def messages(lines: Lines) -> Iterator[str]:
    """Messages that are not empty, until the end of input or two Ctrl-C."""
    warned = False
    while True:
        try:
            line = lines.read()
        except EOFError:
            return
        except KeyboardInterrupt:
            if warned or deaf():
                return
            warned = True
            print("Ctrl-C again, /quit or Ctrl-D leaves.", file=sys.stderr, flush=True)
            continue
        warned = False
        if line.strip():
            yield line


def open_ended(text: str) -> bool:
    """Whether a message goes on after this line: behind a backslash, or in a block."""
    block = text.lstrip().startswith(BLOCK) and text.count(BLOCK) % 2 == 1
    return block or text.rstrip().endswith("\\")


def continued(text: str) -> str:
    """A line that goes on, without the backslash that says so."""
    return text.rstrip().removesuffix("\\") if text.rstrip().endswith("\\") else text


def message_in(text: str) -> str | None:
    """The message in what was typed; None where that is a command.

    A block, a second slash or a space before it make a message of what begins with a slash.
    """
    block = text.strip()
    if block.startswith(BLOCK) and block.count(BLOCK) <= 2:
        return block.removeprefix(BLOCK).removesuffix(BLOCK).strip()
    if text.startswith("//"):
        return text[1:].strip()
    if text.startswith("/"):
        return None
    return text.rstrip().lstrip("\n") if "\n" in block else block
