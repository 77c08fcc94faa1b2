"""Files of users: read with one sentence about what is wrong, replaced at once."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

from .errors import Error


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


@contextmanager
def replacing(path: Path, suffix: str = "") -> Iterator[Path]:
    """A file beside `path`, to be written; at the end it takes the place of what `path` names.

    A full disk or a kill leaves the old file; a link stays a link. `suffix` is for writers that
    insist on one.
    """
    target = path.resolve()
    with NamedTemporaryFile(dir=target.parent, suffix=suffix, delete=False) as file:
        pass
    try:
        yield Path(file.name)
        os.replace(file.name, target)
    except BaseException:
        os.unlink(file.name)
        raise
