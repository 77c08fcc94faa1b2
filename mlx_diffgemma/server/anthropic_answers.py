"""Puts Anthropic's answers together from events: whole, or in the events of a stream."""

import json
import uuid
from collections.abc import Iterator
from typing import Any, Literal

from ..tasks.request import Done
from ..text.turns import BadToolCall, Text, Thought, ToolCall
from .events import sse
from .refused import Refused, told

# What thoughts are signed with: clients send it back, and nobody looks at it.
UNSIGNED = "unsigned"

Kind = Literal["text", "thinking"]

_REASONS = {"length": "max_tokens"}


class MessageReply:
    """Puts an answer together, block by block.

    Args:
        model: its name, as clients are told.
        prompt_tokens: of what is read before.
        begun: what the client has begun the answer with, which is not told again.
    """

    def __init__(self, model: str, prompt_tokens: int, begun: str):
        self._facts = {
            "id": f"msg_{uuid.uuid4().hex[:24]}",
            "type": "message",
            "role": "assistant",
            "model": model,
        }
        self._prompt_tokens = prompt_tokens
        self._begun = begun
        self._content: list[dict[str, Any]] = []
        self._open: Kind | None = None
        self._called = False
        self._done: Done | None = None

    def begin(self) -> Iterator[str]:
        """Give the first event, which has no content yet."""
        usage = {"input_tokens": self._prompt_tokens, "output_tokens": 0}
        empty: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
        yield _event("message_start", message={**self._facts, **empty, "usage": usage})
        yield PING

    def take(self, event: object) -> Iterator[str]:
        """Take an event of the work, and give those of the stream that it adds."""
        match event:
            case Text():
                yield from self._add("text", self._unknown(event.text))
            case BadToolCall():  # the client sees what the model wrote
                yield from self._add("text", event.text)
            case Thought():
                yield from self._add("thinking", event.text)
            case ToolCall():
                yield from self._call(event)
            case Done():
                self._done = event

    def end(self) -> Iterator[str]:
        """Give the last events."""
        yield from self._close()
        yield _event("message_delta", delta=self._end, usage=self._usage)
        yield _event("message_stop")

    def whole(self) -> dict[str, Any]:
        """Give the finished answer as JSON."""
        list(self._close())
        return {**self._facts, "content": self._content, **self._end, "usage": self._usage}

    def _unknown(self, text: str) -> str:
        """Cut off what the client has begun the answer with."""
        length = min(len(text), len(self._begun))
        if text[:length] != self._begun[:length]:
            self._begun = ""
            return text
        self._begun = self._begun[length:]
        return text[length:]

    def _add(self, kind: Kind, text: str) -> Iterator[str]:
        """Go on with a block, or open one."""
        if not text:
            return
        if self._open != kind:
            yield from self._close()
            block = {"type": kind, kind: "", **({"signature": ""} if kind == "thinking" else {})}
            yield self._start(block)
            self._open = kind
        self._content[-1][kind] += text
        yield self._delta({"type": f"{kind}_delta", kind: text})

    def _call(self, call: ToolCall) -> Iterator[str]:
        yield from self._close()
        self._called = True
        identity = f"toolu_{uuid.uuid4().hex[:24]}"
        yield self._start({"type": "tool_use", "id": identity, "name": call.name, "input": {}})
        self._content[-1]["input"] = call.arguments
        written = json.dumps(call.arguments, ensure_ascii=False)
        yield self._delta({"type": "input_json_delta", "partial_json": written})
        yield _event("content_block_stop", index=len(self._content) - 1)

    def _start(self, block: dict[str, Any]) -> str:
        self._content.append(block)
        return _event("content_block_start", index=len(self._content) - 1, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> str:
        return _event("content_block_delta", index=len(self._content) - 1, delta=delta)

    def _close(self) -> Iterator[str]:
        if self._open == "thinking":
            self._content[-1]["signature"] = UNSIGNED
            yield self._delta({"type": "signature_delta", "signature": UNSIGNED})
        if self._open is not None:
            yield _event("content_block_stop", index=len(self._content) - 1)
        self._open = None

    @property
    def _end(self) -> dict[str, Any]:
        """Why it ended, in Anthropic's words."""
        assert self._done is not None
        stop = self._done.stop_string
        reason = _REASONS.get(self._done.finish_reason, "end_turn")
        if stop is not None:
            reason = "stop_sequence"
        elif self._called:
            reason = "tool_use"
        return {"stop_reason": reason, "stop_sequence": stop}

    @property
    def _usage(self) -> dict[str, int]:
        """Count tokens; those that had been read before are told apart."""
        assert self._done is not None
        return {
            "input_tokens": self._done.prompt_tokens - self._done.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self._done.cached_tokens,
            "output_tokens": self._done.generated_tokens,
        }


def _event(kind: str, **facts: Any) -> str:
    return sse({"type": kind, **facts}, kind)


PING = _event("ping")


def failed_event(error: Refused) -> str:
    """Write an error as an event."""
    return sse(told("/v1/messages", error), "error")
