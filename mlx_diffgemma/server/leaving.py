"""Stops work that nobody waits for: the client has gone, or its time is over."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import Request as Http

from .refused import Refused, stopping

Result = TypeVar("Result")

# Seconds between two looks at whether a client is still there.
LOOK_SECONDS = 0.1


async def unless_gone(
    http: Http,
    work: Coroutine[Any, Any, Result],
    close: Callable[[], None],
    seconds: float | None = None,
) -> Result:
    """Do the work, and call `close` where it fails, its time is over, or nobody waits.

    Raises:
        TimeoutError: after `seconds`; the work is cancelled.
        Refused: the client has gone, or the server stops.
    """

    async def gone() -> None:
        while not await http.is_disconnected():
            await asyncio.sleep(LOOK_SECONDS)

    task, watch = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        first = asyncio.FIRST_COMPLETED
        done, _ = await asyncio.wait({task, watch}, timeout=seconds, return_when=first)
        if not done:
            raise TimeoutError
        if not task.done():
            raise Refused(499, "the client has gone")
        return task.result()
    except asyncio.CancelledError:  # the time that a shutdown grants is over
        close()
        raise stopping() from None
    except BaseException:
        close()
        raise
    finally:
        for each in (task, watch):
            each.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await each
