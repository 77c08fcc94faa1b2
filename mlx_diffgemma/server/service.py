"""Gives routes what they need: a worker that answers, and threads that prepare requests."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property, partial
from typing import Any, TypeVar, cast

from fastapi import Request as Http

from ..tasks.generate import Answer, Request
from ..tasks.request import Prepared, Task
from ..text.tokenizer import Message
from .body import Body, ignored
from .leaving import unless_gone
from .pictures import sees, with_pictures
from .preparing import QUICK_BYTES, Places
from .refused import Refused
from .stream import Stream
from .worker import Patience, Timeout, Worker

Result = TypeVar("Result")

Item = TypeVar("Item")


class Service:
    """Offers a model under a name to the routes of any API.

    Attributes:
        worker: answers what is prepared.
        name: the model's, as clients are told.
        aliases: further names by which it is found.
        started: seconds since the epoch.
    """

    def __init__(self, worker: Worker, name: str, aliases: Sequence[str] = ()):
        self.worker = worker
        self.name, self.aliases = name, tuple(aliases)
        self.started = int(time.time())
        self._places = Places()

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Describe the model as `/v1/models` does; lengths are in tokens."""
        model, tokenizer = self.worker.model, self.worker.tokenizer
        return {
            "id": self.name,
            "object": "model",
            "created": self.started,
            "owned_by": "local",
            "type": "model",  # this and the next two for Anthropic's client
            "display_name": self.name,
            "created_at": datetime.fromtimestamp(self.started, UTC).isoformat(),
            "aliases": self.aliases,
            "context_length": model.context,
            "canvas_length": model.config.canvas_length,
            "denoising_steps": model.generation.max_denoising_steps,
            "thinking": tokenizer.knows_thinking,
            "tools": tokenizer.knows_tools,
            "images": sees(model),
            "adapter": model.adapter,
        }

    def find(self, name: str) -> dict[str, Any]:
        """Describe the model of this name or alias.

        Raises:
            Refused: there is none.
        """
        if name not in (self.name, *self.aliases):
            raise Refused(404, f"there is no model {name!r} here", "model_not_found")
        return self.facts

    async def prepare(self, http: Http, task: Task[Item]) -> tuple[Prepared[Item], Patience]:
        """Prepare a task, and tell the patience that is left for it.

        Raises:
            Error: as the task's own `prepare`.
            Refused: the client has gone, or the time is over.
        """
        return await self.make(http, lambda patience: self.worker.prepare(task, patience))

    async def chat(
        self, http: Http, make: Callable[[], Request], *, slow: bool
    ) -> tuple[Answer, Patience]:
        """Prepare the chat that `make` gives, whose pictures nobody has read yet; see `make`."""

        def work(patience: Patience) -> Answer:
            request = make()
            messages = cast("Sequence[Message]", request.prompt)
            seen = with_pictures(messages, self.worker.model, patience.check)
            found = self.worker.prepare(replace(request, prompt=seen), patience)
            assert isinstance(found, Answer)
            return found

        return await self.make(http, work, slow=slow)

    async def make(
        self, http: Http, make: Callable[[Patience], Result], *, slow: bool = False
    ) -> tuple[Result, Patience]:
        """Call `make` in a thread of its own, and tell the patience that is left.

        Others go on meanwhile, in this loop and in the worker. What is `slow` for few bytes, such
        as a schema, waits for others of its kind only.

        Raises:
            Error: as `make` does.
            Refused: the client has gone, or the time is over.
        """
        patience = self.worker.patience()
        length = http.headers.get("content-length", "")
        quick = not slow and length.isdecimal() and int(length) <= QUICK_BYTES

        def close() -> None:
            patience.gone = True

        work = self._places.prepare(partial(make, patience), quick=quick)
        try:
            return await unless_gone(http, work, close, patience.left), patience
        except (TimeoutError, Timeout):
            raise Refused(504, str(patience.timeout), "timeout") from None

    def stream(self, works: Sequence[Prepared[object]], patience: Patience) -> Stream:
        """Queue what is prepared, and give its events.

        Raises:
            Refused: the queue is full.
        """
        return Stream(self.worker, works, patience)

    def headers(self, body: Body) -> dict[str, str]:
        """Name, in headers of the answer, what was sent and means nothing here."""
        names = ",".join(ignored(body))
        return {"X-Ignored-Parameters": names} if names else {}
