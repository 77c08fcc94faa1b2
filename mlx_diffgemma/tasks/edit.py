"""Rewriting a part of a text: the part is the starting canvas, the rest is given.

The ordinary loop puts fresh noise wherever it accepts nothing, which destroys the text that was to
be repaired. Here such a position takes back the user's own token; the original also stands in the
prompt. The text behind the part is given but may shift, so that the part can grow or shrink.
"""

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypedDict, Unpack

import mlx.core as mx
import numpy as np

from ..arguments import SettingError, check_kind, is_number, shown
from ..diffusion.automaton import Concat, Exactly, Pattern, Repeat, Tokens, compile_pattern
from ..diffusion.causal import CausalReader
from ..diffusion.decoding import Decoding, relay
from ..diffusion.denoise import DenoisingState, Start, denoise
from ..diffusion.draws import Draws
from ..diffusion.plans import Plans
from ..diffusion.prompt_cache import PromptCache, Reading, remaining_context
from ..errors import Error
from ..model.diffusion_gemma import DiffusionGemma
from ..model.settings import GenerationConfig, Sampler
from ..text.tokenizer import COUNTED_AT_ONCE, Tokenizer, no_check
from ..text.vocabulary import Vocabulary
from .proofread import Proofreader, Tally, begin_reading
from .request import Draft, checked_seed, draft_of, encode_prompt, fresh_draws, stream
from .starts import CanvasError, clip_context
from .writing import Read

STRENGTH = 0.4


class EditError(Error):
    """Lines that are not there, or that cannot be edited."""


@dataclass(frozen=True)
class EditResult:
    """An edited text.

    Attributes:
        text: the whole text, its part rewritten.
        steps: denoising steps, over all canvases.
        notes: what a user should know, as sentences: text that the model could not see.
        positions_decoded: positions of canvases, over those steps.
        converged: whether every canvas met the stop rule before its steps were used up.
        encoder_passes: of those that verify, over `positions_encoded` tokens.
    """

    text: str
    steps: int
    notes: tuple[str, ...]
    positions_decoded: int
    converged: bool
    encoder_passes: int = 0
    positions_encoded: int = 0


class EditOptions(TypedDict, total=False):
    """Says all else that a rewriting is asked for with.

    Attributes:
        lines: first and last line of the part, counted from 1; None is the whole text.
        strength: over 0 to 1: how much of the part is noised, and how much of the schedule is run.
        steps: denoising steps of the whole schedule; None asks the checkpoint.
        seed: makes the result repeatable; None draws one.
        sampler: `EntropyBound` or `ConfidenceThreshold`; None asks the checkpoint.
        draws: takes the place of `seed`, to replay a run.
        verify: have the encoder read what was rewritten, and correct what it doubts; of that, what
            was denoised, and the part as it was, the one stays that it finds likeliest.
    """

    lines: tuple[int, int] | None
    strength: float
    steps: int | None
    seed: int | None
    sampler: Sampler | None
    draws: Draws | None
    verify: bool


