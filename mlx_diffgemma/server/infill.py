"""Translates what editors ask between two texts: llama.cpp's `/infill`, and Mistral's
`/v1/fim/completions`. Knows nothing of HTTP and nothing of threads."""

import time
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from ..diffusion.guards import Guards
from ..tasks.fill import FillRequest, FillResult
from ..tasks.gaps import BEFORE, QUICK_LENGTHS, steady
from ..tasks.generate import Request
from ..tasks.request import Done, Draft, Task
from ..text.template import Hole
from ..text.tokenizer import Tokenizer
from ..text.turns import Text
from .body import Body, NonNegative, Steps
from .openai import MIDDLE, CompletionBody, Continuation, stops
from .openai_answers import Common, common, counted, middle_of

# Pieces of other files that are sent along, and fields that are wanted of an answer.
MOST_EXTRA, MOST_FIELDS = 256, 64

MOST_PREDICT = 1 << 20


# How clients mark, for other models, what stands before and behind a gap in a prompt.
MARKS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)


def _none_below(least: int) -> BeforeValidator:
    """Take a number that is smaller for none: -1 says that nothing is set."""
    return BeforeValidator(lambda given: None if type(given) is int and given < least else given)


Predict = Annotated[Annotated[int, Field(ge=0, le=MOST_PREDICT)] | None, _none_below(0)]

Stop = str | Annotated[list[str], Field(max_length=16)] | None


class Extra(Body):
    """A piece of another file."""

    text: str
    filename: str | None = None
    time: Any = None  # when it was picked: nothing follows from it


class InfillBody(Body):
    """Asks as llama.cpp's clients do: `prompt` is the beginning of the line that is written."""

    input_prefix: str = ""
    input_suffix: str = ""
    input_extra: Annotated[list[Extra], Field(max_length=MOST_EXTRA)] | None = None
    prompt: str = ""
    n_predict: Predict = None
    stop: Stop = None
    seed: Annotated[NonNegative | None, _none_below(0)] = None
    steps: Steps | None = None
    stream: bool | None = None
    response_fields: Annotated[list[str], Field(max_length=MOST_FIELDS)] | None = None
    model: str | None = None
    cache_prompt: bool | None = None  # what was read is kept anyway


class FimBody(Body):
    """Asks as Mistral's clients do."""

    prompt: str
    suffix: str | None = None
    max_tokens: Predict = None
    stop: Stop = None
    random_seed: NonNegative | None = None
    seed: NonNegative | None = None
    steps: Steps | None = None
    stream: bool | None = None
    model: str | None = None


def unmarked(body: CompletionBody) -> CompletionBody:
    """A completion whose prompt is two texts between marks, as one with a suffix; any other is as
    it was."""
    prompt = body.prompt
    if body.suffix or not isinstance(prompt, str):
        return body
    for first, second, third in MARKS:
        if prompt.startswith(first) and prompt.endswith(third):
            before, _, behind = prompt[len(first) : -len(third)].partition(second)
            if (before + behind).strip():
                return body.model_copy(update={"prompt": before, "suffix": behind})
    return body


