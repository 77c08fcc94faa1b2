"""Probabilities of labels in the slots of a text, by one decoder pass and without sampling.

A label of n tokens is scored by the chain rule, p(first) * p(second | first) * ...: each factor is
read off a canvas in which the tokens before it are given and the rest of the slot is noise. All
these canvases are rows of one batch, so all labels of all slots take one pass of the decoder.

Where the labels of a slot have the same number of tokens, the text right of the slot is given too.
Where they differ, it would give their length away: then all of it is noise, and the token behind
the slot counts as one more factor, without which "no" would always beat "no idea".
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from types import NoneType
from typing import Any, Never

import mlx.core as mx
import numpy as np

from ..arguments import check_kind, shown, token_ids, whole_number
from ..diffusion.decoding import Decoding, rows_at_once
from ..diffusion.draws import SeededDraws
from ..diffusion.prompt_cache import PromptCache, Reading, remaining_context
from ..errors import Error
from ..model.cache import LayerCache
from ..model.diffusion_gemma import DiffusionGemma, Pass
from ..text.tokenizer import Tokenizer, no_check
from ..text.vocabulary import Vocabulary
from .request import Prompt, checked_seed, encode_prompt, stream

# Tokens of all labels together: each may need a canvas of its own.
MOST_TOKENS = 4096

# Canvases of all draws together: some minutes of a large model.
MOST_CANVASES = 1 << 14

Chances = dict[str, dict[str, float]]  # by slot and label


class ChooseError(Error):
    """Slots or labels that cannot be scored."""


class Choice(dict[str, dict[str, float]]):
    """How likely labels are: means over the draws by slot and label; those of a slot sum to 1.

    Attributes:
        errors: the standard errors of those means, None of one draw: how far other noise might
            move them, which says nothing of how right the model is.
        agreement: by slot, the share of draws whose likeliest label is that of the means.
        draws: noises that were read.
    """

    def __init__(self, draws: Sequence[Chances]) -> None:
        self.draws = count = len(draws)
        seen = {
            slot: {label: [each[slot][label] for each in draws] for label in known}
            for slot, known in draws[0].items()
        }
        super().__init__({s: {x: mean(p) for x, p in known.items()} for s, known in seen.items()})
        self.errors: Chances | None = None
        if count > 1:
            self.errors = {
                slot: {label: stdev(p) / math.sqrt(count) for label, p in known.items()}
                for slot, known in seen.items()
            }
        self.agreement = {
            slot: sum(likeliest(each[slot]) == likeliest(known) for each in draws) / count
            for slot, known in self.items()
        }

    def facts(self) -> dict[str, Any]:
        """All of it as JSON; errors and agreement only where several draws tell of them."""
        if self.errors is None:
            return {"probabilities": self}
        return {
            "probabilities": self,
            "errors": self.errors,
            "agreement": self.agreement,
            "draws": self.draws,
        }


def likeliest(chances: Mapping[str, float]) -> str:
    """The label with the highest probability; of equal ones the first."""
    return max(chances, key=chances.__getitem__)


@dataclass(frozen=True)
class ChooseRequest:
    """Labels that are to be weighed, see `choose`."""

    prompt: Prompt
    slots: Mapping[str, Sequence[str]]
    template: str | None = None
    isolated: bool = False
    seed: int = 0
    draws: int = 1

    def prepare(
        self,
        model: DiffusionGemma,
        vocabulary: Vocabulary,
        check: Callable[[], None] = no_check,
    ) -> "Question":
        """The canvases that are to be read, see `request.Task`.

        Raises:
            ChooseError: no slot, fewer than two labels, a template without a slot, or too long, or
                more canvases than `MOST_CANVASES`.
            ContextError: the prompt does not fit.
            SettingError: seed or draws are out of range.
        """
        self.check_options()
        slots, template, isolated = self.slots, self.template, self.isolated
        _refuse_long(model, vocabulary.tokenizer, slots, template, isolated)
        labels = {name: _encoded(vocabulary, name, texts, check) for name, texts in slots.items()}
        if sum(len(ids) for known in labels.values() for ids in known.values()) > MOST_TOKENS:
            raise ChooseError(f"the labels have more than {MOST_TOKENS} tokens together")
        parts = _parts(template, list(slots))
        texts = [parts] if not isolated else _isolate(parts)
        prompt = encode_prompt(
            vocabulary.tokenizer, self.prompt, sight=model.sight, most=model.context, check=check
        )
        token_ids(prompt, model.config.vocab_size)
        remaining_context(model, prompt)
        rows: list[_Row] = []
        for pieces in texts:
            for where in range(1, len(pieces), 2):
                check()
                rows += _rows(model, vocabulary, pieces, where, labels)
                if len(rows) * self.draws > MOST_CANVASES:
                    raise ChooseError(
                        f"the labels need more than {MOST_CANVASES:,} canvases: one for each token "
                        f"that labels of a slot do not begin with alike, times {self.draws} draws"
                    )
        names = {name: list(known) for name, known in labels.items()}
        return Question(model, prompt, names, rows, self.seed, self.draws)

    def check_options(self) -> None:
        """Find mistakes that no model is needed for.

        Raises:
            ChooseError, SettingError: as `prepare`.
        """
        checked_seed(self.seed)
        whole_number("draws", self.draws, 1)
        check_kind("a template", self.template, (str, NoneType), "text")
        check_kind("slots", self.slots, Mapping, "labels by name")
        if not self.slots:
            raise ChooseError("there is no slot to choose for")
        for name, labels in self.slots.items():
            check_kind("the name of a slot", name, str, "text")
            if isinstance(labels, str) or not isinstance(labels, Sequence):
                raise ChooseError(f"the labels of {name} must be a list, not {shown(labels)}")
            for label in labels:
                check_kind("a label", label, str, "text")
            if len(set(labels)) < 2 or not all(labels):
                raise ChooseError(f"slot {name} needs at least two labels, none of them empty")


def _refuse_long(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    slots: Mapping[str, Sequence[str]],
    template: str | None,
    isolated: bool,
) -> None:
    """Refuse, before anything is encoded or searched, what has too many characters to fit."""
    labels = sum(len(text) for texts in slots.values() for text in texts)
    if labels > MOST_TOKENS * tokenizer.longest:
        raise ChooseError(f"the labels have more than {MOST_TOKENS} tokens together")
    canvas = model.config.canvas_length * tokenizer.longest
    names = sum(map(len, slots))
    if names > canvas:
        raise ChooseError(f"the slots' names have more than {canvas:,} characters together")
    texts = len(slots) if isolated else 1  # a canvas for each
    if len(template or "") > canvas * texts + names + 2 * len(slots):
        raise ChooseError(
            f"the template has {len(template or ''):,} characters; a canvas has room for "
            f"{model.config.canvas_length} tokens of at most {tokenizer.longest}"
        )


@dataclass(frozen=True, eq=False)
class Question:
    """A choice that is ready to be made, see `request.Prepared`."""

    model: DiffusionGemma
    prompt: list[int]
    slots: dict[str, list[str]]  # labels by slot
    rows: list["_Row"]
    seed: int
    draws: int

    def run(self, prompt_cache: PromptCache) -> Decoding[Reading | Choice, None]:
        """The choice, which is the last item."""
        model = self.model
        yield from prompt_cache.reading(self.prompt)
        source = SeededDraws(self.seed, model.config.vocab_size)
        draws: list[Chances] = []
        for _ in range(self.draws):
            # One noise for all rows: labels are compared under the same circumstances.
            noise = source.tokens((1, model.config.canvas_length))
            scores: Chances = {
                name: dict.fromkeys(known, 0.0) for name, known in self.slots.items()
            }
            read = yield from _read(model, prompt_cache.cache, self.rows, noise)
            for row, log_p in zip(self.rows, read, strict=True):
                for (label, _), score in zip(row.asked, log_p, strict=True):
                    scores[row.slot][label] += score
            draws.append({name: _normalised(known) for name, known in scores.items()})
        yield Choice(draws)


def _normalised(scores: Mapping[str, float]) -> dict[str, float]:
    """Probabilities that sum to 1, of log-probabilities."""
    top = max(scores.values())
    weights = {label: math.exp(score - top) for label, score in scores.items()}
    total = sum(weights.values())
    return {label: weight / total for label, weight in weights.items()}


@dataclass
class _Row:
    """A canvas (None is noise), the position asked about, and the token of each label there."""

    slot: str
    canvas: list[int | None]
    position: int
    asked: list[tuple[str, int]] = field(default_factory=list)


def _read(
    model: DiffusionGemma, cache: list[LayerCache], rows: list[_Row], noise: mx.array
) -> Decoding[Never, list[list[float]]]:
    """Log-probabilities at each row's position, of the tokens it asks about."""
    found: list[list[float]] = []
    at_once = rows_at_once(model)
    for first in range(0, len(rows), at_once):
        group = rows[first : first + at_once]
        given = mx.array([[token or 0 for token in row.canvas] for row in group], dtype=mx.int32)
        free = mx.array([[token is None for token in row.canvas] for row in group])
        hidden = yield Pass(mx.where(free, noise, given), cache)
        assert hidden is not None
        at = mx.array([row.position for row in group])[:, None, None]
        chosen = model.logits(mx.take_along_axis(hidden, at, axis=1))[:, 0]
        log_p = np.array(chosen - mx.logsumexp(chosen, axis=-1, keepdims=True))
        # Kept of each row, the whole vocabulary would be gigabytes.
        for row, known in zip(group, log_p, strict=True):
            found.append(known[[token for _, token in row.asked]].tolist())
    return found


