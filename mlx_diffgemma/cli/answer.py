"""One answer: shown while it comes, and put together for JSON."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from ..diffusion.prompt_cache import PromptCache, Reading
from ..tasks.generate import Request
from ..tasks.request import Done, Draft, Event, Notice, stream
from ..text.tokenizer import Tokenizer
from ..text.turns import BadToolCall, Text, Thought, ToolCall
from .display import Screen, progress, summary, told
from .options import Load
from .strict import tell_unsettled
from .terminal import put, say


def answer_one(
    request: Request,
    load: Load,
    file: Path | None,
    *,
    show: bool,
    as_json: bool,
    quiet: bool,
    strict: bool,
) -> None:
    """Answer a request; `file` keeps what is read for it, and holds what was read before.

    Raises:
        SystemExit: with `strict`, the answer did not converge.
    """
    model, tokenizer = load()
    cache = PromptCache(model)
    if file is not None and file.exists():
        cache, _ = PromptCache.load(file, model)
    show = show and not quiet
    with Screen(Console(stderr=True, highlight=False), sys.stdout, live=not quiet) as screen:
        answer = Answer(screen, tokenizer, show=show, as_json=as_json, quiet=quiet)
        events: Iterator[Event] = stream(model, tokenizer, request, cache)
        for event in events:
            answer.take(event)
        answer.end()
    if file is not None:
        cache.save(file)
    if not answer.converged:
        tell_unsettled("the answer", strict=strict)


class Answer:
    """Takes the events of an answer."""

    def __init__(
        self, screen: Screen, tokenizer: Tokenizer, *, show: bool, as_json: bool, quiet: bool
    ):
        self._screen, self._tokenizer = screen, tokenizer
        self._show, self._as_json, self._quiet = show, as_json, quiet
        self._text = self._thought = ""
        self._calls: list[dict[str, Any]] = []
        self._done: Done | None = None

    def take(self, event: Event) -> None:
        """Show an event, or keep it for the end."""
        screen = self._screen
        match event:
            case Draft() if screen.live and self._show:
                screen.draft(event, self._tokenizer.pieces(event.tokens))
            case Draft() if screen.live:
                screen.step(event)
            case Draft() if self._show:
                say(f"{progress(event)} | {event.text!r}")
            case Reading() if not self._quiet:
                screen.reading(event.done, event.total)
            case Text():
                self._text += event.text
                if not self._as_json:
                    screen.text(event.text)
            case Thought():
                self._thought += event.text
            case ToolCall():
                self._calls.append(vars(event))
            case BadToolCall() if not self._quiet:
                screen.note(f"[a tool call that cannot be read: {event.problem}]")
            case Notice() if not self._quiet:
                screen.note(told(event))
            case Done():
                self._done = event

    @property
    def converged(self) -> bool:
        """Whether the answer is what the model settled on."""
        return self._done is not None and self._done.finish_reason != "not_converged"

    def end(self) -> None:
        """Show what comes once the answer is complete."""
        assert self._done is not None
        if self._as_json:
            parts = {"text": self._text, "thought": self._thought, "tool_calls": self._calls}
            put(json.dumps({**parts, **vars(self._done)}, ensure_ascii=False))
        else:
            for call in self._calls:
                self._screen.text(json.dumps(call, ensure_ascii=False))
            self._screen.end()
        if self._quiet:
            return
        if self._thought and not self._as_json:
            self._screen.note(self._thought.strip())
        self._screen.note(summary(self._done))
