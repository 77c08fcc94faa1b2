"""Answers, in layers: arrays (denoise.py) -> tokens of several canvases -> events with text."""

import re
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import NoneType
from typing import TYPE_CHECKING, Unpack

import mlx.core as mx
import numpy as np

from ..arguments import SettingError, check_kind, token_ids, whole_number
from ..diffusion.causal import CausalReader, Sampling
from ..diffusion.constraints import Constraint
from ..diffusion.decoding import Clock, Decoding, drive, relay
from ..diffusion.denoise import DenoisingState, Start
from ..diffusion.draws import Draws, PlaceDraws
from ..diffusion.guards import (
    OFF,
    Candidate,
    Commit,
    FinishReason,
    Guard,
    Guards,
    Judge,
    Retry,
    Thinking,
    judge_by,
    trust,
)
from ..diffusion.prompt_cache import PREFILL_CHUNK, PromptCache, Reading, remaining_context
from ..model.diffusion_gemma import DiffusionGemma
from ..model.settings import GenerationConfig, Sampler
from ..text.tokenizer import Declaration, Tokenizer, no_check
from ..text.turns import StopStrings, Text, TurnReader
from ..text.vocabulary import Vocabulary
from .modes import DENOISE, Mode, Way, attempt
from .request import (
    MOST_TOP,
    Done,
    Event,
    Notice,
    Options,
    Prompt,
    checked_seed,
    draft_of,
    encode_prompt,
    fresh_draws,
    stream,
)
from .speculation import Acceptance, Drafter
from .starts import (
    CanvasStart,
    First,
    Noise,
    Opening,
    Pieces,
    document,
    encode_opening,
    forced_tokens,
)
from .writing import Read, Writer

if TYPE_CHECKING:
    from ..text.schema import Compiled, Parsed, Schema


@dataclass(frozen=True)
class Encoded:
    """The prompt has been read; `tokens` of it were new to the context."""

    tokens: int


@dataclass(frozen=True)
class Committed:
    """A canvas is final: its tokens, why it was the last, and the guard that changed it."""

    tokens: tuple[int, ...]
    finish_reason: FinishReason | None
    guard: Guard | None = None


@dataclass(frozen=True)
class Weighed:
    """The encoder has read what was committed: log-probabilities, each behind all before it."""

    log_probabilities: tuple[float, ...]


# What canvas after canvas tells.
Told = Reading | Encoded | DenoisingState | Read | Retry | Committed | Weighed


def generate_tokens(
    model: DiffusionGemma,
    prompt: Sequence[int],
    config: GenerationConfig,
    draws: Draws,
    prefill_chunk: int = PREFILL_CHUNK,
    start: CanvasStart | None = None,
) -> Generator[Told, None, None]:
    """Canvas after canvas: a state a step, then what is committed. Nothing runs ahead.

    Raises:
        ContextError: the prompt is empty or too long; before any computation.
    """
    start = start or Noise(model.config.canvas_length)
    cache = PromptCache(model)
    return drive(
        model, decode_tokens(model, prompt, config, draws, prefill_chunk, start, cache, trust)
    )


