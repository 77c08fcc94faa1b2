"""Numbers that callers and files give: checked once, where they enter, never in a step."""

import operator
import reprlib
from collections.abc import Iterable
from typing import TypeGuard

import mlx.core as mx

from .errors import Error

# Characters of a wrong value that a message repeats.
SHOWN = 100

# A size of a model (a width, a count, a context). The largest today is 2 ** 18; positions beyond
# 2 ** 24 are not exact in float32.
SIZE_LIMIT = 1 << 24

# Smallest and largest positive number of a config: float32 holds them, and products of a few.
NUMBER_LIMITS = 1e-30, 1e30


class SettingError(Error, ValueError):
    """A setting out of range, or an id that the vocabulary does not have."""


def whole_number(name: str, value: object, least: int, most: int | None = None) -> int:
    """A value as an int, numpy's included; True is none.

    Raises:
        SettingError: it is no whole number from `least` to `most`.
    """
    number = _index(value)
    if number is None:
        raise SettingError(f"{name} must be a whole number, not {shown(value)}")
    if number < least or (most is not None and number > most):
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        raise SettingError(f"{name} must be {bounds}, not {shown(number)}")
    return number


def token_ids(given: Iterable[object], vocab_size: int | None = None) -> list[int]:
    """Token ids as ints; None checks only that they are ids of some vocabulary.

    An id beyond the embedding table is read beyond its memory: MLX checks no index.

    Raises:
        SettingError: one of them is no whole number from 0 to `vocab_size` - 1.
    """
    name = "a token id"
    # What stands for a picture is an int that knows it, and has to stay one.
    ids = [
        token
        if isinstance(token, int) and type(token) is not bool
        else whole_number(name, token, 0)
        for token in given
    ]
    if ids:
        most = None if vocab_size is None else vocab_size - 1
        whole_number(name, min(ids), 0, most)
        whole_number(name, max(ids), 0, most)
    return ids


def check_kind(name: str, value: object, kinds: type | tuple[type, ...], what: str) -> None:
    """Refuse a value of another type; `what` says in words what it must be.

    Raises:
        SettingError: it is of none of these types.
    """
    if not isinstance(value, kinds):
        raise SettingError(f"{name} must be {what}, not {shown(value)}")


def check_canvas(name: str, ids: object, vocab_size: int) -> None:
    """Whether an array is canvases (B, L) of token ids; waits until it is computed.

    Raises:
        SettingError: it has another shape or type, or an id is not in the vocabulary.
    """
    if not isinstance(ids, mx.array) or not mx.issubdtype(ids.dtype, mx.integer):
        raise SettingError(f"{name} must be an array of token ids")
    if ids.ndim != 2 or not ids.size:
        raise SettingError(f"{name} must be canvases (B, L), not of shape {ids.shape}")
    token_ids([ids.min().item(), ids.max().item()], vocab_size)


def shown(value: object) -> str:
    """A foreign value as a sentence repeats it: on one line, and short."""
    try:
        text = reprlib.repr(value)
    except Exception:  # an int of more digits than Python prints, or a type's own
        text = f"one of type {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def is_size(value: object) -> TypeGuard[int]:
    """Whether it is a whole number that a model's size can be; true and 1.0 are not."""
    return type(value) is int and 1 <= value <= SIZE_LIMIT


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a number, neither NaN nor infinite nor beyond what float32 holds."""
    largest = NUMBER_LIMITS[1]
    return isinstance(value, (int, float)) and type(value) is not bool and abs(value) <= largest


def _index(value: object) -> int | None:
    """An int or what stands for one, else None."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
