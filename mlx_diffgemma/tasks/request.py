"""Says what all tasks have in common: how a request is prepared and run, and what answers it.

A task is one frozen request. `prepare` finds every mistake in it and turns text into ids; it
touches no arrays, so any thread may do it. What it gives is `run` on the thread that owns MLX.
"""

import os
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from html import escape
from types import NoneType
from typing import TYPE_CHECKING, Protocol, TypedDict, TypeVar
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np

from ..arguments import SHOWN, SettingError, check_kind, shown, token_ids, whole_number
from ..diffusion.constraints import NEVER
from ..diffusion.decoding import Decoding, drive
from ..diffusion.denoise import DenoisingState, Start
from ..diffusion.draws import MOST_SEED, Draws, SeededDraws
from ..diffusion.guards import FinishReason, Guard, Guards
from ..diffusion.prompt_cache import ContextError, PromptCache, Reading
from ..errors import Error
from ..model.diffusion_gemma import READS_TEXT, DiffusionGemma
from ..model.placeholders import runs
from ..model.settings import GenerationConfig, Sampler
from ..model.sight import Sight
from ..text.tokenizer import Declaration, Message, Tokenizer, TooLong, no_check
from ..text.turns import BadToolCall, Text, Thought, ToolCall, TurnReader
from ..text.vocabulary import Vocabulary
from .modes import Mode
from .notebook import Cell, html_of
from .pictures import bare, markers_of, pictures_of, placed_ids, shown_messages, times_of
from .speculation import Acceptance
from .starts import Pieces
from .together import together

if TYPE_CHECKING:
    from ..text.schema import Compiled, Parsed, Schema


Item = TypeVar("Item")

# Likeliest tokens that are told of a position.
MOST_TOP = 20

Given = TypeVar("Given", covariant=True)

# A user message, a chat that the template renders, or token ids, which are taken as they are. In a
# chat, a content may be a list of parts: {"type": "text", "text": ...} and {"type": "image",
# "image": a pathlib.Path, bytes or an image of Pillow, "tokens": most that it takes, or none} and
# {"type": "video", "video": a pathlib.Path of a file or folder}.
Prompt = str | Sequence[Message] | Sequence[int]


class Prepared(Protocol[Given]):
    """A request in which nothing is wrong any more. It holds no arrays of MLX."""

    @property
    def prompt(self) -> Sequence[int]:
        """Ids that are read first; what a prompt cache holds of them is not encoded again."""

    def run(self, prompt_cache: PromptCache) -> Decoding[Given, None]:
        """Answer the request, item by item, on the thread that owns MLX."""


class Task(Protocol[Given]):
    """A request of whatever kind."""

    def prepare(
        self,
        model: DiffusionGemma,
        vocabulary: Vocabulary,
        check: Callable[[], None] = no_check,
    ) -> Prepared[Given]:
        """Encode and compile; `check` is called now and then, and may raise.

        Raises:
            Error: of the kind that the request's mistake has.
        """


def stream(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    task: Task[Item],
    prompt_cache: PromptCache | None = None,
) -> Generator[Item, None, None]:
    """Prepare a request at once, and answer it lazily.

    Raises:
        Error: as the task's own `prepare`, and as `together`.
    """
    check_kind("prompt_cache", prompt_cache, (PromptCache, NoneType), "a PromptCache")
    prepared = task.prepare(model, Vocabulary(model, tokenizer))
    items = run_prepared(model, prepared, prompt_cache)
    return together(model, "stream", task, items, prompt_cache)


def run_prepared(
    model: DiffusionGemma, prepared: Prepared[Item], prompt_cache: PromptCache | None = None
) -> Generator[Item, None, None]:
    """Answer a request that is prepared, lazily.

    Raises:
        SettingError: the prompt cache was used by another run since.
    """
    return drive(model, _run(model, prepared, prompt_cache))


# Which run has used a prompt cache last.
_users: WeakKeyDictionary[PromptCache, object] = WeakKeyDictionary()


def _run(
    model: DiffusionGemma, prepared: Prepared[Item], prompt_cache: PromptCache | None
) -> Decoding[Item, None]:
    # Not in `stream`: an empty cache is made where the run begins, and nobody else holds it.
    try:
        yield from _alone(prepared, PromptCache(model) if prompt_cache is None else prompt_cache)
    finally:
        mx.clear_cache()  # once nothing above holds arrays any more