def decode_tokens(
    model: DiffusionGemma,
    prompt: Sequence[int],
    config: GenerationConfig,
    draws: Draws,
    prefill_chunk: int,
    start: CanvasStart,
    prompt_cache: PromptCache,
    judge: Judge,
    ended: Callable[[], bool] = lambda: False,
    likelihood: bool = False,
    way: Way = DENOISE,
    top: int = 0,
) -> Decoding[Told, None]:
    """Canvas after canvas: a state a step, then what is committed.

    `judge` says what becomes of a canvas; `ended`, once it is committed, whether the text is
    complete. The last canvas is not encoded, a next prompt reads it; but with `likelihood` it is,
    and each canvas is `Weighed`. In other modes than "denoise" a canvas is what is written next.
    """
    remaining = remaining_context(model, prompt)
    length = model.config.canvas_length if way.mode == "denoise" else 1
    budget = config.max_new_tokens
    # The prompt's last token is encoded apart where its hidden state is wanted.
    causal = likelihood or way.causal
    apart = len(prompt) - causal
    new = len(prompt) - prompt_cache.shared(prompt[:apart])
    yield from prompt_cache.reading(prompt[:apart], prefill_chunk)
    reader: CausalReader | None = None
    sampling = _sampling(model, draws, way)
    if causal:
        (hidden,) = prompt_cache.encoding(prompt[apart:])
        reader = CausalReader(model, prompt_cache, hidden, prefill_chunk, sampling)
    yield Encoded(new)
    canvas_draws = draws if sampling is None else sampling.draws.others
    writer = Writer(model, prompt_cache.cache, config, canvas_draws, start, start.places(), top)
    drafter = Drafter(config.speculation, way.acceptance or "exact")
    write = partial(attempt, writer, reader, drafter, way)
    generated: list[int] = []
    while True:
        attempts: list[Candidate] = []
        states: list[DenoisingState] = []
        forbidden: Constraint | None = None
        while True:
            state = yield from write(generated, forbidden, min(budget, remaining))
            states.append(state)
            attempts.append(_candidate(state, config, budget))
            verdict = judge(generated, attempts)
            if isinstance(verdict, Commit):
                break
            forbidden = verdict.constraint
            yield verdict
        if (taken := _taken(verdict.tokens, attempts)) < len(attempts) - 1:
            yield replace(states[taken], decoded=0)  # the last that is told is what is committed
        tokens = verdict.tokens[:budget]
        budget -= len(tokens)
        remaining -= len(tokens)
        spent = not budget or remaining < length
        reason = _reason(verdict, tokens, config, spent, attempts[-1].converged)
        yield Committed(tokens, reason, verdict.guard)
        if way.mode != "causal":  # whose every token is one
            mx.clear_cache()
        complete = reason is not None or ended()
        if reader is not None:
            yield from _weighed(reader, tokens, complete, likelihood)
        elif not complete:
            prompt_cache.extend(tokens, prefill_chunk)
            yield Read(len(tokens))
        if complete:
            return
        generated += tokens


def _weighed(
    reader: CausalReader, tokens: Sequence[int], complete: bool, likelihood: bool
) -> Iterator[Weighed | Read]:
    """Have the encoder keep what is committed, and say how likely that is where it is asked for."""
    encoded = 0
    if likelihood:
        encoded = reader.read(tokens)
        yield Weighed(reader.log_probabilities())
    if complete:
        reader.take_back(tokens)
    else:
        encoded += reader.keep(tokens)
    if encoded:
        yield Read(encoded)


def _sampling(model: DiffusionGemma, draws: Draws, way: Way) -> Sampling | None:
    """How the encoder draws its tokens; None where it takes the best."""
    if not way.temperature:
        return None
    return Sampling(way.temperature, PlaceDraws(draws, model.config.vocab_size))


def _reason(
    verdict: Commit, tokens: Sequence[int], config: GenerationConfig, spent: bool, converged: bool
) -> FinishReason | None:
    """Why the answer is over with these tokens; None: it goes on. `spent` is what it may take."""
    if verdict.finish_reason is not None:
        return verdict.finish_reason
    ends = tokens[-1] in config.eos_token_ids
    if not ends and not spent:
        return None
    if not converged:
        return "not_converged"
    return "stop" if ends else "length"


def _taken(tokens: Sequence[int], attempts: Sequence[Candidate]) -> int:
    """The number of the newest attempt that these tokens are of; what belongs to none is the
    last's, with a token that a guard has put."""
    last = len(attempts) - 1
    of = (i for i in range(last, -1, -1) if attempts[i].tokens[: len(tokens)] == tuple(tokens))
    return next(of, last)


