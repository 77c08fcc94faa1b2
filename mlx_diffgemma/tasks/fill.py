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
from ..diffusion.automaton import compile_pattern
from ..diffusion.causal import CausalReader
from ..diffusion.decoding import Decoding, relay, rows_at_once
from ..diffusion.denoise import denoise
from ..diffusion.draws import Draws
from ..diffusion.head import log_probability, read_out
from ..diffusion.prompt_cache import ContextError, PromptCache, Reading, remaining_context
from ..model.cache import LayerCache
from ..model.diffusion_gemma import DiffusionGemma, Pass
from ..model.settings import GenerationConfig, Sampler
from ..text.template import Hole, TemplateError, check_parts, parse_template
from ..text.tokenizer import Tokenizer, no_check
from ..text.vocabulary import Vocabulary
from .gaps import (
    Gap,
    Piece,
    Row,
    cut_behind,
    near_text,
    pieces_of,
    quick_room,
    row_of,
    size_of,
    split_left,
)
from .pictures import Given
from .proofread import Tally, begin_reading, refilled
from .request import Draft, checked_seed, draft_of, encode_prompt, fresh_draws, stream
from .starts import clip_context, planned_start

# Enough to tell a length that fits from one that does not; the length kept gets all steps.
TRIAL_STEPS = 8

# Where the model, seeing all else, gives a digit or choice less than e ** -MOST_SURPRISE, the
# canvas is denoised again from other noise, and the least surprising one is kept.
MOST_SURPRISE = 0.7

RETRIES = 2

# A quick fill tries a length for fewer steps. Where the best tokens of a canvas have not changed
# for so many of them, it is taken: other noise has then been seen each time.
QUICK_STEPS, QUICK_PLATEAU = 2, 2

# Tokens at the end of a text that may be others when more is typed; a place before them is kept to
# go back to, where it saves so many tokens that they are worth a pass of their own.
UNSURE, WORTH_A_PASS = 16, 64

# Passes over a finished canvas that find how likely its holes are, each hiding some of them.
GROUPS = 4


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
        read_tokens: of the prompt and the text that stands before the first canvas, of which
            `cached_tokens` had been read before.
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
    read_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True)
class _Layout:
    """A canvas as it would be with holes of these lengths."""

    lengths: dict[str, int]
    row: Row


@dataclass(frozen=True)
class _Settled:
    """A finished canvas (1, L), with the surprise, in nats, of each token of its holes.

    `behind` is that of the token behind the hole in question, where a length is tried. A step more
    would start from `next`.
    """

    layout: _Layout
    canvas: mx.array
    next: mx.array
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
        quick: as an editor wants it, which has the next question soon: fewer lengths and steps, a
            canvas no longer than the hole and some lines behind it, and of a long text the nearest
            part.
    """

    prompt: str | None
    images: Sequence[Given]
    image_tokens: int | None
    steps: int | None
    seed: int | None
    sampler: Sampler | None
    draws: Draws | None
    verify: bool
    quick: bool


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
    quick: bool = False

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
        parts = near = self.parts()
        room, whole = model.config.canvas_length, True
        if self.quick:
            near, whole = near_text(parts, vocabulary.tokenizer.longest, model.context)
        _refuse_long(model, vocabulary.tokenizer, near)
        pieces = tuple(pieces_of(model, vocabulary, near, check, self.quick))
        if self.quick:
            pieces, uncut = cut_behind(pieces)
            whole = whole and uncut
        fits = whole and _fits(model, pieces)
        if self.quick:
            room = quick_room(room, pieces, whole, fits)
        prompt = self.prompt
        if prompt is None:
            shown = "the gap in the text"
            if fits:
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
            room,
            whole,
            self.quick,
            fits,
        )

    def parts(self) -> list[str | Hole]:
        """Texts and holes in turn; finds all mistakes that no model is needed for.

        Raises:
            TemplateError: as `parse_template`.
            SettingError: the seed is none, the prompt no text, `verify` or `quick` no boolean.
        """
        checked_seed(self.seed)
        check_kind("a prompt", self.prompt, (str, NoneType), "text")
        check_kind("verify", self.verify, bool, "true or false")
        check_kind("quick", self.quick, bool, "true or false")
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


def _fits(model: DiffusionGemma, pieces: Iterable[Piece]) -> bool:
    """Tell whether a canvas holds all of a template, before its holes' lengths are decided."""
    lengths = {p.hole.name: p.start_length for p in pieces if isinstance(p, Gap)}
    return size_of(pieces, lengths) < model.config.canvas_length


