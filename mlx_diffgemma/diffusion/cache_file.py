"""Files of what a model has read: tokens, pictures, keys and values, checked when they are read."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..arguments import is_size, token_ids
from ..errors import Error
from ..files import check_writable, parse_json, replacing
from ..model.diffusion_gemma import DiffusionGemma
from ..model.part import Kept
from ..model.placeholders import Kept as KeptPicture
from ..model.placeholders import Placeholder, placeholders
from .cache_parts import shapes_held

# Characters of messages and tokens in a file; the longest contexts are said in some megabytes.
MOST_METADATA = 1 << 25

FORMAT = "mlx-diffgemma context 2"


class SessionError(Error):
    """A saved context or session that cannot be written, read, or used with this model."""


@dataclass(frozen=True)
class Saved:
    """What a file holds: tokens, where snapshots stand, and what its owner has put beside it.

    `layers` are keys and values of each layer, or None, at the end and then at each snapshot.
    """

    tokens: list[int]
    snapshots: list[int]
    layers: list[list[mx.array | None]]
    extra: object

    @property
    def described(self) -> "Described":
        """All but the numbers, for ranks that are given them."""
        arrays = [
            [None if a is None else (a.shape, str(a.dtype)) for a in row] for row in self.layers
        ]
        return self.tokens, self.snapshots, arrays

    @classmethod
    def like(cls, described: "Described") -> "Saved":
        """One with zeros in place of the numbers."""
        tokens, snapshots, arrays = described
        return cls(tokens, snapshots, [[*map(_zeros, row)] for row in arrays], None)


# Shape and type of an array, or None.
Told = tuple[tuple[int, ...], str] | None

Described = tuple[list[int], list[int], list[list[Told]]]


def _told(array: mx.array | None) -> Told:
    return None if array is None else (array.shape, str(array.dtype))


def _zeros(told: Told) -> mx.array | None:
    if told is None:
        return None
    dtype = getattr(mx, told[1].rpartition(".")[2])
    return mx.zeros(told[0], dtype)


def write_saved(path: Path, model: DiffusionGemma, saved: Saved) -> None:
    """Write a file, at once.

    Raises:
        SessionError: as `PromptCache.save`.
    """
    check_ours(path)
    arrays = dict(_named(saved.layers))
    metadata = {
        "format": FORMAT,
        "model": model.identity or fingerprint(model),
        "tokens": json.dumps(saved.tokens),
        "pictures": json.dumps(_described(saved.tokens)),
        "marks": json.dumps(saved.snapshots),
        "extra": _as_json(path, saved.extra),
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


def _named(layers: Sequence[Sequence[mx.array | None]]) -> Iterator[tuple[str, mx.array]]:
    """Names and arrays of a file."""
    yield "format", mx.array([1])  # MLX cannot read a file without arrays
    for number, held in enumerate(layers):
        prefix = f"marks.{number - 1}." if number else ""
        for i, state in enumerate(held):
            if state is not None:
                yield f"{prefix}layers.{i}", state


def read_saved(path: Path, model: DiffusionGemma, types: Callable[[], Sequence[mx.Dtype]]) -> Saved:
    """Read a file that `write_saved` wrote, with arrays of these types.

    Raises:
        SessionError: as `PromptCache.load`.
    """
    arrays, metadata = _read(path)
    if metadata.get("format") != FORMAT:
        raise SessionError(f"{path} is not a context that this version saved")
    if metadata.get("model") != (model.identity or fingerprint(model)):
        raise SessionError(f"{path} was saved with another model than the one that is loaded")
    try:
        tokens, lengths = _read_lengths(model, metadata)
        layers = _layers(model, arrays, [len(tokens), *lengths], types())
        extra = parse_json(metadata["extra"])
    except (KeyError, ValueError, RuntimeError) as error:
        raise SessionError(f"{path} is damaged: {error}") from None
    return Saved(tokens, lengths, layers, extra)


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


def kept_picture(described: object) -> KeptPicture:
    """A picture as a file tells it: `digest` in hexadecimal, `rows`, `columns` and `tokens`.

    Raises:
        ValueError: it is told in another way.
    """
    match described:
        case {"digest": str(digest), "rows": rows, "columns": columns, "tokens": tokens}:
            sizes = is_size(rows) and is_size(columns) and is_size(tokens)
            if sizes and re.fullmatch("[0-9a-f]{64}", digest):
                return KeptPicture(bytes.fromhex(digest), rows, columns, tokens)
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
    model: DiffusionGemma,
    arrays: dict[str, mx.array],
    lengths: Sequence[int],
    types: Sequence[mx.Dtype],
) -> list[list[mx.array | None]]:
    """Keys and values of each layer, of all tokens, then of each snapshot, named as by `_named`.

    Raises:
        ValueError: one is missing or too many, of the wrong shape or type, or not finite.
    """
    found: list[list[mx.array | None]] = []
    count = 1  # the one that says that there are some
    for number, shapes in enumerate(shapes_held(model, lengths)):
        prefix = f"marks.{number - 1}." if number else ""
        found.append([])
        for i, (shape, dtype) in enumerate(zip(shapes, types, strict=True)):
            if shape is None:
                found[-1].append(None)
                continue
            held = arrays.get(f"{prefix}layers.{i}")
            if held is None or held.dtype != dtype:
                raise ValueError(f"{prefix}layers.{i} is missing or of the wrong type")
            if held.shape != tuple(shape):
                raise ValueError(f"{prefix}layers.{i} has the wrong shape")
            if not mx.isfinite(held).all().item():
                raise ValueError(f"{prefix}layers.{i} has numbers that are not finite")
            found[-1].append(held)
            count += 1
    if len(arrays) != count:
        raise ValueError(f"it has {len(arrays)} arrays, not {count}")
    return found


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
        check_ours(path)
        check_writable(path)
    except OSError as error:
        raise SessionError(f"{path} cannot be written: {error.strerror}") from None


def check_ours(path: Path) -> None:
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


def fingerprint(model: DiffusionGemma) -> str:
    """Equal for equal weights: a hash of the config and of 64 numbers of each parameter.

    An adapter's are among them; its factor is no parameter, and is said beside them. Ranks that
    have parts of a model must call it at once, and all find what one finds that has the whole.
    """
    named: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    parameters = {
        # Modules of an adapter stand around a map, in parts of a model others than in the whole.
        name.replace(".linear", ""): array
        for name, array in named.items()
        if not name.endswith((".factors", ".m"))
    }
    heads = {name: _head(array, model.cut(name)) for name, array in sorted(parameters.items())}
    packed = mx.concatenate([head for _, head in heads.values()])
    if (group := model.part.share.group) is not None:
        packed = group.gather(packed).max(axis=0)  # who does not have a number says zero
    told = np.array(packed).tobytes()
    digest = hashlib.sha256(repr(model.config).encode())
    if model.sight is not None:
        digest.update(model.sight.rule.encode())
    if model.adapter is not None:
        digest.update(model.adapter.encode())
    for name, (shape, head) in heads.items():
        digest.update(f"{name} {shape} {parameters[name].dtype}".encode())
        digest.update(told[: len(head)])
        told = told[len(head) :]
    return digest.hexdigest()


def _head(array: mx.array, cut: Kept | None) -> tuple[tuple[int, ...], mx.array]:
    """The shape of a whole parameter and the bytes of its first 64 numbers; of those that this rank
    does not have, zeros."""
    if cut is None:
        return array.shape, _bytes(array.reshape(-1)[:64]).reshape(-1)
    shape = list(array.shape)
    shape[cut.axis] = shape[cut.axis] * cut.whole // sum(map(len, cut.ranges))
    places = [*np.unravel_index(np.arange(min(64, prod(shape))), shape)]
    own = [i for each in cut.stored(shape[cut.axis]) for i in each]
    known = mx.array(np.isin(places[cut.axis], own))[:, None]
    places[cut.axis] = np.searchsorted(own, places[cut.axis])
    at = mx.array(np.ravel_multi_index(places, array.shape, mode="clip"))
    found = _bytes(array.reshape(-1)[at])
    return tuple(shape), mx.where(known, found, mx.zeros_like(found)).reshape(-1)


def _bytes(numbers: mx.array) -> mx.array:
    """(N,) numbers as (N, bytes of each)."""
    return numbers[:, None].view(mx.uint8)
