"""A repository on the hub: what it holds, the headers of its weights, one file of it at a time.

Weights are read in pieces, so that a cut connection costs a piece and a killed run nothing that is
on the disk, and are compared with the checksum that the hub states.
"""

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from ..errors import CheckpointError
from .files import (
    NEEDED,
    WEIGHTS,
    Headers,
    Tensor,
    header_of,
    hub_failure,
    joined,
    on_this_machine,
    read_header,
    read_headers,
    read_json,
    resolve,
)

# Bytes that are asked for at once: few where the line is slow, so that progress is seen and little
# is asked for again; many where it is fast, as each request waits for an answer first.
SMALLEST_PIECE = 1 << 20
LARGEST_PIECE = 1 << 25

# Seconds within which a piece should come.
QUICK, SLOW = 1.0, 4.0

# Seconds without a single byte after which a download is given up, and the first question: where
# there is no network, somebody waits for what the cache has.
PATIENCE = 300.0
FIRST_PATIENCE = 10.0

# Times that a file is fetched whose bytes are not those that the hub states.
ATTEMPTS = 3

# Bytes of a header that are asked for at once; the published files' are shorter.
_HEAD = 1 << 17

_BLOCK = 1 << 22  # bytes of a file that are hashed at once

T = TypeVar("T")


class Unreachable(CheckpointError):
    """The hub does not answer, or no longer; asking again later may help."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. `sha256` is that of a large file; a small one has `blob`, the hash
    that git gives it."""

    name: str
    size: int
    sha256: str | None
    blob: str | None


@dataclass(frozen=True)
class Repository:
    """What a repository holds at one commit."""

    name: str
    commit: str
    files: dict[str, RemoteFile]

    @property
    def weights(self) -> list[str]:
        """Names of its files of weights, none of them in a folder or with odd characters."""
        return [
            name
            for name in self.files
            if re.fullmatch(r"[\w.-]+", name, re.ASCII)
            and any(fnmatch(name, pattern) for pattern in WEIGHTS)
        ]

    @cached_property
    def stored(self) -> Any:
        """The hub's files as a file system; it asks once where they are."""
        from huggingface_hub import HfFileSystem

        return HfFileSystem(skip_instance_cache=True)


def look_up(name: str, revision: str | None) -> Repository:
    """Ask the hub for the commit of a revision and for its files.

    Raises:
        Unreachable: the hub does not answer.
        CheckpointError: there is no such repository or revision, or it may not be read.
    """
    from huggingface_hub import HfApi

    def ask() -> Any:
        return HfApi().model_info(name, revision=revision, files_metadata=True)

    found = _patiently(ask, FIRST_PATIENCE, name, revision)
    if not re.fullmatch("[0-9a-f]{40}", str(found.sha)):
        raise CheckpointError(f"{name} could not be fetched: the hub names no commit")
    files = {}
    for each in found.siblings or []:
        sha256 = each.lfs.sha256 if each.lfs else None
        if type(each.size) is int and each.size >= 0 and (sha256 or each.blob_id):
            files[each.rfilename] = RemoteFile(each.rfilename, each.size, sha256, each.blob_id)
    return Repository(name, found.sha, files)


def cached(repository: Repository, file: RemoteFile) -> Path | None:
    """Return where the hub's cache has this file, if it has all of it."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository.name, file.name, revision=repository.commit)
    if not isinstance(found, str) or not Path(found).is_file():
        return None
    return Path(found) if Path(found).stat().st_size == file.size else None


def small_files(repository: Repository) -> Path:
    """Fetch everything but weights into the hub's cache; returns the directory.

    Raises:
        CheckpointError: one cannot be fetched, or is not what the hub says it is.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    name, commit = repository.name, repository.commit

    def ask() -> Path:
        return Path(snapshot_download(name, revision=commit, allow_patterns=[*NEEDED]))

    with _no_bars():  # of a few megabytes
        directory = _patiently(ask, PATIENCE, name, commit)
    for path in directory.iterdir():
        file = repository.files.get(path.name)
        if file is None or path.name in repository.weights or _is_sound(path, file):
            continue
        again = partial(hf_hub_download, name, path.name, revision=commit, force_download=True)
        with _no_bars():
            _patiently(again, PATIENCE, name, commit)
        if not _is_sound(path, file):
            raise _unsound(repository, file)
    return directory


def read_remote(repository: Repository, place: Path) -> Headers:
    """Read the headers of a repository's weights, which stay on the hub or in its cache.

    Those that the cache lacks are said to lie in `place`, where they may be fetched to.

    Raises:
        Unreachable: the hub does not answer any more.
        CheckpointError: a file is missing or damaged, or does not hold what the index says.
    """
    directory = small_files(repository)

    def header(name: str) -> dict[str, Tensor]:
        file = repository.files.get(name)
        if file is None:
            raise CheckpointError(f"{repository.name} has no file {name}, which its index names")
        path = cached(repository, file)
        return read_header(path) if path else _header(repository, file, place / name)

    tensors = joined(directory, repository.weights, header)
    return Headers(directory, read_json(directory, "config.json"), tensors)


