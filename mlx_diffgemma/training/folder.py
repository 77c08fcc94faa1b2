"""The folder of a run: adapters as mlx-lm writes them, what it takes to go on, a log of events.

One process at a time writes to it. Each file takes the place of an older one at once, so that a
kill or a full disk leaves the older one.
"""

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast

import mlx.core as mx

from ..checkpoint.adapter import CONFIG_FILE, WEIGHTS_FILE, AdapterConfig, save_adapter
from ..errors import Error
from ..files import replacing
from .events import Logged, line_of
from .plots import can_plot, plot

STATE_FILE = "training_state.safetensors"
LOG_FILE = "log.jsonl"
PLOT_FILE = "progress.svg"
TAUGHT_FILE = "taught.jsonl"  # the teacher's answers, where a model is distilled

# Names of what a run writes; checkpoints end as mlx-lm's do, behind the iteration.
_OWN = (WEIGHTS_FILE, CONFIG_FILE, STATE_FILE, LOG_FILE, PLOT_FILE, TAUGHT_FILE)
_CHECKPOINT = "[0-9]*_adapters.safetensors"

# What a kill leaves of a file that was being written; see `files.replacing`.
_HALF = re.compile(r"tmp[a-z0-9_]{8}(\.safetensors|\.svg)?")

BETWEEN_PLOTS = 60.0  # seconds; drawing takes about half of one

Mode = Literal["new", "resume", "overwrite"]

Arrays = dict[str, mx.array]


class RunError(Error):
    """A folder of a run that cannot be used, written or gone on with."""


@dataclass
class Progress:
    """How far a run has come: what has to be known to go on as if it had not stopped.

    Attributes:
        iteration: the last one that is over.
        evaluated: the last one that was measured; -1 is none.
        trained_tokens: of all batches.
        since: sums since the last report: batches, losses, tokens, seconds.
        norm: of the last gradient that changed the weights.
        kept: the iteration whose weights adapters.safetensors has; -1 is none.
        best: success of those weights and minus their loss, where success is measured.
        untrained: success before the first iteration.
    """

    iteration: int = 0
    evaluated: int = -1
    trained_tokens: int = 0
    since: dict[str, float] = field(default_factory=dict)
    norm: float = 0.0
    kept: int = -1
    best: list[float] | None = None
    untrained: float | None = None


@dataclass(frozen=True)
class Stored:
    """What a training state holds: arrays, how far the run was, and what it was asked for."""

    arrays: Arrays
    progress: Progress
    arguments: dict[str, Any]
    data: str  # a digest of the examples


class Folder:
    """Writes the files of a run. `arguments` are what it was asked for, for those who go on."""

    def __init__(
        self, path: Path, config: AdapterConfig, arguments: Mapping[str, Any], data: str
    ) -> None:
        self.path = path
        self._config = config
        self._arguments = dict(arguments)
        self._data = data
        self._drawn = time.monotonic()

    def log(self, event: Logged) -> None:
        """Add an event to the log.

        Raises:
            RunError: the disk refuses.
        """
        with writing(self.path / LOG_FILE) as path, path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line_of(event)) + "\n")

    def save_best(self, weights: Arrays, iteration: int, **about: Any) -> Path:
        """Write adapters.safetensors, which is what others load, with its config."""
        with writing(self.path / WEIGHTS_FILE) as path:
            save_adapter(
                self.path, weights, self._config, **self._arguments, iteration=iteration, **about
            )
            return path

    def save_checkpoint(self, weights: Arrays, iteration: int) -> Path:
        """Write the weights after an iteration beside the others."""
        with writing(self.path / f"{iteration:07d}_{WEIGHTS_FILE}") as path:
            with replacing(path, suffix=".safetensors") as fresh:
                mx.save_safetensors(str(fresh), weights, {"format": "mlx"})
            return path

    def save_state(self, arrays: Arrays, progress: Progress) -> Path:
        """Write what `read_state` reads."""
        about = {
            "progress": asdict(progress),
            "arguments": self._arguments,
            "data": self._data,
        }
        with writing(self.path / STATE_FILE) as path:
            with replacing(path, suffix=".safetensors") as fresh:
                mx.save_safetensors(str(fresh), arrays, {"run": json.dumps(about)})
            return path

    def plot(self, *, last: bool) -> None:
        """Draw the log, if the library for it is installed; before the last time not too often."""
        due = last or time.monotonic() - self._drawn > BETWEEN_PLOTS
        if due and can_plot() and (self.path / LOG_FILE).exists():
            self._drawn = time.monotonic()
            with writing(self.path / PLOT_FILE) as path:
                plot(path, read_log(self.path))

    def trim_log(self, iteration: int) -> None:
        """Forget what was logged behind the state that a run goes on from."""
        source = self.path / LOG_FILE
        if not source.exists():
            return
        kept = [line for line in read_log(self.path) if line.get("iteration", 0) <= iteration]
        with writing(source) as path, replacing(path) as fresh:
            fresh.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """While a file is written: what the system or MLX refuses is a RunError in one sentence."""
    try:
        yield path
    except (OSError, RuntimeError) as error:  # the second is MLX's, and says what the first does
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        reason = reason.rstrip(".")
        raise RunError(
            f"{path} cannot be written: {reason}; what was saved before is as it was"
        ) from None


