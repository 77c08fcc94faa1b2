"""Tool calls as a model writes them: `call:NAME{key:value,...}`."""

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from ..errors import Error

QUOTE = '<|"|>'

# Deeper values than this are a model gone astray, and would exhaust Python's stack.
MAX_DEPTH = 64

# Longer numbers too; Python refuses to print one of more than 4,300 digits.
MAX_DIGITS = 1000


@dataclass(frozen=True)
class ToolCall:
    """The model asks for a function to be called; `arguments` are JSON values."""

    name: str
    arguments: dict[str, Any]


class CallError(Error, ValueError):
    """Text that is no tool call."""


_CALL = re.compile(r"\s*call:\s*([^\s{]+)\s*(?=\{)")

_NUMBER = re.compile(r"-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?(?=\s*(?:[,\]}]|$))")

_WORD = re.compile(r"[^,\]}]+")

_KEY = re.compile(r"[^\s:,{}\[\]]+(?:\s+[^\s:,{}\[\]]+)*")

_CONSTANTS = {"true": True, "false": False, "null": None}

_CONSTANTS |= {"True": True, "False": False, "None": None}  # as templates print Python's


def parse_call(text: str) -> ToolCall:
    """Read `call:NAME{key:value,...}`: strings between quote tokens, the rest much like JSON.

    Raises:
        CallError: it is not of that form; the message says where.
    """
    head = _CALL.match(text)
    if not head:
        raise CallError("it does not begin with call:NAME{")
    arguments, end = _value(text, head.end(), 0)
    if text[end:].strip():
        raise CallError(f"there is more behind its end: {text[end:].strip()[:20]!r}")
    return ToolCall(head[1], arguments)


def _space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _value(text: str, at: int, depth: int) -> tuple[Any, int]:
    """Read a value that begins at `at`, and where it ends."""
    at = _space(text, at)
    if depth > MAX_DEPTH:
        raise CallError("its values are nested too deeply")
    if text.startswith(QUOTE, at) or text.startswith('"', at):
        return _string(text, at)
    if text.startswith("{", at):
        pairs: dict[str, Any] = {}
        at = _space(text, at + 1)
        while not text.startswith("}", at):
            key, at = _key(text, at)
            pairs[key], at = _value(text, at, depth + 1)
            at = _separator(text, at, "}")
        return pairs, at + 1
    if text.startswith("[", at):
        items: list[Any] = []
        at = _space(text, at + 1)
        while not text.startswith("]", at):
            item, at = _value(text, at, depth + 1)
            items.append(item)
            at = _separator(text, at, "]")
        return items, at + 1
    if number := _NUMBER.match(text, at):
        return _number(number[0], at), number.end()
    word = _WORD.match(text, at)
    if not word:
        raise CallError(f"a value is missing at character {at}")
    bare = word[0].strip()
    return _CONSTANTS.get(bare, bare), word.end()


def _number(digits: str, at: int) -> int | float:
    """Read an int, or a float that JSON can say."""
    if len(digits) > MAX_DIGITS:
        raise CallError(f"the number at character {at} is too long")
    if digits.lstrip("-").isdecimal():
        return int(digits)
    value = float(digits)
    if not math.isfinite(value):
        raise CallError(f"the number at character {at} is too large")
    return value


def _string(text: str, at: int) -> tuple[str, int]:
    if text.startswith(QUOTE, at):
        end = text.find(QUOTE, at + len(QUOTE))
        if end < 0:
            raise CallError(f"the string at character {at} does not end")
        return text[at + len(QUOTE) : end], end + len(QUOTE)
    try:
        found, end = json.JSONDecoder().raw_decode(text, at)
    except ValueError:
        raise CallError(f"the string at character {at} does not end") from None
    if any("\ud800" <= c <= "\udfff" for c in found):
        raise CallError(f"the string at character {at} holds half a character")
    return str(found), end


def _key(text: str, at: int) -> tuple[str, int]:
    if text.startswith(QUOTE, at) or text.startswith('"', at):
        key, at = _string(text, at)
    else:
        word = _KEY.match(text, at)
        if not word:
            raise CallError(f"a name is missing at character {at}")
        key, at = word[0], word.end()
    at = _space(text, at)
    if not text.startswith(":", at):
        raise CallError(f"a colon is missing at character {at}")
    return key, at + 1


def _separator(text: str, at: int, end: str) -> int:
    """Return the place behind a comma, or `end`'s."""
    at = _space(text, at)
    if text.startswith(",", at):
        return _space(text, at + 1)
    if text.startswith(end, at):
        return at
    raise CallError(f"a comma or {end} is missing at character {at}")