def _alone(prepared: Prepared[Item], prompt_cache: PromptCache) -> Decoding[Item, None]:
    """Run, unless another run has used the prompt cache since."""
    me = _users[prompt_cache] = object()
    answer: mx.array | None = None
    with closing(prepared.run(prompt_cache)) as decoding, suppress(StopIteration):
        while True:
            item = decoding.send(answer)
            answer = yield item
            if _users[prompt_cache] is not me:
                raise SettingError(
                    "the prompt cache, or chat session, was used by another answer before this one "
                    "was complete"
                )


class Settings(TypedDict, total=False):
    """Says how answers are decoded, one after another; what is not given is the checkpoint's.

    Attributes:
        max_tokens: budget over all canvases.
        steps: most denoising steps a canvas.
        sampler: `EntropyBound` or `ConfidenceThreshold`.
        prefill_chunk: tokens of the prompt encoded at once; bounds memory, not the result.
        guards: what to do about bad canvases, each reported as a `Notice`; the default is nothing,
            as in the reference. Not together with a schema, whose answers need none.
        shrink: canvases no longer than what is left of `max_tokens`: cheaper, and not what the
            model was trained on.
        mode: "denoise" is the model's own way. "causal" writes the encoder's next token, one after
            another, and "speculative" the same from drafts; neither goes with `start`, `shrink` or
            `verify`.
        verify: have the encoder read each canvas before it is committed: from the first token that
            it doubts on, the canvas is denoised again, and the one stays that it likes best.
        temperature: at which the encoder draws its tokens in modes "causal" and "speculative", to
            the same text with the same seed; None or 0 take the best ones.
        acceptance: which drafted tokens are taken in mode "speculative": "exact" (None) are those
            that "causal" would have written, "typical" also others that are likely enough, with
            which the text is another.
    """

    max_tokens: int | None
    steps: int | None
    sampler: Sampler | None
    prefill_chunk: int
    guards: Guards
    shrink: bool
    mode: Mode
    verify: bool
    temperature: float | None
    acceptance: Acceptance | None


class Options(Settings, total=False):
    """Says all else that an answer is asked for with.

    Attributes:
        seed: makes the output repeatable; None draws one.
        draws: takes the place of `seed`, to replay a run.
        enable_thinking: ask for thoughts before the answer.
        start: what the first canvas starts from, arrays or text; None is noise.
        schema: a JSON Schema that the answer follows, see `schema.py`, or one that is parsed or
            `compiled`, or a type or class of Pydantic that has one; not together with `start`,
            `opening` or `shrink`.
        tools: function declarations in JSON Schema, for templates that know them.
        stop: strings before which the text ends, or one.
        opening: what the answer begins with, as text, in which special tokens are recognised, or
            as ids; not together with `start`.
        likelihood: have the encoder read the answer, too, so that `Done` says how likely it is:
            one more pass over its tokens.
        top: tell so many of the likeliest tokens of each place, at most 20, in the last `Draft` of
            a canvas; in mode "denoise" alone.
    """

    seed: int | None
    draws: Draws | None
    enable_thinking: bool
    start: Start | Pieces | None
    schema: "Schema | type | Parsed | Compiled | None"
    tools: Sequence[Declaration]
    stop: Sequence[str]
    opening: str | Sequence[int]
    likelihood: bool
    top: int


@dataclass(frozen=True, repr=False)
class Draft:
    """One denoising step: the canvas as it stands. The last one of a canvas is what is committed:
    where it is none of the newest attempt, that draft is told once more, with `decoded` 0.

    `tokens` (the model's best at each position), their `probabilities`, `accepted` and `entropies`
    (nats) have one entry per canvas position, and so has `settled`: the next step does not decode
    these. `decoded` positions have been, over all steps of the canvas, of which `first_step` was
    the first. The answer ends before token `end`. `visible` are the tokens for the user, not those
    of thoughts, tool calls and markers; `text` is their text. `tokenizer` can tell the text of each
    token. In the last step of a canvas, where it is asked for, `top` has the likeliest ids of
    each position with their log-probabilities, the best first.
    """

    canvas: int
    step: int
    steps: int
    tokens: tuple[int, ...]
    accepted: tuple[bool, ...]
    entropies: tuple[float, ...]
    probabilities: tuple[float, ...]
    settled: tuple[bool, ...]
    decoded: int
    end: int
    visible: tuple[bool, ...]
    text: str
    tokenizer: Tokenizer | None = field(default=None, compare=False)
    first_step: int = 1
    top: tuple[tuple[tuple[int, float], ...], ...] | None = None

    def __repr__(self) -> str:
        # Hundreds of numbers say nothing to whoever prints events.
        text = self.text if len(self.text) <= SHOWN else f"{self.text[: SHOWN - 3]}..."
        return (
            f"Draft(canvas={self.canvas}, step={self.step}, steps={self.steps}, "
            f"accepted={sum(self.accepted)}/{len(self.accepted)}, text={text!r})"
        )

    def _repr_html_(self) -> str:
        """What notebooks show."""
        if self.tokenizer is None:
            return f"<pre>{escape(self.text)}</pre>"
        shown = [i for i in range(self.end) if self.visible[i]]
        pieces = self.tokenizer.pieces([self.tokens[i] for i in shown])
        cells = [
            Cell(piece, self.accepted[i], self.entropies[i], self.probabilities[i])
            for i, piece in zip(shown, pieces, strict=True)
        ]
        caption = (
            f"canvas {self.canvas + 1}, step {self.step}/{self.steps}, "
            f"{sum(self.accepted)}/{len(self.accepted)} accepted"
        )
        return html_of(cells, self.end - len(shown), caption)


