"""Generation in layers: arrays (denoise.py) -> tokens of several canvases -> events with text."""

import os
import re
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from .arguments import SettingError, token_ids, whole_number
from .config import GenerationConfig
from .context import PREFILL_CHUNK, Context
from .denoise import Run, Snapshot, Start, drive, refine
from .errors import Error
from .guards import (
    OFF,
    Again,
    Candidate,
    FinishReason,
    Guard,
    Guards,
    Judge,
    Take,
    Thinking,
    judge_by,
    trust,
)
from .model import DiffusionGemma, Pass
from .sampler import Constraint, Draws, Sampler, SeededDraws
from .tokenizer import Declaration, Message, Tokenizer, TooLong, unhurried
from .turns import BadToolCall, Text, Thought, ToolCall, TurnReader

if TYPE_CHECKING:
    from .schema import Compiled, Schema

# Canvas positions computed side by side where a task has many canvases.
POSITIONS_AT_ONCE = 4096


class ContextError(Error):
    """A prompt that is empty, or leaves no room for a canvas in the model's context."""


@dataclass(frozen=True)
class Reading:
    """A long prompt is being encoded: `done` of `total` tokens so far."""

    done: int
    total: int


@dataclass(frozen=True)
class Draft:
    """One denoising step: the canvas as it stands.

    `tokens` (the model's best at each position), their `probabilities`, `accepted` and `entropies`
    (nats) have one entry per canvas position; the answer ends before token `end`. `visible` are the
    tokens for the user, not those of thoughts, tool calls and markers; `text` is their text.
    """

    canvas: int
    step: int
    steps: int
    tokens: tuple[int, ...]
    accepted: tuple[bool, ...]
    entropies: tuple[float, ...]
    probabilities: tuple[float, ...]
    end: int
    visible: tuple[bool, ...]
    text: str


@dataclass(frozen=True)
class Notice:
    """A guard has stepped in, see `guards.py`; `again` where the canvas is tried once more."""

    guard: Guard
    again: bool


@dataclass(frozen=True)
class Done:
    """The end, with statistics.

    `cached_tokens` of the `prompt_tokens` had been encoded before. `generated_tokens` counts the
    end token, as the reference does. Times are seconds of computing:
    `prompt_seconds` encodes the prompt, `generation_seconds` does the rest, and `tokens_per_second`
    divides by the latter. Memory is in bytes, weights included.
    """

    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    canvases: int
    denoising_steps: int
    tokens_per_forward: float
    prompt_seconds: float
    generation_seconds: float
    tokens_per_second: float
    peak_memory: int


Event = Reading | Draft | Text | Thought | ToolCall | BadToolCall | Notice | Done


@dataclass(frozen=True)
class Encoded:
    """The prompt has been read; `tokens` of it were new to the context."""

    tokens: int


@dataclass(frozen=True)
class Committed:
    """What is final of a canvas, why it was the last, and the guard that changed it."""

    tokens: tuple[int, ...]
    finish_reason: FinishReason | None
    guard: Guard | None = None


