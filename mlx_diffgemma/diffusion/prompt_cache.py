"""Keeps what a model has read: tokens, their keys and values, and places to go back to."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from weakref import finalize
from zlib import crc32

import mlx.core as mx
import numpy as np

from ..arguments import SettingError, token_ids, whole_number
from ..distributed.others import Others
from ..errors import Error
from ..model.cache import LayerCache, LayerSnapshot
from ..model.diffusion_gemma import DiffusionGemma
from ..model.placeholders import (
    Placeholder,
    picture_mask,
    pictures_in,
    pieces,
    placed,
    runs,
    without_pixels,
)
from .cache_file import Saved, check_ours, read_saved, write_saved
from .cache_parts import put_together, take_apart, types_held, whole_bytes

# Tokens encoded in one pass of a long prompt; bounds the memory of the pass, not the result.
PREFILL_CHUNK = 2048

# Bytes that snapshots may hold beside the cache itself; the newest two stay whatever they take.
SNAPSHOT_BYTES = 1 << 30

# Tokens that a new snapshot has to save from being encoded again; fewer are not worth its memory.
WORTH_A_SNAPSHOT = 256

# PrefixCache of earlier prompts kept at most: each is compared with every new prompt.
MOST_CACHES = 64

# Embeddings (tokens, hidden) of pictures that have been looked at, by digest.
Seen = Mapping[bytes, mx.array]


class ContextError(Error):
    """A prompt that is empty, or leaves no room for a canvas in the model's context.

    Where it is too long, it has `tokens`, at least, and may have `most`.
    """

    def __init__(self, message: str, tokens: int | None = None, most: int | None = None):
        super().__init__(message)
        self.tokens, self.most = tokens, most


@dataclass(frozen=True)
class Reading:
    """A long prompt is being encoded: `done` of `total` tokens so far."""

    done: int
    total: int


def remaining_context(model: DiffusionGemma, prompt: Sequence[int]) -> int:
    """Tokens of context that a prompt leaves, at least a canvas.

    Where it has pictures the vision tower takes memory from the context.

    Raises:
        ContextError: the prompt is empty or leaves less.
    """
    context = model.context
    if model.sight is not None and pictures_in(prompt):
        context = min(context, model.sight.context)
    remaining = context - len(prompt)
    length = model.config.canvas_length
    short = context < model.config.max_position_embeddings
    if not prompt:
        raise ContextError("the prompt is empty")
    if remaining < length:
        raise ContextError(
            f"the prompt has {len(prompt)} tokens; with a canvas of {length} it does not fit into "
            f"the context of {context}" + (", which is all that fits into memory" if short else ""),
            len(prompt),
            context - length,
        )
    return remaining


def prefill(
    model: DiffusionGemma,
    tokens: Sequence[int],
    cache: list[LayerCache],
    chunk: int = PREFILL_CHUNK,
    take: Callable[[mx.array], None] | None = None,
    seen: Seen | None = None,
) -> None:
    """Encode tokens into the cache, `chunk` at a time; the result does not depend on `chunk`.

    `take` is given each chunk's hidden states (1, T, hidden), which else are not computed. What is
    not in `seen` of the tokens' pictures is looked at here. No chunk ends within a picture.

    Raises:
        SettingError: an id is not in the vocabulary, or `chunk` is no number from 1.
        Error: a picture cannot be seen, see `DiffusionGemma.see`.
    """
    tokens = token_ids(tokens, model.config.vocab_size)
    whole_number("prefill_chunk", chunk, 1)
    seen = dict(seen or {})
    for picture in pictures_in(tokens):
        if picture.digest not in seen:
            seen[picture.digest] = model.see(picture)
    for layer in cache:
        layer.reserve(len(tokens) + model.config.canvas_length)
    start = 0
    for end in pieces(tokens, chunk):
        hidden = _encode(model, tokens[start:end], cache, seen)
        mx.eval([layer.state for layer in cache], [] if take is None else hidden)
        mx.clear_cache()
        if take is not None:
            take(hidden)
        start = end


def _encode(
    model: DiffusionGemma, tokens: Sequence[int], cache: list[LayerCache], seen: Seen
) -> mx.array:
    """Hidden states (1, T, hidden) of one chunk, in which the embeddings of pictures stand."""
    ids = mx.array([tokens])
    pictures = pictures_in(tokens)
    if model.sight is None or not pictures:
        return model.encode(ids, cache, evaluate=mx.eval)
    of = runs(tokens)
    embedded = placed(model.embed(ids), [seen[each.digest] for each in pictures], of)
    mask = picture_mask(of, model.sight.config.rule)
    return model.encode(ids, cache, embedded, mask=mask, evaluate=mx.eval)


@dataclass(frozen=True)
class CacheSnapshot:
    """A length of the context that it can go back to."""

    length: int
    layers: tuple[LayerSnapshot, ...]


class PromptCache:
    """The tokens a model has encoded, with its cache; later prompts pay only for what is new.

    Sliding layers forget, so going back to any earlier token is not possible: `read` goes back to
    the longest snapshot that agrees with the new prompt. Not for several threads.
    """

    def __init__(self, model: DiffusionGemma):
        self._model = model
        self._tokens: list[int] = []
        self._snapshots: list[CacheSnapshot] = []
        self._number: int | None = None
        self.cache = model.make_cache()

    def __len__(self) -> int:
        return len(self._tokens)

    def __repr__(self) -> str:
        return f"PromptCache({len(self):,} tokens, {self.nbytes:,} bytes)"

    @property
    def tokens(self) -> tuple[int, ...]:
        """The ids encoded so far."""
        return tuple(self._tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, snapshots included; of all ranks that share a model."""
        return whole_bytes(self._model, self.cache) + self._snapshot_bytes

    @property
    def _snapshot_bytes(self) -> int:
        return sum(whole_bytes(self._model, each.layers) for each in self._snapshots)

    @property
    def standing(self) -> tuple[int, ...]:
        """Numbers that are equal for caches that have read the same and can go back as far."""
        lengths = [snapshot.length for snapshot in self._snapshots]
        return (len(self), crc32(np.array(self._tokens, np.int64).tobytes()), *lengths)

    def number(self, others: Others) -> int:
        """What rank 0 calls it to the others, which have theirs under this number."""
        if self._number is None:
            self._take_number(others.number(), others)
        assert self._number is not None
        return self._number

    def _take_number(self, number: int, others: Others) -> None:
        self._number = number
        finalize(self, others.drop, number).atexit = False

    def clear(self) -> None:
        """Forget everything."""
        self._tokens, self._snapshots = [], []
        self.cache = self._model.make_cache()

    def shared(self, tokens: Sequence[int]) -> int:
        """Count the `tokens` that would not have to be encoded."""
        return self._reusable(_common(self._tokens, tokens))

    def read(self, tokens: Sequence[int], chunk: int = PREFILL_CHUNK) -> int:
        """Hold exactly `tokens`, with a snapshot at their end; answers how many were encoded."""
        new = len(tokens) - self.shared(tokens)
        for _ in self.reading(tokens, chunk):
            pass
        return new

    def reading(
        self, tokens: Sequence[int], chunk: int = PREFILL_CHUNK
    ) -> Generator[Reading, None, None]:
        """Read as `read` does, with a pause after each chunk but the last, and after each picture.

        Where the tokens depart from what was held a snapshot is left, if it saves enough: the next
        prompt may begin in the same way.

        Raises:
            SettingError: an id is not in the vocabulary, or `chunk` is no number from 1; nothing
                is forgotten then, nor after what follows.
            Error: a picture cannot be seen, see `DiffusionGemma.see`.
        """
        tokens = token_ids(tokens, self._model.config.vocab_size)
        whole_number("prefill_chunk", chunk, 1)
        agreed = _common(self._tokens, tokens)
        kept = self._reusable(agreed)
        departs = agreed < len(self._tokens) and agreed - kept >= WORTH_A_SNAPSHOT
        seen: dict[bytes, mx.array] = {}
        for picture in pictures_in(tokens[kept:]):
            if picture.digest not in seen:
                seen[picture.digest] = self._model.see(picture)
                yield Reading(kept, len(tokens))
        self._restore(kept)
        for layer in self.cache:
            layer.reserve(len(tokens) - len(self) + self._model.config.canvas_length)
        for goal in [agreed] * departs + [len(tokens)]:
            start = len(self)
            for end in pieces(tokens[start:goal], chunk):
                self.extend(tokens[len(self) : start + end], chunk, seen=seen)
                if len(self) < len(tokens):
                    yield Reading(len(self), len(tokens))
            self.snapshot()

    def encoding(
        self, tokens: Sequence[int], chunk: int = PREFILL_CHUNK
    ) -> Generator[mx.array, None, None]:
        """Encode more tokens: the hidden states (1, T, hidden) of one chunk after another.

        Raises:
            SettingError: as `reading`.
        """
        tokens = token_ids(tokens, self._model.config.vocab_size)
        whole_number("prefill_chunk", chunk, 1)
        for layer in self.cache:
            layer.reserve(len(tokens) + self._model.config.canvas_length)
        start = 0
        for end in pieces(tokens, chunk):
            found: list[mx.array] = []
            self.extend(tokens[start:end], chunk, found.append)
            yield found.pop()
            start = end

    def extend(
        self,
        tokens: Sequence[int],
        chunk: int = PREFILL_CHUNK,
        take: Callable[[mx.array], None] | None = None,
        seen: Seen | None = None,
    ) -> None:
        """Encode more tokens. Interrupted, the context is empty: layers must not disagree.

        `take` and `seen` are as in `prefill`.

        Raises:
            SettingError: as `reading`.
        """
        tokens = token_ids(tokens, self._model.config.vocab_size)
        whole_number("prefill_chunk", chunk, 1)
        if not tokens:
            return
        try:
            prefill(self._model, tokens, self.cache, chunk, take, seen)
        except BaseException:
            self.clear()
            raise
        self._tokens += without_pixels(tokens)

    def snapshot(self) -> None:
        """Remember this place; the oldest snapshots go when they take too much memory."""
        if len(self) and (not self._snapshots or self._snapshots[-1].length < len(self)):
            self._snapshots.append(
                CacheSnapshot(len(self), tuple(layer.snapshot() for layer in self.cache))
            )
        while len(self._snapshots) > 2 and self._snapshot_bytes > SNAPSHOT_BYTES:
            del self._snapshots[0]

    def forget_snapshot(self) -> bool:
        """Forget the oldest snapshot, unless it is one of the newest two; say whether one was."""
        if len(self._snapshots) <= 2:
            return False
        del self._snapshots[0]
        return True

    def mark(self) -> CacheSnapshot:
        """This place, for `trim`; it is not remembered here."""
        return CacheSnapshot(len(self), tuple(layer.snapshot() for layer in self.cache))

    def trim(self, mark: CacheSnapshot, length: int, chunk: int = PREFILL_CHUNK) -> None:
        """Hold the first `length` tokens only, at least those of a mark made on the way here.

        What sliding layers no longer hold, behind more tokens than their window, is encoded again.

        Raises:
            SettingError: that is within a picture, whose first tokens have seen the last.
        """
        if length == len(self):
            return
        if isinstance(cut := self._tokens[length], Placeholder) and cut.place:
            raise SettingError(f"{length} tokens end within a picture")
        between = self._tokens[mark.length : length]
        del self._tokens[length:]
        pairs = list(zip(self.cache, mark.layers, strict=True))
        if all(layer.trim(place, length) for layer, place in pairs):
            return
        del self._tokens[mark.length :]
        for layer, place in pairs:
            layer.restore(place)
        self.extend(between, chunk)

    def _reusable(self, agreed: int) -> int:
        if agreed == len(self):
            return agreed
        return max(
            (snapshot.length for snapshot in self._snapshots if snapshot.length <= agreed),
            default=0,
        )

    def _restore(self, length: int) -> None:
        if length == len(self):
            return
        if not length:
            self.clear()
            return
        self._snapshots = [snapshot for snapshot in self._snapshots if snapshot.length <= length]
        for layer, snapshot in zip(self.cache, self._snapshots[-1].layers, strict=True):
            layer.restore(snapshot)
        del self._tokens[length:]

    def fork(self) -> "PromptCache":
        """A context of its own that has read the same; arrays are shared until they change."""
        other = PromptCache(self._model)
        other._tokens, other._snapshots = list(self._tokens), list(self._snapshots)
        other.cache = [layer.fork() for layer in self.cache]
        return other

    def save(self, path: Path, extra: object = None) -> None:
        """Write one safetensors file, at once: a full disk or a kill leaves the old one.

        `extra` is anything that JSON can say; `load` gives it back.

        Raises:
            SessionError: the file cannot be written, or is there and nothing that was saved so.
        """
        check_ours(path)
        others = self._model.part.share.others
        if others is not None and others.broken:  # without what only all ranks together have
            empty: list[mx.array | None] = [None] * len(self.cache)
            write_saved(path, self._model, Saved([], [], [empty], extra))
            return
        if others is not None:
            others.tell("put together", (self.number(others), self.standing))
        with nullcontext() if others is None else others.in_step():
            lengths, layers = self.put_together()
        write_saved(path, self._model, Saved(self._tokens, lengths, layers, extra))

    def put_together(self) -> tuple[list[int], list[list[mx.array | None]]]:
        """Where snapshots stand, and keys and values of all heads there, after those at the end.

        All ranks that share a model call it at once.
        """
        # A snapshot at the very end would say everything twice.
        snapshots = [snapshot for snapshot in self._snapshots if snapshot.length < len(self)]
        held: list[Sequence[LayerCache | LayerSnapshot]] = [self.cache]
        held += [snapshot.layers for snapshot in snapshots]
        found = put_together(self._model, [[layer.state for layer in each] for each in held])
        leads = not self._model.part.share.rank
        # The others' arrays go at once: together they would be all heads once more.
        arrays = [each if leads else None for each in found]
        count = len(self.cache)
        layers = [arrays[i : i + count] for i in range(0, len(arrays), count)]
        return [snapshot.length for snapshot in snapshots], layers

    @classmethod
    def load(cls, path: Path, model: DiffusionGemma) -> tuple["PromptCache", object]:
        """A context that was saved, and what was saved beside it.

        Raises:
            SessionError: there is no such file, it is damaged, or another model made it.
        """
        others = model.part.share.others
        if others is None:
            saved = read_saved(path, model, lambda: types_held(model))
            return cls.of(model, saved), saved.extra

        def types() -> list[mx.Dtype]:
            others.tell("types held")
            with others.in_step():
                return types_held(model)

        saved = read_saved(path, model, types)
        number = others.number()
        others.tell("take apart", (number, saved.described))
        with others.in_step():
            prompt_cache = cls.of(model, saved)
        prompt_cache._take_number(number, others)
        return prompt_cache, saved.extra

    @classmethod
    def of(cls, model: DiffusionGemma, saved: Saved) -> "PromptCache":
        """A context out of tokens, and keys and values of all heads, of which rank 0's count.

        All ranks that share a model call it at once.
        """
        prompt_cache = cls(model)
        prompt_cache._tokens = list(saved.tokens)
        first, *others = take_apart(model, saved.layers)
        for layer, held in zip(prompt_cache.cache, first, strict=True):
            layer.set_state(len(saved.tokens), held)
        prompt_cache._snapshots = [
            CacheSnapshot(length, tuple(LayerSnapshot(length, held) for held in each))
            for length, each in zip(saved.snapshots, others, strict=True)
        ]
        prompt_cache.snapshot()
        return prompt_cache


