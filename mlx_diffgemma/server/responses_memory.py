"""Keeps what was said in earlier responses, for those that go on with it; within bounds."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..text.tokenizer import Message
from .pictures import Sent

# Responses that are kept, and characters of all of them, the texts of pictures included. Those that
# nobody has asked for longest go first.
MOST_RESPONSES = 256

MOST_REMEMBERED = 64_000_000


@dataclass(frozen=True)
class Kept:
    """A response, and all that was said up to its end."""

    messages: Sequence[Message]
    response: dict[str, Any]
    characters: int


class Memory:
    """Finds responses by their ids, which nobody can guess; for one event loop."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._characters = 0

    def keep(self, messages: Sequence[Message], response: dict[str, Any]) -> None:
        """Keep a response, which may push out others; one that is too large is not kept."""
        # Those of what came before are counted again: a bound, not a balance. Of the response all
        # counts: it repeats tools, schemas and instructions.
        characters = characters_of([*messages, response])
        if characters > MOST_REMEMBERED:
            return
        self._kept[response["id"]] = Kept(messages, response, characters)
        self._characters += characters
        while len(self._kept) > MOST_RESPONSES or self._characters > MOST_REMEMBERED:
            self._characters -= self._kept.popitem(last=False)[1].characters

    def find(self, identity: str) -> Kept | None:
        """Give a response that is kept."""
        if identity in self._kept:
            self._kept.move_to_end(identity)
        return self._kept.get(identity)

    def forget(self, identity: str) -> bool:
        """Leave a response out, and say whether there was one."""
        found = self._kept.pop(identity, None)
        self._characters -= 0 if found is None else found.characters
        return found is not None


def characters_of(value: Any) -> int:
    """Count characters of all texts in a value, and one for each value."""
    count, waiting = 0, [value]
    while waiting:
        each = waiting.pop()
        count += 1
        if isinstance(each, dict):
            waiting += [*each.keys(), *each.values()]
        elif isinstance(each, list | tuple):
            waiting += each
        elif isinstance(each, str):
            count += len(each)
        elif isinstance(each, Sent):
            count += len(each.url)
    return count
