"""Puts OpenAI's answers together from events: whole, or in the chunks of a stream."""

import json
import math
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..tasks.fill import FillResult
from ..tasks.request import Done, Draft
from ..text.tokenizer import Tokenizer
from ..text.turns import BadToolCall, StopStrings, Text, Thought, ToolCall
from .openai import MIDDLE, ChatBody, CompletionBody, best_of, prompts_of, stops

# How a reply is named and whose it is.
Common = dict[str, Any]


def common(prefix: str, model: str) -> Common:
    """Make what all chunks of an answer have alike, with an id of its own."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": model,
    }


class Choice:
    """Puts one of the answers together from its events.

    `pieces` gives the text of tokens, and asks for their log-probabilities; None does not.
    """

    def __init__(self, pieces: Callable[[Sequence[int]], list[str]] | None = None) -> None:
        self._pieces = pieces
        self.text = self.thought = ""
        self.calls: list[dict[str, Any]] = []
        self.done: Done | None = None
        self.mean_entropy = 0.0
        self.logprobs: list[dict[str, Any]] = []
        self._draft: Draft | None = None

    def take(self, event: object) -> dict[str, Any]:
        """Take an event, and give what it adds as a chat's delta; empty if nothing."""
        match event:
            case Text():
                self.text += event.text
                self._weigh(event.text)
                return {"content": event.text}
            case Thought():
                self.thought += event.text
                return {"reasoning_content": event.text}
            case ToolCall():
                call = {
                    "id": f"call_{uuid.uuid4().hex[:12]}",
                    "type": "function",
                    "function": {
                        "name": event.name,
                        "arguments": json.dumps(event.arguments, ensure_ascii=False),
                    },
                }
                self.calls.append(call)
                return {"tool_calls": [{"index": len(self.calls) - 1, **call}]}
            case BadToolCall():  # the client sees what the model wrote
                self.text += event.text
                return {"content": event.text}
            case Draft():
                self.mean_entropy = sum(event.entropies) / len(event.entropies)
                self._draft = event
            case Done():
                self.done = event
        return {}

    def _weigh(self, text: str) -> None:
        """Note log-probabilities of a text's tokens, from the step that it was taken from."""
        if self._pieces is None or self._draft is None:
            return
        draft, self._draft = self._draft, None
        shown = [i for i in range(draft.end) if draft.visible[i]]
        pieces = self._pieces([draft.tokens[i] for i in shown])
        length = 0
        for i, piece in zip(shown, pieces, strict=True):
            if length >= len(text):  # a budget or a stop string has cut the rest
                break
            length += len(piece)
            logprob = math.log(max(draft.probabilities[i], 1e-30))
            best = () if draft.top is None else draft.top[i]
            others = self._pieces([token for token, _ in best])
            top = [_weight(other, level) for other, (_, level) in zip(others, best, strict=True)]
            self.logprobs.append({**_weight(piece, logprob), "top_logprobs": top})

    @property
    def reason(self) -> str:
        """Say why it ended, in OpenAI's words."""
        assert self.done is not None
        if self.calls:
            return "tool_calls"
        return {"stop": "stop", "length": "length"}.get(self.done.finish_reason, "stop")

    @property
    def likelihood(self) -> float:
        """Give the mean log-probability of its tokens, by the encoder, which has read them."""
        assert self.done is not None
        assert self.done.mean_log_probability is not None
        return self.done.mean_log_probability

    @property
    def facts(self) -> dict[str, Any]:
        """Give what OpenAI has no words for."""
        assert self.done is not None
        return {
            "finish": self.done.finish_reason,
            "denoising_steps": self.done.denoising_steps,
            "positions_decoded": self.done.positions_decoded,
            "canvases": self.done.canvases,
            "mean_entropy": self.mean_entropy,
            "mean_log_probability": self.done.mean_log_probability,
            "least_log_probability": self.done.least_log_probability,
        }


def _weight(piece: str, logprob: float) -> dict[str, Any]:
    """Write how likely a token is, as OpenAI tells it."""
    return {"token": piece, "logprob": logprob, "bytes": list(piece.encode())}


