"""What a model turn is made of: thoughts, text for the user, tool calls.

Markers are recognised as tokens, so text that merely looks like one stays text.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from ..errors import Error
from .tokenizer import Tokenizer

Kind = Literal["text", "thought", "call", "marker"]

QUOTE = '<|"|>'

# Deeper values than this are a model gone astray, and would exhaust Python's stack.
MAX_DEPTH = 64

# Longer numbers too; Python refuses to print one of more than 4,300 digits.
MAX_DIGITS = 1000


@dataclass(frozen=True)
class Text:
    """Text that is final: what a committed canvas adds to the answer."""

    text: str


@dataclass(frozen=True)
class Thought:
    """What a committed canvas adds to the model's thoughts."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """The model asks for a function to be called; `arguments` are JSON values."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class BadToolCall:
    """A tool call that cannot be read: the model's words, and what is wrong with them."""

    text: str
    problem: str


Part = Text | Thought | ToolCall | BadToolCall

# What stands behind each marker. A tool's response is the prompt of the next call to the model.
_FOLLOWS: dict[str, Kind] = {
    "<|channel>": "thought",
    "<channel|>": "text",
    "<|tool_call>": "call",
    "<tool_call|>": "text",
    "<|tool_response>": "text",
    "<tool_response|>": "text",
}


class CallError(Error, ValueError):
    """Text that is no tool call."""


class TurnReader:
    """Takes the tokens of one model turn, canvas by canvas, and gives its parts.

    `prompt` is what stands before the turn: templates may open a thought there already.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._after: dict[int, Kind] = {}  # what follows a marker
        for name, kind in _FOLLOWS.items():
            token = tokenizer.token_id(name)
            if token is not None:
                self._after[token] = kind
        self._thought_opens = tokenizer.token_id("<|channel>")
        self._kind: Kind = "text"
        for token in prompt:
            self._kind = self._after.get(token, self._kind)
        if self._kind == "call":
            self._kind = "text"
        # A thought begins with the name of its channel; one that the prompt opened has it already.
        self._header = False
        self._ids: dict[Kind, list[int]] = {"text": [], "thought": [], "call": []}
        self._shown: dict[Kind, int] = {"text": 0, "thought": 0}
        self._calling = False

    @property
    def thinking(self) -> bool:
        """Whether what comes next belongs to a thought."""
        return self._kind == "thought"

    def kinds(self, tokens: Sequence[int]) -> list[Kind]:
        """What each of the tokens that come next would be; nothing is taken in."""
        kind, found = self._kind, list[Kind]()
        for token in tokens:
            found.append("marker" if token in self._after else kind)
            kind = self._after.get(token, kind)
        return found

    def feed(self, tokens: Sequence[int], *, last: bool) -> list[Part]:
        """The parts that tokens add. `last` says that the turn ends with them: nothing waits."""
        parts: list[Part] = []
        kinds = self.kinds(tokens)
        for kind, run in groupby(zip(kinds, tokens, strict=True), key=lambda pair: pair[0]):
            ids = [token for _, token in run]
            if kind != "marker":
                self._ids[kind] += ids
                parts += self._grown(kind, last=False)
                continue
            for token in ids:
                parts += self._closed()
                self._kind = self._after[token]
                self._calling = self._kind == "call"
                if token == self._thought_opens:
                    self._ids["thought"], self._shown["thought"] = [], 0
                    self._header = True
        if last:
            parts += self._closed()
        return parts

    def _closed(self) -> list[Part]:
        """What is still to be said of the kind that ends here."""
        if not self._calling:
            return self._grown(self._kind, last=True)
        self._calling = False
        text = self._tokenizer.decode(self._ids["call"])
        self._ids["call"] = []
        try:
            return [parse_call(text)]
        except CallError as error:
            return [BadToolCall(text, str(error))]

    def _grown(self, kind: Kind, *, last: bool) -> list[Part]:
        if kind not in self._shown:
            return []
        text = self._tokenizer.decode(self._ids[kind])
        if not last:
            # Bytes of a character that the next canvas completes are U+FFFD until then.
            text = text.rstrip("\ufffd")
        if kind == "thought" and self._header:
            _, found, text = text.partition("\n")
            if not found:
                return []
        new = text[self._shown[kind] :]
        if not new:
            return []
        self._shown[kind] = len(text)
        return [Thought(new) if kind == "thought" else Text(new)]


_CALL = re.compile(r"\s*call:\s*([^\s{]+)\s*(?=\{)")

_NUMBER = re.compile(r"-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?(?=\s*(?:[,\]}]|$))")

_WORD = re.compile(r"[^,\]}]+")

_KEY = re.compile(r"[^\s:,{}\[\]]+(?:\s+[^\s:,{}\[\]]+)*")

_CONSTANTS = {"true": True, "false": False, "null": None}

_CONSTANTS |= {"True": True, "False": False, "None": None}  # as templates print Python's


def parse_call(text: str) -> ToolCall:
    """`call:NAME{key:value,...}`: strings between quote tokens, the rest much like JSON.

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
    """A value that begins at `at`, and where it ends."""
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
    """An int, or a float that JSON can say."""
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
    """Behind a comma, or at `end`."""
    at = _space(text, at)
    if text.startswith(",", at):
        return _space(text, at + 1)
    if text.startswith(end, at):
        return at
    raise CallError(f"a comma or {end} is missing at character {at}")


class StopStrings:
    """Text up to the first of some stop strings; what may become one waits."""

    def __init__(self, stop: Sequence[str]):
        self._stop = [text for text in stop if text]
        self._held = ""
        self.hit = False

    def feed(self, text: str) -> str:
        """What can be shown now that this text has come."""
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        self.hit = bool(found)
        end = len(self._held) if not found else min(found)
        if not found:
            waits = (
                n
                for stop in self._stop
                for n in range(min(len(stop) - 1, len(self._held)), 0, -1)
                if self._held.endswith(stop[:n])
            )
            end -= max(waits, default=0)
        shown, self._held = self._held[:end], "" if found else self._held[end:]
        return shown

    def rest(self) -> str:
        """What waited in vain."""
        shown, self._held = self._held, ""
        return shown
