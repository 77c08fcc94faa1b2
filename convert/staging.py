"""A directory filled beside its destination, by one process at a time, and then moved there."""

import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlx_diffgemma.errors import Error

_LOCK = "lock"
_ATTEMPTS = 100  # to take a lock whose file its holder removes at the same moment


class ConvertError(Error):
    """A conversion that cannot be done or was not finished."""


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


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yield an empty directory that takes the place of `target`, or vanishes on a failure.

    It lies in `workspace_of(target)` beside a file that is locked as long as a process works there.
    The system drops the lock of a process that dies, so what a killed run left is known for dead
    and cleared by the next.

    Raises:
        ConvertError: another run is at it, or `target` was written meanwhile.
        OSError: the disk refuses.
    """
    workspace = workspace_of(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = _take(workspace, target)
    fresh = workspace / "checkpoint"
    try:
        check_vacant(target)  # another run may have finished since this one looked
        _clear(workspace)
        fresh.mkdir()
        yield fresh
        os.rename(fresh, target)  # an empty directory is replaced
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        # The file goes while its lock is held; who opened it before looks at its name again.
        with suppress(OSError):
            os.unlink(workspace / _LOCK)
            os.rmdir(workspace)
        os.close(lock)


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
