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
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Never

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .context import prefilling
from .denoise import Run, drive
from .errors import Error
from .generation import Reading, encode_prompt, room_behind, rows_at_once
from .model import DiffusionGemma, LayerCache, Pass
from .sampler import SeededDraws
from .tokenizer import Message, Tokenizer
from .vocabulary import Vocabulary

# Tokens of all labels together: each may need a canvas of its own.
MOST_TOKENS = 4096
Chances = dict[str, dict[str, float]]  # by slot and label


class ChooseError(Error):
    """Slots or labels that cannot be scored."""


def choose(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    prompt: str | Sequence[Message] | Sequence[int],
    slots: Mapping[str, Sequence[str]],
    *,
    template: str | None = None,
    isolated: bool = False,
    seed: int = 0,
    draws: int = 1,
) -> Chances:
    """The probability of each label in each slot; those of a slot sum to 1.

    Args:
        prompt: as in `stream_generate`.
        slots: labels by slot name. They count as different texts: leading spaces matter.
        template: the answer, with `{name}` where a slot stands; None is the slot itself, or of
            several slots a line each, `name: {name}`. While a slot is scored, the others are noise
            of their first label's length.
        isolated: score each slot in a text that ends at its neighbours.
        seed: of the noise.
        draws: noise canvases to average over; each is one more pass.

    Raises:
        ChooseError: no slot, fewer than two labels, or a template without a slot, or too long.
        ContextError: the prompt does not fit.
    """
    run = write_choose(model, tokenizer, prompt, slots, template, isolated, seed, draws)
    items: Generator[Reading | Chances, None, None] = drive(model, run)
    (found,) = (item for item in items if not isinstance(item, Reading))
    return found


def write_choose(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    prompt: str | Sequence[Message] | Sequence[int],
    slots: Mapping[str, Sequence[str]],
    template: str | None,
    isolated: bool,
    seed: int,
    draws: int,
) -> Run[Reading | Chances, None]:
    """As `choose`, but somebody else decodes: see `batch.py`. The result is the last item."""
    vocabulary = Vocabulary(model, tokenizer)
    labels = {name: _encoded(vocabulary, name, texts) for name, texts in slots.items()}
    if not labels:
        raise ChooseError("there is no slot to choose for")
    if sum(len(ids) for known in labels.values() for ids in known.values()) > MOST_TOKENS:
        raise ChooseError(f"the labels have more than {MOST_TOKENS} tokens together")
    parts = _parts(template, list(slots))
    texts = [parts] if not isolated else _isolate(parts)
    context = encode_prompt(tokenizer, prompt)
    room_behind(model, context)
    rows: list[_Row] = []
    for pieces in texts:
        for where in range(1, len(pieces), 2):
            rows += _rows(model, vocabulary, pieces, where, labels)
    cache = model.make_cache()
    for tokens_read in prefilling(model, context, cache):
        if tokens_read < len(context):
            yield Reading(tokens_read, len(context))
    source = SeededDraws(seed, vocabulary.size)
    chances: Chances = {name: dict.fromkeys(known, 0.0) for name, known in labels.items()}
    for _ in range(draws):
        # One noise for all rows: labels are compared under the same circumstances.
        noise = source.tokens((1, model.config.canvas_length))
        scores: Chances = {n: dict.fromkeys(k, 0.0) for n, k in labels.items()}
        read = yield from _read(model, cache, rows, noise)
        for row, log_p in zip(rows, read, strict=True):
            for label, token in row.asked:
                scores[row.slot][label] += float(log_p[token])
        for name, known in scores.items():
            top = max(known.values())
            weights = {label: math.exp(score - top) for label, score in known.items()}
            for label, weight in weights.items():
                chances[name][label] += weight / sum(weights.values()) / draws
    mx.clear_cache()
    yield chances


@dataclass
class _Row:
    """A canvas (None is noise), the position asked about, and the token of each label there."""

    slot: str
    canvas: list[int | None]
    position: int
    asked: list[tuple[str, int]] = field(default_factory=list)


def _read(
    model: DiffusionGemma, cache: list[LayerCache], rows: list[_Row], noise: mx.array
) -> Run[Never, list[npt.NDArray[np.float32]]]:
    """Log-probabilities (vocabulary,) at each row's position."""
    found: list[npt.NDArray[np.float32]] = []
    at_once = rows_at_once(model)
    for first in range(0, len(rows), at_once):
        group = rows[first : first + at_once]
        given = mx.array([[token or 0 for token in row.canvas] for row in group], dtype=mx.int32)
        free = mx.array([[token is None for token in row.canvas] for row in group])
        hidden = yield Pass(mx.where(free, noise, given), cache)
        assert hidden is not None
        at = mx.array([row.position for row in group])[:, None, None]
        chosen = model.logits(mx.take_along_axis(hidden, at, axis=1))[:, 0]
        found += list(np.array(chosen - mx.logsumexp(chosen, axis=-1, keepdims=True)))
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
        raise ChooseError(f"the text with slot {slot} is longer than a canvas of {room} tokens")
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


def _encoded(vocabulary: Vocabulary, name: str, texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    encoded = {text: vocabulary.literal(text).ids for text in texts}
    if len(encoded) < 2 or not all(encoded.values()):
        raise ChooseError(f"slot {name} needs at least two labels, none of them empty")
    return encoded