@contextmanager
def locked(path: Path, mode: Mode) -> Iterator[None]:
    """Make the folder, and keep other processes out of it.

    Raises:
        RunError: another process trains there, or it does not hold what `mode` needs: nothing of a
            run, or a run to go on with. Nothing is removed by "overwrite" before `clear`.
    """
    made = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise RunError(f"{path} cannot be a run's folder: {error.strerror}") from None
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed, or a kill
        except BlockingIOError:
            raise RunError(f"another process is training in {path}") from None
        except OSError as error:
            raise RunError(f"{path} cannot be locked: {error.strerror}") from None
        check_folder(path, mode)
        if mode != "new":
            _remove_halves(path)
        yield
    finally:
        os.close(directory)
        if made and not any(path.iterdir()):
            path.rmdir()


def _remove_halves(path: Path) -> None:
    for file in path.iterdir():
        if _HALF.fullmatch(file.name):
            file.unlink(missing_ok=True)


def check_folder(path: Path, mode: Mode) -> None:
    """Whether a folder holds what a run needs of it.

    Raises:
        RunError: it does not, see `locked`.
    """
    held = files_of(path)
    if mode == "resume" and path / STATE_FILE not in held:
        raise RunError(f"{path} has no {STATE_FILE} to go on from")
    if mode == "new" and held:
        raise RunError(
            f"{path} holds another run ({held[0].name}): --resume goes on with it, --overwrite "
            "replaces it, --adapter-path names another folder"
        )


def files_of(path: Path) -> list[Path]:
    """What runs have written into a folder."""
    return [path / name for name in _OWN if (path / name).exists()] + sorted(path.glob(_CHECKPOINT))


def clear(path: Path) -> None:
    """Remove what another run has left, once nothing can go wrong before the first iteration."""
    for file in files_of(path):
        file.unlink()


def read_state(path: Path) -> Stored:
    """Read what a run goes on from.

    Raises:
        RunError: it is missing or damaged.
    """
    file = path / STATE_FILE
    if not file.exists():
        raise RunError(f"{path} has no {STATE_FILE} to go on from")
    try:
        arrays, metadata = cast(Any, mx.load(str(file), return_metadata=True))
        about = json.loads(metadata["run"])
        names = {each.name for each in fields(Progress)}
        if about["progress"].keys() != names or not isinstance(about["arguments"], dict):
            raise ValueError("it is of another version")
        return Stored(arrays, Progress(**about["progress"]), about["arguments"], str(about["data"]))
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{file} cannot be gone on from: {' '.join(str(error).split())}") from None


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a run's log; half a line that a kill has left does not count."""
    found = []
    for line in (path / LOG_FILE).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
