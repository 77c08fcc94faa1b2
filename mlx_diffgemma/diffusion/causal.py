"""What the encoder says of an answer that follows a prompt cache, token by token.

The encoder is the model's weights read causally. What it reads is cached, and can be taken back:
a canvas that is doubted is not committed, and of a draft only what agrees is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from ..model.diffusion_gemma import DiffusionGemma
from .constraints import Constraint
from .denoise import DenoisingState
from .draws import PlaceDraws
from .head import log_probability, read_causally, read_out
from .prompt_cache import PREFILL_CHUNK, PromptCache


@dataclass(frozen=True)
class Following:
    """The encoder's choice at each place, with its probability and the entropy (nats) there, and
    the probability of what was `read` there. All are of what is allowed, at the temperature at
    which the encoder draws; of one that takes the best, at 1."""

    tokens: tuple[int, ...]
    probabilities: tuple[float, ...]
    entropies: tuple[float, ...]
    read: tuple[float, ...] = ()


@dataclass(frozen=True)
class Sampling:
    """Has the encoder draw its tokens, instead of taking the best."""

    temperature: float
    draws: PlaceDraws


@dataclass(frozen=True)
class Doubts:
    """Of tokens that were read: log-probabilities (nats), and the likeliest ones with theirs."""

    log_probabilities: tuple[float, ...]
    choices: tuple[int, ...]
    preferred: tuple[float, ...]


class CausalReader:
    """Reads an answer behind what a prompt cache holds, and keeps of it what is committed.

    `hidden` (1, 1, hidden) is the state of the last token that the cache holds. Without `sampling`
    the encoder's choice is its best token.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        prompt_cache: PromptCache,
        hidden: mx.array,
        chunk: int = PREFILL_CHUNK,
        sampling: Sampling | None = None,
    ):
        self._model = model
        self._prompt_cache = prompt_cache
        self._chunk = chunk
        self._sampling = sampling
        self._kept = 0  # tokens of the answer
        self._mark = prompt_cache.mark()
        self._tokens: tuple[int, ...] = ()  # read behind the mark
        self._states = hidden  # of the token before them, and theirs

    def read(self, tokens: Sequence[int]) -> int:
        """Read these tokens behind what is kept; answers how many had to be encoded."""
        agreed = self.take_back(tokens)
        if len(tokens) > agreed:
            found = list(self._prompt_cache.encoding(tokens[agreed:], self._chunk))
            self._states = mx.concatenate([self._states, *found], axis=1)
            self._tokens = tuple(tokens)
        return len(tokens) - agreed

    def take_back(self, tokens: Sequence[int] = ()) -> int:
        """Hold nothing behind what is kept but what these tokens agree with; says how many do."""
        pairs = zip(self._tokens, tokens, strict=False)
        agreed = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if agreed is None:
            agreed = min(len(self._tokens), len(tokens))
        if agreed < len(self._tokens):
            self._prompt_cache.trim(self._mark, self._mark.length + agreed, self._chunk)
            self._tokens, self._states = self._tokens[:agreed], self._states[:, : agreed + 1]
        return agreed

    def keep(self, tokens: Sequence[int]) -> int:
        """Read these tokens, and keep them; answers how many had to be encoded."""
        encoded = self.read(tokens)
        self._mark = self._prompt_cache.mark()
        self._kept += len(tokens)
        self._tokens, self._states = (), self._states[:, -1:]
        return encoded

    def log_probabilities(self) -> tuple[float, ...]:
        """Of each token that has been read, behind all before it."""
        if not self._tokens:
            return ()
        seen = read_causally(self._model, self._states[:, :-1], mx.array([self._tokens]))
        (found,) = self._model.part.share.agreed([seen.log_probability])
        return tuple(np.array(found)[0].tolist())

    def doubts(self, first: int = 0) -> Doubts:
        """What the encoder says of each token that has been read, from a place on."""
        if first >= len(self._tokens):
            return Doubts((), (), ())
        asked = mx.array([self._tokens[first:]])
        seen = read_causally(self._model, self._states[:, first:-1], asked)
        told = (seen.log_probability, seen.top[..., 0], seen.top_log_probability[..., 0])
        found = self._model.part.share.agreed(told)
        mx.eval(*found)
        chances, choices, preferred = (tuple(np.array(each)[0].tolist()) for each in found)
        return Doubts(chances, choices, preferred)

    def following(self, constraint: Constraint, first: int, count: int) -> Following:
        """The encoder's choice at places behind what is kept, `count` of them from `first` on."""
        states, sampling = self._states[:, first : first + count], self._sampling
        temperature, categorical = 1.0, None
        if sampling is not None:
            temperature = sampling.temperature
            categorical = sampling.draws.at(self._kept + first, count)
        seen = read_out(self._model, states, temperature, constraint, categorical=categorical)
        chosen = seen.choices.tokens[..., 0] if seen.sampled is None else seen.sampled
        read = self._tokens[first : first + count]
        there = mx.array([[*read, *[0] * (count - len(read))]], dtype=mx.int32)
        chances, found = (
            mx.exp(log_probability(self._model, states, ids, temperature, seen))
            for ids in (chosen, there)
        )
        told = self._model.part.share.agreed([chosen, chances, seen.entropy, found])
        mx.eval(*told)
        numbers = [np.array(each)[0].tolist() for each in told]
        tokens, probabilities, entropies, behind = map(tuple, numbers)
        return Following(tokens, probabilities, entropies, behind[: len(read)])


def written(tokens: Sequence[int], following: Following | None = None) -> DenoisingState:
    """Tokens as a canvas that nothing has denoised, certain where nothing is known of them."""
    canvas = mx.array([list(tokens)], dtype=mx.int32)
    zeros, everywhere = mx.zeros(canvas.shape), mx.ones(canvas.shape, dtype=mx.bool_)
    return DenoisingState(
        step=1,
        canvas=canvas,
        argmax=canvas,
        accepted=everywhere,
        entropy=zeros if following is None else mx.array([following.entropies]),
        probability=zeros + 1 if following is None else mx.array([following.probabilities]),
        converged=mx.array([True]),
        settled=~everywhere,
        decoded=0,
    )


def front(state: DenoisingState, count: int) -> DenoisingState:
    """The first tokens of a canvas, which the encoder has accepted, as one of their own."""
    return replace(
        state,
        canvas=state.canvas[:, :count],
        argmax=state.argmax[:, :count],
        accepted=state.accepted[:, :count],
        entropy=state.entropy[:, :count],
        probability=state.probability[:, :count],
        settled=state.settled[:, :count],
        converged=mx.array([True]),
    )