def _candidate(state: DenoisingState, config: GenerationConfig, budget: int) -> Candidate:
    """The first row of a finished canvas, up to its end token or the budget."""
    tokens: list[int] = np.array(state.argmax)[0].tolist()
    ends = [i + 1 for i, token in enumerate(tokens) if token in config.eos_token_ids]
    kept = min([*ends[:1], budget, len(tokens)])
    entropies: list[float] = np.array(state.entropy)[0].tolist()
    converged = bool(np.array(state.converged)[0])
    return Candidate(tuple(tokens[:kept]), tuple(entropies[:kept]), converged)


@dataclass(frozen=True)
class Request:
    """An answer that is asked for; all but the prompt is described with `Options`."""

    prompt: Prompt
    max_tokens: int | None = None
    steps: int | None = None
    seed: int | None = None
    sampler: Sampler | None = None
    draws: Draws | None = None
    enable_thinking: bool = False
    prefill_chunk: int = PREFILL_CHUNK
    start: Start | Pieces | None = None
    schema: "Schema | type | Parsed | Compiled | None" = None
    guards: Guards = OFF
    shrink: bool = False
    tools: Sequence[Declaration] = ()
    stop: Sequence[str] = ()
    opening: str | Sequence[int] = ""
    likelihood: bool = False
    mode: Mode = "denoise"
    verify: bool = False
    temperature: float | None = None
    acceptance: Acceptance | None = None
    top: int = 0

    def prepare(
        self,
        model: DiffusionGemma,
        vocabulary: Vocabulary,
        check: Callable[[], None] = no_check,
    ) -> "Answer":
        """Encode the prompt, compile the schema, find what is wrong; see `request.Task`.

        Raises:
            ContextError: the prompt is empty or does not fit.
            TokenizerError: the chat template refuses the messages.
            SettingError: a setting is out of range, an id is not in the vocabulary, or two options
                make no sense together.
            SchemaError: the schema is not supported, or no document is short enough.
            CanvasError: text pieces do not fit into a canvas.
        """
        self.check_options()
        config = model.generation.override(
            max_new_tokens=self.max_tokens,
            max_denoising_steps=self.steps,
            sampler=self.sampler,
        )
        tokenizer = vocabulary.tokenizer
        ids = encode_prompt(
            tokenizer,
            self.prompt,
            sight=model.sight,
            most=model.context,
            enable_thinking=self.enable_thinking,
            tools=self.tools,
            check=check,
        )
        token_ids(ids, model.config.vocab_size)
        remaining_context(model, ids)
        guards = self.guards
        if config.max_denoising_steps < model.generation.max_denoising_steps:
            guards = replace(guards, not_converged=False)
        start, schema = self._start(model, vocabulary, config, len(ids), check)
        return Answer(
            model=model,
            tokenizer=tokenizer,
            prompt=ids,
            config=config,
            start=start,
            schema=schema,
            judge=trust if guards == OFF else _judge(tokenizer, ids, config, guards),
            seed=self.seed,
            draws=self.draws,
            prefill_chunk=self.prefill_chunk,
            likelihood=self.likelihood,
            top=self.top,
            way=self._way(),
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
        )

    def check_options(self) -> None:
        """Refuse what is out of range or makes no sense together."""
        whole_number("prefill_chunk", self.prefill_chunk, 1)
        checked_seed(self.seed)
        whole_number("top", self.top, 0, MOST_TOP)
        self._way().check()
        check_kind("guards", self.guards, Guards, "Guards")
        check_kind("opening", self.opening, (str, Sequence), "text or token ids")
        check_kind("start", self.start, (Start, Pieces, NoneType), "a Start or Pieces")
        check_kind("tools", self.tools, Sequence, "a list of declarations")
        check_kind("stop", self.stop, (str, Sequence), "a list of texts")
        for text in self.stop:
            check_kind("a stop string", text, str, "text")
        given = {
            "schema": self.schema is not None,
            "start": self.start is not None,
            "opening": len(self.opening) > 0,
            "shrink": self.shrink,
            "guards": self.guards != OFF,
            "mode": self.mode != "denoise",
            "top": self.top > 0,
        }
        for one, others in (
            ("schema", ("start", "opening", "shrink", "guards")),
            ("start", ("opening", "shrink")),
            ("mode", ("start", "shrink", "top")),
        ):
            if found := [other for other in others if given[one] and given[other]]:
                named = f"mode {self.mode}" if one == "mode" else f"a {one}"
                raise SettingError(f"{named} does not go with {found[0]}")

    def _way(self) -> Way:
        return Way(self.mode, self.verify, self.temperature, self.acceptance)

    def _start(
        self,
        model: DiffusionGemma,
        vocabulary: Vocabulary,
        config: GenerationConfig,
        prompt_tokens: int,
        check: Callable[[], None],
    ) -> tuple[CanvasStart, "Compiled | None"]:
        """Find where canvases start, and the schema that they follow."""
        length = model.config.canvas_length
        if self.schema is not None:
            from ..text.schema import Compiled, compiled

            schema = self.schema
            if not isinstance(schema, Compiled):
                schema = compiled(schema, vocabulary, check=check)
            return document(model, schema, prompt_tokens, config), schema
        if self.start is not None:
            start: Start | list[int | None] = (
                self.start
                if isinstance(self.start, Start)
                else forced_tokens(model, vocabulary, self.start.pieces, check)
            )
            return First(start), None
        budget = config.max_new_tokens if self.shrink else None
        if opening := encode_opening(model, vocabulary.tokenizer, self.opening):
            token_ids(opening, model.config.vocab_size)
            return Opening(tuple(opening), length, budget), None
        return Noise(length, budget), None


