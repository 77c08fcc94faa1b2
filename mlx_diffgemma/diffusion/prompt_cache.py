"""Keeps what a model has read: tokens, their keys and values, and places to go back to."""

import hashlib
import json
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..arguments import SettingError, is_size, token_ids, whole_number
from ..errors import Error
from ..files import check_writable, parse_json, replacing
from ..model.cache import LayerCache, LayerSnapshot
from ..model.diffusion_gemma import DiffusionGemma
from ..model.placeholders import (
    Kept,
    Placeholder,
    picture_mask,
    pictures_in,
    pieces,
    placed,
    placeholders,
    runs,
    without_pixels,
)

# Tokens encoded in one pass of a long prompt; bounds the memory of the pass, not the result.
PREFILL_CHUNK = 2048

# Bytes that snapshots may hold beside the cache itself; the newest two stay whatever they take.
SNAPSHOT_BYTES = 1 << 30

# Tokens that a new snapshot has to save from being encoded again; fewer are not worth its memory.
WORTH_A_SNAPSHOT = 256

# PrefixCache of earlier prompts kept at most: each is compared with every new prompt.
MOST_CACHES = 64

# Characters of messages and tokens in a file; the longest contexts are said in some megabytes.
MOST_METADATA = 1 << 25

FORMAT = "mlx-diffgemma context 2"


# Embeddings (tokens, hidden) of pictures that have been looked at, by digest.
Seen = Mapping[bytes, mx.array]


class SessionError(Error):
    """A saved context or session that cannot be written, read, or used with this model."""


class ContextError(Error):
    """A prompt that is empty, or leaves no room for a canvas in the model's context."""


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
            f"the context of {context}" + (", which is all that fits into memory" if short else "")
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

    @property
    def nbytes(self) -> int:
        """Bytes of the sliding layers' arrays."""
        return sum(layer.state.nbytes for layer in self.layers if layer.state is not None)


