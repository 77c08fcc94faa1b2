"""Knows the workers behind one address: who has room, and who gets the next request."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from .affinity import Beginnings, Readers
from .refused import Refused

# How much more a worker that has read a conversation may be loaded than the least loaded one, in
# parts of its places: reading anew costs less than waiting for a whole answer.
SLACK = 0.5

# Room of a worker that does not say it.
PLACES, QUEUE = 4, 64

# Why a worker gets no requests at first.
UNSEEN = "it has not been asked yet"


class Patience:
    """Bounds how long one request is waited for, over all waits together.

    Attributes:
        lost: whether the worker is lost, so that the waits have ended before their time.
    """

    def __init__(self, seconds: float):
        self._ends = asyncio.get_running_loop().time() + seconds
        self._scope: asyncio.Timeout | None = None
        self.lost = False

    def wait(self) -> asyncio.Timeout:
        """Give what a wait has to stand in, which raises `TimeoutError` at the end."""
        self._scope = asyncio.timeout_at(self._ends)
        return self._scope

    def give_up(self) -> None:
        """Have the wait end now, and those that follow."""
        self.lost = True
        self._ends = asyncio.get_running_loop().time()
        if self._scope is not None:
            with suppress(RuntimeError):  # that wait is over
                self._scope.reschedule(self._ends)


@dataclass(eq=False)
class Backend:
    """A worker, as it is seen from here.

    Attributes:
        address: `host:port`.
        number: its place among all.
        out: why it gets no requests; None if it does.
        places: requests that it answers side by side.
        queue: requests that may wait there.
        begun: when it was last given a request, on the monotonic clock.
        heard: when it last said anything.
        misses: looks in turn that it did not answer.
        look: set to have it looked at now.
    """

    address: str
    number: int
    out: str | None = UNSEEN
    places: int = PLACES
    queue: int = QUEUE
    begun: float = 0
    heard: float = field(default_factory=time.monotonic)
    misses: int = 0
    look: asyncio.Event = field(default_factory=asyncio.Event)
    _under_way: set[Patience] = field(default_factory=set)

    @property
    def under_way(self) -> int:
        """Count requests that it has not answered yet."""
        return len(self._under_way)

    @property
    def load(self) -> float:
        """Give requests for each of its places."""
        return self.under_way / self.places

    @property
    def has_room(self) -> bool:
        """Say whether another request could at least wait there."""
        return self.under_way < self.places + self.queue

    def begin(self, patience: Patience) -> None:
        """Count a request as under way."""
        self.begun = time.monotonic()
        self._under_way.add(patience)

    def end(self, patience: Patience) -> None:
        """Count it no more."""
        self._under_way.discard(patience)

    def give_up(self) -> None:
        """End what is under way: nobody expects an answer any more."""
        for each in list(self._under_way):
            each.give_up()


class Backends:
    """Chooses a worker for each request; for one event loop.

    Args:
        addresses: `host:port` of each.
        tell: takes sentences for whoever runs this.
    """

    def __init__(self, addresses: Sequence[str], tell: Callable[[str], None]):
        self.all = [Backend(address, i) for i, address in enumerate(addresses)]
        self._tell = tell
        self._readers = Readers()

    @property
    def there(self) -> list[Backend]:
        """Give those that get requests."""
        return [each for each in self.all if each.out is None]

    def let_in(self, backend: Backend, what: str) -> None:
        """Give a worker requests from now on; what it had read is gone."""
        backend.out, backend.misses = None, 0
        self._readers.forget(backend.number)
        self._tell(f"worker {backend.address} answers: {what}")

    def leave_out(self, backend: Backend, why: str) -> None:
        """Give a worker no more requests until it is let in."""
        if backend.out != why:
            backend.out = why
            self._tell(f"worker {backend.address} is left out: {why}")

    def choose(self, beginnings: Beginnings, left: Sequence[Backend]) -> Backend:
        """Choose the worker for a request, of those `left` that have not refused it.

        Raises:
            Refused: none is there, or all are full.
        """
        if not self.there:
            raise Refused(503, "none of the workers answers, try again soon", "no_worker")
        able = [each for each in left if each.out is None and each.has_room]
        if not able:
            raise Refused(429, "all workers are busy, try again soon", "queue_full")
        least = _least(able)
        for digest, goes_on in beginnings.longest_first():
            numbers = self._readers.of(digest)
            if readers := [each for each in able if each.number in numbers]:
                best = _least(readers)
                return best if best.load - least.load <= (SLACK if goes_on else 0) else least
        return least

    def note(self, beginnings: Beginnings, backend: Backend) -> None:
        """Note that a worker has read a conversation."""
        self._readers.note(beginnings, backend.number)


def _least(backends: Sequence[Backend]) -> Backend:
    """The one with the fewest requests for its places; of equals who has had none for longest."""
    return min(backends, key=lambda each: (each.load, each.begun))