def usage_of(choices: Sequence[Choice], per_prompt: int) -> dict[str, Any]:
    """Count tokens of all answers; each prompt counts once, with the first of its answers."""
    done = [choice.done for choice in choices if choice.done is not None]
    prompt = sum(each.prompt_tokens for each in done[::per_prompt])
    written = sum(each.generated_tokens for each in done)
    cached = sum(each.cached_tokens for each in done[::per_prompt])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class Reply(Protocol):
    """Puts the choices of an answer together, whole or in chunks.

    Attributes:
        choices: in the order of the work that answers.
        per_prompt: how many of them share a prompt.
    """

    choices: list[Choice]
    per_prompt: int

    def chunk(self, index: int, delta: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        """Give a delta as JSON; None is the beginning, which may be empty."""

    def whole(self) -> dict[str, Any]:
        """Give the finished answer as JSON."""


class ChatReply:
    """Answers a chat, see `Reply`."""

    def __init__(self, body: ChatBody, model: str, count: int, tokenizer: Tokenizer):
        self._common = common("chatcmpl", model)
        self._logprobs = bool(body.logprobs)
        pieces = tokenizer.pieces if body.logprobs else None
        self.choices = [Choice(pieces) for _ in range(count)]
        self.per_prompt = count

    def chunk(self, index: int, delta: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        """Give a delta as JSON; the first says who speaks."""
        shown = {"role": "assistant", "content": ""} if delta is None else delta
        choice = {"index": index, "delta": shown, "finish_reason": reason}
        known = self.choices[index]
        if self._logprobs and "content" in shown and delta is not None:
            choice["logprobs"] = {"content": known.logprobs}
            known.logprobs = []
        if reason is not None:
            choice["diffusion"] = known.facts
        return {**self._common, "object": "chat.completion.chunk", "choices": [choice]}

    def whole(self) -> dict[str, Any]:
        """Give the finished answer as JSON."""
        answers = []
        for i, choice in enumerate(self.choices):
            message: dict[str, Any] = {"role": "assistant", "content": choice.text}
            if choice.thought:
                message["reasoning_content"] = choice.thought
            if choice.calls:
                message["tool_calls"] = choice.calls
                message["content"] = choice.text or None
            answers.append(
                {
                    "index": i,
                    "message": message,
                    "finish_reason": choice.reason,
                    "logprobs": {"content": choice.logprobs} if self._logprobs else None,
                    "diffusion": choice.facts,
                }
            )
        answer = {**self._common, "object": "chat.completion", "choices": answers}
        return {**answer, "usage": usage_of(self.choices, self.per_prompt)}


class CompletionReply:
    """Goes on from prompts, see `Reply`."""

    def __init__(self, body: CompletionBody, model: str, tokenizer: Tokenizer):
        self._common = {**common("cmpl", model), "object": "text_completion"}
        self._prompts = [
            each if isinstance(each, str) else tokenizer.decode(each) for each in prompts_of(body)
        ]
        self._echo = bool(body.echo)
        self._kept = body.n or 1
        self.per_prompt = best_of(body)
        self.choices = [Choice() for _ in range(len(self._prompts) * self.per_prompt)]

    def chunk(self, index: int, delta: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        """Give a delta as JSON; the first is the prompt, where it is wanted."""
        if delta is None and not self._echo:
            return {}
        prompt = self._prompts[index // self.per_prompt]
        text = prompt if delta is None else delta.get("content", "")
        choice = {"index": index, "text": text, "finish_reason": reason, "logprobs": None}
        return {**self._common, "choices": [choice]}

    def whole(self) -> dict[str, Any]:
        """Give the finished answers as JSON, of more than are wanted the likeliest."""
        answers: list[dict[str, Any]] = []
        for i, prompt in enumerate(self._prompts):
            tried = self.choices[i * self.per_prompt : (i + 1) * self.per_prompt]
            if self.per_prompt > self._kept:
                tried = sorted(tried, key=lambda choice: -choice.likelihood)
            for choice in tried[: self._kept]:
                answers.append(
                    {
                        "index": len(answers),
                        "text": (prompt if self._echo else "") + choice.text,
                        "finish_reason": choice.reason,
                        "logprobs": None,
                        "diffusion": choice.facts,
                    }
                )
        usage = usage_of(self.choices, self.per_prompt)
        return {**self._common, "choices": answers, "usage": usage}


def middle_of(
    result: FillResult, stop: Sequence[str], tokenizer: Tokenizer
) -> tuple[str, int, bool]:
    """Give the text of a hole up to a stop string, its tokens, and whether one was hit."""
    strings = StopStrings(stop)
    text = strings.feed(str(result.values[MIDDLE]))
    if strings.hit is not None:
        return text, len(tokenizer.encode(text)), True
    return text + strings.rest(), len(result.probabilities[MIDDLE]), False


def counted(read: int, cached: int, written: int) -> dict[str, Any]:
    """Tell the tokens that one text took."""
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class InfillReply:
    """Answers with what stands between a prompt and a suffix, whose text is `before`."""

    def __init__(self, body: CompletionBody, model: str, tokenizer: Tokenizer, before: str):
        self._common = {**common("cmpl", model), "object": "text_completion"}
        self._shown = before if body.echo else ""
        self._stop = stops(body.stop)
        self._tokenizer = tokenizer

    def whole(self, result: FillResult) -> dict[str, Any]:
        """Give the answer as JSON, with its usage."""
        text, written, _ = middle_of(result, self._stop, self._tokenizer)
        choice = {
            "index": 0,
            "text": self._shown + text,
            "finish_reason": "stop",
            "logprobs": None,
        }
        usage = counted(result.read_tokens, result.cached_tokens, written)
        return {**self._common, "choices": [choice], "usage": usage}