@dataclass(frozen=True)
class Notice:
    """A guard has stepped in, see `guards.py`; `again` where the canvas is tried once more."""

    guard: Guard
    again: bool


@dataclass(frozen=True)
class Done:
    """The end, with statistics.

    `cached_tokens` of the `prompt_tokens` had been encoded before. `generated_tokens` counts the
    end token, as the reference does. `positions_decoded` by all steps is the work that does not
    depend on the machine: a step over a whole canvas counts its length. Times are seconds of
    computing: `prompt_seconds` encodes the prompt, `generation_seconds` does the rest, and
    `tokens_per_second` divides by the latter. Memory is in bytes, weights included.
    Log-probabilities (nats) are the encoder's, of the tokens committed, the end token included;
    None where it has not read them. The encoder reads answers too, in `encoder_passes` over
    `positions_encoded` tokens: canvases behind which another follows, and those that it verifies.
    Where it decides, in another mode than "denoise" or with `verify`, `tokens_per_forward` and
    `positions_per_token` count that as well. `stop_string` is the one before which the text ends.
    """

    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    canvases: int
    denoising_steps: int
    tokens_per_forward: float
    positions_decoded: int
    positions_per_token: float
    prompt_seconds: float
    generation_seconds: float
    tokens_per_second: float
    peak_memory: int
    mean_log_probability: float | None = None
    least_log_probability: float | None = None
    encoder_passes: int = 0
    positions_encoded: int = 0
    stop_string: str | None = None


Event = Reading | Draft | Text | Thought | ToolCall | BadToolCall | Notice | Done


def draft_of(
    tokenizer: Tokenizer,
    state: DenoisingState,
    canvas: int,
    config: GenerationConfig,
    reader: TurnReader | None = None,
) -> Draft:
    """The first row of a state as an event; `reader` knows what the turn has come to."""
    tokens: list[int] = np.array(state.argmax)[0].tolist()
    kinds = (reader or TurnReader(tokenizer)).kinds(tokens)
    visible = tuple(kind == "text" for kind in kinds)
    end = next((i for i, token in enumerate(tokens) if token in config.eos_token_ids), len(tokens))
    return Draft(
        canvas=canvas,
        step=state.step,
        steps=config.max_denoising_steps,
        tokens=tuple(tokens),
        accepted=tuple(np.array(state.accepted)[0].tolist()),
        entropies=tuple(np.array(state.entropy)[0].tolist()),
        probabilities=tuple(np.array(state.probability)[0].tolist()),
        settled=tuple(np.array(state.settled)[0].tolist()),
        decoded=state.decoded,
        end=end,
        visible=visible,
        text=tokenizer.decode([tokens[i] for i in range(end) if visible[i]]),
        tokenizer=tokenizer,
        first_step=state.first_step,
        top=None if state.top is None else _likeliest(*state.top),
    )


def _likeliest(ids: mx.array, levels: mx.array) -> tuple[tuple[tuple[int, float], ...], ...]:
    """The first row of likeliest ids and their log-probabilities, without those that are none."""
    rows = zip(np.array(ids)[0].tolist(), np.array(levels)[0].tolist(), strict=True)
    return tuple(
        tuple(pair for pair in zip(*row, strict=True) if pair[1] > NEVER / 2) for row in rows
    )


