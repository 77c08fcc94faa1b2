"""Tells which worker has read how a conversation begins, by hashes of its beginnings.

A worker keeps what it has read, so the next turn of a conversation costs it least. Hashes say the
same of all APIs, in which a conversation is a list of messages, and of prompts that are one text.
"""

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

# Beginnings of one conversation that are kept: the first, and the last of the others.
MOST_BEGINNINGS = 64

# Beginnings of all conversations, those that nobody has asked for longest going first: 10 MB.
MOST_KNOWN = 65_536

# Characters after which the beginning of a text counts; a shorter one is read in no time.
BLOCK = 1024

# The messages of a route's bodies, and what stands before them in the prompt.
_MESSAGES = {
    "/v1/chat/completions": "messages",
    "/v1/messages": "messages",
    "/v1/messages/count_tokens": "messages",
    "/api/chat": "messages",
    "/v1/responses": "input",
}
_BEFORE = ("model", "system", "instructions", "tools")

# Routes whose prompt is one text, and its field.
_TEXTS = {
    "/v1/completions": "prompt",
    "/v1/responses": "input",
    "/api/generate": "prompt",
    "/v1/fim/completions": "prompt",
    "/infill": "input_prefix",
    "/v1/fill": "prompt",
    "/v1/choose": "prompt",
}

# What changes from turn to turn and means nothing: Anthropic's marks of what is to be kept.
_MARKS = frozenset(["cache_control"])


@dataclass(frozen=True)
class Beginnings:
    """Hashes of how a conversation begins, the shortest first.

    Attributes:
        turns: the conversation is made of messages, so whoever has read some will be asked again.
        previous: the response that is gone on with, where a worker keeps what was said.
    """

    digests: Sequence[bytes] = ()
    turns: bool = False
    previous: str | None = None

    def longest_first(self) -> Iterator[tuple[bytes, bool]]:
        """Give each, and whether the conversation goes on behind it."""
        for i in reversed(range(len(self.digests))):
            yield self.digests[i], self.turns and i < len(self.digests) - 1


def beginnings_of(path: str, body: bytes) -> Beginnings:
    """Read the beginnings of a request, whose JSON has been checked; none where it has no form."""
    found = json.loads(body)
    if not isinstance(found, dict):
        return Beginnings()
    previous = found.get("previous_response_id")
    if path == "/v1/responses" and isinstance(previous, str):
        return Beginnings(previous=previous)
    messages = found.get(_MESSAGES.get(path, ""))
    if isinstance(messages, list):
        return _of_messages(found, messages)
    text = found.get(_TEXTS.get(path, ""))
    if isinstance(text, str):
        return _of_text(found, text)
    return Beginnings()


def _hash(body: dict[str, Any]) -> "blake2b":
    """Begin with what stands before all messages."""
    return blake2b(_written({name: body.get(name) for name in _BEFORE}), digest_size=16)


def _of_messages(body: dict[str, Any], messages: list[Any]) -> Beginnings:
    """One beginning behind each message, from a user's first on: many have what is before it."""
    roles = [each.get("role") if isinstance(each, dict) else None for each in messages]
    first = roles.index("user") if "user" in roles else len(messages) - 1
    digests = []
    so_far = _hash(body)
    for i, message in enumerate(messages):
        so_far.update(_written(_bare(message)))
        if i == first or i >= max(first, len(messages) - MOST_BEGINNINGS + 1):
            digests.append(so_far.digest())
    return Beginnings(digests, turns=True)


def _of_text(body: dict[str, Any], text: str) -> Beginnings:
    """One beginning behind each block, so many that all of them are few, and one of the whole."""
    blocks = len(text) // BLOCK
    digests = []
    so_far = _hash(body)
    for i in range(blocks):
        so_far.update(text[i * BLOCK : (i + 1) * BLOCK].encode())
        if i == 0 or i > blocks - MOST_BEGINNINGS:
            digests.append(so_far.digest())
    return Beginnings(digests)


def _bare(message: Any) -> Any:
    """A message as it comes again in the next turn: marks are gone, a text may stand alone."""
    if not isinstance(message, dict):
        return message
    content = message.get("content")
    if isinstance(content, list):
        content = [_unmarked(part) for part in content]
        if len(content) == 1 and isinstance(content[0], dict) and content[0].get("type") == "text":
            content = content[0].get("text")
    return {**_unmarked(message), "content": content}


def _unmarked(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    return {name: value for name, value in part.items() if name not in _MARKS}


def _written(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode() + b"\n"


class Readers:
    """Knows who has read which beginnings; workers are numbered from 0."""

    def __init__(self) -> None:
        self._masks: OrderedDict[bytes, int] = OrderedDict()

    def note(self, beginnings: Beginnings, number: int) -> None:
        """Note that a worker reads these."""
        for digest in beginnings.digests:
            self._masks[digest] = self._masks.pop(digest, 0) | 1 << number
        while len(self._masks) > MOST_KNOWN:
            self._masks.popitem(last=False)

    def of(self, digest: bytes) -> frozenset[int]:
        """Give the numbers of those who have read a beginning."""
        mask = self._masks.get(digest, 0)
        return frozenset(i for i in range(mask.bit_length()) if mask >> i & 1)

    def forget(self, number: int) -> None:
        """Leave a worker out that has begun anew."""
        for digest, mask in list(self._masks.items()):
            if mask >> number & 1:
                self._masks[digest] = mask & ~(1 << number)
