"""Generation in layers: arrays (denoise.py) -> tokens of several canvases -> events with text."""

import os
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import mlx.core as mx
import numpy as np

from .config import GenerationConfig
from .denoise import Snapshot, Start, denoise
from .errors import Error
from .model import DiffusionGemma, LayerCache
from .sampler import Draws, Sampler, SeededDraws
from .tokenizer import Message, Tokenizer

if TYPE_CHECKING:
    from .schema import Schema

FinishReason = Literal["stop", "length", "not_converged"]
# Tokens encoded in one pass of a long prompt; bounds the memory of the pass, not the result.
PREFILL_CHUNK = 2048


# Bytes of logits that canvases computed side by side may take; four copies exist at the peak.
LOGITS_BYTES = 1 << 30


class ContextError(Error):
    """A prompt that is empty, or leaves no room for a canvas in the model's context."""


@dataclass(frozen=True)
class Draft:
    """One denoising step: the canvas as it stands.

    `tokens` (the model's best at each position), `accepted` and `entropies` (nats) have one entry
    per canvas position; `text` is the answer so far for this canvas, its first `end` tokens.
    """

    canvas: int
    step: int
    steps: int
    tokens: tuple[int, ...]
    accepted: tuple[bool, ...]
    entropies: tuple[float, ...]
    end: int
    text: str


@dataclass(frozen=True)
class Text:
    """Text that is final: a committed canvas."""

    text: str


@dataclass(frozen=True)
class Done:
    """The end, with statistics.

    `generated_tokens` counts the end token, as the reference does. Times are seconds of computing:
    `prompt_seconds` encodes the prompt, `generation_seconds` does the rest, and `tokens_per_second`
    divides by the latter. Memory is in bytes, weights included.
    """

    finish_reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    canvases: int
    denoising_steps: int
    tokens_per_forward: float
    prompt_seconds: float
    generation_seconds: float
    tokens_per_second: float
    peak_memory: int


Event = Draft | Text | Done


def prefill(
    model: DiffusionGemma,
    tokens: Sequence[int],
    cache: list[LayerCache],
    chunk: int = PREFILL_CHUNK,
) -> None:
    """Encode tokens into the cache, `chunk` at a time; the result does not depend on `chunk`."""
    for start in range(0, len(tokens), chunk):
        model.encode(mx.array([list(tokens[start : start + chunk])]), cache)
        mx.eval([layer.keys for layer in cache], [layer.values for layer in cache])
        mx.clear_cache()


@dataclass(frozen=True)
class Encoded:
    """Context that has been written to the cache: the prompt first, later each full canvas."""

    tokens: int


@dataclass(frozen=True)
class Committed:
    """A finished canvas: its tokens up to the end token or the budget, and why it was the last."""

    tokens: tuple[int, ...]
    finish_reason: FinishReason | None


def rows_at_once(model: DiffusionGemma) -> int:
    """How many canvases may go through one pass, at least one."""
    return max(1, LOGITS_BYTES // (4 * model.config.canvas_length * model.config.vocab_size))


def room_behind(model: DiffusionGemma, prompt: Sequence[int]) -> int:
    """Tokens of context that a prompt leaves, at least a canvas.

    Raises:
        ContextError: the prompt is empty or leaves less.
    """
    room = model.config.max_position_embeddings - len(prompt)
    length = model.config.canvas_length
    if not prompt:
        raise ContextError("the prompt is empty")
    if room < length:
        raise ContextError(
            f"the prompt has {len(prompt)} tokens; with a canvas of {length} it does not fit into "
            f"the context of {model.config.max_position_embeddings}"
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
) -> Generator[Encoded | Snapshot | Committed, None, None]:
    """Canvas after canvas: a snapshot a step, then what is committed. Nothing runs ahead.

    `starts` says where each canvas starts.

    Raises:
        ContextError: the prompt is empty or too long; before any computation.
    """
    room = room_behind(model, prompt)
    length = model.config.canvas_length
    budget = config.max_new_tokens
    cache = model.make_cache()
    pending: Sequence[int] = prompt
    generated: list[int] = []
    while True:
        prefill(model, pending, cache, prefill_chunk)
        yield Encoded(len(pending))
        for snapshot in denoise(model, cache, config, draws, starts(generated)):
            yield snapshot
        canvas: list[int] = np.array(snapshot.argmax[0]).tolist()
        ends = [i + 1 for i, token in enumerate(canvas) if token in config.eos_token_ids]
        kept = canvas[: min([*ends[:1], budget])]
        budget -= len(kept)
        room -= length
        reason: FinishReason | None = None
        if ends and kept[-1] in config.eos_token_ids:
            reason = "stop"
        elif not budget or room < length:
            reason = "length"
        if reason and not snapshot.converged.item():
            reason = "not_converged"
        yield Committed(tuple(kept), reason)
        if reason:
            return
        pending = canvas
        generated += canvas


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
) -> Generator[Event, None, None]:
    """Answer a prompt, lazily: a `Draft` a denoising step, a `Text` a canvas, one `Done`.

    Closing the iterator stops at once and frees the cache.

    Args:
        prompt: a user message, a chat (`[{"role": ..., "content": ...}, ...]`) that the template
            renders, or token ids, which are taken as they are.
        max_tokens: budget over all canvases; None asks the checkpoint, as it does below.
        steps: most denoising steps a canvas.
        seed: makes the output repeatable; None draws one.
        sampler: `EntropyBound` or `ConfidenceThreshold`.
        draws: takes the place of `seed`, to replay a run.
        start: what the first canvas starts from, see `canvas.py`; None is noise.
        schema: a JSON Schema that the answer follows, see `schema.py`; not together with `start`.

    Raises:
        ContextError: the prompt is empty or does not fit, before any computation.
        TokenizerError: the chat template refuses the messages.
        SettingError: a setting out of range.
        SchemaError: the schema is not supported, or no document is short enough.
    """
    config = model.generation.override(
        max_new_tokens=max_tokens, max_denoising_steps=steps, sampler=sampler
    )
    ids = encode_prompt(tokenizer, prompt, enable_thinking=enable_thinking)
    draws = draws or fresh_draws(model, seed)
    if schema is None:
        starts: Starts = lambda generated: None if generated else start  # noqa: E731
        return _events(model, tokenizer, ids, config, draws, prefill_chunk, starts)
    from .schema import schema_starts, validated

    starts = schema_starts(model, tokenizer, schema, len(ids), config, draws)
    return validated(schema, _events(model, tokenizer, ids, config, draws, prefill_chunk, starts))


