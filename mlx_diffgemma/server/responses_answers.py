"""Puts answers of OpenAI's Responses together from events: whole, or in the events of a stream."""

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any, Literal

from ..tasks.request import Done
from ..text.tokenizer import Message, Tokenizer
from ..text.turns import BadToolCall, Text, Thought, ToolCall
from .events import sse
from .openai_answers import Choice
from .refused import Refused
from .responses_body import ResponsesBody
from .responses_tools import INPUT, declared

Kind = Literal["message", "reasoning"]


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


class ResponseReply:
    """Puts a response together, item by item."""

    def __init__(self, body: ResponsesBody, model: str, tokenizer: Tokenizer):
        self._choice = Choice(tokenizer.pieces if body.weighs else None)
        self._weighs = body.weighs
        self._tokenizer = tokenizer
        self._tools = declared(body.tools or ())
        self._output: list[dict[str, Any]] = []
        self._calls: list[dict[str, Any]] = []
        self._open: Kind | None = None
        self._number = 0  # of the next event
        self._facts = {"id": _id("resp"), "object": "response", "created_at": int(time.time())}
        self._facts |= {"model": model, **_echoed(body)}

    def begin(self) -> Iterator[str]:
        """Give the first events, which have no content yet."""
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=self._response("in_progress"))

    def take(self, event: object) -> Iterator[str]:
        """Take an event of the work, and give those of the stream that it adds."""
        self._choice.take(event)
        match event:
            case Text() | BadToolCall():  # of the second the client sees what the model wrote
                yield from self._add("message", event.text)
            case Thought():
                yield from self._add("reasoning", event.text)
            case ToolCall():
                yield from self._call(event)

    def end(self) -> Iterator[str]:
        """Give the last events."""
        yield from self._close()
        whole = self.whole()
        yield self._event(f"response.{whole['status']}", response=whole)

    def whole(self) -> dict[str, Any]:
        """Give the finished response as JSON."""
        list(self._close())
        done = self._choice.done
        assert done is not None
        cut = done.finish_reason == "length" and not self._calls
        found = self._response("incomplete" if cut else "completed")
        found["usage"] = self._usage(done)
        if cut:
            return {**found, "incomplete_details": {"reason": "max_output_tokens"}}
        return {**found, "completed_at": int(time.time())}

    def failed(self, error: Refused) -> str:
        """Write an error as the last events."""
        facts = {"code": error.code or "server_error", "message": error.message}
        told = self._event("error", **facts, param=error.param)
        response = {**self._response("failed"), "error": facts}
        return told + self._event("response.failed", response=response)

    def message(self) -> Message:
        """Give what was said as templates want it, for whoever goes on with it."""
        found: Message = {"role": "assistant", "content": self._choice.text}
        if self._choice.thought:
            found["reasoning"] = self._choice.thought
        if self._calls:
            found["tool_calls"] = self._calls
        return found

    def _response(self, status: str) -> dict[str, Any]:
        nothing = {"error": None, "incomplete_details": None}
        return {**self._facts, "status": status, **nothing, "output": [*self._output]}

    def _usage(self, done: Done) -> dict[str, Any]:
        thought = len(self._tokenizer.encode(self._choice.thought)) if self._choice.thought else 0
        read, written = done.prompt_tokens, done.generated_tokens
        return {
            "input_tokens": read,
            "input_tokens_details": {"cached_tokens": done.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": written,
            "output_tokens_details": {"reasoning_tokens": thought},
            "total_tokens": read + written,
        }

    def _event(self, kind: str, **facts: Any) -> str:
        number, self._number = self._number, self._number + 1
        return sse({"type": kind, "sequence_number": number, **facts}, kind)

    def _add(self, kind: Kind, text: str) -> Iterator[str]:
        """Go on with an item, or open one."""
        if not text:
            return
        if self._open != kind:
            yield from self._close()
            if kind == "message":
                item = {"id": _id("msg"), "type": kind, "role": "assistant", "content": []}
                part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            else:
                item = {"id": _id("rs"), "type": kind, "summary": [], "content": []}
                part = {"type": "reasoning_text", "text": ""}
            yield self._start({**item, "status": "in_progress"})
            self._output[-1]["content"] = [part]
            yield self._of_part("response.content_part.added", part=part)
            self._open = kind
        (part,) = self._output[-1]["content"]
        part["text"] += text
        more = {}
        if kind == "message":
            more["logprobs"], self._choice.logprobs = self._choice.logprobs, []
            part["logprobs"] += more["logprobs"]
        yield self._of_part(f"response.{part['type']}.delta", delta=text, **more)

    def _call(self, call: ToolCall) -> Iterator[str]:
        yield from self._close()
        identity = _id("call")
        function = {"name": call.name, "arguments": call.arguments}
        self._calls.append({"id": identity, "type": "function", "function": function})
        known = self._tools.get(call.name)
        named = {"call_id": identity, "name": call.name if known is None else known.name}
        if known is not None and known.namespace is not None:
            named["namespace"] = known.namespace
        if known is not None and known.custom and isinstance(call.arguments.get(INPUT), str):
            yield from self._written("custom_tool_call", "input", call.arguments[INPUT], named)
        else:
            written = json.dumps(call.arguments, ensure_ascii=False)
            yield from self._written("function_call", "arguments", written, named)

    def _written(self, kind: str, field: str, text: str, named: dict[str, str]) -> Iterator[str]:
        """Give the events of a call, which is written at once."""
        prefix = "fc" if kind == "function_call" else "ctc"
        item = {"id": _id(prefix), "type": kind, **named, field: ""}
        yield self._start({**item, "status": "in_progress"})
        self._output[-1][field] = text
        more = {"name": named["name"]} if kind == "function_call" else {}
        yield self._of_item(f"response.{kind}_{field}.delta", delta=text)
        yield self._of_item(f"response.{kind}_{field}.done", **more, **{field: text})
        yield self._finish()

    def _start(self, item: dict[str, Any]) -> str:
        self._output.append(item)
        place = len(self._output) - 1
        return self._event("response.output_item.added", output_index=place, item=item)

    def _finish(self) -> str:
        item, place = self._output[-1], len(self._output) - 1
        item["status"] = "completed"
        return self._event("response.output_item.done", output_index=place, item=item)

    def _close(self) -> Iterator[str]:
        """End the item that is open."""
        if self._open is None:
            return
        (part,) = self._output[-1]["content"]
        more = {"logprobs": part["logprobs"]} if self._open == "message" else {}
        self._open = None
        yield self._of_part(f"response.{part['type']}.done", text=part["text"], **more)
        yield self._of_part("response.content_part.done", part=part)
        yield self._finish()

    def _of_item(self, kind: str, **facts: Any) -> str:
        place = len(self._output) - 1
        return self._event(kind, item_id=self._output[-1]["id"], output_index=place, **facts)

    def _of_part(self, kind: str, **facts: Any) -> str:
        return self._of_item(kind, content_index=0, **facts)


def _echoed(body: ResponsesBody) -> dict[str, Any]:
    """What a response says of its request."""
    form = None if body.text is None else body.text.format
    return {
        "instructions": body.instructions,
        "previous_response_id": body.previous_response_id,
        "store": body.store is not False,
        "max_output_tokens": body.max_output_tokens,
        "tools": [tool.model_dump(exclude_unset=True) for tool in body.tools or ()],
        "tool_choice": body.tool_choice or "auto",
        "parallel_tool_calls": True,
        "reasoning": {"effort": None if body.reasoning is None else body.reasoning.effort},
        "text": {
            "format": {"type": "text"}
            if form is None
            else form.model_dump(exclude_unset=True, by_alias=True)
        },
        "top_logprobs": body.top_logprobs or 0,
        "truncation": "disabled",
        "metadata": body.metadata or {},
        "temperature": None,
        "top_p": None,
        "usage": None,
    }
