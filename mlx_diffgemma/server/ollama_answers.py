"""Puts Ollama's answers together from events: whole, or in the lines of a stream."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from ..text.turns import BadToolCall, Text, Thought, ToolCall
from .openai_answers import Choice
from .refused import Refused, told

# The version of Ollama whose API this is; clients ask for it, and want no older one.
SPOKEN = "0.12.6"

FAMILY = "diffusion_gemma"


def now() -> str:
    """Write the time as Ollama does."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


class OllamaReply:
    """Puts an answer together, for a chat or for a completion.

    Args:
        model: its name, as clients are told.
        chat: whether parts are messages; else they are responses.
        pieces: as `Choice` takes it.
    """

    def __init__(
        self, model: str, *, chat: bool, pieces: Callable[[Sequence[int]], list[str]] | None = None
    ):
        self._model, self._chat = model, chat
        self._choice = Choice(pieces)
        self._calls: list[dict[str, Any]] = []
        self._started = time.monotonic()

    def take(self, event: object) -> dict[str, Any]:
        """Take an event, and give what it adds as JSON; empty if nothing."""
        self._choice.take(event)
        match event:
            case Text() | BadToolCall():  # of the second the client sees what the model wrote
                weights, self._choice.logprobs = self._choice.logprobs, []
                more = {"logprobs": weights} if weights else {}
                return {**self._part({"content": event.text}), "done": False, **more}
            case Thought():
                return {**self._part({"thinking": event.text}), "done": False}
            case ToolCall():
                call = {"function": {"name": event.name, "arguments": event.arguments}}
                self._calls.append(call)
                return {**self._part({"tool_calls": [call]}), "done": False}
        return {}

    def end(self, **given: Any) -> dict[str, Any]:
        """Give the last part as JSON, or with what is `given` in it, the whole."""
        done = self._choice.done
        assert done is not None
        reason = "length" if done.finish_reason == "length" else "stop"
        return {
            **self._part(given),
            "done": True,
            "done_reason": reason,
            "total_duration": self._nanoseconds,
            "load_duration": 0,
            "prompt_eval_count": done.prompt_tokens,
            "prompt_eval_duration": int(done.prompt_seconds * 1e9),
            "eval_count": done.generated_tokens,
            "eval_duration": int(done.generation_seconds * 1e9),
        }

    def whole(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Give the finished answer as JSON, whose `parts` `take` has given."""
        given: dict[str, Any] = {"content": self._choice.text}
        if self._choice.thought:
            given["thinking"] = self._choice.thought
        if self._calls:
            given["tool_calls"] = self._calls
        weights = [each for part in parts for each in part.get("logprobs", ())]
        return {**self.end(**given), **({"logprobs": weights} if weights else {})}

    def infilled(self, text: str, read: int, written: int) -> dict[str, Any]:
        """Give what stands between a prompt and a suffix as JSON."""
        return {
            **self._part({"content": text}),
            "done": True,
            "done_reason": "stop",
            "total_duration": self._nanoseconds,
            "load_duration": 0,
            "prompt_eval_count": read,
            "eval_count": written,
        }

    def nothing(self, keep_alive: object) -> dict[str, Any]:
        """Answer that the model is there, where nothing is asked."""
        reason = "unload" if keep_alive in (0, "0") else "load"
        return {**self._part({}), "done": True, "done_reason": reason}

    @property
    def _nanoseconds(self) -> int:
        return int((time.monotonic() - self._started) * 1e9)

    def _part(self, given: dict[str, Any]) -> dict[str, Any]:
        common = {"model": self._model, "created_at": now()}
        if self._chat:
            return {**common, "message": {"role": "assistant", "content": "", **given}}
        return {**common, "response": given.pop("content", ""), **given}


def line(value: object) -> str:
    """Write a value as a line of a stream."""
    return json.dumps(value, ensure_ascii=False) + "\n"


def failed_line(error: Refused) -> str:
    """Write an error as a line."""
    return line(told("/api/", error))


def listed(facts: dict[str, Any]) -> dict[str, Any]:
    """Describe a model as lists of Ollama do, from what `/v1/models` says of it."""
    name = facts["id"]
    return {
        "name": name,
        "model": name,
        "modified_at": facts["created_at"],
        "size": 0,  # nothing is asked of the disk
        "digest": hashlib.sha256(name.encode()).hexdigest(),  # of the name: it tells models apart
        "details": details(),
    }


def details() -> dict[str, Any]:
    """Describe what kind of model it is."""
    return {"format": "mlx", "family": FAMILY, "families": [FAMILY], "parent_model": ""}


def shown(facts: dict[str, Any]) -> dict[str, Any]:
    """Describe a model as `/api/show` does, from what `/v1/models` says of it."""
    able = {"tools": facts["tools"], "thinking": facts["thinking"], "vision": facts["images"]}
    return {
        "modified_at": facts["created_at"],
        "details": details(),
        "template": "{{ .Prompt }}{{ .Suffix }}",  # by which Continue knows that there is infilling
        "model_info": {
            "general.architecture": FAMILY,
            "general.basename": facts["id"],
            f"{FAMILY}.context_length": facts["context_length"],
            f"{FAMILY}.canvas_length": facts["canvas_length"],
        },
        "capabilities": ["completion", "insert", *(each for each, known in able.items() if known)],
    }