class PrefixCache:
    """Keeps what was read for earlier requests, the latest first, within a number of bytes."""

    def __init__(self, model: DiffusionGemma, most_bytes: int):
        self._model = model
        self._most = most_bytes
        self._kept: list[PromptCache] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all; what two of them share counts twice."""
        return sum(prompt_cache.nbytes for prompt_cache in self._kept)

    def take(self, tokens: Sequence[int]) -> PromptCache:
        """A cache for a new prompt: a copy of the one that has read most of it, or an empty one.

        Of those that can go back to nothing of it, the one that begins alike for longest: where
        the two depart a snapshot is left then, from which a third prompt can go on.
        """
        agreed = [_common(prompt_cache._tokens, tokens) for prompt_cache in self._kept]
        ranked = [(each._reusable(n), n) for each, n in zip(self._kept, agreed, strict=True)]
        best = max(ranked, default=(0, 0))
        if not best[0] and best[1] < WORTH_A_SNAPSHOT:
            return PromptCache(self._model)
        return self._kept[ranked.index(best)].fork()

    def give(self, prompt_cache: PromptCache) -> None:
        """Keep a cache that is no longer used; the ones that it goes on from are dropped."""
        read = prompt_cache.tokens
        self._kept = [c for c in self._kept if c.tokens != read[: len(c)]]
        self._kept.insert(0, prompt_cache)
        del self._kept[MOST_CACHES:]
        while self._kept and self.nbytes > self._most:
            if len(self._kept) > 1 or not prompt_cache.forget_snapshot():
                self._kept.pop()


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Count the tokens that two sequences begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
