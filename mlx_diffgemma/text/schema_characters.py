"""Patterns of characters, and the tokens that they become: texts in the tokenizer's own pieces."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..diffusion.automaton import Alternation, Concat, Deadline, Graph, Pattern, Repeat
from .schema_keywords import SchemaError
from .vocabulary import Vocabulary

# Parts of a pattern; references and optional members can make few lines of schema into very many.
MOST_PARTS = 200_000

# Characters that follow each other without a choice. They reach the tokenizer in one call, which
# cannot be interrupted and keeps other threads waiting: about 0.1 s with a large vocabulary.
LONGEST_LITERAL = 20_000


class Unencoded:
    """A pattern of characters, which an `Encoder` turns into one of tokens."""

    def build(self, graph: Graph, start: int) -> int:
        raise AssertionError("patterns of characters are encoded first")


@dataclass(frozen=True)
class Spelled(Unencoded):
    """This text; runs of it are encoded as one, as a tokenizer would."""

    text: str


@dataclass(frozen=True)
class OneOf(Unencoded):
    """One of these characters."""

    characters: str


@dataclass(frozen=True)
class Inside(Unencoded):
    """The inside of a string, by its number of characters."""

    least: int
    most: int | None


@dataclass
class Encoder:
    """Turns patterns of characters into patterns of tokens; what stands in several is made once."""

    vocabulary: Vocabulary
    deadline: Deadline
    count: int = 0
    _literals: dict[str, Pattern] = field(default_factory=dict)
    # By identity: the pattern, what it became, and its parts.
    _made: dict[int, tuple[Pattern, Pattern, int]] = field(default_factory=dict)

    def encoded(self, pattern: Pattern) -> Pattern:
        """Turn a pattern of characters into one of tokens.

        Raises:
            SchemaError: it is too large.
        """
        self.deadline.check()
        known = self._made.get(id(pattern))
        if known is not None:
            self._add(known[2])
            return known[1]
        before = self.count
        self._add(1)
        made = self._encode(pattern)
        self._made[id(pattern)] = pattern, made, self.count - before
        return made

    def _add(self, parts: int) -> None:
        # Optional members stand in several options each, and so do the members inside of them.
        self.count += parts
        if self.count > MOST_PARTS:
            raise SchemaError(f"the schema is too large: it has over {MOST_PARTS:,} parts")

    def _encode(self, pattern: Pattern) -> Pattern:
        match pattern:
            case Spelled(text):
                return self._literal(text)
            case OneOf(characters):
                return self.vocabulary.character(characters)
            case Inside(least, most):
                return self.vocabulary.json_characters(least, most)
            case Concat(parts):
                return Concat(tuple(map(self.encoded, _merged(parts))))
            case Alternation(options):
                return Alternation(tuple(map(self.encoded, options)))
            case Repeat(part, least, most):
                return Repeat(self.encoded(part), least, most)
        return pattern

    def _literal(self, text: str) -> Pattern:
        if text not in self._literals:
            if len(text) > LONGEST_LITERAL:
                raise SchemaError(
                    f"the schema is too large: over {LONGEST_LITERAL:,} characters follow each "
                    "other without a choice"
                )
            self._literals[text] = self.vocabulary.literal(text)
        return self._literals[text]


def _merged(parts: tuple[Pattern, ...]) -> list[Pattern]:
    """Return the parts, with texts that follow each other as one."""
    joined: list[Pattern] = []
    texts: list[str] = []
    for part in (*_flat(parts), None):
        if isinstance(part, Spelled):
            texts.append(part.text)
            continue
        if texts:
            joined.append(Spelled("".join(texts)))
            texts = []
        if part is not None:
            joined.append(part)
    return joined


def _flat(parts: tuple[Pattern, ...]) -> Iterator[Pattern]:
    for part in parts:
        if isinstance(part, Concat):
            yield from _flat(part.parts)
        else:
            yield part


def json_text(value: Any) -> Spelled:
    """Write JSON as documents have it. What is no character by itself is escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if not text.isprintable():
        text = json.dumps(value, separators=(",", ":"))
    return Spelled(text)