class Between:
    """What is to be written between two texts, and what becomes of it.

    Attributes:
        text: what was written, up to a stop string.
        read: tokens before the hole, of which `cached` had been read before.
        written: tokens of the text.
        reason: why it ended, "stop" or "length".
    """

    def __init__(
        self,
        before: str,
        behind: str,
        most: int | None,
        stop: Stop,
        *,
        seed: int | None,
        steps: int | None,
        extra: Sequence[str] = (),
    ):
        self._before, self._behind, self._extra = before, behind, extra
        self._most = min(max(QUICK_LENGTHS) if most is None else most, max(QUICK_LENGTHS))
        self._stop = stops(stop)
        self._seed, self._steps = seed, steps
        self._began, self._first = time.perf_counter(), 0.0
        self.text, self.reason, self.stopped = "", "stop", False
        self.read = self.cached = self.written = 0

    def task(self, context: int) -> Task[object] | None:
        """What answers it; None where nothing is to be written, or there is nothing to go by.

        Where nothing but space stands behind, the text is gone on with. Pieces of other files take
        a quarter of the `context` at most, of which few tokens have less than a character.
        """
        if not self._most or not (self._before or self._behind).strip():
            return None
        if self._behind.strip():
            hole = Hole(MIDDLE, most=self._most, line="\n" in self._stop)
            extra = _newest(self._extra, min(BEFORE, context // 4))
            prompt = "\n\n".join(["Fill: the gap in the text", *extra]) if extra else None
            parts = [each for each in (self._before, hole, self._behind) if each != ""]
            return FillRequest(parts, prompt, steps=self._steps, seed=self._seed, quick=True)
        request = Request(
            "",
            max_tokens=self._most,
            steps=min(self._steps or MOST_PREDICT, self._most + 1),
            seed=self._seed,
            guards=Guards(),
            stop=self._stop,
            shrink=True,
        )
        return Continuation(steady(self._before, min(BEFORE, context // 2)), request)

    def take(self, event: object, tokenizer: Tokenizer) -> None:
        """Take an event of the task."""
        match event:
            case Draft():
                self._first = self._first or time.perf_counter()
            case Text():
                self.text += event.text
            case Done():
                self.read, self.cached = event.prompt_tokens, event.cached_tokens
                self.written = event.generated_tokens
                self.reason = "length" if event.finish_reason == "length" else "stop"
                self.stopped = event.stop_string is not None
            case FillResult():
                self.read, self.cached = event.read_tokens, event.cached_tokens
                self.text, self.written, self.stopped = middle_of(event, self._stop, tokenizer)

    @property
    def seconds(self) -> tuple[float, float]:
        """Give the seconds until there was a first draft, and those from there to now."""
        now = time.perf_counter()
        first = self._first or now
        return first - self._began, now - first


def _newest(pieces: Sequence[str], most: int) -> list[str]:
    """The last pieces that have so many characters together."""
    kept: list[str] = []
    for piece in reversed(pieces):
        most -= len(piece)
        if most < 0:
            break
        kept.insert(0, piece)
    return kept


def infill_of(body: InfillBody) -> Between:
    """Translate llama.cpp's request.

    Raises:
        Refused: a stop string is too long.
    """
    extra = [f"{each.filename or 'another file'}:\n{each.text}" for each in body.input_extra or ()]
    return Between(
        body.input_prefix + body.prompt,
        body.input_suffix,
        body.n_predict,
        body.stop,
        seed=body.seed,
        steps=body.steps,
        extra=extra,
    )


def fim_of(body: FimBody) -> Between:
    """Translate Mistral's request; errors as above."""
    seed = body.random_seed if body.seed is None else body.seed
    suffix = body.suffix or ""
    return Between(body.prompt, suffix, body.max_tokens, body.stop, seed=seed, steps=body.steps)


class InfillReply:
    """Answers as llama.cpp does."""

    def __init__(self, model: str, fields: list[str] | None):
        self._model, self._fields = model, fields

    def part(self, found: Between) -> dict[str, Any]:
        """Give the text, behind which the end comes."""
        return {"index": 0, "content": found.text, "tokens": [], "stop": False}

    def whole(self, found: Between, text: str) -> dict[str, Any]:
        """Give the end with a text; of that only the fields that are wanted, by their paths."""
        reading, writing = found.seconds
        new = found.read - found.cached
        kind = "word" if found.stopped else {"length": "limit"}.get(found.reason, "eos")
        answer = {
            "index": 0,
            "content": text,
            "tokens": [],
            "stop": True,
            "model": self._model,
            "tokens_predicted": found.written,
            "tokens_evaluated": found.read,
            "tokens_cached": found.read + found.written,
            "truncated": False,
            "has_new_line": "\n" in found.text,
            "stop_type": kind,
            "timings": {
                **_rate("prompt", new, reading),
                **_rate("predicted", found.written, writing),
            },
        }
        if not self._fields:
            return answer
        paths = {each: _at(answer, each) for each in self._fields}
        return {path: value for path, value in paths.items() if value is not None}


def _rate(name: str, count: int, seconds: float) -> dict[str, float]:
    """Say how fast so many tokens were, as llama.cpp does."""
    return {
        f"{name}_n": count,
        f"{name}_ms": 1000 * seconds,
        f"{name}_per_token_ms": 1000 * seconds / max(count, 1),
        f"{name}_per_second": count / max(seconds, 1e-6),
    }


def _at(answer: dict[str, Any], path: str) -> Any:
    """Find what stands at a path such as `timings/prompt_n`."""
    found: Any = answer
    for name in path.split("/"):
        found = found.get(name) if isinstance(found, dict) else None
    return found


class FimReply:
    """Answers as Mistral does."""

    def __init__(self, model: str):
        self._common: Common = common("fim", model)

    def part(self, found: Between) -> dict[str, Any]:
        """Give the text, behind which the end comes."""
        delta = {"role": "assistant", "content": found.text}
        return self._chunk(delta, None)

    def end(self, found: Between) -> dict[str, Any]:
        """Give the end, with what was read and written."""
        return {**self._chunk({"content": ""}, found.reason), "usage": _usage(found)}

    def whole(self, found: Between) -> dict[str, Any]:
        """Give the answer as JSON."""
        message = {"role": "assistant", "content": found.text}
        choice = {"index": 0, "message": message, "finish_reason": found.reason}
        answer = {**self._common, "object": "chat.completion", "choices": [choice]}
        return {**answer, "usage": _usage(found)}

    def _chunk(self, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return {**self._common, "object": "chat.completion.chunk", "choices": [choice]}


def _usage(found: Between) -> dict[str, Any]:
    return counted(found.read, found.cached, found.written)