@dataclass(frozen=True, eq=False)
class Answer:
    """A request that is ready to run, see `request.Prepared`."""

    model: DiffusionGemma
    tokenizer: Tokenizer
    prompt: list[int]
    config: GenerationConfig
    start: CanvasStart
    schema: "Compiled | None"
    judge: Judge
    seed: int | None
    draws: Draws | None
    prefill_chunk: int
    stop: tuple[str, ...]
    likelihood: bool = False
    way: Way = DENOISE
    top: int = 0

    def run(self, prompt_cache: PromptCache) -> Decoding[Event, None]:
        """A `Draft` a denoising step, then what a canvas adds, at last a `Done`."""
        mx.reset_peak_memory()
        teller = _Teller(self)
        tokens = decode_tokens(
            self.model,
            self.prompt,
            self.config,
            self.draws or fresh_draws(self.model, self.seed),
            self.prefill_chunk,
            self.start,
            prompt_cache,
            self.judge,
            lambda: teller.reason is not None,
            self.likelihood,
            self.way,
            self.top,
        )
        yield from relay(tokens, teller.tell, teller.clock)
        yield from teller.end()


class _Teller:
    """Tells of tokens as text, up to a stop string, and keeps count."""

    def __init__(self, answer: Answer):
        self._answer = answer
        self._reader = TurnReader(answer.tokenizer, answer.prompt)
        self._stopper = StopStrings(answer.stop)
        self._text = ""
        self._encoded = self._generated = self._canvases = self._passes = 0
        self._positions = self._now = 0  # decoded, of canvases that are over and of this one
        self._reads = self._read = 0  # passes of the encoder, and tokens of the answer in them
        self._prompt_seconds = 0.0
        self._log_probabilities: list[float] = []
        self.clock = Clock()
        self.reason: FinishReason | None = None

    def tell(self, item: Told) -> Iterator[Event]:
        """Tell an item as events."""
        answer = self._answer
        match item:
            case Reading():
                yield item
            case Encoded():
                self._prompt_seconds, self._encoded = self.clock.seconds, item.tokens
            case DenoisingState():
                self._passes += item.decoded > 0  # else it is the encoder's
                self._now = item.decoded
                yield draft_of(answer.tokenizer, item, self._canvases, answer.config, self._reader)
            case Read():
                self._turn()
                self._reads, self._read = self._reads + 1, self._read + item.tokens
            case Retry():
                self._turn()
                yield Notice(item.guard, again=True)
            case Committed():
                yield from self._commit(item)
            case Weighed():
                self._log_probabilities += item.log_probabilities

    def _turn(self) -> None:
        self._positions, self._now = self._positions + self._now, 0

    def _commit(self, item: Committed) -> Iterator[Event]:
        self._turn()
        self._canvases += 1
        self._generated += len(item.tokens)
        self.reason = item.finish_reason
        for part in self._reader.feed(item.tokens, last=self.reason is not None):
            if isinstance(part, Text):
                self._text += part.text
                part = Text(self._stopper.feed(part.text))
            if not isinstance(part, Text) or part.text:
                yield part
            if self._stopper.hit:
                self.reason = "stop"
                break
        if item.guard is not None:
            yield Notice(item.guard, again=False)

    def end(self) -> Iterator[Event]:
        """The text that a stop string might have followed, and the statistics.

        Raises:
            SchemaError: the text is no document of the schema: a defect.
        """
        if rest := self._stopper.rest():
            yield Text(rest)
        if self._answer.schema is not None:
            self._answer.schema.check(self._text)
        assert self.reason is not None
        seconds = self.clock.seconds - self._prompt_seconds
        prompt_tokens = len(self._answer.prompt)
        chances = self._log_probabilities
        passes, positions = self._passes, self._positions
        if self._answer.way.causal:
            # The prompt's pass gives the first token of all.
            passes, positions = max(passes + self._reads, 1), positions + self._read
        yield Done(
            finish_reason=self.reason,
            prompt_tokens=prompt_tokens,
            cached_tokens=prompt_tokens - self._encoded,
            generated_tokens=self._generated,
            canvases=self._canvases,
            denoising_steps=self._passes,
            tokens_per_forward=self._generated / passes,
            positions_decoded=self._positions,
            positions_per_token=positions / max(self._generated, 1),
            prompt_seconds=self._prompt_seconds,
            generation_seconds=seconds,
            tokens_per_second=self._generated / seconds,
            peak_memory=mx.get_peak_memory(),
            mean_log_probability=sum(chances) / len(chances) if chances else None,
            least_log_probability=min(chances) if chances else None,
            encoder_passes=self._reads,
            positions_encoded=self._read,
            stop_string=self._stopper.hit,
        )


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


def stream_generate(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    prompt_cache: PromptCache | None = None,
    **options: Unpack[Options],
) -> Generator[Event, None, None]:
    """Answer a prompt, lazily: a `Draft` a denoising step, then what a canvas adds, one `Done`.

    What a canvas adds is `Text`; from models that think or call tools also `Thought`, `ToolCall`
    and `BadToolCall`. Closing the iterator stops at once and frees the cache.

    Args:
        model: as `load` gives it.
        tokenizer: the same checkpoint's.
        prompt: a user message, a chat (`[{"role": ..., "content": ...}, ...]`), or token ids.
        prompt_cache: what the model has read before; of the prompt only what is new is encoded.
        options: see `Options`.

    Raises:
        Error: as `Request.prepare`, before anything is computed.
    """
    return stream(model, tokenizer, Request(prompt, **options), prompt_cache)


def generate(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    prompt_cache: PromptCache | None = None,
    **options: Unpack[Options],
) -> str:
    """The answer as a string; arguments and errors as in `stream_generate`."""
    events = stream_generate(model, tokenizer, prompt, prompt_cache=prompt_cache, **options)
    return "".join(event.text for event in events if isinstance(event, Text))
