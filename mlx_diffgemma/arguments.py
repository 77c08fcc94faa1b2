"""Numbers that callers give: checked once, where they enter, never in a step."""

import operator
from collections.abc import Iterable

import mlx.core as mx

from .errors import Error

# Characters of a wrong value that a message repeats.
SHOWN = 40


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
    ids = [token if type(token) is int else whole_number(name, token, 0) for token in given]
    if ids:
        most = None if vocab_size is None else vocab_size - 1
        whole_number(name, min(ids), 0, most)
        whole_number(name, max(ids), 0, most)
    return ids


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
    """A value as a message repeats it: the beginning of what is long."""
    try:
        text = repr(value)
    except Exception:  # an int of more digits than Python prints, or a type's own
        text = f"one of type {type(value).__name__}"
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def _index(value: object) -> int | None:
    """An int or what stands for one, else None."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
