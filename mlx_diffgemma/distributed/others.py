"""Rank 0's way to the others: what it tells and asks them, and whether all still do the same."""

import pickle
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from queue import Empty, Queue
from typing import Any, TypeVar

from .launch import LaunchError

Item = TypeVar("Item")

# Seconds in which the others fail as rank 0 has failed, or say what they were asked.
AGREEING = 10.0

# Seconds between two looks at whether an answer is still waited for.
LOOK = 0.05


class Others:
    """Tells all other ranks what to do; from any thread, each message as a whole.

    What is on their side for a thing of rank 0, a prompt cache for instance, has the thing's
    number. `broken` says that rank 0 was torn out of what all do at once, so no more is possible.

    Args:
        send: a message to all of them.
        size: how many ranks there are.
        end: ends this process with a sentence.
    """

    def __init__(self, send: Callable[[bytes], None], size: int, end: Callable[[str], None]):
        self._send, self._size, self._end = send, size, end
        self._numbers = count(1)
        self._dropped: deque[int] = deque()
        self._asked: dict[int, Queue[Any]] = {}
        self._telling = threading.Lock()
        self.broken = False
        self.busy = False  # with a request whose answer is not complete

    def number(self) -> int:
        """A number that nothing else has."""
        return next(self._numbers)

    def drop(self, number: int) -> None:
        """The others may forget what has this number; they are told with the next message.

        A finalizer may call it, in whatever thread, while another message is being sent.
        """
        self._dropped.append(number)

    def forget(self, number: int) -> None:
        """Have the others forget it now, and what they do for it."""
        self.drop(number)
        with suppress(LaunchError):
            self.tell("forget")

    def tell(self, kind: str, work: object = None) -> None:
        """Have all others do something, or take part in what rank 0 is about to do.

        Raises:
            LaunchError: ranks no longer do the same, or it cannot be said in bytes.
        """
        if self.broken:
            raise LaunchError("the ranks do no longer the same: start all of them again")
        with self._telling:
            dropped = [self._dropped.popleft() for _ in range(len(self._dropped))]
            try:
                message = packed((kind, work, dropped))
            except LaunchError:
                self._dropped.extend(dropped)
                raise
            self._send(message)

    def ask(self, kind: str, work: object, number: int) -> None:
        """Tell them something that each of them answers, see `answers`."""
        self._asked[number] = Queue()
        try:
            self.tell(kind, (number, work))
        except BaseException:
            del self._asked[number]
            raise

    def heard(self, message: bytes) -> None:
        """Take an answer: a number, and what is said."""
        number, said = pickle.loads(message)
        if (asked := self._asked.get(number)) is not None:
            asked.put(said)

    def answers(self, number: int, check: Callable[[], None]) -> list[Any]:
        """What each of the others has said; `check` may raise while one is waited for."""
        asked = self._asked[number]
        found: list[Any] = []
        try:
            while len(found) < self._size - 1:
                try:
                    found.append(asked.get(timeout=LOOK))
                except Empty:
                    check()
        finally:
            del self._asked[number]
        return found

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """What all do at once. What fails here has to fail everywhere, or nobody can go on."""
        try:
            yield
        except Exception as error:
            self._agree(error)
            raise
        except BaseException:  # Ctrl-C, in the midst of it
            self.broken = True
            raise

    def all_of(self, items: Generator[Item, None, None]) -> Generator[Item, None, None]:
        """Items of what all do at once, each found within `in_step`."""
        while True:
            with self.in_step():
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def _agree(self, error: Exception) -> None:
        """End all, unless each of the others has failed as well."""
        number, left = self.number(), int(AGREEING / LOOK)

        def check() -> None:
            nonlocal left
            left -= 1
            if not left:
                self._end(f"the other ranks do not fail as rank 0 does: {error}")

        self.ask("failed", None, number)
        if not all(self.answers(number, check)):
            self._end(f"the other ranks do not fail as rank 0 does: {error}")


def packed(said: object) -> bytes:
    """Bytes of a message.

    Raises:
        LaunchError: it cannot be said so.
    """
    try:
        return pickle.dumps(said)
    except (pickle.PicklingError, TypeError, AttributeError, RecursionError) as error:
        raise LaunchError(f"the other ranks cannot be told this: {error}") from None
