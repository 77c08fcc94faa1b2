"""Files of users: read with one sentence about what is wrong, replaced at once."""

import json
import math
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EISDIR
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import NoReturn

from .errors import Error

# Deeper values than this would exhaust the stack of whoever walks through them.
MOST_DEPTH = 100

# Digits of the longest whole number; Python itself prints no more than 4,300.
MOST_DIGITS = 1000


def read_text(path: Path, failure: type[Error] = Error) -> str:
    """A file's text, its line ends as they are.

    Raises:
        Error: of type `failure`; it cannot be read, or is not UTF-8.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except OSError as error:
        raise failure(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise failure(f"{path} is not UTF-8 text") from None


def parse_json(text: str) -> object:
    """A JSON value that can be written again: finite numbers, whole characters, no deep nesting.

    Raises:
        ValueError: it is none; the message says what is wrong with it.
    """
    try:
        value: object = json.loads(
            text, parse_constant=_no_constant, parse_float=_finite, parse_int=_whole
        )
    except RecursionError:
        raise ValueError("values are nested too deeply") from None
    level = [value]
    for _ in range(MOST_DEPTH):
        if not all(is_text(each) for each in level if isinstance(each, str)):
            raise ValueError("a string holds half a character")
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return value
    raise ValueError("values are nested too deeply")


def is_text(text: str) -> bool:
    """Whether UTF-8 can say it: half a surrogate pair is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _inside(value: object) -> list[object]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else []


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number has more than {MOST_DIGITS} digits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is too large")
    return value


def check_writable(path: Path) -> None:
    """Find out whether `replacing` could write a file; nothing stays of the attempt.

    Raises:
        OSError: it could not, as there is no such folder, or no permission.
    """
    target = Path(os.path.realpath(path))  # Path.resolve raises for links that go in circles
    if target.is_dir():
        raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
    with NamedTemporaryFile(dir=target.parent):
        pass


@contextmanager
def replacing(path: Path, suffix: str = "") -> Iterator[Path]:
    """A file beside `path`, to be written; at the end it takes the place of what `path` names.

    A full disk or a kill leaves the old file; a link stays a link. Who may read it stays as it was,
    and is what the umask says of a new one. `suffix` is for writers that insist on one.
    """
    target = Path(os.path.realpath(path))
    try:
        kept = stat.S_IMODE(target.stat().st_mode)
    except OSError:  # there is none; what else is wrong is said where a file is made
        kept = None
    # Until it is whole, nobody reads what takes a private file's place.
    fresh = _create_beside(target, suffix, 0o666 if kept is None else 0o600)
    try:
        yield fresh
        if kept is not None and kept != stat.S_IMODE(fresh.stat().st_mode):
            fresh.chmod(kept)
        os.replace(fresh, target)
    except BaseException:
        fresh.unlink()
        raise


def _create_beside(target: Path, suffix: str, mode: int) -> Path:
    """An empty file of a new name. The system takes the umask off its mode, as of any file's;
    what `tempfile` makes is its owner's alone."""
    while True:
        fresh = target.with_name(f"tmp{secrets.token_hex(4)}{suffix}")
        try:
            os.close(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
        except FileExistsError:
            continue
        return fresh