def _events(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    prompt: list[int],
    config: GenerationConfig,
    draws: Draws,
    prefill_chunk: int,
    starts: Starts,
) -> Generator[Event, None, None]:
    mx.reset_peak_memory()
    prompt_seconds = seconds = 0.0
    generated: list[int] = []
    shown = ""
    canvases = passes = 0
    run = generate_tokens(model, prompt, config, draws, prefill_chunk, starts)
    try:
        while True:
            # Only time spent computing counts, not what the consumer does between events.
            resumed = time.perf_counter()
            item = next(run)
            seconds += time.perf_counter() - resumed
            if isinstance(item, Encoded):
                prompt_seconds = prompt_seconds or seconds
            elif isinstance(item, Snapshot):
                passes += 1
                yield draft_of(tokenizer, item, canvases, config)
            else:
                canvases += 1
                generated += item.tokens
                text = tokenizer.decode(generated)
                if item.finish_reason is None:
                    # Bytes of a character that the next canvas completes are U+FFFD until then.
                    text = text.rstrip("\ufffd")
                if len(text) > len(shown):
                    yield Text(text[len(shown) :])
                    shown = text
                if item.finish_reason is not None:
                    break
        yield Done(
            finish_reason=item.finish_reason,
            prompt_tokens=len(prompt),
            generated_tokens=len(generated),
            canvases=canvases,
            denoising_steps=passes,
            tokens_per_forward=len(generated) / passes,
            prompt_seconds=prompt_seconds,
            generation_seconds=seconds - prompt_seconds,
            tokens_per_second=len(generated) / (seconds - prompt_seconds),
            peak_memory=mx.get_peak_memory(),
        )
    finally:
        run.close()
        mx.clear_cache()


def draft_of(
    tokenizer: Tokenizer, snapshot: Snapshot, canvas: int, config: GenerationConfig
) -> Draft:
    """The first row of a snapshot as an event."""
    tokens: list[int] = np.array(snapshot.argmax[0]).tolist()
    end = next((i for i, token in enumerate(tokens) if token in config.eos_token_ids), len(tokens))
    return Draft(
        canvas=canvas,
        step=snapshot.step,
        steps=config.max_denoising_steps,
        tokens=tuple(tokens),
        accepted=tuple(np.array(snapshot.accepted[0]).tolist()),
        entropies=tuple(np.array(snapshot.entropy[0]).tolist()),
        end=end,
        text=tokenizer.decode(tokens[:end]),
    )


def fresh_draws(model: DiffusionGemma, seed: int | None) -> SeededDraws:
    """Draws from a seed, or from one that the system draws."""
    if seed is None:
        seed = int.from_bytes(os.urandom(4))
    return SeededDraws(seed, model.config.vocab_size)


def encode_prompt(
    tokenizer: Tokenizer,
    prompt: str | Sequence[Message] | Sequence[int],
    *,
    enable_thinking: bool = False,
) -> list[int]:
    """Ids of a prompt: a string is one user message; ids pass through."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ContextError("the prompt is empty")
        prompt = [{"role": "user", "content": prompt}]
    ids = [part for part in prompt if isinstance(part, int)]
    if len(ids) == len(prompt):
        return ids
    messages = [part for part in prompt if not isinstance(part, int)]
    return tokenizer.encode(tokenizer.render_chat(messages, enable_thinking=enable_thinking))


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
