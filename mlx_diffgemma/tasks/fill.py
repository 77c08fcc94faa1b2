"""Filling holes in a text: what is given is pinned, the model writes between, seeing both sides.

How a hole of unknown length is decided: a few lengths are denoised side by side for a few steps,
and the one whose tokens surprise the model least is kept. Surprise is the mean of -log p over the
tokens written, seen from all text around them but not from themselves, and over the token behind
the hole, seen from everything before it. (The mean entropy of the finished canvas, tried first,
hardly notices a wrong length: a model is certain of whatever it sees.) Several such holes are
decided from left to right.

A finished canvas whose numbers or choices the model doubts, once it sees all else, is denoised
again from other noise; the least surprising one is kept.
"""

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import NoneType
from typing import Never, TypedDict, Unpack

import mlx.core as mx
import numpy as np

from ..arguments import check_kind, shown
from ..diffusion.automaton import Alternation, Concat, Exactly, Pattern, Repeat, compile_pattern
from ..diffusion.causal import CausalReader
from ..diffusion.decoding import Decoding, relay, rows_at_once
from ..diffusion.denoise import denoise
from ..diffusion.draws import Draws
from ..diffusion.head import log_probability, read_out
from ..diffusion.prompt_cache import ContextError, PromptCache, Reading, remaining_context
from ..model.cache import LayerCache
from ..model.diffusion_gemma import DiffusionGemma, Pass
from ..model.settings import GenerationConfig, Sampler
from ..text.template import Hole, TemplateError, check_parts, parse_template, short
from ..text.tokenizer import Tokenizer, no_check
from ..text.vocabulary import Vocabulary, integer
from .pictures import Given
from .proofread import Tally, begin_reading, refilled
from .request import Draft, checked_seed, draft_of, encode_prompt, fresh_draws, stream
from .starts import clip_context, planned_start

TEXT_LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)

INTEGER_LENGTHS = (1, 2, 3, 4, 5, 6)

# Enough to tell a length that fits from one that does not; the length kept gets all steps.
TRIAL_STEPS = 8

# Where the model, seeing all else, gives a digit or choice less than e ** -MOST_SURPRISE, the
# canvas is denoised again from other noise, and the least surprising one is kept.
MOST_SURPRISE = 0.7

RETRIES = 2

# Passes over a finished canvas that find how likely its holes are, each hiding some of them.
GROUPS = 4

_CLOSING = '"`)]}>'


@dataclass(frozen=True)
class FillResult:
    """A filled template.

    Attributes:
        text: the template with its holes filled.
        values: by hole name; an `int` hole gives an int. Unnamed holes are called "1", "2", ...
        probabilities: by hole name, the probability of each token in a decoder pass that sees all
            else, but noise in this hole and in up to a quarter of the others (temperature 1).
        steps: denoising steps, over all windows; rows tried side by side count once.
        notes: what a user should know, as sentences: text that the model could not see.
        positions_decoded: positions of canvases, over those steps and all rows.
        converged: whether every canvas met the stop rule before its steps were used up.
        encoder_passes: of those that verify, over `positions_encoded` tokens.
    """

    text: str
    values: dict[str, str | int]
    probabilities: dict[str, tuple[float, ...]] = field(repr=False)
    steps: int
    notes: tuple[str, ...]
    positions_decoded: int
    converged: bool
    encoder_passes: int = 0
    positions_encoded: int = 0


# Layout ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Gap:
    """A hole with what it may hold, by length in tokens."""

    hole: Hole
    spaced: bool  # its text begins with the space that stood before it
    patterns: dict[int, Pattern]
    start_length: int  # until it is decided
    any_length: Pattern  # as the encoder writes it, which need not guess


_Piece = tuple[int, ...] | _Gap


