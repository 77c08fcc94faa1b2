"""Log-probabilities of a given text, token by token: the encoder reads it, and nothing is sampled.

The encoder is the model's weights read causally; it was trained with a next-token loss beside the
denoiser's. Its hidden state at a token says what comes next. So one pass over prompt and text, as
when a prompt is read, gives the log-probability of each token of the text behind all before it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..arguments import token_ids, whole_number
from ..diffusion.decoding import Decoding
from ..diffusion.head import read_causally
from ..diffusion.prompt_cache import PREFILL_CHUNK, ContextError, PromptCache, Reading
from ..model.diffusion_gemma import DiffusionGemma
from ..text.tokenizer import Tokenizer, TooLong, no_check
from ..text.vocabulary import Vocabulary
from .request import MOST_TOP, Prompt, encode_prompt, stream


@dataclass(frozen=True)
class ScoreResult:
    """What the encoder says of a text; log-probabilities are in nats.

    Attributes:
        tokens: ids of the text.
        pieces: the text of each token; part of a character is U+FFFD.
        log_probabilities: of each token, behind the prompt and the tokens before it.
        top: of each place, the likeliest ids with their log-probabilities, the best first.
        following: as an entry of `top`, of the place behind the text.
    """

    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    log_probabilities: tuple[float, ...]
    top: tuple[tuple[tuple[int, float], ...], ...]
    following: tuple[tuple[int, float], ...]

    @property
    def total(self) -> float:
        """The log-probability of the whole text."""
        return math.fsum(self.log_probabilities)

    @property
    def mean(self) -> float:
        """The mean log-probability of a token."""
        return self.total / len(self.tokens)

    @property
    def least(self) -> float:
        """The log-probability of the token that is doubted most."""
        return min(self.log_probabilities)

    @property
    def perplexity(self) -> float:
        """exp(-mean); infinite where that is beyond a float."""
        try:
            return math.exp(-self.mean)
        except OverflowError:
            return math.inf

    @property
    def greedy(self) -> bool:
        """Whether no token is likelier than the one that stands at its place."""
        return all(
            chance >= best[0][1]  # of equal ones, the head's rounded product may name another
            for chance, best in zip(self.log_probabilities, self.top, strict=True)
        )


@dataclass(frozen=True)
class ScoreRequest:
    """A text that is to be read, see `score`."""

    prompt: Prompt | None
    text: str | Sequence[int]
    top: int = 1
    prefill_chunk: int = PREFILL_CHUNK

    def prepare(
        self,
        model: DiffusionGemma,
        vocabulary: Vocabulary,
        check: Callable[[], None] = no_check,
    ) -> "Reader":
        """Encode prompt and text, see `request.Task`.

        Raises:
            ContextError: the prompt or the text is empty, or they do not fit together; or there is
                no prompt and no token that begins texts.
            SettingError: an id is not in the vocabulary, or a number is out of range.
            TokenizerError: the chat template refuses the messages.
        """
        size, most = model.config.vocab_size, model.context
        whole_number("top", self.top, 1, min(MOST_TOP, size))
        whole_number("prefill_chunk", self.prefill_chunk, 1)
        tokenizer = vocabulary.tokenizer
        prompt = (
            [_beginning(tokenizer)]
            if self.prompt is None
            else encode_prompt(tokenizer, self.prompt, sight=model.sight, most=most, check=check)
        )
        text = self.text
        if isinstance(text, str):
            try:
                text = tokenizer.encode_within(text, most, "the text", check)
            except TooLong as error:
                raise ContextError(f"{error}, and no more fits into the context") from None
        prompt, ids = token_ids(prompt, size), token_ids(text, size)
        for name, tokens in (("prompt", prompt), ("text", ids)):
            if not tokens:
                raise ContextError(f"the {name} is empty")
        if len(prompt) + len(ids) > most:
            raise ContextError(
                f"the prompt has {len(prompt):,} tokens and the text {len(ids):,}, together more "
                f"than the context of {most:,}"
            )
        check()
        pieces = tuple(tokenizer.pieces(ids))
        return Reader(model, prompt, ids, pieces, self.top, self.prefill_chunk)


def _beginning(tokenizer: Tokenizer) -> int:
    """The token behind which a text stands that has no prompt."""
    bos = tokenizer.token_id("<bos>")
    if bos is None:
        raise ContextError("this tokenizer has no token that begins texts: a prompt is needed")
    return bos


@dataclass(frozen=True, eq=False)
class Reader:
    """A text that is ready to be read, see `request.Prepared`."""

    model: DiffusionGemma
    prompt: list[int]
    text: list[int]
    pieces: tuple[str, ...]
    top: int
    prefill_chunk: int

    def run(self, prompt_cache: PromptCache) -> Decoding[Reading | ScoreResult, None]:
        """What the encoder says of the text, which is the last item."""
        yield from prompt_cache.reading(self.prompt[:-1], self.prefill_chunk)
        # The last token of the prompt is read with the text: it says what begins that.
        read, asked = [self.prompt[-1], *self.text], [*self.text, 0]  # behind it, any token
        found: list[float] = []
        top: list[tuple[tuple[int, float], ...]] = []
        # No more at once than a prompt is read in: the head holds some arrays a position.
        for hidden in prompt_cache.encoding(read, min(self.prefill_chunk, PREFILL_CHUNK)):
            some = asked[len(found) : len(found) + hidden.shape[1]]
            seen = read_causally(self.model, hidden, mx.array([some]), self.top)
            found += np.array(seen.log_probability)[0].tolist()
            ids, chances = np.array(seen.top)[0], np.array(seen.top_log_probability)[0]
            pairs = zip(ids.tolist(), chances.tolist(), strict=True)
            top += [tuple(zip(*pair, strict=True)) for pair in pairs]
            if len(found) < len(read):
                yield Reading(len(prompt_cache), len(self.prompt) + len(self.text))
        yield ScoreResult(
            tuple(self.text),
            self.pieces,
            tuple(found[:-1]),
            tuple(top[:-1]),
            top[-1],
        )


def score(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    prompt: Prompt | None,
    text: str | Sequence[int],
    *,
    top: int = 1,
    prefill_chunk: int = PREFILL_CHUNK,
    prompt_cache: PromptCache | None = None,
) -> ScoreResult:
    """How likely a text is behind a prompt, token by token, by the encoder in one pass.

    Args:
        model: as `load` gives it.
        tokenizer: the same checkpoint's.
        prompt: as in `stream_generate`: the text then is the answer. None is no prompt: the text
            is read as it stands, behind the token that begins texts.
        text: as text, in which special tokens are recognised, or as ids. To ask for the end of an
            answer as well, write its end token behind it.
        top: likeliest tokens told of each place.
        prefill_chunk: tokens encoded at once; bounds memory, not the result.
        prompt_cache: what the model has read before; of the prompt only what is new is encoded.

    Raises:
        Error: as `ScoreRequest.prepare`, before anything is computed.
    """
    request = ScoreRequest(prompt, text, top, prefill_chunk)
    items: Iterator[Reading | ScoreResult] = stream(model, tokenizer, request, prompt_cache)
    (found,) = (item for item in items if isinstance(item, ScoreResult))
    return found
