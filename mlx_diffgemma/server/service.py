"""Gives routes what they need: models by name, workers that answer, threads that prepare."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from typing import Any, TypeVar, cast

from fastapi import Request as Http

from ..diffusion.decoding import Decoding
from ..diffusion.prompt_cache import PromptCache
from ..tasks.generate import Answer, Request
from ..tasks.request import Prepared, Task
from ..text.tokenizer import Message
from .body import Body, ignored
from .leaving import unless_gone
from .pictures import sees, with_pictures
from .preparing import QUICK_BYTES, Places
from .refused import Refused
from .stream import Stream, gathered
from .worker import Patience, Timeout, Worker

Result = TypeVar("Result")

Item = TypeVar("Item")


@dataclass(frozen=True)
class Nothing:
    """Asks for nothing but that the model is loaded."""

    prompt: tuple[int, ...] = ()

    def run(self, prompt_cache: PromptCache) -> Decoding[object, None]:
        """End at once."""
        yield from ()


class Service:
    """Offers a model to the routes of any API.

    Attributes:
        worker: answers what is prepared.
        started: seconds since the epoch.

    Args:
        worker: the model's.
        places: where requests are prepared, for all models together.
    """

    def __init__(self, worker: Worker, places: Places):
        self.worker = worker
        self.started = int(time.time())
        self._places = places

    @property
    def name(self) -> str:
        """Give the model's name, as clients are told."""
        return self.worker.name

    @property
    def facts(self) -> dict[str, Any]:
        """Describe the model as `facts_at_start`, and say whether it is in memory."""
        return {**self.facts_at_start, "loaded": self.worker.loaded}

    @cached_property
    def facts_at_start(self) -> dict[str, Any]:
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
            "aliases": self.worker.aliases,
            "context_length": model.context,
            "canvas_length": model.config.canvas_length,
            "denoising_steps": model.generation.max_denoising_steps,
            "thinking": tokenizer.knows_thinking,
            "tools": tokenizer.knows_tools,
            "images": sees(model),
            "adapter": model.adapter,
        }

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

    async def warm(self, http: Http) -> None:
        """Have the model loaded, and wait for it.

        Raises:
            Refused: it cannot be loaded, the queue is full, or the time is over.
        """
        if not self.worker.loaded:
            await gathered(http, self.stream([Nothing()], self.worker.patience()))

    def headers(self, body: Body) -> dict[str, str]:
        """Name, in headers of the answer, what was sent and means nothing here."""
        names = ",".join(ignored(body))
        return {"X-Ignored-Parameters": names} if names else {}


class Models:
    """Finds the service of a model; the first one answers where a request names none."""

    def __init__(self, workers: Sequence[Worker]):
        places = Places()
        self.services = [Service(worker, places) for worker in workers]
        self._by_name = {
            name: service
            for service in self.services
            for name in (*service.worker.aliases, service.name)
        }

    def answering(self, name: str | None) -> Service:
        """Give what answers a request that names this model. One that is alone answers to any name.

        Raises:
            Refused: there are several, and none of them is called so.
        """
        if len(self.services) == 1 or not name:
            return self.services[0]
        return self.find(name)

    def find(self, name: str) -> Service:
        """Give the service of the model of this name or alias.

        Raises:
            Refused: there is none.
        """
        if name not in self._by_name:
            known = ", ".join(each.name for each in self.services)
            there = f"; there are {known}" if len(self.services) > 1 else ""
            said = f"there is no model {name!r} here{there}"
            raise Refused(404, said, "model_not_found", "model" if there else None)
        return self._by_name[name]
