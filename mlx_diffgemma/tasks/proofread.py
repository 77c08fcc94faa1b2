"""A text that is corrected by the encoder, which reads it causally and says what it doubts.

Where it would rather have another token, that is put, and the text goes on behind it in one of a
few ways: a typo that is mended, or a word of fewer tokens, shifts all that follows. One text takes
the place of another only if the encoder finds it likelier, with what stands behind it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from ..diffusion.automaton import Concat, Exactly, Pattern, compile_pattern
from ..diffusion.causal import CausalReader, Doubts
from ..diffusion.constraints import Listed
from ..diffusion.decoding import Decoding, Rest
from ..diffusion.prompt_cache import PromptCache, Reading
from ..model.diffusion_gemma import DiffusionGemma
from .writing import Read

# Nats by which the encoder prefers a token of its own to one that it doubts.
MARGIN = 2.0

# Tokens of the text whose place a correction may take; none is an insertion.
REPLACED = (0, 1, 2)

# Tokens read behind a correction to tell in which way the text goes on.
AHEAD = 6

# Tokens behind the text that are weighed with it: how it ends, or joins what follows.
BEHIND = 8

# Corrections of a text at most, and those in a row that make nothing likelier.
CORRECTIONS = 32
PATIENCE = 3


@dataclass(frozen=True, eq=False)
class Proofreader:
    """Weighs and corrects a text of at most `most` tokens that stands behind what a reader keeps.

    A correction is one of the `allowed` tokens. The text is followed by the first tokens of
    `behind`, which are not empty and stay.
    """

    reader: CausalReader
    allowed: frozenset[int]
    behind: Sequence[int]
    most: int
    _known: dict[tuple[int, ...], Doubts] = field(default_factory=dict)

    def likeliest(self, texts: Sequence[Sequence[int]]) -> Decoding[Read, list[int]]:
        """Of some texts the one that the encoder likes best, the first at a tie."""
        best, liked = texts[0], -math.inf
        for text in texts:
            total = sum((yield from self._whole(text)).log_probabilities)
            if total > liked:
                best, liked = text, total
        return list(best)

    def corrected(self, text: Sequence[int]) -> Decoding[Read, list[int]]:
        """The text, or a likelier one: from left to right, what is doubted is replaced."""
        best, now = list(text), list(text)
        kept = vain = 0
        for _ in range(CORRECTIONS):
            doubts = yield from self._whole(now)
            at = self._first_doubt(doubts, kept, len(now))
            ways = [] if at is None else self._ways(now, at, doubts.choices[at])
            if at is None or not ways:
                break
            now = yield from self._way_on(ways, at)
            best = yield from self.likeliest([best, now])
            kept = at + 1
            vain = 0 if best == now else vain + 1
            if vain == PATIENCE:
                break
        return best

    @property
    def _tail(self) -> list[int]:
        return list(self.behind[:BEHIND])

    def _first_doubt(self, doubts: Doubts, kept: int, end: int) -> int | None:
        """The first place from `kept` to the one behind the text where the encoder clearly prefers
        a token that may stand there."""
        for at in range(kept, end + 1):
            choice = doubts.choices[at]
            may = choice in self.allowed or choice == self.behind[0]
            if may and doubts.preferred[at] - doubts.log_probabilities[at] > MARGIN:
                return at
        return None

    def _ways(self, text: list[int], at: int, choice: int) -> list[list[int]]:
        """Texts with the encoder's choice at a place, which differ in what follows it."""
        ways = [text[:at]] if choice == self.behind[0] else []
        if choice in self.allowed:
            replaced = [count for count in REPLACED if at + count <= len(text)]
            ways += [[*text[:at], choice, *text[at + count :]] for count in replaced]
        return [way for way in ways if len(way) <= self.most]

    def _way_on(self, ways: list[list[int]], at: int) -> Decoding[Read, list[int]]:
        """Of texts that agree up to a place, the one whose next tokens the encoder likes best."""
        best, liked = ways[0], -math.inf
        for way in ways if len(ways) > 1 else ():
            seen = [*way, *self._tail][: at + 1 + AHEAD]
            found = (yield from self._read(seen, at)).log_probabilities
            if (mean := sum(found) / len(found)) > liked:
                best, liked = way, mean
        return best

    def _whole(self, text: Sequence[int]) -> Decoding[Read, Doubts]:
        """What the encoder says of a text and its tail, which it reads once."""
        key = tuple(text)
        if key not in self._known:
            self._known[key] = yield from self._read([*text, *self._tail])
        return self._known[key]

    def _read(self, tokens: Sequence[int], first: int = 0) -> Decoding[Read, Doubts]:
        """What the encoder says of tokens, from the place `first` on."""
        yield from _reading(self.reader, tokens)
        return self.reader.doubts(first)


def refilled(
    reader: CausalReader,
    line: Sequence[int],
    span: tuple[int, int],
    pattern: Pattern,
    most: int,
    vocab_size: int,
) -> Decoding[Read, list[int]]:
    """What stands in a hole of a line: as before, or as the encoder writes it from its first doubt
    on, if it finds the whole line likelier then.

    A token stands behind the hole. What is written matches the pattern, in at most `most` tokens.
    """
    start, end = span
    yield from _reading(reader, line)
    before = reader.doubts(start)
    gaps = zip(before.preferred, before.log_probabilities, strict=True)
    doubted = (i for i, (a, b) in enumerate(gaps) if a - b > MARGIN and i <= end - start)
    at = next(doubted, None)
    if at is None:
        return list(line[start:end])
    machine = compile_pattern(Concat((pattern, Exactly((line[end],)))))
    written = list(line[start : start + at])
    states = machine.advance(frozenset([machine.first]), written)
    while True:
        yield from _reading(reader, [*line[:start], *written])
        sets = machine.sets_behind(states, most + 1 - len(written))
        may = Listed(mx.array(machine.union(sets, vocab_size))[None], mx.array([0]))
        (choice,) = reader.following(may, start + len(written), 1).tokens
        states = machine.advance(states, [choice])
        if choice == line[end] and states & machine.accepting:
            break
        written.append(choice)
    yield from _reading(reader, [*line[:start], *written, *line[end:]])
    after = reader.doubts(start)
    better = sum(after.log_probabilities) > sum(before.log_probabilities)
    return written if better else list(line[start:end])


def _reading(reader: CausalReader, tokens: Sequence[int]) -> Decoding[Read, None]:
    """Have tokens read, once others had their turn."""
    yield Rest()
    if encoded := reader.read(tokens):
        yield Read(encoded)


@dataclass
class Tally:
    """Counts the encoder's passes over what it reads, and the tokens in them."""

    passes: int = 0
    positions: int = 0

    def take(self, item: Read) -> tuple[()]:
        """Count a pass, of which nobody is told."""
        self.passes += 1
        self.positions += item.tokens
        return ()


def begin_reading(
    model: DiffusionGemma, prompt_cache: PromptCache, context: list[int], verify: bool
) -> Decoding[Reading, CausalReader | None]:
    """Read what stands before a text; if it is to be verified, the reader that goes on behind."""
    if not verify:
        yield from prompt_cache.reading(context)
        return None
    # The last token apart: its hidden state says what begins the text.
    yield from prompt_cache.reading(context[:-1])
    (hidden,) = prompt_cache.encoding(context[-1:])
    return CausalReader(model, prompt_cache, hidden)