def headers_of(path_or_repo: str, *, revision: str | None = None) -> Headers:
    """Read the headers of a checkpoint wherever it is; of one on the hub no weights are fetched.

    Raises:
        CheckpointError: as `resolve` and `read_headers`.
    """
    directory = on_this_machine(path_or_repo)
    if directory is not None:
        return read_headers(directory)
    try:
        repository = look_up(path_or_repo, revision)
    except Unreachable:  # the cache may have it
        return read_headers(resolve(path_or_repo, revision=revision, fetch=False))
    return read_remote(repository, Path(path_or_repo))


def fetch(repository: Repository, file: RemoteFile, path: Path) -> Iterator[int]:
    """Write a file of the hub to `path`, going on behind what is there; yields its bytes so far.

    Raises:
        Unreachable: the connection is cut for long, or the bytes are not those that the hub states.
        CheckpointError: the hub refuses.
        OSError: the disk refuses.
    """
    for _ in range(ATTEMPTS):
        with path.open("a+b") as out:
            digest, done = _digest(file), 0
            out.seek(0)
            while block := out.read(_BLOCK):
                digest.update(block)
                done += len(block)
            yield done
            for piece in _pieces(repository, file, done):
                out.write(piece)
                digest.update(piece)
                done += len(piece)
                yield done
        if done == file.size and digest.hexdigest() == (file.sha256 or file.blob):
            return
        path.unlink()
    raise _unsound(repository, file)


def _pieces(repository: Repository, file: RemoteFile, start: int) -> Iterator[bytes]:
    """Yield the bytes of a file from `start` on."""
    length = SMALLEST_PIECE
    with _opened(repository, file) as remote:
        while start < file.size:
            count = min(length, file.size - start)
            before = time.perf_counter()
            piece = _read(repository, remote, start, count)
            seconds = time.perf_counter() - before
            yield piece
            start += count
            if seconds < QUICK:
                length = min(2 * length, LARGEST_PIECE)
            elif seconds > SLOW:
                length = max(length // 2, SMALLEST_PIECE)


def _header(repository: Repository, file: RemoteFile, path: Path) -> dict[str, Tensor]:
    """Read the header of one file of weights that stays on the hub."""
    with _opened(repository, file) as remote:
        head = _read(repository, remote, 0, min(_HEAD, file.size))
        at = 0

        def read(count: int) -> bytes:
            nonlocal at
            part = head[at : at + count]
            if len(part) < count <= file.size - at:
                part += _read(repository, remote, at + len(part), count - len(part))
            at += count
            return part

        return header_of(path, file.size, read)


def _opened(repository: Repository, file: RemoteFile) -> Any:
    """Open a file of the hub, to read any part of it."""

    def ask() -> Any:
        where = f"{repository.name}/{file.name}"
        return repository.stored.open(where, "rb", revision=repository.commit, cache_type="none")

    return _patiently(ask, PATIENCE, repository.name, repository.commit)


def _read(repository: Repository, remote: Any, start: int, count: int) -> bytes:
    """Read a part of a file of the hub, all of it."""

    def ask() -> bytes:
        remote.seek(start)
        piece: bytes = remote.read(count)
        if len(piece) != count:
            raise EOFError(f"the hub sent {len(piece)} bytes of {count}")
        return piece

    return _patiently(ask, PATIENCE, repository.name, repository.commit)


def _patiently(ask: Callable[[], T], seconds: float, name: str, revision: str | None) -> T:
    """Ask the hub until it answers, but no longer than so many seconds.

    Its library asks again by itself only where bytes are read, and not for long.
    """
    until, wait = time.monotonic() + seconds, 1.0
    while True:
        try:
            return ask()
        except Exception as error:
            if not _passes(error):
                raise hub_failure(name, revision, error) from error
            if _is_offline(error) or time.monotonic() + wait > until:
                raise Unreachable(str(hub_failure(name, revision, error))) from error
        time.sleep(wait)
        wait = min(2 * wait, 8.0)


def _passes(error: Exception) -> bool:
    """Whether asking again may help: too many requests, a fault of the server, a cut line."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):  # the hub could not be asked
        return True
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 500
        return status in (408, 429) or status >= 500
    if _is_offline(error):
        return True
    # What the HTTP library of the day raises when a line is cut is none of these.
    return not isinstance(error, OSError | ValueError | TypeError | AttributeError)


def _is_offline(error: Exception) -> bool:
    from huggingface_hub import errors

    return isinstance(error, errors.OfflineModeIsEnabled)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keep the hub's library from drawing progress, unless it draws none anyway."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # its stubs lag behind
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _digest(file: RemoteFile) -> Any:
    """Begin the checksum that the hub states: SHA-256, or that of git, which counts bytes first."""
    if file.sha256 is not None:
        return hashlib.sha256()
    return hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)


def _is_sound(path: Path, file: RemoteFile) -> bool:
    digest = _digest(file)
    with path.open("rb") as stored:
        while block := stored.read(_BLOCK):
            digest.update(block)
    return bool(digest.hexdigest() == (file.sha256 or file.blob))


def _unsound(repository: Repository, file: RemoteFile) -> Unreachable:
    return Unreachable(
        f"{repository.name}: the bytes of {file.name} are not those whose checksum the hub states"
    )
