"""A directory filled beside its destination, by one process at a time, and then moved there."""

import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_diffgemma.checkpoint.hub import Unreachable
from mlx_diffgemma.errors import Error
from mlx_diffgemma.files import replacing

_LOCK = "lock"
_RECORD = "run.json"
_ATTEMPTS = 100  # to take a lock whose file its holder removes at the same moment


class ConvertError(Error):
    """A conversion that cannot be done or was not finished."""


class NoRoom(ConvertError):
    """A disk that is too small; where there is more room, the same conversion may go on."""


def check_vacant(target: Path) -> None:
    """Refuse a destination that is taken or that no directory can be renamed to."""
    if target.name in ("", ".."):
        raise ConvertError(f"{target} is not a name for a new directory")
    try:
        os.lstat(target)
        is_empty = target.is_dir() and not target.is_symlink() and not any(target.iterdir())
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:  # a NUL in the name is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise ConvertError(f"{target} cannot be written: {reason}") from None
    if not is_empty:
        raise ConvertError(f"{target} exists already")
    if target.is_mount():
        raise ConvertError(f"{target} is where a disk is mounted: name a directory in it")


def workspace_of(target: Path) -> Path:
    """Return where a run that writes `target` works: beside it, on the same disk."""
    return target.with_name(f".{target.name}.incomplete")


@dataclass(frozen=True)
class Stage:
    """Where a run works. `done` is how many jobs a former run of the same `key` has finished."""

    workspace: Path
    key: str | None
    done: int

    @property
    def fresh(self) -> Path:
        """The directory that will take the destination's place."""
        return self.workspace / "checkpoint"

    @property
    def source(self) -> Path:
        """The directory of what is fetched and not kept."""
        return self.workspace / "source"

    def record(self, done: int, notes: dict[str, Any]) -> None:
        """Note that so many jobs are on the disk; the next run of this key goes on behind them."""
        with replacing(self.workspace / _RECORD) as path:
            write_json(path, {**notes, "key": self.key, "done": done})


@contextmanager
def staged(target: Path, key: str | None = None) -> Iterator[Stage]:
    """Yield a stage, whose directory `fresh` takes the place of `target`, or vanishes on a failure.

    It lies in `workspace_of(target)` beside a file that is locked as long as a process works there.
    The system drops the lock of a process that dies, so what a killed run left is known for dead
    and cleared by the next. With a `key`, a run that was killed, cut off or interrupted leaves what
    it has, and the next with the same key goes on.

    Raises:
        ConvertError: another run is at it, or `target` was written meanwhile.
        OSError: the disk refuses.
    """
    workspace = workspace_of(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = _take(workspace, target)
    goes_on = False
    try:
        check_vacant(target)  # another run may have finished since this one looked
        left = recorded(workspace)
        goes_on = key is not None and left.get("key") == key and (workspace / "checkpoint").is_dir()
        if not goes_on:
            _clear(workspace)
        resumed = goes_on
        stage = Stage(workspace, key, left["done"] if resumed else 0)
        stage.fresh.mkdir(exist_ok=True)
        goes_on = key is not None
        yield stage
        os.rename(stage.fresh, target)  # an empty directory is replaced
        goes_on = False
    except Unreachable:
        raise
    except Error as error:
        goes_on = goes_on and isinstance(error, NoRoom) and resumed
        raise
    finally:
        with suppress(OSError):
            if not goes_on:
                _clear(workspace)
        # The file goes while its lock is held; who opened it before looks at its name again.
        with suppress(OSError):
            os.unlink(workspace / _LOCK)
            os.rmdir(workspace)
        os.close(lock)


def recorded(workspace: Path) -> dict[str, Any]:
    """Read what a former run noted, {} if there is nothing to be made of it."""
    try:
        found = json.loads((workspace / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    sound = isinstance(found, dict) and type(found.get("done")) is int and found["done"] >= 0
    return found if sound else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file that is on the disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=4)
        file.flush()
        os.fsync(file.fileno())


def _take(workspace: Path, target: Path) -> int:
    """Make the directory and lock it; returns the descriptor that holds the lock."""
    path = workspace / _LOCK
    for _ in range(_ATTEMPTS):
        with suppress(FileExistsError):
            workspace.mkdir()
        try:
            # Looked at once: between two looks its last holder may remove it.
            if not stat.S_ISDIR(os.lstat(workspace).st_mode):
                raise ConvertError(f"{workspace} is in the way")
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # its last holder has just removed the directory
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(lock, path):
                return lock
        except BlockingIOError:
            os.close(lock)
            raise ConvertError(f"another conversion is writing {target}") from None
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
    raise ConvertError(f"another conversion is writing {target}")


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether the open file still has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _clear(workspace: Path) -> None:
    """Remove what a killed run left, all but the lock."""
    for path in workspace.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()
