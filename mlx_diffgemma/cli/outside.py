"""What a chat takes from outside and gives to it: an editor, texts of files, the clipboard."""

import base64
import os
import shlex
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from ..errors import Error
from ..files import read_text

# Bytes of a text that becomes part of a message: more than any context holds.
MOST_FILE = 4_000_000

# Bytes that are sent to a terminal for its clipboard: many take no more, and drop all of it.
MOST_COPIED = 74_994

CLIPBOARDS = {
    "pbcopy": ("", ["pbcopy"]),
    "wl-copy": ("WAYLAND_DISPLAY", ["wl-copy"]),
    "xclip": ("DISPLAY", ["xclip", "-selection", "clipboard"]),
}

COPY_SECONDS = 5


def given_path(text: str) -> Path:
    """A file name as a shell would read it: quotes, ~."""
    with suppress(ValueError):
        text = " ".join(shlex.split(text))
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~nobody
        return Path(text)


def text_of_file(path: Path) -> str:
    """A file's text.

    Raises:
        Error: it is no file, too long or no text.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        raise Error(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from None
    if not stat.S_ISREG(found.st_mode):  # a pipe or a device may never end
        raise Error(f"{path} is not a file")
    if found.st_size > MOST_FILE:
        raise Error(f"{path} has more than {MOST_FILE:,} bytes")
    return read_text(path)


def with_files(files: list[tuple[str, str]], message: str) -> str:
    """A message behind texts, each with its name and between fences that it does not hold."""
    parts = []
    for name, text in files:
        fence = "```"
        while fence in text:
            fence += "`"
        parts.append(f"{name}:\n{fence}\n{text.rstrip()}\n{fence}\n\n")
    return "".join(parts) + message


def edited(text: str) -> str:
    """What the user made of a text in an editor: $VISUAL, $EDITOR or vi.

    Raises:
        Error: it cannot be started or says that it failed.
    """
    command = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    with TemporaryDirectory() as directory, _deaf():
        file = Path(directory) / "message.md"
        file.write_text(text, encoding="utf-8", errors="replace", newline="")
        try:
            code = subprocess.run([*shlex.split(command), str(file)]).returncode
        except OSError as error:
            raise Error(f"the editor {command} cannot be started: {error.strerror}") from None
        except ValueError:
            raise Error(f"the editor {command} is no command") from None
        if code:
            raise Error(f"the editor {command} ended with {code}; nothing has changed")
        return text_of_file(file).rstrip("\n")


@contextmanager
def _deaf() -> Iterator[None]:
    """Ctrl-C is the editor's; an ignored signal would be ignored by it, too."""
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def copied(text: str, screen: IO[str]) -> str:
    """Put a text into the clipboard: by a command of this machine, or by the terminal (OSC 52).

    Over ssh only the terminal knows the clipboard that is meant.

    Returns:
        How it went, for the user.

    Raises:
        Error: there is no way.
    """
    size = f"{len(text):,} characters"
    if "SSH_CONNECTION" not in os.environ:
        for name, (needed, command) in CLIPBOARDS.items():
            if (
                shutil.which(name)
                and (not needed or os.environ.get(needed))
                and _given(command, text)
            ):
                return f"Copied {size} with {name}."
    data = base64.b64encode(text.encode(errors="replace"))
    if not screen.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        raise Error("no clipboard: neither pbcopy, wl-copy nor xclip, nor a terminal that has one")
    if len(data) > MOST_COPIED:
        raise Error(f"{size} are too many for a terminal's clipboard")
    screen.write(f"\x1b]52;c;{data.decode()}\x07")
    screen.flush()
    return f"Sent {size} to the terminal's clipboard (OSC 52, which some refuse)."


def _given(command: list[str], text: str) -> bool:
    # It goes on in the background as the clipboard's owner: a pipe from it would never end.
    nothing, data = subprocess.DEVNULL, text.encode(errors="replace")
    try:
        done = subprocess.run(
            command,
            input=data,
            stdout=nothing,
            stderr=nothing,
            timeout=COPY_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return not done.returncode
