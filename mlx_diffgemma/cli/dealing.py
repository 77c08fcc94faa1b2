"""Work that rank 0 and others divide among them, and what comes back of it: prompts, runs."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..distributed.launch import LaunchError
from ..measure.evaluate import Case, Outcome
from .batchfile import Answers
from .ranks import ending
from .terminal import say

if TYPE_CHECKING:
    from ..distributed.link import Link

# Seconds between two looks at whether all is to end, and those in which the last answers come then.
LOOK, LAST = 0.2, 1.0


class Dealt:
    """What other ranks answer of the requests `left`: rank r each r-th of them.

    Their content goes to them as bytes: a file need not be on every Mac. Answers are counted where
    one's own are.
    """

    def __init__(self, link: "Link | None", content: bytes, left: Sequence[int], answers: Answers):
        self._link = link
        self._answers = answers
        self._due: dict[int, set[int]] = {}
        if link is None:
            return
        for rank in range(1, link.place.size):
            mine = list(left[rank :: link.place.size])
            self._due[rank] = set(mine)
            link.send(json.dumps(mine).encode(), rank)
            link.send(content, rank)

    def __contains__(self, index: int) -> bool:
        return any(index in due for due in self._due.values())

    @contextmanager
    def ending(self) -> Iterator[threading.Event]:
        """Set once all is to end: the launcher ends all ranks if one has failed."""
        if self._link is None:
            yield threading.Event()
            return
        with ending() as wanted:
            yield wanted

    def heard(self, seconds: float = 0) -> Iterator[tuple[int, str]]:
        """Numbers and lines that have come; where none has, those of the next so many seconds."""
        while self._link is not None and (found := self._link.received(seconds)) is not None:
            seconds = 0
            rank, message = found
            if message is None or message.startswith(b"!"):
                self._drop(rank, message)
                continue
            line = message[1:].decode()
            index = self._answers.count(line)
            self._due[rank].discard(index)
            yield index, line

    def rest(self, ended: threading.Event) -> Iterator[tuple[int, str]]:
        """All that is still to come, or what comes in the last moments before the end."""
        while any(self._due.values()) and not ended.is_set():
            yield from self.heard(LOOK)
        if any(self._due.values()):
            yield from self.heard(LAST)

    def _drop(self, rank: int, message: bytes | None) -> None:
        """A rank answers no more; it has said why, or not."""
        if self._due.pop(rank, None):
            reason = "is lost" if message is None else f"has failed: {message[1:].decode()}"
            say(f"warning: rank {rank} {reason}")


def given(link: "Link") -> tuple[bytes, list[int]]:
    """What rank 0 gives this rank: a file's content, and the numbers of its requests.

    Raises:
        LaunchError: it is lost.
    """
    parts = []
    for _ in range(2):
        found = link.received()
        if found is None or found[1] is None:
            raise LaunchError("rank 0 is lost")
        parts.append(found[1])
    return parts[1], json.loads(parts[0])


class Shared:
    """Runs of `eval`: rank r does each r-th of them, rank 0 has all outcomes."""

    def __init__(self, link: "Link", ran: Callable[[], None]):
        self._link = link
        self._ran = ran  # called in rank 0 for each that another has done
        self._calls = 0
        self._found: dict[tuple[int, int], Outcome] = {}
        self._ended: set[int] = set()

    def __call__(
        self, jobs: Sequence[tuple[Case, int]], run: Callable[[tuple[Case, int]], Outcome]
    ) -> list[Outcome] | None:
        """Outcomes in the order of the jobs; None in another rank than 0, which does not wait.

        Raises:
            LaunchError: a rank is lost, or has failed.
        """
        here, call = self._link.place, self._calls
        self._calls += 1
        for i in range(here.rank, len(jobs), here.size):
            outcome = run(jobs[i])
            if here.leads:
                self._found[call, i] = outcome
            else:
                self._link.send(b"=" + json.dumps([call, i, asdict(outcome)]).encode())
        if not here.leads:
            return None
        wanted = [(call, i) for i in range(len(jobs))]
        while missing := [i for call, i in wanted if (call, i) not in self._found]:
            if lost := {i % here.size for i in missing} & self._ended:
                raise LaunchError(f"rank {min(lost)} is lost; run the command again")
            self._hear()
        return [self._found.pop(key) for key in wanted]

    def _hear(self) -> None:
        found = self._link.received()
        assert found is not None
        rank, message = found
        if message is None:
            self._ended.add(rank)  # behind its last run, or before
        elif message.startswith(b"!"):
            raise LaunchError(f"rank {rank} has failed: {message[1:].decode()}")
        else:
            call, i, outcome = json.loads(message[1:])
            self._found[call, i] = Outcome(**outcome)
            self._ran()
