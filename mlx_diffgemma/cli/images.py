"""Pictures that commands are given: files, stdin, paths dropped into a chat, the clipboard."""

import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import unquote, urlsplit

import typer

from ..errors import Error
from .terminal import fail

if TYPE_CHECKING:
    from PIL import Image

# Names of files that a chat takes for pictures when a path is dropped into it.
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")

# How the path of a file begins that a terminal writes.
_BEGINS = ("/", "~/", "file://", '"', "'")


@dataclass(frozen=True)
class Pictures:
    """Pictures that stand before a prompt."""

    image: Annotated[
        list[str] | None,
        typer.Option(help="A picture before the prompt; - reads stdin. Can be given again."),
    ] = None
    image_tokens: Annotated[
        int | None,
        typer.Option(help="Most tokens of a picture: 70, 140, 280, 560 or 1120. [checkpoint's]"),
    ] = None

    def __post_init__(self) -> None:
        if self.image_tokens is None:
            return
        if not self.image:
            fail("--image-tokens goes with --image", code=2)
        from ..model.vision_config import BUDGETS

        if self.image_tokens not in BUDGETS:
            known = ", ".join(map(str, BUDGETS))
            fail(f"--image-tokens takes one of {known}; not {self.image_tokens}", code=2)

    def given(self, prompt: str) -> list[Path | bytes]:
        """The pictures, each of which can be read; `prompt` is what the command's argument says.

        Raises:
            PictureError: one cannot.
            SystemExit: stdin would be read twice.
        """
        from ..images.files import read_picture

        names = self.image or []
        if names.count("-") + (prompt == "-") > 1 and "-" in names:
            fail("stdin is read once, for the prompt or for one picture", code=2)
        found: list[Path | bytes] = []
        for name in names:
            each = _stdin() if name == "-" else path_of(name)
            read_picture(each)  # what is wrong with it should not have to wait for a model
            found.append(each)
        return found

    def parts(self, prompt: str) -> list[dict[str, Any]]:
        """The same as parts of a message; errors as in `given`."""
        own = {} if self.image_tokens is None else {"tokens": self.image_tokens}
        return [{"type": "image", "image": each, **own} for each in self.given(prompt)]


def path_of(name: str) -> Path:
    """A file's name, in which ~ is a home."""
    try:
        return Path(name).expanduser()
    except RuntimeError:  # ~nobody
        return Path(name)


def _stdin() -> bytes:
    """A picture from stdin; of one that is too large enough to be refused."""
    from ..images.files import MOST_BYTES

    if not sys.stdin:  # the shell has closed it
        fail("the picture is to be read from stdin, which is closed")
    if sys.stdin.isatty():
        fail("the picture is to be read from stdin, which is a terminal", code=2)
    return sys.stdin.buffer.read(MOST_BYTES + 1)


def dropped(line: str) -> tuple[list[Path], str]:
    """Paths of pictures that a line begins with, as a terminal writes a file that is dropped into
    it, and the text behind them."""
    found: list[Path] = []
    rest = line.strip()
    while (
        rest.startswith(("/", "~/", "file://", '"', "'")) and (cut := _first_word(rest)) is not None
    ):
        word, behind = cut
        path = _local(word)
        if path is None or path.suffix.lower() not in SUFFIXES or not path.is_file():
            break
        found.append(path)
        rest = behind
    return found, rest


def _first_word(text: str) -> tuple[str, str] | None:
    """A word as a shell reads it, with quotes and backslashes, and what stands behind it."""
    stream = StringIO(text)
    lexer = shlex.shlex(stream, posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    with suppress(ValueError):  # a quote that is not closed
        word = lexer.get_token()
        if word:
            return word, stream.read().strip()
    return None


def _local(word: str) -> Path | None:
    """The file that an absolute path, one with ~ or a file: address names, else None."""
    if word.startswith("file://"):
        return Path(unquote(urlsplit(word).path))
    path = path_of(word) if word.startswith(("/", "~/")) else None
    try:
        return path if path is not None and path.exists() else None
    except (OSError, ValueError):  # a name that is too long, or has a zero byte
        return None


def pasted() -> "list[Path | Image.Image]":
    """The picture in the clipboard, or the files of pictures that were copied there.

    Raises:
        Error: there is none, or this system offers no way to it.
    """
    try:
        from PIL import ImageGrab
    except ImportError:
        raise Error("pictures need Pillow: pip install 'mlx-diffgemma[images]'") from None
    try:
        found = ImageGrab.grabclipboard()
    except (NotImplementedError, OSError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise Error(f"the clipboard of this system cannot be read: {said}") from None
    if isinstance(found, Sequence):
        files = [Path(name) for name in found]
        found_files = [file for file in files if file.suffix.lower() in SUFFIXES]
        if found_files:
            return [*found_files]
    elif found is not None:
        return [found]
    raise Error("there is no picture in the clipboard; /image FILE takes one from a file")
