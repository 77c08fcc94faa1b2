"""Prepares requests (encodes, compiles) in threads of their own, bounded in number."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

# Requests that are prepared at the same time: long or with a schema, which may take seconds, and
# all others, which take milliseconds and do not wait for those.
MOST_SLOW = 2

MOST_QUICK = 2

# Bytes of a body whose text is encoded in a few milliseconds.
QUICK_BYTES = 1 << 15


class Places:
    """Bounds how many requests are prepared side by side; for one event loop."""

    def __init__(self) -> None:
        self._slow = asyncio.Semaphore(MOST_SLOW)
        self._quick = asyncio.Semaphore(MOST_QUICK)

    async def prepare(self, make: Callable[[], Result], *, quick: bool) -> Result:
        """Call `make` in a thread, once there is a place. Cancelled, this leaves at once.

        A thread cannot be stopped, so it keeps its place until `make` sees that nobody waits.
        """
        places = self._quick if quick else self._slow
        await places.acquire()
        made = asyncio.get_running_loop().run_in_executor(None, make)

        def over(made: asyncio.Future[Result]) -> None:
            places.release()
            if not made.cancelled():
                made.exception()  # seen: nobody else may be left to look at it

        made.add_done_callback(over)
        return await asyncio.shield(made)