def checked_seed(seed: int | None) -> int | None:
    """The seed, if it is one; refused where no array is needed for that.

    Raises:
        SettingError: it is no whole number from 0 to 2^64 - 1.
    """
    return None if seed is None else whole_number("a seed", seed, 0, MOST_SEED)


def fresh_draws(model: DiffusionGemma, seed: int | None) -> SeededDraws:
    """Draws from a seed, or from one that the system draws."""
    if seed is None:
        drawn = mx.array([int.from_bytes(os.urandom(4))], dtype=mx.uint32)
        (agreed,) = model.part.share.agreed([drawn])
        seed = int(np.array(agreed)[0])
    return SeededDraws(seed, model.config.vocab_size)


def encode_prompt(
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    sight: Sight | None = None,
    most: int = sys.maxsize,
    enable_thinking: bool = False,
    tools: Sequence[Declaration] = (),
    check: Callable[[], None] = no_check,
) -> list[int]:
    """Ids of a prompt: a string is one user message; ids pass through.

    Of text that must have more than `most` tokens not all is encoded; `check` is called now and
    then, and may raise. Those of a picture know it, see `Placeholder`; `sight` is the model's.

    Raises:
        SettingError: it is neither messages nor ids, or asks for tools or thoughts that the chat
            template would leave out, or for pictures of a model that reads text alone.
        ContextError: the prompt is empty, or text or pictures that are far too long.
        TokenizerError: the chat template refuses the messages.
        PictureError: a picture cannot be read.
        TooLarge: there is no memory to see one.
    """
    _check_known(tokenizer, tools=len(tools) > 0, thinking=enable_thinking)
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ContextError("the prompt is empty")
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, Iterable) or isinstance(prompt, bytes | Mapping):
        raise SettingError(f"a prompt is text, messages or token ids, not {shown(prompt)}")
    parts = list(prompt)
    messages = [part for part in parts if isinstance(part, dict)]
    if not messages:
        ids = token_ids(parts)
        runs(ids)  # which refuses parts of a picture
        return ids
    if len(messages) < len(parts):
        raise SettingError("a prompt is either messages or token ids, not both")
    if any(each.get("tool_calls") for each in messages):
        _check_known(tokenizer, tools=True)
    messages = shown_messages(messages, sight, most, check)
    return encode_messages(
        tokenizer, messages, sight, most, enable_thinking=enable_thinking, tools=tools, check=check
    )


def _check_known(tokenizer: Tokenizer, *, tools: bool = False, thinking: bool = False) -> None:
    """Refuse what the chat template would leave out: tools and their calls, thoughts."""
    if tools and not tokenizer.knows_tools:
        raise SettingError("this model's chat template knows no tools")
    if thinking and not tokenizer.knows_thinking:
        raise SettingError("this model's chat template knows no thinking")


def encode_messages(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    sight: Sight | None,
    most: int,
    *,
    enable_thinking: bool = False,
    tools: Sequence[Declaration] = (),
    check: Callable[[], None] = no_check,
) -> list[int]:
    """Ids of messages that `shown_messages` gave; arguments and errors as in `encode_prompt`.

    Markers of pictures that stand in a text are made ordinary text.
    """
    pictures = pictures_of(messages)
    if pictures and sight is None:
        raise SettingError(READS_TEXT)
    markers = None
    if sight is not None:
        try:
            markers = markers_of(tokenizer, sight.config)
        except Error:
            if pictures:
                raise
    times = times_of(messages)
    messages, tools = bare(messages), list(tools)
    if markers is not None:
        messages, tools = markers.neutral(messages), markers.neutral(tools)
    text = tokenizer.apply_chat_template(
        messages,
        enable_thinking=enable_thinking,
        tools=tools or None,
        pictures=len(pictures) > 0,
    )
    if markers is None or sight is None:
        return encode_text(tokenizer, text, most, check)
    ids = encode_text(tokenizer, markers.expanded(text, pictures, times), most, check)
    return placed_ids(ids, pictures, sight.config)


def encode_text(
    tokenizer: Tokenizer, text: str, most: int, check: Callable[[], None] = no_check
) -> list[int]:
    """Ids of a text that is read as it stands; `check` is called now and then, and may raise.

    Raises:
        ContextError: it must have more than `most` tokens.
    """
    try:
        return tokenizer.encode_within(text, most, "the prompt", check)
    except TooLong as error:
        least = max(most + 1, len(text) // tokenizer.longest)
        told = f"{error}, and no more fits into the context"
        raise ContextError(told, least, most) from None