def _rows(
    model: DiffusionGemma,
    vocabulary: Vocabulary,
    pieces: list[str],
    where: int,
    labels: dict[str, dict[str, tuple[int, ...]]],
) -> list[_Row]:
    """The factors of all labels of the slot at `where`; labels that begin alike share canvases."""
    room = model.config.canvas_length
    slot = pieces[where]
    left = _tokens(vocabulary, pieces, 0, where, labels)
    right = _tokens(vocabulary, pieces, where + 1, len(pieces), labels)
    longest = max(map(len, labels[slot].values()))
    if len(left) + longest + len(right) >= room:
        raise _too_long(model, slot)
    right += vocabulary.ending(room - len(left) - longest - len(right))
    alike = min(map(len, labels[slot].values())) == longest
    behind = right if alike else [None] * len(right)
    rows: dict[tuple[int, ...], _Row] = {}
    for label, ids in labels[slot].items():
        for i, token in enumerate(ids if alike else (*ids, _first_given(right, slot))):
            if ids[:i] not in rows:
                canvas = [*left, *ids[:i], *[None] * (longest - i), *behind]
                rows[ids[:i]] = _Row(slot, canvas, len(left) + i)
            rows[ids[:i]].asked.append((label, token))
    return list(rows.values())


def _too_long(model: DiffusionGemma, slot: str) -> ChooseError:
    room = model.config.canvas_length
    return ChooseError(f"the text with slot {slot} is longer than a canvas of {room} tokens")


