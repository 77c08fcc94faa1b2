"""What a model turn is made of: thoughts, text for the user, tool calls.

Markers are recognised as tokens, so text that merely looks like one stays text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from .calls import CallError, parse_call
from .calls import ToolCall as ToolCall
from .stop_strings import StopStrings as StopStrings
from .tokenizer import Tokenizer

Kind = Literal["text", "thought", "call", "marker"]


@dataclass(frozen=True)
class Text:
    """Text that is final: what a committed canvas adds to the answer."""

    text: str


@dataclass(frozen=True)
class Thought:
    """What a committed canvas adds to the model's thoughts."""

    text: str


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
        """Tell what each of the tokens that come next would be; nothing is taken in."""
        kind, found = self._kind, list[Kind]()
        for token in tokens:
            found.append("marker" if token in self._after else kind)
            kind = self._after.get(token, kind)
        return found

    def feed(self, tokens: Sequence[int], *, last: bool) -> list[Part]:
        """Return the parts that tokens add; with `last` the turn ends and nothing is held back."""
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
        """Return what is still to be said of the kind that ends here."""
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
        alone = self._tokenizer.decode(self._ids[kind][-1:])
        if "\ufffd" not in alone:  # else it is a byte, perhaps the first of a character
            # What comes is decoded behind this token alone: an answer of one token after another
            # would else take the square of its length.
            self._ids[kind], self._shown[kind] = self._ids[kind][-1:], len(alone)
            self._header = self._header and kind != "thought"
        return [Thought(new) if kind == "thought" else Text(new)]
