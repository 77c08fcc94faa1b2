"""Takes requests for a model, from any thread; `thread.py` has the one that answers them."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, TypeVar

from ..errors import Error
from ..model.diffusion_gemma import DiffusionGemma
from ..tasks.engine import prepared
from ..tasks.request import Prepared, Task
from ..text.tokenizer import Tokenizer
from ..text.vocabulary import Vocabulary

# Takes what whoever waits is given: events, at the end None, or an exception.
Listener = Callable[[object], None]

Item = TypeVar("Item")


class Busy(Exception):
    """Says that the queue is full."""


class Stopped(Error):
    """Says that the server's end has cut a request off."""


class Timeout(Error):
    """Says that a request took longer than it may."""


class NotLoaded(Error):
    """Says that the model of a request cannot be loaded now."""


class Gone(Error):
    """Says that nobody waits for an answer any more."""


@dataclass(eq=False)
class Patience:
    """Says how long somebody waits for an answer, its preparation included.

    Attributes:
        seconds: the whole time.
        ends: on the monotonic clock.
        gone: whether nobody waits any more; any thread may say so.
    """

    seconds: float
    ends: float
    gone: bool = False

    @property
    def left(self) -> float:
        """Give what is left, in seconds."""
        return max(self.ends - time.monotonic(), 0.0)

    @property
    def timeout(self) -> Timeout:
        """Make the error that is told when the time is over."""
        return Timeout(f"the request took longer than {self.seconds:g} seconds")

    def check(self) -> None:
        """Raise where it makes no sense to go on; called between pieces of long work.

        Raises:
            Gone: nobody waits.
            Timeout: the time is over.
        """
        if self.gone:
            raise Gone("nobody waits for the answer")
        if not self.left:
            raise self.timeout


@dataclass(eq=False)
class Ticket:
    """Stands for a request on its way; `asked` is when it came, on the monotonic clock."""

    work: Prepared[object]
    listen: Listener
    patience: Patience
    cancelled: bool = False
    asked: float = field(default_factory=time.monotonic)

    def end(self, error: Exception | None = None) -> None:
        """Tell that nothing more comes, behind an error if there is one."""
        if error is not None:
            self.listen(error)
        self.listen(None)


@dataclass
class Counters:
    """Counts what has been done for a model so far."""

    answered: int = 0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0
    loaded: int = 0
    unloaded: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    denoising_steps: int = 0
    positions_decoded: int = 0


class Source(Protocol):
    """Gives a model.

    Attributes:
        model: known from the first on, unless it stays; its arrays are for the thread that loads.
        tokenizer: known as the model is.
        stays: whether it is loaded at the start and never unloaded.
    """

    model: DiffusionGemma
    tokenizer: Tokenizer
    stays: bool

    def loading(self) -> Iterator[None]:
        """Load the weights, with pauses in which others go on.

        Raises:
            Error: they cannot be loaded.
        """

    def unload(self) -> None:
        """Free the weights."""

    def needs(self, tokens: int, pictures: bool) -> int:
        """Count the bytes that loading it takes, with so many tokens, perhaps of pictures."""

    def context_bytes(self, tokens: int, pictures: bool) -> int:
        """Count the bytes that they take where it is loaded."""


class Resident:
    """A model that a function loads at the start, and that stays."""

    stays = True
    model: DiffusionGemma
    tokenizer: Tokenizer

    def __init__(self, load: Callable[[], tuple[DiffusionGemma, Tokenizer]]):
        self._load = load

    def loading(self) -> Iterator[None]:
        """Load it, without a pause."""
        self.model, self.tokenizer = self._load()
        yield

    def unload(self) -> None:
        """Do nothing: whoever has the model keeps it."""

    def needs(self, tokens: int, pictures: bool) -> int:
        """Count nothing: the function sees to it that it fits."""
        return 0

    context_bytes = needs


class Door:
    """Stands between those who ask and the thread that answers; one for all of its models.

    Attributes:
        changed: held to touch a queue, and notified when something is to be done.
        open: whether the thread is there to answer.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.open = False


class Worker:
    """Takes requests for one model, in the order they come.

    Args:
        source: gives the model.
        name: the model's, as clients are told.
        aliases: further names by which it is found.
        max_batch: requests that are denoised together.
        max_queue: requests that may wait; one more is refused.
        timeout: seconds from being asked to the end, preparation included.
    """

    def __init__(
        self,
        source: Source,
        *,
        name: str = "model",
        aliases: Sequence[str] = (),
        max_batch: int,
        max_queue: int,
        timeout: float,
    ):
        self.source = source
        self.name, self.aliases = name, tuple(aliases)
        self.max_batch, self.max_queue = max_batch, max_queue
        self._timeout = timeout
        self.counters = Counters()
        self.door = Door()  # the thread puts its own in place
        self.queue: deque[Ticket] = deque()
        self.answering: dict[int, Ticket] = {}
        self.loaded = False

    @property
    def waiting(self) -> int:
        """Count requests in the queue."""
        return len(self.queue)

    @property
    def running(self) -> int:
        """Count requests that are being answered."""
        return len(self.answering)

    @property
    def model(self) -> DiffusionGemma:
        """Give the model, whose arrays are for the thread that owns MLX alone."""
        return self.source.model

    @property
    def tokenizer(self) -> Tokenizer:
        """Give the model's tokenizer; for any thread."""
        return self.source.tokenizer

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Give what the model's tokens can spell; for any thread."""
        return Vocabulary(self.model, self.tokenizer)

    def patience(self) -> Patience:
        """Give the patience of somebody who asks now."""
        return Patience(self._timeout, time.monotonic() + self._timeout)

    def prepare(self, task: Task[Item], patience: Patience | None = None) -> Prepared[Item]:
        """Prepare a request, on the thread of whoever asks: seconds that hold up nobody else.

        The model need not be loaded for it.

        Raises:
            Error: as the task's own `prepare`.
            Gone: nobody waits any more.
            Timeout: the time is over.
        """
        check = (patience or self.patience()).check
        work = prepared(task, self.model, self.vocabulary, check)
        check()
        return work

    def submit(
        self, work: Prepared[object], listen: Listener, patience: Patience | None = None
    ) -> Ticket:
        """Queue a request that is prepared.

        `listen` is called on the thread that owns MLX: with events, an exception, at last None.

        Raises:
            Busy: the queue is full.
        """
        with self.door.changed:
            if len(self.queue) >= self.max_queue or not self.door.open:
                self.counters.refused += 1
                raise Busy
            # Made here: of two, the one that stands before the other has come earlier.
            ticket = Ticket(work, listen, patience or self.patience())
            self.queue.append(ticket)
            self.door.changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Stop a request that nobody waits for any more, within one denoising step."""
        ticket.cancelled = True
