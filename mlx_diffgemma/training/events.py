"""What a run of fine-tuning tells; each event of the log is a line of log.jsonl."""

from dataclasses import asdict, dataclass
from typing import Any

# Shares of a canvas that are noise where the validation loss is measured.
LEVELS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Started:
    """A run begins, or goes on after `iteration`: so many examples, and parameters to train."""

    iteration: int
    iters: int
    examples: int
    parameters: int


@dataclass(frozen=True)
class Stepped:
    """An iteration is over. `loss` is that of its batch, in nats a token."""

    iteration: int
    loss: float


@dataclass(frozen=True)
class Measuring:
    """So many of the validation batches, or of the cases that are answered, are done."""

    what: str
    done: int
    total: int


@dataclass(frozen=True)
class Trained:
    """Means since the last one. Tokens are those of prompts and responses; memory is in bytes.

    `gradient_norm` is that of the last update, before it was limited.
    """

    iteration: int
    loss: float
    denoising: float
    reading: float
    learning_rate: float
    gradient_norm: float
    iterations_per_second: float
    tokens_per_second: float
    trained_tokens: int
    peak_memory: int


@dataclass(frozen=True)
class Validated:
    """Losses of validation examples: the denoiser's at each of `LEVELS`, always with the same
    noise, and the encoder's. `of` says which examples: valid or test."""

    iteration: int
    denoising: tuple[float, ...]
    reading: float
    seconds: float
    of: str = "valid"

    @property
    def loss(self) -> float:
        """The mean over the levels."""
        return sum(self.denoising) / len(self.denoising)


@dataclass(frozen=True)
class Succeeded:
    """So many of the cases were answered exactly as the examples say."""

    iteration: int
    right: int
    cases: int
    seconds: float
    of: str = "valid"


@dataclass(frozen=True)
class Saved:
    """A file is written: the weights after an iteration. `best` is the one that is used."""

    iteration: int
    file: str
    best: bool = False


@dataclass(frozen=True)
class Stopped:
    """The run was asked to end before its last iteration, and can go on."""

    iteration: int


@dataclass(frozen=True)
class Finished:
    """The run is over. `kept` is the iteration whose weights are in adapters.safetensors."""

    iteration: int
    kept: int
    success: float | None
    untrained: float | None


Logged = Started | Trained | Validated | Succeeded | Saved | Stopped | Finished

Event = Stepped | Measuring | Logged


def line_of(event: Logged) -> dict[str, Any]:
    """An event as an object of the log."""
    return {"event": type(event).__name__.lower(), **asdict(event)}
