"""Where the weights of a source are: in its directory, or on the hub, a file at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_diffgemma.checkpoint.files import Tensor, read_header
from mlx_diffgemma.checkpoint.hub import RemoteFile, Repository, fetch
from mlx_diffgemma.errors import CheckpointError

from .plan import Job, size_of


@dataclass(frozen=True)
class Fetched:
    """Progress: bytes of weights fetched so far, of those that are not on this machine."""

    file: str
    bytes_done: int
    bytes_total: int


class Source:
    """The files that jobs read, in the jobs' order.

    `remote` are those that have to be fetched, by where they will lie. Each is there from the first
    job that reads it to the last, and then removed.
    """

    def __init__(self, jobs: list[Job], repository: Repository | None, place: Path):
        self._jobs = jobs
        self._repository = repository
        self._tensors: dict[Path, dict[str, Tensor]] = {}
        self._last: dict[Path, int] = {}
        for number, job in enumerate(jobs):
            for tensor in job.sources:
                self._tensors.setdefault(tensor.file, {})[tensor.name] = tensor
                self._last[tensor.file] = number
        self._remote: dict[Path, RemoteFile] = {}
        if repository is not None:
            self._remote = {
                path: repository.files[path.name] for path in self._last if path.parent == place
            }
        self._sound: set[Path] = set()
        self._total = sum(file.size for file in self._remote.values())

    def clear(self, done: int) -> None:
        """Remove what a former run left that no job from `done` on reads."""
        for path in self._remote:
            if self._last[path] < done:
                path.unlink(missing_ok=True)

    def room(self, done: int) -> int:
        """Return how many more bytes the disk must hold at most, from job `done` on."""
        there = sum(path.stat().st_size for path in self._remote if path.exists())
        present: set[Path] = set()
        written = most = 0
        for number, job in enumerate(self._jobs[done:], done):
            present |= {tensor.file for tensor in job.sources if tensor.file in self._remote}
            written += sum(map(size_of, job.parts))
            most = max(most, written + sum(self._remote[path].size for path in present))
            present -= set(self.read_last(number))
        return most - there

    def ready(self, number: int) -> Iterator[Fetched]:
        """Fetch what a job reads, unless it is there.

        Raises:
            Unreachable: the hub cannot be reached any more, or does not send what it states.
            CheckpointError: a file is not what its header was said to be.
        """
        for tensor in self._jobs[number].sources:
            path = tensor.file
            if path not in self._remote or path in self._sound:
                continue
            assert self._repository is not None
            file = self._remote[path]
            path.parent.mkdir(exist_ok=True)
            before = self._total - sum(
                each.size for at, each in self._remote.items() if self._last[at] >= number
            )
            before += sum(self._remote[at].size for at in self._sound)
            for done in fetch(self._repository, file, path):
                yield Fetched(file.name, before + done, self._total)
            if read_header(path) != self._tensors[path]:
                raise CheckpointError(f"{file.name} is not the file whose header the hub has sent")
            self._sound.add(path)

    def read_last(self, number: int) -> list[Path]:
        """Return the fetched files that no job behind this one reads."""
        reads = {tensor.file for tensor in self._jobs[number].sources}
        return [path for path in reads if path in self._remote and self._last[path] == number]

    def drop(self, paths: list[Path]) -> None:
        """Remove fetched files."""
        for path in paths:
            path.unlink()
            self._sound.discard(path)
