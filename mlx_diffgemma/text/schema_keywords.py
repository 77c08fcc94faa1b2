"""The part of JSON Schema that is supported: its keywords, what each must look like, and sizes.

A schema may come from anybody: `check_size` bounds it before anything else reads it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import Error
from .vocabulary import SHOWN

Schema = Mapping[str, Any] | bool

# Values in a schema (objects, lists, texts, numbers), several times what the largest in use have.
MOST_NODES = 20_000

# Characters of all its names and texts together.
MOST_CHARACTERS = 200_000

# Levels inside of each other, in JSON and through references: far from Python's limit of calls.
MOST_DEPTH = 128

# Digits of a whole number: what the largest double has. Python refuses to write over 4,300.
LONGEST_NUMBER = 309

# Keywords that say nothing about what is valid.
ANNOTATIONS = frozenset(
    "title description default examples deprecated readOnly writeOnly $schema $id $comment $defs "
    "definitions".split()
)

BY_TYPE = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength"}),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "boolean": frozenset[str](),
    "null": frozenset[str](),
}

# What a value may be where the schema does not say its type.
SCALARS = ("string", "number", "boolean", "null")

# Beside enum or const: what is checked in one look, and holds no further schema.
BESIDE = frozenset({"type", "enum", "minItems", "maxItems"}).union(
    *(BY_TYPE[kind] for kind in ("string", "number"))
)

# What the library checks values by; $ref is resolved before.
CHECKED = frozenset({"type", "enum", "const", "anyOf"}).union(*BY_TYPE.values())

# Dialects that read the keywords above alike; never fetched.
_DIALECTS = frozenset(
    f"json-schema.org/{dialect}schema"
    for dialect in ("", "draft-04/", "draft-06/", "draft-07/", "draft/2019-09/", "draft/2020-12/")
)


def _is_schema(value: Any) -> bool:
    return isinstance(value, dict | bool)


def _is_size(value: Any) -> bool:
    if isinstance(value, float):
        return value >= 0 and value.is_integer()
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_type(value: Any) -> bool:
    if isinstance(value, str):
        return value in BY_TYPE
    return _is_names(value) and bool(value) and all(kind in BY_TYPE for kind in value)


def _is_names(value: Any) -> bool:
    return (
        isinstance(value, list)
        and all(isinstance(name, str) for name in value)
        and len(set(value)) == len(value)
    )


def _is_dialect(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    return value.removesuffix("#").partition("://")[2] in _DIALECTS


# What a keyword's value must be.
FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "$schema": (_is_dialect, "one of json-schema.org's drafts from 4 to 2020-12"),
    "$id": (lambda value: isinstance(value, str), "a text"),
    "$ref": (lambda value: isinstance(value, str), "a text"),
    "type": (_is_type, f"one of {', '.join(BY_TYPE)}, or a list of some"),
    "enum": (lambda value: isinstance(value, list), "a list"),
    "anyOf": (
        lambda value: isinstance(value, list) and bool(value) and all(map(_is_schema, value)),
        "a list of schemas",
    ),
    "properties": (
        lambda value: isinstance(value, dict) and all(map(_is_schema, value.values())),
        "an object of schemas",
    ),
    "required": (_is_names, "a list of distinct names"),
    "additionalProperties": (_is_schema, "true, false or a schema"),
    "items": (_is_schema, "a schema"),
    **dict.fromkeys(
        ("minItems", "maxItems", "minLength", "maxLength"),
        (_is_size, "a whole number, 0 or more"),
    ),
    **dict.fromkeys(
        sorted(BY_TYPE["number"]),
        (_is_number, "a number; true and false (draft 4) are not supported"),
    ),
}


class SchemaError(Error):
    """A schema that cannot be read, or asks for something that is not supported."""


def check_size(schema: Schema) -> None:
    """Refuse what is too large to be read, or no JSON; the cost is bounded whatever it is."""
    if not _is_schema(schema):
        raise SchemaError("a schema is a JSON object")
    nodes = characters = 0
    ahead: list[tuple[Any, int]] = [(schema, 1)]
    while ahead:
        value, depth = ahead.pop()
        nodes += 1
        if depth > MOST_DEPTH:
            raise SchemaError(f"the schema is nested too deeply: over {MOST_DEPTH} levels")
        inside = len(value) if isinstance(value, dict | list) else 0
        if nodes + len(ahead) + inside > MOST_NODES:
            raise SchemaError(f"the schema is too large: it has over {MOST_NODES:,} values")
        _check_value(value)
        if isinstance(value, str):
            characters += len(value)
        elif isinstance(value, dict):
            characters += sum(map(len, value))
            ahead.extend((part, depth + 1) for part in value.values())
        elif isinstance(value, list):
            ahead.extend((part, depth + 1) for part in value)
        if characters > MOST_CHARACTERS:
            raise SchemaError(
                f"the schema is too large: its texts have over {MOST_CHARACTERS:,} characters"
            )


def _check_value(value: Any) -> None:
    """Refuse what JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        raise SchemaError(f"the schema holds {value}, which is no number")
    # Bits, since writing so many digits is what is slow, or refused.
    if isinstance(value, int) and value.bit_length() > LONGEST_NUMBER * math.log2(10):
        raise SchemaError(f"the schema holds a number of over {LONGEST_NUMBER} digits")
    if value is not None and not isinstance(value, dict | list | str | int | float):
        raise SchemaError(f"the schema holds a {type(value).__name__}, which is not JSON")
    if isinstance(value, dict) and not all(isinstance(name, str) for name in value):
        raise SchemaError("the schema holds a name that is no text, which is not JSON")


def shown(text: str) -> str:
    """Shorten a text of a schema for errors, to such as every encoding can write."""
    start = text[: SHOWN + 1]
    if not start.isprintable():
        start = start.encode("unicode_escape").decode()
    return start if len(start) <= SHOWN else start[: SHOWN - 3] + "..."
