"""Patterns over a tokenizer's vocabulary: text, digits, the end of an answer."""

from collections import defaultdict
from functools import cached_property

from ..diffusion.automaton import Alternation, Characters, Concat, Exactly, Pattern, Repeat, Tokens
from ..errors import Error
from ..model.diffusion_gemma import DiffusionGemma
from .tokenizer import Tokenizer

# No token of a common vocabulary is longer, but for runs of spaces and rulers.
LONGEST_TOKEN = 24

# Characters up to which the length of a string is counted exactly.
COUNTED = 512

# Characters of a given text that an error repeats.
SHOWN = 60


class VocabularyError(Error):
    """A tokenizer that lacks what a constraint needs."""


class Vocabulary:
    """What a model's tokens can spell. Only tokens of whole characters are used, see
    `Tokenizer.plain`; what is given is encoded as it stands."""

    def __init__(self, model: DiffusionGemma, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.size = model.config.vocab_size
        # Ends what the model writes; the canvas behind it is filled with the first end token,
        # as in training.
        ends = model.generation.eos_token_ids
        turn = tokenizer.token_id("<turn|>")
        self.end = turn if turn in ends else ends[0]
        self.fill = ends[0]
        self._without: dict[str, Tokens] = {}
        self._plain = {i: t for i, t in tokenizer.plain.items() if i < self.size and i not in ends}

    def literal(self, text: str) -> Exactly:
        """Spell this text in the tokens that the tokenizer makes of it.

        Raises:
            VocabularyError: those tokens do not read as this text.
        """
        ids = self.tokenizer.encode(text)
        if self.tokenizer.decode(ids) != text:
            shown = text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
            raise VocabularyError(f"this tokenizer cannot spell {shown!r}")
        return Exactly(tuple(ids))

    @cached_property
    def anything(self) -> Tokens:
        """Any token whatever."""
        return Tokens(tuple(range(self.size)))

    def text_without(self, characters: str) -> Tokens:
        """Match a token of ordinary text that has none of these characters."""
        if characters not in self._without:
            ids = (i for i, t in self._plain.items() if not set(characters) & set(t))
            self._without[characters] = Tokens(tuple(ids))
        return self._without[characters]

    def words_without(self, characters: str) -> Tokens:
        """Match those of `text_without` that are one space and then something else."""
        ids = self.text_without(characters).ids
        words = ((i, self._plain[i]) for i in ids)
        return Tokens(tuple(i for i, t in words if len(t) > 1 and t[0] == " " and t[1] != " "))

    @cached_property
    def words_begin_with_spaces(self) -> bool:
        """Whether any token does; in a vocabulary of single characters no word has its space."""
        return bool(self.words_without("").ids)

    def character(self, characters: str) -> Tokens:
        """Match a token that is exactly one of these characters.

        Raises:
            VocabularyError: the vocabulary has none of them.
        """
        ids = tuple(i for c in characters for i in self._single.get(c, ()))
        if not ids:
            raise VocabularyError(f"no token of this vocabulary is one of {characters!r}")
        return Tokens(tuple(sorted(ids)))

    @cached_property
    def _single(self) -> dict[str, list[int]]:
        single: dict[str, list[int]] = defaultdict(list)
        for i, text in self._plain.items():
            if len(text) == 1:
                single[text].append(i)
        return single

    def json_characters(self, least: int, most: int | None) -> Pattern:
        """Match the inside of a JSON string of `least` to `most` characters, without escapes."""
        if most is not None and most > COUNTED and least <= most // LONGEST_TOKEN:
            # So long a string is bounded by its tokens, which needs fewer states than characters.
            return Repeat(self._json_any, least, most // LONGEST_TOKEN)
        return Characters(self._json_by_length, least, most)

    @cached_property
    def _json_any(self) -> Tokens:
        return Tokens(tuple(sorted(i for ids in self._json_by_length.values() for i in ids)))

    @cached_property
    def _json_by_length(self) -> dict[int, tuple[int, ...]]:
        lengths: dict[int, list[int]] = defaultdict(list)
        for i, text in self._plain.items():
            fits = len(text) <= LONGEST_TOKEN
            if fits and not any(c in '"\\' or ord(c) < 32 or c == "\x7f" for c in text):
                lengths[len(text)].append(i)
        return {n: tuple(ids) for n, ids in sorted(lengths.items())}

    def digits(self, first: str, count: int) -> Pattern:
        """Match `count` digits, the first one of `first`."""
        rest = self.character("0123456789")
        return Concat((self.character(first), *[rest] * (count - 1)))

    def ending(self, length: int) -> list[int]:
        """Return the end token and the fill behind it, `length` tokens in all."""
        return [self.end, *[self.fill] * (length - 1)]

    def answer(self, pattern: Pattern) -> Pattern:
        """Match the pattern, then the end token and the fill behind it."""
        return Concat((pattern, Exactly((self.end,)), Repeat(Tokens((self.fill,)))))


def integer(vocabulary: Vocabulary, tokens: int) -> Pattern:
    """Match a whole number of `tokens` tokens, sign included, without leading zeros."""
    if tokens == 1:
        return vocabulary.digits("0123456789", 1)
    positive = vocabulary.digits("123456789", tokens)
    minus = vocabulary.character("-")
    return Alternation((positive, Concat((minus, vocabulary.digits("123456789", tokens - 1)))))