def _first_given(right: list[int | None], slot: str) -> int:
    if right[0] is None:
        raise ChooseError(
            f"labels of slot {slot} have different lengths; then text must stand behind the slot"
        )
    return right[0]


def _tokens(
    vocabulary: Vocabulary,
    pieces: list[str],
    start: int,
    stop: int,
    labels: dict[str, dict[str, tuple[int, ...]]],
) -> list[int | None]:
    """Pieces in tokens: those at even places are text, the others slots, which are noise here."""
    tokens: list[int | None] = []
    for i in range(start, stop):
        if i % 2:
            tokens += [None] * len(next(iter(labels[pieces[i]].values())))
        else:
            tokens += vocabulary.literal(pieces[i]).ids
    return tokens


def _parts(template: str | None, slots: list[str]) -> list[str]:
    """Text and slot names in turn, text first and last.

    Raises:
        ChooseError: the template does not have each slot once.
    """
    if template is None:
        if len(slots) > 1:
            template = "\n".join(f"{slot}: {{{slot}}}" for slot in slots)
        else:
            template = f"{{{slots[0]}}}"
    parts = re.split("{(" + "|".join(map(re.escape, slots)) + ")}", template)
    for slot in slots:
        if parts[1::2].count(slot) != 1:
            raise ChooseError(f"the template must have {{{slot}}} once")
    return parts


def _isolate(parts: list[str]) -> list[list[str]]:
    """Each slot with the text up to its neighbours, and nothing of them."""
    return [parts[i - 1 : i + 2] for i in range(1, len(parts), 2)]


def _encoded(
    vocabulary: Vocabulary, name: str, texts: Sequence[str], check: Callable[[], None]
) -> dict[str, tuple[int, ...]]:
    encoded: dict[str, tuple[int, ...]] = {}
    for text in texts:
        check()
        encoded[text] = vocabulary.literal(text).ids
    if len(encoded) < 2 or not all(encoded.values()):
        raise ChooseError(f"slot {name} needs at least two labels, none of them empty")
    return encoded


def choose(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    prompt: Prompt,
    slots: Mapping[str, Sequence[str]],
    *,
    template: str | None = None,
    isolated: bool = False,
    seed: int = 0,
    draws: int = 1,
) -> Choice:
    """The probability of each label in each slot; those of a slot sum to 1. See `Choice`.

    Args:
        prompt: as in `stream_generate`.
        slots: labels by slot name. They count as different texts: leading spaces matter.
        template: the answer, with `{name}` where a slot stands; None is the slot itself, or of
            several slots a line each, `name: {name}`. While a slot is scored, the others are noise
            of their first label's length.
        isolated: score each slot in a text that ends at its neighbours.
        seed: of the noise.
        draws: noise canvases to average over; each is one more pass, and from two on they tell
            how much noise matters: `errors` and `agreement`.

    Raises:
        ChooseError: no slot, fewer than two labels, or a template without a slot, or too long.
        ContextError: the prompt does not fit.
    """
    request = ChooseRequest(prompt, slots, template, isolated, seed, draws)
    items: Iterator[Reading | Choice] = stream(model, tokenizer, request)
    (found,) = (item for item in items if not isinstance(item, Reading))
    return found