class PromptCache:
    """The tokens a model has encoded, with its cache; later prompts pay only for what is new.

    Sliding layers forget, so going back to any earlier token is not possible: `read` goes back to
    the longest snapshot that agrees with the new prompt. Not for several threads.
    """

    def __init__(self, model: DiffusionGemma):
        self._model = model
        self._tokens: list[int] = []
        self._snapshots: list[CacheSnapshot] = []
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
        """Bytes of keys and values, snapshots included."""
        held = sum(layer.state.nbytes for layer in self.cache if layer.state is not None)
        return held + sum(snapshot.nbytes for snapshot in self._snapshots)

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
        while (
            len(self._snapshots) > 2
            and sum(snapshot.nbytes for snapshot in self._snapshots) > SNAPSHOT_BYTES
        ):
            del self._snapshots[0]

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
        _check_ours(path)
        # A snapshot at the very end would say everything twice.
        snapshots = [snapshot for snapshot in self._snapshots if snapshot.length < len(self)]
        arrays: dict[str, mx.array] = dict(self._arrays(snapshots))
        metadata = {
            "format": FORMAT,
            "model": fingerprint(self._model),
            "tokens": json.dumps(self._tokens),
            "pictures": json.dumps(_described(self._tokens)),
            "marks": json.dumps([snapshot.length for snapshot in snapshots]),
            "extra": _as_json(path, extra),
        }
        if sum(map(len, metadata.values())) > MOST_METADATA:
            raise SessionError(f"{path} cannot be written: the conversation is too long")
        try:
            with replacing(path, suffix=".safetensors") as fresh:
                mx.save_safetensors(str(fresh), arrays, metadata)
        except OSError as error:
            raise SessionError(f"{path} cannot be written: {error.strerror}") from None
        except RuntimeError as error:  # what MLX raises when the disk is full
            raise SessionError(f"{path} cannot be written: {error}") from None

    def _arrays(self, snapshots: Sequence[CacheSnapshot]) -> Iterator[tuple[str, mx.array]]:
        """Names and arrays of a file."""
        yield "format", mx.array([1])  # MLX cannot read a file without arrays
        held: list[tuple[str, Sequence[LayerCache | LayerSnapshot]]] = [("", self.cache)]
        held += [(f"marks.{i}.", snapshot.layers) for i, snapshot in enumerate(snapshots)]
        for prefix, layers in held:
            for i, layer in enumerate(layers):
                if layer.state is not None:
                    yield f"{prefix}layers.{i}", layer.state

    @classmethod
    def load(cls, path: Path, model: DiffusionGemma) -> tuple["PromptCache", object]:
        """A context that was saved, and what was saved beside it.

        Raises:
            SessionError: there is no such file, it is damaged, or another model made it.
        """
        arrays, metadata = _read(path)
        if metadata.get("format") != FORMAT:
            raise SessionError(f"{path} is not a context that this version saved")
        if metadata.get("model") != fingerprint(model):
            raise SessionError(f"{path} was saved with another model than the one that is loaded")
        try:
            tokens, lengths = _read_lengths(model, metadata)
            layers = _layers(model, arrays, [len(tokens), *lengths])
            extra = parse_json(metadata["extra"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise SessionError(f"{path} is damaged: {error}") from None
        prompt_cache = cls(model)
        prompt_cache._tokens = tokens
        for layer, held in zip(prompt_cache.cache, layers[0], strict=True):
            layer.set_state(len(tokens), held)
        prompt_cache._snapshots = [
            CacheSnapshot(length, tuple(LayerSnapshot(length, held) for held in each))
            for length, each in zip(lengths, layers[1:], strict=True)
        ]
        prompt_cache.snapshot()
        return prompt_cache, extra


def _read_lengths(model: DiffusionGemma, metadata: dict[str, str]) -> tuple[list[int], list[int]]:
    """The tokens of a saved cache, and where its snapshots stand.

    Raises:
        KeyError, ValueError: they are not what `save` writes.
    """
    tokens, snapshots = parse_json(metadata["tokens"]), parse_json(metadata["marks"])
    if not isinstance(tokens, list) or not isinstance(snapshots, list):
        raise ValueError("tokens and snapshots are no lists")
    tokens = token_ids(tokens, model.config.vocab_size)
    if len(tokens) > (most := model.config.max_position_embeddings):
        raise ValueError(f"it has {len(tokens)} tokens, and the model can read {most}")
    tokens = _with_pictures(tokens, parse_json(metadata.get("pictures", "[]")))
    if not all(type(snapshot) is int for snapshot in snapshots):
        raise ValueError("a snapshot is no number of tokens")
    if any(a >= b for a, b in pairwise([0, *snapshots, len(tokens)] if snapshots else [])):
        raise ValueError("marks do not follow each other within the tokens")
    return tokens, snapshots


def _described(tokens: Sequence[int]) -> list[dict[str, Any]]:
    """The pictures of tokens as a file tells them: where each begins, its digest and size."""
    return [
        {
            "start": start,
            "digest": token.picture.digest.hex(),
            "rows": token.picture.rows,
            "columns": token.picture.columns,
            "tokens": token.picture.tokens,
        }
        for start, token in enumerate(tokens)
        if isinstance(token, Placeholder) and not token.place
    ]


def kept_picture(described: object) -> Kept:
    """A picture as a file tells it: `digest` in hexadecimal, `rows`, `columns` and `tokens`.

    Raises:
        ValueError: it is told in another way.
    """
    match described:
        case {"digest": str(digest), "rows": rows, "columns": columns, "tokens": tokens}:
            sizes = is_size(rows) and is_size(columns) and is_size(tokens)
            if sizes and re.fullmatch("[0-9a-f]{64}", digest):
                return Kept(bytes.fromhex(digest), rows, columns, tokens)
    raise ValueError("a picture has no digest and size")


def _with_pictures(tokens: list[int], described: object) -> list[int]:
    """Tokens in which those of pictures know them, as `_described` tells.

    Raises:
        ValueError: they are no pictures, or stand where none could.
    """
    if not isinstance(described, list):
        raise ValueError("pictures are no list")
    end = 0
    for each in described:
        picture, start = kept_picture(each), each.get("start")
        if type(start) is not int or not end <= start <= len(tokens) - picture.tokens:
            raise ValueError("a picture stands beyond the tokens, or within another")
        end = start + picture.tokens
        if len(set(tokens[start:end])) > 1:
            raise ValueError("a picture stands for different tokens")
        tokens[start:end] = placeholders(tokens[start], [picture])
    return tokens


def _layers(
    model: DiffusionGemma, arrays: dict[str, mx.array], lengths: Sequence[int]
) -> list[list[mx.array | None]]:
    """Keys and values of each layer, of all tokens, then of each snapshot, named as by `_arrays`.

    Raises:
        ValueError: one is missing or too many, of the wrong shape or type, or not finite.
    """
    like = model.make_cache()
    model.encode(mx.array([[0]]), like)  # never computed: only its shapes and type are asked
    found: list[list[mx.array | None]] = []
    count = 1  # the one that says that there are some
    for number, length in enumerate(lengths):
        prefix = f"marks.{number - 1}." if number else ""
        found.append([])
        for i, layer in enumerate(like):
            if not length or (number and layer.window is None):
                found[-1].append(None)
                continue
            assert layer.state is not None
            kept = length if layer.window is None else min(length, layer.window - 1)
            batch, heads, _, size = layer.state.shape
            held = arrays.get(f"{prefix}layers.{i}")
            if held is None or held.dtype != layer.state.dtype:
                raise ValueError(f"{prefix}layers.{i} is missing or of the wrong type")
            if held.shape != (batch, heads, kept, size):
                raise ValueError(f"{prefix}layers.{i} has the wrong shape")
            if not mx.isfinite(held).all().item():
                raise ValueError(f"{prefix}layers.{i} has numbers that are not finite")
            found[-1].append(held)
            count += 1
    if len(arrays) != count:
        raise ValueError(f"it has {len(arrays)} arrays, not {count}")
    return found


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
        """A cache for a new prompt: a copy of the one that has read most of it, or an empty one."""
        shared = [prompt_cache.shared(tokens) for prompt_cache in self._kept]
        most = max(shared, default=0)
        return self._kept[shared.index(most)].fork() if most else PromptCache(self._model)

    def give(self, prompt_cache: PromptCache) -> None:
        """Keep a cache that is no longer used; the ones that it goes on from are dropped."""
        read = prompt_cache.tokens
        self._kept = [c for c in self._kept if c.tokens != read[: len(c)]]
        self._kept.insert(0, prompt_cache)
        del self._kept[MOST_CACHES:]
        while self._kept and self.nbytes > self._most:
            self._kept.pop()


def _as_json(path: Path, extra: object) -> str:
    """Write JSON that `load` will be able to read."""
    try:
        text = json.dumps(extra, ensure_ascii=False)
        parse_json(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise SessionError(f"{path} cannot be written: {error}") from None
    return text


def check_destination(path: Path) -> None:
    """Find out, before a model is loaded, whether `PromptCache.save` could write a file.

    Raises:
        SessionError: it could not, or something else has the name.
    """
    try:
        if path.exists() and not (path.is_file() and not path.stat().st_size):
            _read(path)  # which says what else it is
        _check_ours(path)
        check_writable(path)
    except OSError as error:
        raise SessionError(f"{path} cannot be written: {error.strerror}") from None


def _check_ours(path: Path) -> None:
    """Tell whether a file may take this name: none is there, an empty one, or one that was saved.

    Raises:
        SessionError: something else has the name.
    """
    try:
        if not path.exists() or (path.is_file() and not path.stat().st_size):
            return
        _, metadata = _read(path)
    except (OSError, SessionError):
        metadata = {}
    if metadata.get("format", "").partition(" context ")[0] != FORMAT.partition(" context ")[0]:
        raise SessionError(f"{path} is no saved context or session, and is left as it is")


def _read(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Arrays, which are not read yet, and metadata of a safetensors file."""
    if not path.is_file():
        raise SessionError(f"{path} is not a file")
    try:
        found = mx.load(str(path), format="safetensors", return_metadata=True)
        assert isinstance(found, tuple)  # of a safetensors file
        arrays, metadata = found
        assert isinstance(arrays, dict)
    except (RuntimeError, ValueError) as error:
        raise SessionError(f"{path} is damaged, or no saved context: {error}") from None
    if sum(map(len, metadata.values())) > MOST_METADATA:
        raise SessionError(f"{path} says more than {MOST_METADATA} characters beside its arrays")
    return arrays, metadata


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Count the tokens that two sequences begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def fingerprint(model: DiffusionGemma) -> str:
    """Equal for equal weights: a hash of the config and of 64 numbers of each parameter."""
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    heads = {name: array.reshape(-1)[:64].view(mx.uint8) for name, array in parameters.items()}
    mx.eval(heads)
    digest = hashlib.sha256(repr(model.config).encode())
    if model.sight is not None:
        digest.update(model.sight.rule.encode())
    for name in sorted(parameters):
        digest.update(f"{name} {parameters[name].shape} {parameters[name].dtype}".encode())
        digest.update(np.array(heads[name]).tobytes())
    return digest.hexdigest()
