"""Asks workers how they are, again and again: whether they answer, and whether with one model."""

import asyncio
import json
import time
from contextlib import suppress
from typing import Any

import httpx

from .backends import PLACES, QUEUE, UNSEEN, Backend, Backends

# Seconds between two looks at a worker, and seconds that it may take to answer one.
LOOK_EVERY, LOOK_SECONDS = 1.0, 3.0

# Looks in turn that a worker may not answer before it is left out: its machine may be busy.
MISSES = 3

# How much rarer a worker is looked at that does not answer, and has nothing under way.
MOST_PAUSES = 10

# Seconds without a word from a worker after which what it had under way is given up.
SILENT_SECONDS = 30

# Bytes of what a worker says of itself.
MOST_FACTS = 1 << 20

# Models of a worker.
MOST_MODELS = 1000

FOREIGN = "it is none of our servers, or too old"


class Unanswered(Exception):
    """Says in a few words why a worker cannot be given requests."""


class Lookout:
    """Lets workers in and leaves them out, by what they say of themselves.

    Args:
        backends: the workers.
        client: asks them.
    """

    def __init__(self, backends: Backends, client: httpx.AsyncClient):
        self._backends = backends
        self._client = client
        self._model: Any = None  # what all have to serve

    async def watch(self) -> None:
        """Look at all workers, until this is cancelled."""
        async with asyncio.TaskGroup() as group:
            for each in self._backends.all:
                group.create_task(self._watch(each))

    async def first(self, seconds: float) -> None:
        """Wait until all workers have been looked at once, but not for longer."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while any(each.out == UNSEEN for each in self._backends.all):
                    await asyncio.sleep(0.01)

    async def _watch(self, backend: Backend) -> None:
        while True:
            await self.look(backend)
            # A name that nobody knows keeps a thread for longer than one look.
            times = 1 if backend.under_way else min(max(backend.misses, 1), MOST_PAUSES)
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY * times):
                    await backend.look.wait()
            backend.look.clear()

    async def look(self, backend: Backend) -> None:
        """Ask a worker how it is."""
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                await self._look(backend)
            backend.misses = 0
        except Unanswered as error:
            self._backends.leave_out(backend, str(error))
        except (TimeoutError, httpx.ConnectTimeout):
            backend.misses += 1
            if backend.out is not None or self._is_late(backend):
                self._backends.leave_out(backend, "it does not answer in time")
        except httpx.ConnectError:
            self._backends.leave_out(backend, "it cannot be connected to")
        except httpx.HTTPError:  # it has closed the connection, or speaks something else
            self._backends.leave_out(backend, "it does not answer as a server does")
        except Exception as error:  # of a defect: whoever looks goes on looking
            self._backends.leave_out(backend, f"it cannot be asked ({type(error).__name__})")
        if self._is_silent(backend):
            backend.give_up()

    def _is_silent(self, backend: Backend) -> bool:
        return time.monotonic() - backend.heard > SILENT_SECONDS

    def _is_late(self, backend: Backend) -> bool:
        """Say whether a worker is to be left out; where all are slow, the last one is not."""
        others = any(each is not backend for each in self._backends.there)
        return self._is_silent(backend) or (others and backend.misses >= MISSES)

    async def _look(self, backend: Backend) -> None:
        """Take what a worker says of itself, and let it in.

        Raises:
            Unanswered: it says nothing that one of our servers would, or serves another model.
            httpx.HTTPError: it says nothing.
        """
        status, state = await self._facts(backend, "/health")
        if "workers" in state:
            raise Unanswered("it stands before workers itself")
        if state.get("status") == "stopping":
            raise Unanswered("it stops")
        if status != 200 or state.get("status") != "ok":
            raise Unanswered(FOREIGN)
        backend.heard = time.monotonic()
        backend.places = _count(state.get("max_batch"), PLACES)
        backend.queue = _count(state.get("max_queue"), QUEUE)
        if backend.out is None:
            return
        status, given = await self._facts(backend, "/v1/models")
        if status == 401:
            raise Unanswered("it wants another key (--api-key)")
        models: Any = given.get("data")
        if status != 200 or not _are_models(models):
            raise Unanswered(FOREIGN)
        model = sorted(f"{each['id']!s:.200} (canvas {each['canvas_length']})" for each in models)
        if not self._backends.there:
            self._model = model
        if model != self._model:
            told = f"it serves {', '.join(model)}, and the others {', '.join(self._model)}"
            raise Unanswered(told)
        backend.context = sum(each["context_length"] for each in models)
        told = f"{', '.join(model)}, context {backend.context}, {backend.places} at a time"
        self._backends.let_in(backend, told)

    async def _facts(self, backend: Backend, path: str) -> tuple[int, dict[str, Any]]:
        """Ask for a small object.

        Raises:
            Unanswered: it is none.
            httpx.HTTPError: nothing comes.
        """
        url, body = f"http://{backend.address}{path}", bytearray()
        async with self._client.stream("GET", url) as reply:
            async for chunk in reply.aiter_raw():
                body += chunk
                if len(body) > MOST_FACTS:
                    raise Unanswered(FOREIGN)
        try:
            found = json.loads(body)
        except (ValueError, RecursionError):
            raise Unanswered(FOREIGN) from None
        if not isinstance(found, dict):
            raise Unanswered(FOREIGN)
        return reply.status_code, found


def _count(given: Any, otherwise: int) -> int:
    """A number that a worker says, if it is one."""
    return given if isinstance(given, int) and 0 < given < 1 << 20 else otherwise


def _are_models(given: Any) -> bool:
    """Say whether a worker tells what it serves."""
    return (
        isinstance(given, list)
        and 0 < len(given) <= MOST_MODELS
        and all(
            isinstance(each, dict)
            and {"id", "canvas_length", "context_length"} <= each.keys()
            and isinstance(each["context_length"], int)
            and isinstance(each["canvas_length"], int)
            for each in given
        )
    )