def _gap(
    vocabulary: Vocabulary,
    hole: Hole,
    spaced: bool,
    closing: str,
    room: int,
    check: Callable[[], None],
) -> _Gap:
    patterns: dict[int, Pattern] = {}
    any_length: Pattern | None = None
    if hole.kind == "choice":
        by_length: dict[int, list[Pattern]] = {}
        for option in hole.options:
            check()
            literal = vocabulary.literal(" " + option if spaced else option)
            by_length.setdefault(len(literal.ids), []).append(literal)
        patterns = {n: Alternation(tuple(options)) for n, options in by_length.items()}
    elif hole.kind == "int":
        patterns = {n: integer(vocabulary, n) for n in INTEGER_LENGTHS}
    else:
        counts = [n for n in TEXT_LENGTHS if hole.most is None or n <= hole.most]
        if hole.tokens is not None:
            counts = [hole.tokens]
        # What closes the hole cannot stand in it, and only a hole that says its length has lines.
        unknown = hole.tokens is None and hole.most is None
        inner = vocabulary.text_without(closing + "\n" if unknown else closing)
        first = vocabulary.words_without(closing + "\n") if spaced else inner
        patterns = {n: Concat((first, Repeat(inner, n - 1, n - 1))) for n in counts}
        if unknown:
            any_length = Concat((first, Repeat(inner, 0, max(counts) - 1)))
    patterns = {n: pattern for n, pattern in patterns.items() if n <= room}
    if not patterns:
        raise TemplateError(
            f"the hole {short(hole.name)} is longer than a canvas of {room + 1} tokens"
        )
    lengths = sorted(patterns)
    any_length = any_length or Alternation(tuple(patterns.values()))
    return _Gap(hole, spaced, patterns, lengths[len(lengths) // 3], any_length)


def _pieces(
    model: DiffusionGemma,
    vocabulary: Vocabulary,
    parts: list[str | Hole],
    check: Callable[[], None],
) -> list[_Piece]:
    """The template in tokens. A space before a hole moves into it, if words begin with theirs."""
    pieces: list[_Piece] = []
    room = model.config.canvas_length - 1
    for i, part in enumerate(parts):
        check()
        after = parts[i + 1] if i + 1 < len(parts) else None
        if isinstance(part, Hole):
            before = parts[i - 1] if i else ""
            spaced = isinstance(before, str) and _lends_space(vocabulary, before, part)
            closing = after[0] if isinstance(after, str) and after[0] in _CLOSING else ""
            pieces.append(_gap(vocabulary, part, spaced, closing, room, check))
            continue
        lends = isinstance(after, Hole) and _lends_space(vocabulary, part, after)
        text = part[:-1] if lends else part
        pieces.append(tuple(vocabulary.tokenizer.encode(text)))
    return pieces


def _lends_space(vocabulary: Vocabulary, text: str, hole: Hole) -> bool:
    if not vocabulary.words_begin_with_spaces:
        return False
    return hole.kind != "int" and len(text) > 1 and text[-1] == " " and not text[-2].isspace()


@dataclass(frozen=True)
class _Row:
    """One canvas: its pattern, where its holes lie, where the template's text ends."""

    pattern: Pattern
    spans: dict[str, tuple[int, int]]
    end: int


def _row(
    vocabulary: Vocabulary, pieces: Iterable[_Piece], lengths: dict[str, int], room: int, last: bool
) -> _Row:
    """Lay pieces over a canvas of `room` tokens; what does not fit is cut off at its end."""
    patterns: list[Pattern] = []
    spans: dict[str, tuple[int, int]] = {}
    used = 0
    for piece in pieces:
        if isinstance(piece, _Gap):
            length = lengths[piece.hole.name]
            if used + length > room:
                last = False
                break
            spans[piece.hole.name] = used, used + length
            patterns.append(piece.patterns[length])
        else:
            shown = piece[: room - used]
            last = last and len(shown) == len(piece)
            length = len(shown)
            patterns.append(Exactly(shown))
        used += length
    if last and used < room:
        patterns.append(Exactly(tuple(vocabulary.ending(room - used))))
    else:
        patterns.append(Repeat(vocabulary.anything, room - used, room - used))
    return _Row(Concat(tuple(patterns)), spans, used)


# Filling -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """A canvas as it would be with holes of these lengths."""

    lengths: dict[str, int]
    row: _Row


@dataclass(frozen=True)
class _Settled:
    """A finished canvas (1, L), with the surprise, in nats, of each token of its holes.

    `behind` is that of the token behind the hole in question, where a length is tried.
    """

    layout: _Layout
    canvas: mx.array
    surprises: dict[str, list[float]]
    behind: list[float]
    converged: bool

    def mean(self, name: str) -> float:
        """Of a hole and the token behind it."""
        judged = self.surprises[name] + self.behind
        return sum(judged) / len(judged)

    def total(self, names: list[str]) -> float:
        """Over all tokens of some holes."""
        return sum(sum(self.surprises[name]) for name in names)

    def surprising(self, names: list[str]) -> bool:
        """Tell whether the model finds a token in these holes unlikely, once it sees the rest."""
        return any(max(self.surprises[name]) > MOST_SURPRISE for name in names)

    @property
    def tokens(self) -> list[int]:
        return np.array(self.canvas[0]).tolist()


class FillOptions(TypedDict, total=False):
    """Says all else that a filling is asked for with.

    Attributes:
        prompt: an instruction; None is "Fill: " and the template with its holes as dots.
        images: pictures that stand before the instruction, each a `pathlib.Path`, bytes of a file
            or an image of Pillow.
        image_tokens: most tokens of each; None asks the checkpoint.
        steps: most denoising steps a canvas; None asks the checkpoint.
        seed: makes the result repeatable; None draws one.
        sampler: `EntropyBound` or `ConfidenceThreshold`; None asks the checkpoint.
        draws: takes the place of `seed`, to replay a run.
        verify: have the encoder read what was filled in; from its first doubt on it writes a hole
            anew, which is kept if it finds the whole line likelier.
    """

    prompt: str | None
    images: Sequence[Given]
    image_tokens: int | None
    steps: int | None
    seed: int | None
    sampler: Sampler | None
    draws: Draws | None
    verify: bool


@dataclass(frozen=True)
class FillRequest:
    """Asks for a template to be filled; all but the template stands in `FillOptions`."""

    template: str | Sequence[str | Hole]
    prompt: str | None = None
    steps: int | None = None
    seed: int | None = None
    sampler: Sampler | None = None
    draws: Draws | None = None
    verify: bool = False
    images: Sequence[Given] = ()
    image_tokens: int | None = None

    def prepare(
        self,
        model: DiffusionGemma,
        vocabulary: Vocabulary,
        check: Callable[[], None] = no_check,
    ) -> "Form":
        """The template and its prompt in tokens, see `request.Task`.

        Raises:
            TemplateError: no hole, or one that makes no sense or fits no canvas, or a text that no
                context has room for.
            ContextError: the prompt does not fit.
            SettingError: a setting is out of range.
        """
        config = model.generation.override(max_denoising_steps=self.steps, sampler=self.sampler)
        parts = self.parts()
        _refuse_long(model, vocabulary.tokenizer, parts)
        pieces = tuple(_pieces(model, vocabulary, parts, check))
        prompt = self.prompt
        if prompt is None:
            shown = "the gap in the text"
            if _fits(model, pieces):
                shown = "".join(part if isinstance(part, str) else "..." for part in parts)
            prompt = f"Fill: {shown}"
        most = {} if self.image_tokens is None else {"tokens": self.image_tokens}
        before = [{"type": "image", "image": each, **most} for each in self.images]
        content = [*before, {"type": "text", "text": prompt}]
        ids = encode_prompt(
            vocabulary.tokenizer,
            [{"role": "user", "content": content}] if before else prompt,
            sight=model.sight,
            most=model.context,
            check=check,
        )
        remaining_context(model, ids)
        return Form(
            model,
            vocabulary,
            tuple(parts),
            pieces,
            ids,
            config,
            self.seed,
            self.draws,
            self.verify,
        )

    def parts(self) -> list[str | Hole]:
        """Texts and holes in turn; finds all mistakes that no model is needed for.

        Raises:
            TemplateError: as `parse_template`.
            SettingError: the seed is none, the prompt no text, or `verify` no boolean.
        """
        checked_seed(self.seed)
        check_kind("a prompt", self.prompt, (str, NoneType), "text")
        check_kind("verify", self.verify, bool, "true or false")
        check_kind("images", self.images, (list, tuple), "a list of pictures")
        if isinstance(self.template, str):
            return parse_template(self.template)
        if not isinstance(self.template, Sequence):
            raise TemplateError(f"a template is text, not {shown(self.template)}")
        check_parts(self.template)
        return list(self.template)


def _refuse_long(model: DiffusionGemma, tokenizer: Tokenizer, parts: list[str | Hole]) -> None:
    given = sum(len(part) for part in parts if isinstance(part, str))
    most = model.context * tokenizer.longest
    if given > most:
        raise TemplateError(
            f"the template has {given:,} characters; the context of {model.context:,} "
            f"tokens of at most {tokenizer.longest} has room for {most:,}"
        )


def _fits(model: DiffusionGemma, pieces: Iterable[_Piece]) -> bool:
    """Tell whether a canvas holds all of a template, before its holes' lengths are decided."""
    lengths = {p.hole.name: p.start_length for p in pieces if isinstance(p, _Gap)}
    return _size(pieces, lengths) < model.config.canvas_length


@dataclass(frozen=True, eq=False)
class Form:
    """A template that is ready to be filled, see `request.Prepared`."""

    model: DiffusionGemma
    vocabulary: Vocabulary
    parts: tuple[str | Hole, ...]
    pieces: tuple[_Piece, ...]
    prompt: list[int]
    config: GenerationConfig
    seed: int | None
    draws: Draws | None
    verify: bool = False

    @cached_property
    def gaps(self) -> dict[str, _Gap]:
        """The holes by name, in their order."""
        return {piece.hole.name: piece for piece in self.pieces if isinstance(piece, _Gap)}

    def run(self, prompt_cache: PromptCache) -> Decoding[Reading | Draft | FillResult, None]:
        """A `Draft` a denoising step (of the first row tried), at last the `FillResult`."""
        draws = self.draws or fresh_draws(self.model, self.seed)
        filling = _Filling(self, prompt_cache, draws)
        while len(filling.written) < len(self.gaps):
            yield from filling.read()
            canvas = yield from filling.decide()
            filling.keep(canvas)
        yield filling.result()


class _Filling:
    """A template that is being filled, canvas by canvas: what is decided, and what is ahead."""

    def __init__(self, form: Form, prompt_cache: PromptCache, draws: Draws):
        self._form, self._cache, self._draws = form, prompt_cache, draws
        self._pieces = form.pieces
        self._lengths = {name: gap.start_length for name, gap in form.gaps.items()}
        self._fits = _fits(form.model, form.pieces)
        self._context: list[int] = []  # to be read next
        self._window = self._passes = self._decoded = 0
        self._notes: list[str] = []
        self._converged = True
        self._probabilities: dict[str, tuple[float, ...]] = {}
        self._reader: CausalReader | None = None  # of what is to be verified
        self._tally = Tally()
        self.written: dict[str, list[int]] = {}

    @property
    def _room(self) -> int:
        return self._form.model.config.canvas_length

    def _row(self, lengths: dict[str, int]) -> _Row:
        return _row(self._form.vocabulary, self._pieces, lengths, self._room, last=True)

    def read(self) -> Decoding[Reading, None]:
        """Read what stands left of the next hole, but for a template that fits as a whole."""
        form = self._form
        while not self._fits and not isinstance(left := self._pieces[0], _Gap):
            self._context += left
            self._pieces = self._pieces[1:]
        if not self._window:
            context, dropped = clip_context(form.model, form.prompt, self._context)
            if dropped:
                self._notes.append(f"The model did not see the first {dropped} tokens of the text.")
        else:
            context = [*self._cache.tokens, *self._context]
            if len(context) + self._room > form.model.context:
                raise ContextError("the text between the holes does not fit into the context")
        self._reader = yield from begin_reading(form.model, self._cache, context, form.verify)

    def decide(self) -> Decoding[Draft, _Settled]:
        """Decide the lengths of holes from left to right, then all that lie in the canvas."""
        gaps = self._form.gaps
        names = list(self._row(self._lengths).spans)
        undecided = [name for name in names if len(gaps[name].patterns) > 1]
        for name in [*undecided, None]:
            if name is not None and name not in self._row(self._lengths).spans:
                continue  # longer holes before it have pushed it out of this canvas
            tried = [self._lengths]
            if name is not None:
                tried = [{**self._lengths, name: length} for length in sorted(gaps[name].patterns)]
            settled = yield from self._try([_Layout(each, self._row(each)) for each in tried], name)
            self._lengths = settled.layout.lengths
        sure = [name for name in settled.layout.row.spans if gaps[name].hole.kind != "text"]
        for _ in range(RETRIES if settled.surprising(sure) else 0):
            other = yield from self._try([settled.layout], None)
            settled = min(settled, other, key=lambda each: each.total(sure))
            if not settled.surprising(sure):
                break
        if self._reader is not None:
            settled = yield from self._verified(settled, self._reader)
        return settled

    def _verified(self, settled: _Settled, reader: CausalReader) -> Decoding[Never, _Settled]:
        """The canvas with its holes as they are, or as the encoder has written them."""
        form, row, room = self._form, settled.layout.row, self._room
        whole = _size(self._pieces, settled.layout.lengths) == row.end < room
        line, spans = settled.tokens[: row.end + whole], dict(row.spans)
        for name in spans:
            start, end = spans[name]
            if end == len(line):
                continue  # nothing tells the encoder where it ends
            gap, slack = form.gaps[name], room - len(line)
            most = min(max(gap.patterns), end - start + slack)
            size = form.model.config.vocab_size
            new = yield from relay(
                refilled(reader, line, (start, end), gap.any_length, most, size), self._tally.take
            )
            line[start:end] = new
            shift = start + len(new) - end
            moved = {n: (a + shift, b + shift) for n, (a, b) in spans.items() if a >= end}
            spans |= {**moved, name: (start, end + shift)}
        reader.take_back()
        if line == settled.tokens[: len(line)] and spans == row.spans:
            return settled
        canvas = mx.array([(line + form.vocabulary.ending(room)[1:])[:room]])
        surprises = yield from _in_groups(form.model, self._cache.cache, canvas, spans, self._draws)
        changed = _Row(row.pattern, spans, len(line) - whole)
        layout = _Layout(settled.layout.lengths, changed)
        return replace(settled, layout=layout, canvas=canvas, surprises=surprises)

    def _try(self, layouts: list[_Layout], name: str | None) -> Decoding[Draft, _Settled]:
        form = self._form
        settled, steps, decoded = yield from _try(
            form.model,
            form.vocabulary,
            self._cache.cache,
            layouts,
            name,
            form.config,
            self._draws,
            self._window,
        )
        self._passes += steps
        self._decoded += decoded
        return settled

    def keep(self, settled: _Settled) -> None:
        """Keep the holes that lie in the canvas, and go on behind the last of them."""
        row, gaps = settled.layout.row, self._form.gaps
        self._converged &= settled.converged
        for name, (start, end) in row.spans.items():
            self.written[name] = settled.tokens[start:end]
            self._probabilities[name] = tuple(math.exp(-x) for x in settled.surprises[name])
        last, (_, reach) = list(row.spans.items())[-1]
        stop = self._pieces.index(gaps[last]) + 1
        self._context = settled.tokens[:reach]
        unseen = _size(self._pieces[stop:], self._lengths) - (row.end - reach)
        if unseen > 0:
            filled = ", ".join(row.spans)
            self._notes.append(
                f"Filling {filled}, the model did not see the last {unseen} tokens of the text."
            )
        self._pieces = self._pieces[stop:]
        self._fits = False
        self._window += 1

    def result(self) -> FillResult:
        """The text with its holes filled."""
        form = self._form
        values: dict[str, str | int] = {}
        text = ""
        for part in form.parts:
            if isinstance(part, str):
                text += part
                continue
            value = form.vocabulary.tokenizer.decode(self.written[part.name])
            # The space that the hole took over stands in the text already.
            value = value.removeprefix(" ") if form.gaps[part.name].spaced else value
            text += value
            values[part.name] = int(value) if part.kind == "int" else value
        notes = tuple(self._notes)
        return FillResult(
            text=text,
            values=values,
            probabilities=self._probabilities,
            steps=self._passes,
            notes=notes,
            positions_decoded=self._decoded,
            converged=self._converged,
            encoder_passes=self._tally.passes,
            positions_encoded=self._tally.positions,
        )


def stream_fill(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    template: str | Sequence[str | Hole],
    **options: Unpack[FillOptions],
) -> Generator[Reading | Draft | FillResult, None, None]:
    """Fill as `fill` does, lazily: a `Draft` a denoising step, then the result.

    A text that is read in several chunks says so with a `Reading` after each but the last.
    """
    return stream(model, tokenizer, FillRequest(template, **options))


def _size(pieces: Iterable[_Piece], lengths: dict[str, int]) -> int:
    return sum(lengths[p.hole.name] if isinstance(p, _Gap) else len(p) for p in pieces)


def _try(
    model: DiffusionGemma,
    vocabulary: Vocabulary,
    cache: list[LayerCache],
    layouts: list[_Layout],
    name: str | None,
    config: GenerationConfig,
    draws: Draws,
    window: int,
) -> Decoding[Draft, tuple[_Settled, int, int]]:
    """Denoise each layout; the one whose hole `name` surprises least, steps and positions.

    Without a name there is one layout, and it gets all its steps.
    """
    room = model.config.canvas_length
    at_once = rows_at_once(model)
    if name is not None:
        config = replace(config, max_denoising_steps=min(TRIAL_STEPS, config.max_denoising_steps))
    finished: list[_Settled] = []
    passes = decoded = 0
    layouts = [each for each in layouts if name is None or name in each.row.spans]
    for first in range(0, len(layouts), at_once):
        group = layouts[first : first + at_once]
        plans = [compile_pattern(each.row.pattern).plan(room, room) for each in group]
        start = planned_start(plans, vocabulary, draws)
        state = yield from relay(
            denoise(model, cache, config, draws, start),
            lambda state: [draft_of(vocabulary.tokenizer, state, window, config)],
        )
        passes += state.step
        decoded += state.decoded * len(group)
        for i, layout in enumerate(group):
            canvas = state.argmax[i : i + 1]
            if name is not None:
                begin, end = layout.row.spans[name]
                inside, after = yield from surprisal(
                    model, cache, canvas, [[(begin, end)], [(end, room)]], draws
                )
                surprises, behind = {name: inside[begin:end]}, after[end : end + 1]
            else:
                spans = layout.row.spans
                surprises = yield from _in_groups(model, cache, canvas, spans, draws)
                behind = []
            converged = bool(np.array(state.converged)[i])
            finished.append(_Settled(layout, canvas, surprises, behind, converged))
    if name is None:
        return finished[0], passes, decoded
    return min(finished, key=lambda settled: settled.mean(name)), passes, decoded


def _in_groups(
    model: DiffusionGemma,
    cache: list[LayerCache],
    canvas: mx.array,
    spans: dict[str, tuple[int, int]],
    draws: Draws,
) -> Decoding[Never, dict[str, list[float]]]:
    """The surprise of each hole's tokens, in at most GROUPS passes, each hiding every so-manyth."""
    names = [list(spans)[i::GROUPS] for i in range(min(GROUPS, len(spans)))]
    hidden = [[spans[name] for name in group] for group in names]
    found = yield from surprisal(model, cache, canvas, hidden, draws)
    return {
        name: each[slice(*spans[name])]
        for group, each in zip(names, found, strict=True)
        for name in group
    }


def surprisal(
    model: DiffusionGemma,
    cache: list[LayerCache],
    canvas: mx.array,
    hidden: list[list[tuple[int, int]]],
    draws: Draws,
) -> Decoding[Never, list[list[float]]]:
    """-log p (nats) of each token of a canvas (1, L), once for each list of spans that is hidden.

    A pass sees noise in the place of its hidden spans.
    """
    position = mx.arange(canvas.shape[1])
    rows: list[mx.array] = []
    for spans in hidden:
        veiled = mx.zeros(position.shape, dtype=mx.bool_)
        for start, end in spans:
            veiled = veiled | ((position >= start) & (position < end))
        rows.append(mx.where(veiled, draws.tokens(canvas.shape), canvas))
    at_once = rows_at_once(model)
    found: list[list[float]] = []
    for first in range(0, len(rows), at_once):
        states = yield Pass(mx.concatenate(rows[first : first + at_once]), cache)
        assert states is not None
        tokens = mx.broadcast_to(canvas, states.shape[:2])
        seen = read_out(model, states, 1.0)
        told = model.part.share.agreed([-log_probability(model, states, tokens, 1.0, seen)])
        found += np.array(told[0]).tolist()
    return found


def fill(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    template: str | Sequence[str | Hole],
    **options: Unpack[FillOptions],
) -> FillResult:
    """Fill the holes of a template, see `parse_template`; text outside of them stays as it is.

    A template that fits into a canvas is denoised as a whole. Of a longer one, the text left of a
    hole is context, and as much of its right side as fits stands in the canvas; holes further right
    wait for their canvas.

    Args:
        model: as `load` gives it.
        tokenizer: the same checkpoint's.
        template: text with holes, or what `parse_template` made of it.
        options: see `FillOptions`.

    Raises:
        Error: as `FillRequest.prepare`.
    """
    *_, result = stream(model, tokenizer, FillRequest(template, **options))
    assert isinstance(result, FillResult)
    return result