@dataclass(frozen=True)
class EditRequest:
    """Asks for a text to be rewritten; all but text and instruction stand in `EditOptions`."""

    text: str
    instruction: str
    lines: tuple[int, int] | None = None
    strength: float = STRENGTH
    steps: int | None = None
    seed: int | None = None
    sampler: Sampler | None = None
    draws: Draws | None = None
    verify: bool = False

    def prepare(
        self,
        model: DiffusionGemma,
        vocabulary: Vocabulary,
        check: Callable[[], None] = no_check,
    ) -> "Revision":
        """The part in pieces that fit into canvases, see `request.Task`.

        Raises:
            EditError: there are no such lines, or nothing in them.
            CanvasError: a line is longer than three quarters of a canvas.
            ContextError: the prompt, which holds the part, does not fit.
            SettingError: a setting is out of range.
        """
        left, part, right = self.split()
        tokenizer = vocabulary.tokenizer
        most = model.context * tokenizer.longest
        if len(self.text) > most:
            raise EditError(f"the text has {len(self.text):,} characters, more than {most:,}")
        config = model.generation.override(max_denoising_steps=self.steps, sampler=self.sampler)
        asked = f"{self.instruction.strip().rstrip(':')}: {part}"
        prompt = encode_prompt(tokenizer, asked, sight=model.sight, most=model.context, check=check)
        remaining_context(model, prompt)
        chunks = _chunks(tokenizer, part, model.config.canvas_length * 3 // 4, check)
        return Revision(
            model,
            vocabulary,
            left,
            _in_pieces(tokenizer, left, check),
            chunks,
            right,
            prompt,
            self.strength,
            config,
            self.seed,
            self.draws,
            self.verify,
        )

    def split(self) -> tuple[str, str, str]:
        """The text before the part, the part and what is behind it, see `split_lines`; finds all
        mistakes that no model is needed for.

        Raises:
            EditError: there are no such lines, or nothing in them.
            SettingError: a setting is out of range, or text or instruction are no text.
        """
        check_kind("the text", self.text, str, "text")
        check_kind("an instruction", self.instruction, str, "text")
        check_kind("verify", self.verify, bool, "true or false")
        if not is_number(self.strength) or not 0 < self.strength <= 1:
            raise SettingError(f"strength must be over 0 and at most 1, not {shown(self.strength)}")
        checked_seed(self.seed)
        left, part, right = split_lines(self.text, self.lines)
        if not part.strip():
            raise EditError("there is nothing to edit")
        return left, part, right


def split_lines(text: str, lines: tuple[int, int] | None) -> tuple[str, str, str]:
    """Split a text before, in and behind the lines, counted from 1, both included; None is all.

    Line breaks at the end of the part stand behind it.

    Raises:
        EditError: the text has no such lines.
    """
    every = text.splitlines(keepends=True)
    match lines:
        case None:
            first, last = 1, max(len(every), 1)
        case (int(first), int(last)):
            pass
        case _:
            raise EditError(f"lines are a first and a last number, not {shown(lines)}")
    if not 1 <= first <= last:
        raise EditError(f"lines {first}:{last} are no range")
    if lines and last > len(every):
        raise EditError(f"there is no line {last}; the text has {len(every)}")
    part = "".join(every[first - 1 : last])
    kept = part.rstrip("\r\n")
    return "".join(every[: first - 1]), kept, part[len(kept) :] + "".join(every[last:])


def _chunks(tokenizer: Tokenizer, part: str, most: int, check: Callable[[], None]) -> list[str]:
    """The part in pieces of whole lines, of at most `most` tokens each."""
    chunks: list[str] = []
    for number, line in enumerate(part.splitlines(keepends=True), 1):
        check()
        if len(tokenizer.encode(line)) > most:
            raise CanvasError(f"line {number} of what is to be edited is over {most} tokens long")
        if chunks and len(tokenizer.encode(chunks[-1] + line)) <= most:
            chunks[-1] += line
        else:
            chunks.append(line)
    return chunks


@dataclass(frozen=True, eq=False)
class Revision:
    """A rewriting that is ready to run, see `request.Prepared`."""

    model: DiffusionGemma
    vocabulary: Vocabulary
    left: str
    left_ids: list[int]
    chunks: list[str]
    right: str
    prompt: list[int]
    strength: float
    config: GenerationConfig
    seed: int | None
    draws: Draws | None
    verify: bool = False

    def run(self, prompt_cache: PromptCache) -> Decoding[Reading | Draft | EditResult, None]:
        """A `Draft` a denoising step, at last the `EditResult`."""
        draws = self.draws or fresh_draws(self.model, self.seed)
        written, given = self.left, self.left_ids
        steps = decoded = 0
        notes: list[str] = []
        converged = True
        tally = Tally()
        for number, chunk in enumerate(self.chunks):
            context, dropped = clip_context(self.model, self.prompt, given)
            if dropped and not notes:
                notes.append(f"The model did not see the first {dropped} tokens of the text.")
            reader = yield from begin_reading(self.model, prompt_cache, context, self.verify)
            state, tokens = yield from self._rewrite(number, prompt_cache, draws)
            if reader is not None:
                tokens = yield from relay(self._verified(number, reader, tokens), tally.take)
            rewritten = self.vocabulary.tokenizer.decode(tokens)
            converged &= bool(np.array(state.converged)[0])
            rewritten += chunk[len(chunk.rstrip("\r\n")) :]
            written += rewritten
            # Not all that is written is encoded anew: others wait on this thread.
            given = given + self.vocabulary.tokenizer.encode(rewritten)
            decoded += state.decoded
            steps += state.step - _first_step(self.strength, self.config) + 1
        yield EditResult(
            text=written + self.right,
            steps=steps,
            notes=tuple(notes),
            positions_decoded=decoded,
            converged=converged,
            encoder_passes=tally.passes,
            positions_encoded=tally.positions,
        )

    def _split(self, number: int) -> tuple[str, str]:
        """A chunk without its line break, and what stands behind that in the text."""
        chunk = self.chunks[number]
        body = chunk.rstrip("\r\n")
        return body, chunk[len(body) :] + "".join(self.chunks[number + 1 :]) + self.right

    def _rewrite(
        self, number: int, prompt_cache: PromptCache, draws: Draws
    ) -> Decoding[Draft, tuple[DenoisingState, list[int]]]:
        """The last state of a chunk's canvas, and the tokens of the chunk rewritten, without its
        line break."""
        tokenizer, config = self.vocabulary.tokenizer, self.config
        body, behind = self._split(number)
        start = edit_start(self.model, self.vocabulary, body, behind, self.strength, config, draws)
        state = yield from relay(
            denoise(self.model, prompt_cache.cache, config, draws, start),
            lambda state: [draft_of(tokenizer, state, number, config)],
        )
        tokens: list[int] = np.array(state.argmax[0]).tolist()
        return state, _without(
            tokens, self.vocabulary.end, _visible(tokenizer, behind, len(tokens))
        )

    def _verified(
        self, number: int, reader: CausalReader, rewritten: list[int]
    ) -> Decoding[Read, list[int]]:
        """The tokens of a chunk rewritten, as they are or corrected, or those that it had."""
        room = self.model.config.canvas_length
        body, behind = self._split(number)
        own = self.vocabulary.tokenizer.encode(body)
        proofreader = Proofreader(
            reader,
            frozenset(_allowed(self.vocabulary, own)),
            [*_visible(self.vocabulary.tokenizer, behind, room), self.vocabulary.end],
            _most(own, room),
        )
        best = yield from proofreader.likeliest([own, rewritten])
        best = yield from proofreader.corrected(best)
        reader.take_back(best)  # a next canvas reads on from there
        return best


def edit_start(
    model: DiffusionGemma,
    vocabulary: Vocabulary,
    part: str,
    behind: str,
    strength: float,
    config: GenerationConfig,
    draws: Draws,
) -> Start:
    """A canvas that starts from a part of a text, noised, and goes back to it where nothing is
    accepted; `behind` follows unchanged, wherever the part ends.

    Strength s noises each token with probability s and enters the schedule at its last share s.

    Raises:
        CanvasError: the part and an end token are more than the canvas.
    """
    room = model.config.canvas_length
    tokenizer = vocabulary.tokenizer
    ids = tokenizer.encode(part)
    if len(ids) >= room:
        raise CanvasError(f"the text has {len(ids)} tokens, more than a canvas of {room} holds")
    right = _visible(tokenizer, behind, room)
    cut = len(right) > room
    allowed = Tokens(_allowed(vocabulary, ids))
    part_pattern = Repeat(allowed, 0, _most(ids, room))
    pattern: Pattern = Concat((part_pattern, Exactly(tuple(right[:room]))))
    if not cut:
        pattern = vocabulary.answer(pattern)
    # Text that does not fit may go on in a canvas that is never computed.
    plan = compile_pattern(pattern).plan(room, 2 * room + 1)
    whole = mx.array([[*ids, *right, *vocabulary.ending(room)][:room]], dtype=mx.int32)
    # Gumbel noise is below -log(-log s) with probability s.
    below = draws.gumbel((1, room)) < -math.log(-math.log(min(strength, 1 - 1e-9)))
    noised = below & (mx.arange(room) < len(ids))
    return Start(
        mx.where(noised, draws.tokens((1, room)), whole),
        background=whole,
        constraint=Plans([plan], vocabulary.size),
        first_step=_first_step(strength, config),
    )


def _allowed(vocabulary: Vocabulary, part: list[int]) -> tuple[int, ...]:
    """Tokens of text, and those of the part itself even if they are, say, single bytes."""
    return tuple(sorted({*vocabulary.text_without("").ids, *part}))


def _most(part: list[int], room: int) -> int:
    """Tokens that a part may grow to in a canvas of `room`."""
    return min(len(part) + max(4, len(part) // 4), room - 1)


def _first_step(strength: float, config: GenerationConfig) -> int:
    """Where the schedule is entered, from 1."""
    return 1 + round((1 - strength) * (config.max_denoising_steps - 1))


def _visible(tokenizer: Tokenizer, behind: str, room: int) -> list[int]:
    """Tokens of what follows the part, of a long text the first, which are more than `room`.

    White space at a text's end stays out of the canvas.
    """
    return tokenizer.encode(behind[: (room + 1) * tokenizer.longest]) if behind.strip() else []


def _in_pieces(tokenizer: Tokenizer, text: str, check: Callable[[], None]) -> list[int]:
    """Ids of a text that may be long, most of which no context has room for."""
    ids: list[int] = []
    for start in range(0, len(text), COUNTED_AT_ONCE):
        check()
        ids += tokenizer.encode(text[start : start + COUNTED_AT_ONCE])
    return ids


def _without(tokens: list[int], end: int, right: list[int]) -> list[int]:
    """The part's tokens: a finished canvas less the end token and the text behind the part."""
    if end in tokens:
        tokens = tokens[: tokens.index(end)]
        return tokens[: len(tokens) - len(right)]
    # The canvas ends within the text behind: as much of it as can be is not the part's.
    for count in range(min(len(right), len(tokens)), 0, -1):
        if tokens[len(tokens) - count :] == right[:count]:
            return tokens[: len(tokens) - count]
    return tokens


def stream_edit(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    text: str,
    instruction: str,
    **options: Unpack[EditOptions],
) -> Generator[Reading | Draft | EditResult, None, None]:
    """Rewrite as `edit` does, lazily: a `Draft` a denoising step, then the result."""
    return stream(model, tokenizer, EditRequest(text, instruction, **options))


def edit(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    text: str,
    instruction: str,
    **options: Unpack[EditOptions],
) -> EditResult:
    """Rewrite a text, or some of its lines, as an instruction says; the rest stays as it is.

    Text left of the part is context; as much of what follows as fits stands behind it in the
    canvas. A part longer than three quarters of a canvas is rewritten in pieces of whole lines.

    Args:
        model: as `load` gives it.
        tokenizer: the same checkpoint's.
        text: the whole text.
        instruction: what to do; the prompt is this, a colon, and the part.
        options: see `EditOptions`.

    Raises:
        Error: as `EditRequest.prepare`.
    """
    *_, result = stream(model, tokenizer, EditRequest(text, instruction, **options))
    assert isinstance(result, EditResult)
    return result