@dataclass(frozen=True, eq=False)
class Form:
    """A template that is ready to be filled, see `request.Prepared`."""

    model: DiffusionGemma
    vocabulary: Vocabulary
    parts: tuple[str | Hole, ...]
    pieces: tuple[Piece, ...]
    instruction: list[int]
    config: GenerationConfig
    seed: int | None
    draws: Draws | None
    verify: bool
    room: int  # positions of a canvas
    whole: bool  # the pieces are all that stands behind the last hole
    quick: bool
    fits: bool  # a canvas holds all of it, before its holes' lengths are decided

    @cached_property
    def prompt(self) -> list[int]:
        """What is read before the first canvas: a server finds by it what it has read before."""
        context, _ = self.context
        return context

    @cached_property
    def context(self) -> tuple[list[int], int]:
        """The instruction and the text left of the first hole, unless a canvas holds it; without
        as many of its first tokens as do not fit, and how many those are."""
        left, _ = ([], ()) if self.fits else split_left(self.pieces)
        step = self.room if self.quick else 1
        return clip_context(self.model, self.instruction, left, step)

    @cached_property
    def gaps(self) -> dict[str, Gap]:
        """The holes by name, in their order."""
        return {piece.hole.name: piece for piece in self.pieces if isinstance(piece, Gap)}

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
        self._fits = form.fits
        self._context: list[int] = []  # to be read next
        self._window = self._passes = self._decoded = self._read = self._cached = 0
        self._notes: list[str] = []
        self._converged = True
        self._probabilities: dict[str, tuple[float, ...]] = {}
        self._reader: CausalReader | None = None  # of what is to be verified
        self._tally = Tally()
        self.written: dict[str, list[int]] = {}

    def _row(self, lengths: dict[str, int]) -> Row:
        form = self._form
        return row_of(form.vocabulary, self._pieces, lengths, form.room, last=form.whole)

    def read(self) -> Decoding[Reading, None]:
        """Read what stands left of the next hole, but for a template that fits as a whole."""
        form = self._form
        while not self._fits and not isinstance(left := self._pieces[0], Gap):
            self._context += left
            self._pieces = self._pieces[1:]
        if not self._window:
            context, dropped = form.context
            self._read, self._cached = len(context), self._cache.shared(context)
            if dropped:
                self._notes.append(f"The model did not see the first {dropped} tokens of the text.")
        else:
            context = [*self._cache.tokens, *self._context]
            if len(context) + form.room > form.model.context:
                raise ContextError("the text between the holes does not fit into the context")
        # What is typed next may change the last tokens, but leaves what stands before them.
        sure = len(context) - UNSURE
        if form.quick and sure - self._cache.shared(context) >= WORTH_A_PASS:
            yield from self._cache.reading(context[:sure])
        self._reader = yield from begin_reading(form.model, self._cache, context, form.verify)

    def decide(self) -> Decoding[Draft, _Settled]:
        """Decide the lengths of holes from left to right, then all that lie in the canvas."""
        gaps = self._form.gaps
        names = list(self._row(self._lengths).spans)
        undecided = [name for name in names if len(gaps[name].patterns) > 1]
        settled: _Settled | None = None
        for name in undecided:
            if name not in self._row(self._lengths).spans:
                continue  # longer holes before it have pushed it out of this canvas
            tried = [{**self._lengths, name: length} for length in sorted(gaps[name].patterns)]
            settled = yield from self._try([_Layout(each, self._row(each)) for each in tried], name)
            self._lengths = settled.layout.lengths
        if settled is None or not (self._form.quick and settled.converged):
            layout = _Layout(self._lengths, self._row(self._lengths))
            settled = yield from self._try([layout], None, settled)
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
        form, row, room = self._form, settled.layout.row, self._form.room
        whole = size_of(self._pieces, settled.layout.lengths) == row.end < room
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
        changed = Row(row.pattern, spans, len(line) - whole)
        layout = _Layout(settled.layout.lengths, changed)
        return replace(settled, layout=layout, canvas=canvas, surprises=surprises)

    def _try(
        self, layouts: list[_Layout], name: str | None, begun: _Settled | None = None
    ) -> Decoding[Draft, _Settled]:
        form = self._form
        settled, steps, decoded = yield from _try(
            form, self._cache.cache, layouts, name, self._draws, self._window, begun
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
        unseen = size_of(self._pieces[stop:], self._lengths) - (row.end - reach)
        if unseen > 0 and not self._form.quick:
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
            read_tokens=self._read,
            cached_tokens=self._cached,
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


def _config(form: Form, layouts: list[_Layout], name: str | None) -> GenerationConfig:
    """How canvases are denoised, to try lengths of the hole `name` or to the end.

    In the end a quick fill takes no more steps than its holes have tokens, and one: each step
    accepts one token at least, and to take them one by one is as careful as it gets.
    """
    config, quick = form.config, form.quick
    if name is not None:
        steps = QUICK_STEPS if quick else TRIAL_STEPS
    elif quick:
        steps = 1 + sum(end - start for start, end in layouts[0].row.spans.values())
    else:
        return config
    plateau = config.plateau or QUICK_PLATEAU if quick else config.plateau
    most = min(steps, config.max_denoising_steps)
    return replace(config, max_denoising_steps=most, plateau=plateau)


def _try(
    form: Form,
    cache: list[LayerCache],
    layouts: list[_Layout],
    name: str | None,
    draws: Draws,
    window: int,
    begun: _Settled | None,
) -> Decoding[Draft, tuple[_Settled, int, int]]:
    """Denoise each layout; the one whose hole `name` surprises least, steps and positions.

    Without a name there is one layout, and it gets all its steps; a quick one goes on from what was
    `begun`.
    """
    model, room, config = form.model, form.room, _config(form, layouts, name)
    at_once = rows_at_once(model)
    finished: list[_Settled] = []
    passes = decoded = 0
    layouts = [each for each in layouts if name is None or name in each.row.spans]
    for first in range(0, len(layouts), at_once):
        group = layouts[first : first + at_once]
        plans = [compile_pattern(each.row.pattern).plan(room, room) for each in group]
        start = planned_start(plans, form.vocabulary, draws)
        if form.quick and begun is not None:
            start = replace(start, canvas=begun.next)
        state = yield from relay(
            denoise(model, cache, config, draws, start),
            lambda state: [draft_of(form.vocabulary.tokenizer, state, window, config)],
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
            following = state.canvas[i : i + 1]
            finished.append(_Settled(layout, canvas, following, surprises, behind, converged))
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
