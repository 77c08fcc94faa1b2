"""Answers: tokens of several canvases (canvases.py) -> events with text."""

import re
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from types import NoneType
from typing import TYPE_CHECKING, Unpack

import mlx.core as mx

from ..arguments import SettingError, check_kind, token_ids, whole_number
from ..diffusion.decoding import Clock, Decoding, relay
from ..diffusion.denoise import DenoisingState, Start
from ..diffusion.draws import Draws
from ..diffusion.guards import (
    OFF,
    FinishReason,
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
from .canvases import Committed, Encoded, Told, Weighed, decode_tokens
from .modes import DENOISE, Mode, Way
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
from .speculation import Acceptance
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
from .writing import Read

if TYPE_CHECKING:
    from ..text.schema import Compiled, Parsed, Schema


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