def rows_at_once(model: DiffusionGemma) -> int:
    """How many canvases may go through one pass, at least one."""
    return max(1, POSITIONS_AT_ONCE // model.config.canvas_length)


def room_behind(model: DiffusionGemma, prompt: Sequence[int]) -> int:
    """Tokens of context that a prompt leaves, at least a canvas.

    Raises:
        ContextError: the prompt is empty or leaves less.
    """
    room = model.context - len(prompt)
    length = model.config.canvas_length
    short = model.context < model.config.max_position_embeddings
    if not prompt:
        raise ContextError("the prompt is empty")
    if room < length:
        raise ContextError(
            f"the prompt has {len(prompt)} tokens; with a canvas of {length} it does not fit into "
            f"the context of {model.context}"
            + (", which is all that fits into memory" if short else "")
        )
    return room


# Where the next canvas starts, by the tokens of those before it; None is uniform noise.
Starts = Callable[[Sequence[int]], Start | None]


def from_noise(generated: Sequence[int]) -> None:
    """Every canvas starts from noise."""


def generate_tokens(
    model: DiffusionGemma,
    prompt: Sequence[int],
    config: GenerationConfig,
    draws: Draws,
    prefill_chunk: int = PREFILL_CHUNK,
    starts: Starts = from_noise,
    context: Context | None = None,
    judge: Judge = trust,
) -> Generator[Reading | Encoded | Snapshot | Again | Committed, None, None]:
    """Canvas after canvas: a snapshot a step, then what is committed. Nothing runs ahead.

    `starts` says where each canvas starts, `judge` what becomes of it. The last canvas is not
    encoded: whoever goes on reads it with the next prompt.

    Raises:
        ContextError: the prompt is empty or too long; before any computation.
    """
    run = write_tokens(model, prompt, config, draws, prefill_chunk, starts, context, judge)
    return drive(model, run)


def write_tokens(
    model: DiffusionGemma,
    prompt: Sequence[int],
    config: GenerationConfig,
    draws: Draws,
    prefill_chunk: int,
    starts: Starts,
    context: Context | None,
    judge: Judge,
) -> Run[Reading | Encoded | Snapshot | Again | Committed, None]:
    """As `generate_tokens`, but somebody else decodes."""
    room = room_behind(model, prompt)
    length = model.config.canvas_length
    budget = config.max_new_tokens
    context = Context(model) if context is None else context
    new = len(prompt) - context.shared(prompt)
    for tokens_read in context.reading(prompt, prefill_chunk):
        if tokens_read < len(prompt):
            yield Reading(tokens_read, len(prompt))
    yield Encoded(new)
    generated: list[int] = []
    while True:
        attempts: list[Candidate] = []
        forbidden: Constraint | None = None
        while True:
            start = starts(generated)
            if forbidden is not None:
                start = start or Start(draws.tokens((1, length)))
                start = replace(start, constraint=forbidden)
            snapshot = yield from refine(model, context.cache, config, draws, start)
            attempts.append(_candidate(snapshot, config, budget))
            verdict = judge(generated, attempts)
            if isinstance(verdict, Take):
                break
            forbidden = verdict.constraint
            yield verdict
        tokens = verdict.tokens[:budget]
        budget -= len(tokens)
        room -= len(tokens)
        reason = verdict.finish_reason
        if reason is None:
            if tokens[-1] in config.eos_token_ids:
                reason = "stop"
            elif not budget or room < length:
                reason = "length"
            if reason and not attempts[-1].converged:
                reason = "not_converged"
        yield Committed(tokens, reason, verdict.guard)
        mx.clear_cache()
        if reason:
            return
        context.extend(tokens, prefill_chunk)
        generated += tokens


def _candidate(snapshot: Snapshot, config: GenerationConfig, budget: int) -> Candidate:
    """The first row of a finished canvas, up to its end token or the budget."""
    tokens: list[int] = np.array(snapshot.argmax)[0].tolist()
    ends = [i + 1 for i, token in enumerate(tokens) if token in config.eos_token_ids]
    kept = min([*ends[:1], budget, len(tokens)])
    entropies: list[float] = np.array(snapshot.entropy)[0].tolist()
    converged = bool(np.array(snapshot.converged)[0])
    return Candidate(tuple(tokens[:kept]), tuple(entropies[:kept]), converged)


@dataclass(frozen=True)
class Request:
    """What is asked of a model.

    Attributes:
        prompt: a user message, a chat (`[{"role": ..., "content": ...}, ...]`) that the template
            renders, or token ids, which are taken as they are.
        max_tokens: budget over all canvases; None asks the checkpoint, as it does below.
        steps: most denoising steps a canvas.
        seed: makes the output repeatable; None draws one.
        sampler: `EntropyBound` or `ConfidenceThreshold`.
        draws: takes the place of `seed`, to replay a run.
        start: what the first canvas starts from, see `canvas.py`; None is noise.
        schema: a JSON Schema that the answer follows, see `schema.py`, or one that is `compiled`;
            not together with `start`.
        prefill_chunk: tokens of the prompt encoded at once; bounds memory, not the result.
        enable_thinking: ask for thoughts before the answer.
        context: what the model has read before; of the prompt only what is new is encoded.
        guards: what to do about bad canvases, each reported as a `Notice`; the default is nothing,
            as in the reference. A schema's answer needs none.
        tools: function declarations in JSON Schema, for templates that know them.
        stop: strings before which the text ends.
        opening: what the answer begins with, as text, in which special tokens are recognised, or
            as ids.
        shrink: canvases no longer than what is left of `max_tokens`: cheaper, and not what the
            model was trained on.
    """

    prompt: str | Sequence[Message] | Sequence[int]
    max_tokens: int | None = None
    steps: int | None = None
    seed: int | None = None
    sampler: Sampler | None = None
    draws: Draws | None = None
    enable_thinking: bool = False
    prefill_chunk: int = PREFILL_CHUNK
    start: Start | None = None
    schema: "Schema | Compiled | None" = None
    context: Context | None = None
    guards: Guards = OFF
    shrink: bool = False
    tools: Sequence[Declaration] = ()
    stop: Sequence[str] = ()
    opening: str | Sequence[int] = ""


def stream_generate(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    prompt: str | Sequence[Message] | Sequence[int],
    *,
    max_tokens: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    sampler: Sampler | None = None,
    draws: Draws | None = None,
    enable_thinking: bool = False,
    prefill_chunk: int = PREFILL_CHUNK,
    start: Start | None = None,
    schema: "Schema | None" = None,
    context: Context | None = None,
    guards: Guards = OFF,
    shrink: bool = False,
    tools: Sequence[Declaration] = (),
    stop: Sequence[str] = (),
    opening: str = "",
) -> Generator[Event, None, None]:
    """Answer a prompt, lazily: a `Draft` a denoising step, then what a canvas adds, one `Done`.

    What a canvas adds is `Text`; from models that think or call tools also `Thought`, `ToolCall`
    and `BadToolCall`. Closing the iterator stops at once and frees the cache.

    The arguments are those of `Request`.

    Raises:
        ContextError: the prompt is empty or does not fit, before any computation.
        TokenizerError: the chat template refuses the messages.
        SettingError: a setting out of range, or an id that the vocabulary does not have.
        SchemaError: the schema is not supported, or no document is short enough.
    """
    request = Request(
        prompt,
        max_tokens=max_tokens,
        steps=steps,
        seed=seed,
        sampler=sampler,
        draws=draws,
        enable_thinking=enable_thinking,
        prefill_chunk=prefill_chunk,
        start=start,
        schema=schema,
        context=context,
        guards=guards,
        shrink=shrink,
        tools=tools,
        stop=stop,
        opening=opening,
    )
    return drive(model, write_events(model, tokenizer, request))


def write_events(model: DiffusionGemma, tokenizer: Tokenizer, request: Request) -> Run[Event, None]:
    """As `stream_generate`, but somebody else decodes: see `batch.py`."""
    config = model.generation.override(
        max_new_tokens=request.max_tokens,
        max_denoising_steps=request.steps,
        sampler=request.sampler,
    )
    whole_number("prefill_chunk", request.prefill_chunk, 1)
    ids = encode_prompt(
        tokenizer,
        request.prompt,
        most=model.context,
        enable_thinking=request.enable_thinking,
        tools=request.tools,
    )
    token_ids(ids, model.config.vocab_size)
    draws = request.draws or fresh_draws(model, request.seed)
    guards = request.guards
    check: Callable[[str], None] = lambda text: None  # noqa: E731
    if request.schema is not None:
        from .schema import Compiled, compiled, schema_starts
        from .vocabulary import Vocabulary

        schema = request.schema
        if not isinstance(schema, Compiled):
            schema = compiled(schema, Vocabulary(model, tokenizer))
        starts = schema_starts(model, schema, len(ids), config, draws)
        check = schema.check
        guards = OFF
    else:
        opening = encode_opening(model, tokenizer, request.opening)
        starts = partial(_start, model, request, config, draws, opening)
    if config.max_denoising_steps < model.generation.max_denoising_steps:
        guards = replace(guards, not_converged=False)
    judge = trust if guards == OFF else _judge(tokenizer, ids, config, guards)
    chunk, context = request.prefill_chunk, request.context
    run = write_tokens(model, ids, config, draws, chunk, starts, context, judge)
    return _events(tokenizer, ids, config, run, check, request.stop)


def _start(
    model: DiffusionGemma,
    request: Request,
    config: GenerationConfig,
    draws: Draws,
    opening: list[int],
    generated: Sequence[int],
) -> Start | None:
    """Where a canvas starts that no schema rules."""
    if request.start is not None and not generated:
        return request.start
    length = model.config.canvas_length
    if request.shrink:
        left = config.max_new_tokens - len(generated)
        length = max(min(length, left), len(opening) + 1)
    if opening and not generated:
        given = [*opening, *[0] * (length - len(opening))]
        pinned = mx.arange(length)[None] < len(opening)
        noise = draws.tokens((1, length))
        return Start(mx.where(pinned, mx.array([given], dtype=mx.int32), noise), pinned)
    return Start(draws.tokens((1, length))) if request.shrink else None


def _judge(
    tokenizer: Tokenizer, prompt: Sequence[int], config: GenerationConfig, guards: Guards
) -> Judge:
    """The guards, told what they need to know of the vocabulary and the prompt."""
    opens, closes = tokenizer.token_id("<|channel>"), tokenizer.token_id("<channel|>")
    thinking = None
    if opens is not None and closes is not None:
        thinking = Thinking(opens, closes, begun=TurnReader(tokenizer, prompt).thinking)
    ends = frozenset(config.eos_token_ids)

    def sentences(tokens: Sequence[int]) -> list[int]:
        return [
            i + 1
            for i in range(len(tokens))
            if tokens[i] in ends or _SENTENCE.search(tokenizer.decode(tokens[: i + 1]))
        ]

    return judge_by(guards, ends, sentences, thinking)


_SENTENCE = re.compile(r"(?:[.!?\u2026][\"'\u201d\u2019)\]]*\s?|[\u3002\uff01\uff1f\n])$")


def _events(
    tokenizer: Tokenizer,
    prompt: list[int],
    config: GenerationConfig,
    run: Run[Reading | Encoded | Snapshot | Again | Committed, None],
    check: Callable[[str], None],
    stop: Sequence[str],
) -> Run[Event, None]:
    """Tokens as text, up to a stop string; `check` gets the whole of it before the last event."""
    mx.reset_peak_memory()
    prompt_seconds = seconds = 0.0
    reader = TurnReader(tokenizer, prompt)
    generated = canvases = passes = encoded = 0
    text = ""
    stopper = Stopper(stop)
    answer: mx.array | None = None
    try:
        while True:
            # Only time spent computing counts, not what the consumer does between events.
            resumed = time.perf_counter()
            item = run.send(answer)
            answer = None
            if isinstance(item, Pass):
                answer = yield item
            seconds += time.perf_counter() - resumed
            if isinstance(item, Pass):
                continue
            if isinstance(item, Reading):
                yield item
            elif isinstance(item, Encoded):
                prompt_seconds, encoded = seconds, item.tokens
            elif isinstance(item, Snapshot):
                passes += 1
                yield draft_of(tokenizer, item, canvases, config, reader)
            elif isinstance(item, Again):
                yield Notice(item.guard, again=True)
            else:
                canvases += 1
                generated += len(item.tokens)
                reason = item.finish_reason
                for part in reader.feed(item.tokens, last=reason is not None):
                    if isinstance(part, Text):
                        text += part.text
                        part = Text(stopper.feed(part.text))
                    if not isinstance(part, Text) or part.text:
                        yield part
                    if stopper.hit:
                        reason = "stop"
                        break
                if item.guard is not None:
                    yield Notice(item.guard, again=False)
                if reason is not None:
                    break
        if rest := stopper.rest():
            yield Text(rest)
        check(text)
        yield Done(
            finish_reason=reason,
            prompt_tokens=len(prompt),
            cached_tokens=len(prompt) - encoded,
            generated_tokens=generated,
            canvases=canvases,
            denoising_steps=passes,
            tokens_per_forward=generated / passes,
            prompt_seconds=prompt_seconds,
            generation_seconds=seconds - prompt_seconds,
            tokens_per_second=generated / (seconds - prompt_seconds),
            peak_memory=mx.get_peak_memory(),
        )
    finally:
        run.close()
        mx.clear_cache()


def draft_of(
    tokenizer: Tokenizer,
    snapshot: Snapshot,
    canvas: int,
    config: GenerationConfig,
    reader: TurnReader | None = None,
) -> Draft:
    """The first row of a snapshot as an event; `reader` knows what the turn has come to."""
    tokens: list[int] = np.array(snapshot.argmax)[0].tolist()
    kinds = (reader or TurnReader(tokenizer)).kinds(tokens)
    visible = tuple(kind == "text" for kind in kinds)
    end = next((i for i, token in enumerate(tokens) if token in config.eos_token_ids), len(tokens))
    return Draft(
        canvas=canvas,
        step=snapshot.step,
        steps=config.max_denoising_steps,
        tokens=tuple(tokens),
        accepted=tuple(np.array(snapshot.accepted)[0].tolist()),
        entropies=tuple(np.array(snapshot.entropy)[0].tolist()),
        probabilities=tuple(np.array(snapshot.probability)[0].tolist()),
        end=end,
        visible=visible,
        text=tokenizer.decode([tokens[i] for i in range(end) if visible[i]]),
    )


class Stopper:
    """Text up to the first of some stop strings; what may become one waits."""

    def __init__(self, stop: Sequence[str]):
        self._stop = [text for text in stop if text]
        self._held = ""
        self.hit = False

    def feed(self, text: str) -> str:
        """What can be shown now that this text has come."""
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        self.hit = bool(found)
        end = len(self._held) if not found else min(found)
        if not found:
            waits = (
                n
                for stop in self._stop
                for n in range(min(len(stop) - 1, len(self._held)), 0, -1)
                if self._held.endswith(stop[:n])
            )
            end -= max(waits, default=0)
        shown, self._held = self._held[:end], "" if found else self._held[end:]
        return shown

    def rest(self) -> str:
        """What waited in vain."""
        shown, self._held = self._held, ""
        return shown


def fresh_draws(model: DiffusionGemma, seed: int | None) -> SeededDraws:
    """Draws from a seed, or from one that the system draws."""
    if seed is None:
        seed = int.from_bytes(os.urandom(4))
    return SeededDraws(seed, model.config.vocab_size)


def encode_prompt(
    tokenizer: Tokenizer,
    prompt: str | Sequence[Message] | Sequence[int],
    *,
    most: int = sys.maxsize,
    enable_thinking: bool = False,
    tools: Sequence[Declaration] = (),
    check: Callable[[], None] = unhurried,
) -> list[int]:
    """Ids of a prompt: a string is one user message; ids pass through.

    Of text that must have more than `most` tokens not all is encoded; `check` is called now and
    then, and may raise.

    Raises:
        SettingError: it is neither messages nor ids.
        ContextError: the prompt is empty, or text that is far too long.
        TokenizerError: the chat template refuses the messages.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ContextError("the prompt is empty")
        prompt = [{"role": "user", "content": prompt}]
    messages = [part for part in prompt if isinstance(part, dict)]
    if not messages:
        return token_ids(prompt)
    if len(messages) < len(prompt):
        raise SettingError("a prompt is either messages or token ids, not both")
    text = tokenizer.render_chat(messages, enable_thinking=enable_thinking, tools=tools or None)
    try:
        return tokenizer.encode_within(text, most, "the prompt", check)
    except TooLong as error:
        raise ContextError(f"{error}, and no more fits into the context") from None


def encode_opening(
    model: DiffusionGemma, tokenizer: Tokenizer, opening: str | Sequence[int]
) -> list[int]:
    """Ids of what an answer begins with; ids pass through.

    Raises:
        ContextError: it leaves no room in a canvas.
    """
    length = model.config.canvas_length
    if isinstance(opening, str):
        try:
            ids = tokenizer.encode_within(opening, length, "the opening")
        except TooLong as error:
            raise ContextError(f"{error}, and no more fits into a canvas") from None
    else:
        ids = list(opening)
    if len(ids) >= length:
        raise ContextError(f"the opening has {len(ids)} tokens, more than a canvas holds")
    return ids


def generate(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    prompt: str | Sequence[Message] | Sequence[int],
    *,
    max_tokens: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    sampler: Sampler | None = None,
    draws: Draws | None = None,
    enable_thinking: bool = False,
    prefill_chunk: int = PREFILL_CHUNK,
    schema: "Schema | None" = None,
) -> str:
    """The answer as a string; arguments and errors as in `stream_generate`."""
    events = stream_generate(
        model,
        tokenizer,
        prompt,
        max_tokens=max_tokens,
        steps=steps,
        seed=seed,
        sampler=sampler,
        draws=draws,
        enable_thinking=enable_thinking,
        prefill_chunk=prefill_chunk,
        schema=schema,
    )
    return "".join(event.text for event in events if isinstance(event, Text))
