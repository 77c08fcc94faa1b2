"""A `tokenizer.model` of sentencepiece -> the tokenizer that the same vocabulary's file would give.

Read are byte-pair vocabularies as Gemma's: text stays as it is, but for spaces, which become ▁, and
characters that the vocabulary lacks are spelled in bytes. Others are refused. What was made is
compared with sentencepiece itself before it is used.
"""

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from ..arguments import SIZE_LIMIT, shown
from ..errors import Error

# Bytes of a file. Gemma's has 4.7 MB.
MOST_MODEL = 50_000_000

# Characters of a piece that others are merged to; sentencepiece itself learns at most 16, and each
# has as many ways to be merged.
LONGEST_PIECE = 128

SPACE = "\u2581"  # ▁, which stands for a space in pieces

# Types of pieces.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

_BPE = 2  # the type of a model


class SentencePieceError(Error):
    """A `tokenizer.model` that is damaged, or of another kind than Gemma's."""


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    type: int


@dataclass(frozen=True)
class Model:
    """What is read of a file: pieces in the order of their ids, and how text is cut into them."""

    pieces: tuple[Piece, ...]
    special: dict[str, str]  # "bos_token" and its like


# Texts of so many pieces each that both spell before a tokenizer is used.
_TEXTS, _PIECES = 400, 12


def read_pieces(path: Path) -> tuple[Tokenizer, dict[str, str]]:
    """Read a `tokenizer.model`: the tokenizer, and special tokens by names such as "bos_token".

    Special pieces (`<bos>`) are found in text, where sentencepiece leaves them to its caller: chat
    templates write them.

    Raises:
        SentencePieceError: it cannot be read, is damaged, or is of a kind that is not read.
    """
    try:
        if path.stat().st_size > MOST_MODEL:
            raise SentencePieceError(f"{path} is larger than {MOST_MODEL // 10**6} MB")
        data = path.read_bytes()
    except OSError as error:
        raise SentencePieceError(f"{path} cannot be read: {error.strerror}") from None
    try:
        model = _model(data)
        made = _tokenizer(model)
        _compare(data, model, made)
        return made, model.special
    except _Refused as error:
        raise SentencePieceError(f"{path} is not read: {error}") from None
    except (ValueError, IndexError, KeyError, TypeError, struct.error, RuntimeError):
        raise SentencePieceError(f"{path} is not a model of sentencepiece") from None


def _tokenizer(model: Model) -> Tokenizer:
    ids = {piece.text: number for number, piece in enumerate(model.pieces)}
    unknown = next(piece.text for piece in model.pieces if piece.type == _UNKNOWN)
    made = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_merges(model.pieces),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    made.normalizer = normalizers.Replace(" ", SPACE)
    made.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    made.add_special_tokens(
        [
            AddedToken(piece.text, normalized=False, special=True)
            for piece in model.pieces
            if piece.type in (_CONTROL, _UNKNOWN)
        ]
    )
    # Found after spaces have become ▁: pieces may hold them.
    made.add_tokens(
        [
            AddedToken(piece.text, normalized=True, special=False)
            for piece in model.pieces
            if piece.type == _USER_DEFINED
        ]
    )
    return made


def _merges(pieces: tuple[Piece, ...]) -> list[tuple[str, str]]:
    """List the pairs of pieces that become one, those of the best score first."""
    ids = {piece.text: number for number, piece in enumerate(pieces) if piece.type == _NORMAL}
    ranked = []
    for piece in pieces:
        if piece.type != _NORMAL:
            continue
        for at in range(1, len(piece.text)):
            left, right = piece.text[:at], piece.text[at:]
            if left in ids and right in ids:
                ranked.append((-piece.score, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _compare(data: bytes, model: Model, made: Tokenizer) -> None:
    """Refuse a tokenizer that spells or reads a text otherwise than sentencepiece does."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=data)
    spoken = [p.text for p in model.pieces if p.type in (_NORMAL, _USER_DEFINED)]
    spoken += [" ", "\n", "\t", "\0", "<0x41>", "\u00e4", "\u6f22", "\U0001f642", "\u0301"]
    draw = random.Random(0)
    for count in range(_TEXTS):
        text = "".join(draw.choices(spoken, k=1 + count % _PIECES))
        if count % 2:
            text = text.replace(SPACE, " ")
        if any(piece in text for piece in model.special.values()):
            continue
        ids = processor.encode(text)
        found = made.encode(text, add_special_tokens=False).ids
        if ids != found or processor.decode(ids) != made.decode(ids, skip_special_tokens=False):
            raise _Refused(f"sentencepiece spells {shown(text)} otherwise")


class _Refused(Exception):
    """A kind of model that is not read; says why."""


def _model(data: bytes) -> Model:
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(dict(_fields(value))))
            if len(pieces) > SIZE_LIMIT:
                raise _Refused(f"it has more than {SIZE_LIMIT:,} pieces")
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    _check(pieces, trainer, normalizer)
    special = {}
    for name, field, default in (("unk", 40, 0), ("bos", 41, 1), ("eos", 42, 2), ("pad", 43, -1)):
        at = _signed(trainer.get(field, default))
        if 0 <= at < len(pieces) and pieces[at].type in (_CONTROL, _UNKNOWN):
            special[f"{name}_token"] = pieces[at].text
    return Model(tuple(pieces), special)


def _check(pieces: list[Piece], trainer: dict[int, Any], normalizer: dict[int, Any]) -> None:
    """Refuse what would be spelled in other tokens than sentencepiece gives."""
    if not pieces:
        raise ValueError
    if trainer.get(3, 1) != _BPE:
        raise _Refused("its vocabulary is not one of byte pairs")
    if normalizer.get(2):
        raise _Refused("it changes characters before it cuts text into pieces")
    if normalizer.get(3, 1) or normalizer.get(4, 1) or not normalizer.get(5, 1):
        raise _Refused("it adds or removes spaces")
    if trainer.get(24, 0):
        raise _Refused("it puts spaces behind words")
    texts = {piece.text for piece in pieces}
    if len(texts) != len(pieces):
        raise _Refused("a piece stands twice in it")
    if {f"<0x{byte:02X}>" for byte in range(256)} - {p.text for p in pieces if p.type == _BYTE}:
        raise _Refused("it cannot spell characters in bytes")
    if sum(piece.type == _UNKNOWN for piece in pieces) != 1:
        raise _Refused("it has no piece for what is unknown")
    for piece in pieces:
        if piece.type == _UNUSED:
            raise _Refused(f"it has pieces that are not used, as {shown(piece.text)}")
        if piece.type == _NORMAL and len(piece.text) > LONGEST_PIECE:
            raise _Refused(f"a piece is longer than {LONGEST_PIECE} characters")


def _piece(fields: dict[int, Any]) -> Piece:
    text = fields[1].decode()
    (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
    kind = fields.get(3, _NORMAL)
    if not text or score != score or kind not in range(_NORMAL, _BYTE + 1):
        raise ValueError
    return Piece(text, score, kind)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Read a message of protocol buffers: numbers of fields, and integers or bytes.

    Their library would do; but the classes that sentencepiece ships insist on versions of it that
    others do not get along with.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == 2:
            length, at = _varint(data, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError
        if at + length > len(data):
            raise ValueError
        yield number, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    if data[at] < 0x80:  # as nearly all of them
        return data[at], at + 1
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError


def _signed(value: int) -> int:
    """Read a negative id, which is stored as if it were of 64 bits."""
    return value - (1 << 64) if value >> 63 else value
