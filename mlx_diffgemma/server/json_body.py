"""Reads JSON from strangers, within bounds on depth, values and numbers, as of one meaning."""

import json
import math
from typing import Any, NoReturn

from ..errors import Error

# Templates, validators and compilers walk a value recursively: a fraction of Python's own limit,
# and more levels than anybody's schema has.
MOST_DEPTH = 100

# Values of a text: far more than tools and schemas have, few enough to be validated in passing.
MOST_VALUES = 50_000

# Characters of a number: any double is shorter, and an integer stays within a double's range.
MOST_DIGITS = 300


class JsonError(Error, ValueError):
    """Says that a text is not JSON, or means more than is safe to work on."""


def read_json(text: str | bytes) -> Any:
    """Read the value of a JSON text.

    Stricter than the standard library: bytes are UTF-8, a name stands once in its object, numbers
    are finite and short, and text is whole characters, never half of a surrogate pair.

    Raises:
        JsonError: it is not JSON, or beyond the bounds of this module.
    """
    try:
        value = json.loads(
            text.decode() if isinstance(text, bytes) else text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_no_number,
        )
    except JsonError:
        raise
    except UnicodeDecodeError:
        raise JsonError("it is not UTF-8") from None
    except RecursionError:
        raise JsonError("it is nested too deeply") from None
    except ValueError as error:
        raise JsonError(f"it is not JSON: {error}") from None
    _check(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):  # readers differ in which of them counts
        raise JsonError("a name stands twice in one object")
    return found


def _integer(digits: str) -> int:
    _bound(digits)
    return int(digits)


def _number(digits: str) -> float:
    _bound(digits)
    value = float(digits)
    if math.isinf(value):
        raise JsonError("a number is too large")
    return value


def _bound(digits: str) -> None:
    if len(digits) > MOST_DIGITS:
        raise JsonError(f"a number has more than {MOST_DIGITS} characters")


def _no_number(name: str) -> NoReturn:
    raise JsonError(f"{name} is not JSON")


def _check(value: Any) -> None:
    """Check level by level: what is too deep must not be walked recursively.

    Raises:
        JsonError: too deep, too many values, or text that no encoding can write.
    """
    level, seen = [value], 0
    for _ in range(MOST_DEPTH):
        seen += len(level)
        if seen > MOST_VALUES:
            raise JsonError(f"it has more than {MOST_VALUES} values")
        below: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                below += each.values()
                for name in each:
                    _whole(name)
            elif isinstance(each, list):
                below += each
            elif isinstance(each, str):
                _whole(each)
        if not below:
            return
        level = below
    raise JsonError(f"it is nested more than {MOST_DEPTH} levels deep")


def _whole(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise JsonError("its text has half of a surrogate pair") from None
