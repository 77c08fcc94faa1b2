"""What rendering a chat template may take: time, and characters in memory."""

import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace

# Characters that one value, and that all values together may take, beside multiples of the input.
MOST_OF_ONE, ONE_BY_INPUT = 4_000_000, 4

MOST_IN_ALL, ALL_BY_INPUT = 64_000_000, 16

# An item of a container takes about as much memory as so many characters.
ITEM = 16

# Values nested deeper would exhaust Python's stack somewhere.
MOST_DEPTH = 100

# Seconds of this thread's processor; others' load does not count. A chat takes milliseconds.
MOST_SECONDS = 2.0

# Steps between looks at the clock; one takes some milliseconds at most.
STEPS_A_LOOK = 32

_SMALL = (bool, int, float, types.NoneType)

_NONE: dict[str, str] = {}

_VIEWS = type(_NONE.keys()), type(_NONE.values()), type(_NONE.items())

_CONTAINERS: tuple[Any, ...] = (list, tuple, set, frozenset, *_VIEWS)


class Budget:
    """What one rendering may still take."""

    def __init__(self, *given: object):
        self._known: dict[int, int] = {}  # sizes of the input's containers, which outlive us
        self._one, self._all = MOST_OF_ONE, MOST_IN_ALL
        size = sum(self._size(value, 0, self._known) for value in given)
        self._one += ONE_BY_INPUT * size
        self._all += ALL_BY_INPUT * size
        self._steps = 0
        self._ends = time.thread_time() + MOST_SECONDS

    def step(self) -> None:
        """Count something that takes a bounded time."""
        self._steps += 1
        if not self._steps % STEPS_A_LOOK and time.thread_time() > self._ends:
            raise SecurityError(f"it takes more than {MOST_SECONDS:.0f} seconds")

    def size(self, value: object) -> int:
        """Return characters of a value, contents included; what would be too large is refused."""
        if type(value) is str:
            return self.fits(len(value))
        return self._size(value, 0, None)

    def fits(self, size: int) -> int:
        """Refuse to make a value of so many characters."""
        if size > self._one:
            raise SecurityError(f"it makes a value of more than {self._one} characters")
        return size

    def made(self, value: Any) -> Any:
        """Count a value that the template made."""
        if type(value) is str:
            size = len(value)
            if size > self._one:
                self.fits(size)
        elif type(value) in _SMALL or id(value) in self._known:
            return value
        else:
            size = self._size(value, 0, None)
        self._all -= size
        if self._all < 0:
            raise SecurityError("its values take too much memory")
        return value

    def _size(self, value: Any, depth: int, known: dict[int, int] | None) -> int:
        """Return the size of a value, unbounded while `known` is filled with those of the input."""
        if isinstance(value, str):
            return self.fits(len(value)) if known is None else len(value)
        if id(value) in self._known:
            return self._known[id(value)] + ITEM
        parts = value
        if isinstance(value, dict):
            size, parts = 2 * ITEM * len(value), chain(value, value.values())
        elif isinstance(value, _CONTAINERS):
            size = ITEM * len(value)
        elif isinstance(value, Namespace):  # whose text is that of all it holds
            raise SecurityError("a namespace inside a value is not supported")
        else:
            return ITEM
        if depth > MOST_DEPTH:
            raise SecurityError("its values are nested too deeply")
        for part in parts:
            size += len(part) if type(part) is str else self._size(part, depth + 1, known)
            if known is None and size > self._one:
                self.fits(size)
        if known is not None:
            known[id(value)] = size
        return size + ITEM


budget_now: ContextVar[Budget] = ContextVar("budget")


@contextmanager
def within(*given: object) -> Iterator[None]:
    """Render or compile with a fresh budget that grows with the input."""
    before = budget_now.set(Budget(*given))
    try:
        yield
    finally:
        budget_now.reset(before)
