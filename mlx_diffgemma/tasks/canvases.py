"""Canvas after canvas, in ids: attempts at each, what is committed, what the encoder keeps."""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx
import numpy as np

from ..diffusion.causal import CausalReader, Sampling
from ..diffusion.constraints import Constraint
from ..diffusion.decoding import Decoding, drive
from ..diffusion.denoise import DenoisingState
from ..diffusion.draws import Draws, PlaceDraws
from ..diffusion.guards import Candidate, Commit, FinishReason, Guard, Judge, Retry, trust
from ..diffusion.prompt_cache import PREFILL_CHUNK, PromptCache, Reading, remaining_context
from ..model.diffusion_gemma import DiffusionGemma
from ..model.settings import GenerationConfig
from .modes import DENOISE, Way, attempt
from .speculation import Drafter
from .starts import CanvasStart, Noise
from .writing import Read, Writer, Written


@dataclass(frozen=True)
class Encoded:
    """The prompt has been read; `tokens` of it were new to the context."""

    tokens: int


@dataclass(frozen=True)
class Committed:
    """A canvas is final: its tokens, why it was the last, and the guard that changed it."""

    tokens: tuple[int, ...]
    finish_reason: FinishReason | None
    guard: Guard | None = None


@dataclass(frozen=True)
class Weighed:
    """The encoder has read what was committed: log-probabilities, each behind all before it."""

    log_probabilities: tuple[float, ...]


# What canvas after canvas tells.
Told = Reading | Encoded | DenoisingState | Read | Retry | Committed | Weighed


def generate_tokens(
    model: DiffusionGemma,
    prompt: Sequence[int],
    config: GenerationConfig,
    draws: Draws,
    prefill_chunk: int = PREFILL_CHUNK,
    start: CanvasStart | None = None,
) -> Generator[Told, None, None]:
    """Canvas after canvas: a state a step, then what is committed. Nothing runs ahead.

    Raises:
        ContextError: the prompt is empty or too long; before any computation.
    """
    start = start or Noise(model.config.canvas_length)
    cache = PromptCache(model)
    return drive(
        model, decode_tokens(model, prompt, config, draws, prefill_chunk, start, cache, trust)
    )


def decode_tokens(
    model: DiffusionGemma,
    prompt: Sequence[int],
    config: GenerationConfig,
    draws: Draws,
    prefill_chunk: int,
    start: CanvasStart,
    prompt_cache: PromptCache,
    judge: Judge,
    ended: Callable[[], bool] = lambda: False,
    likelihood: bool = False,
    way: Way = DENOISE,
    top: int = 0,
) -> Decoding[Told, None]:
    """Canvas after canvas: a state a step, then what is committed.

    `judge` says what becomes of a canvas; `ended`, once it is committed, whether the text is
    complete. The last canvas is not encoded, a next prompt reads it; but with `likelihood` it is,
    and each canvas is `Weighed`. In other modes than "denoise" a canvas is what is written next.
    """
    remaining = remaining_context(model, prompt)
    length = model.config.canvas_length if way.mode == "denoise" else 1
    budget = config.max_new_tokens
    # The prompt's last token is encoded apart where its hidden state is wanted.
    causal = likelihood or way.causal
    apart = len(prompt) - causal
    new = len(prompt) - prompt_cache.shared(prompt[:apart])
    yield from prompt_cache.reading(prompt[:apart], prefill_chunk)
    reader: CausalReader | None = None
    sampling = _sampling(model, draws, way)
    if causal:
        (hidden,) = prompt_cache.encoding(prompt[apart:])
        reader = CausalReader(model, prompt_cache, hidden, prefill_chunk, sampling)
    yield Encoded(new)
    canvas_draws = draws if sampling is None else sampling.draws.others
    writer = Writer(model, prompt_cache.cache, config, canvas_draws, start, start.places(), top)
    drafter = Drafter(config.speculation, way.acceptance or "exact")
    write = partial(attempt, writer, reader, drafter, way)
    generated: list[int] = []
    while True:
        written = partial(write, generated, room=min(budget, remaining))
        verdict, converged = yield from _judged(written, judge, generated, config, budget)
        tokens = verdict.tokens[:budget]
        budget -= len(tokens)
        remaining -= len(tokens)
        spent = not budget or remaining < length
        reason = _reason(verdict, tokens, config, spent, converged)
        yield Committed(tokens, reason, verdict.guard)
        if way.mode != "causal":  # whose every token is one
            mx.clear_cache()
        complete = reason is not None or ended()
        if reader is not None:
            yield from _weighed(reader, tokens, complete, likelihood)
        elif not complete:
            prompt_cache.extend(tokens, prefill_chunk)
            yield Read(len(tokens))
        if complete:
            return
        generated += tokens


def _judged(
    write: Callable[[Constraint | None], Written],
    judge: Judge,
    generated: Sequence[int],
    config: GenerationConfig,
    budget: int,
) -> Decoding[DenoisingState | Read | Retry, tuple[Commit, bool]]:
    """Attempts at a canvas until one is committed; and whether the last of them has converged.

    The last state that is told is the one that is committed.
    """
    attempts: list[Candidate] = []
    states: list[DenoisingState] = []
    forbidden: Constraint | None = None
    while True:
        states.append((yield from write(forbidden)))
        attempts.append(_candidate(states[-1], config, budget))
        verdict = judge(generated, attempts)
        if isinstance(verdict, Commit):
            break
        forbidden = verdict.constraint
        yield verdict
    if (taken := _taken(verdict.tokens, attempts)) < len(attempts) - 1:
        yield replace(states[taken], decoded=0)  # which was counted
    return verdict, attempts[-1].converged


def _weighed(
    reader: CausalReader, tokens: Sequence[int], complete: bool, likelihood: bool
) -> Iterator[Weighed | Read]:
    """Have the encoder keep what is committed, and say how likely that is where it is asked for."""
    encoded = 0
    if likelihood:
        encoded = reader.read(tokens)
        yield Weighed(reader.log_probabilities())
    if complete:
        reader.take_back(tokens)
    else:
        encoded += reader.keep(tokens)
    if encoded:
        yield Read(encoded)


def _sampling(model: DiffusionGemma, draws: Draws, way: Way) -> Sampling | None:
    """How the encoder draws its tokens; None where it takes the best."""
    if not way.temperature:
        return None
    return Sampling(way.temperature, PlaceDraws(draws, model.config.vocab_size))


def _reason(
    verdict: Commit, tokens: Sequence[int], config: GenerationConfig, spent: bool, converged: bool
) -> FinishReason | None:
    """Why the answer is over with these tokens; None: it goes on. `spent` is what it may take."""
    if verdict.finish_reason is not None:
        return verdict.finish_reason
    ends = tokens[-1] in config.eos_token_ids
    if not ends and not spent:
        return None
    if not converged:
        return "not_converged"
    return "stop" if ends else "length"


def _taken(tokens: Sequence[int], attempts: Sequence[Candidate]) -> int:
    """The number of the newest attempt that these tokens are of; what belongs to none is the
    last's, with a token that a guard has put."""
    last = len(attempts) - 1
    of = (i for i in range(last, -1, -1) if attempts[i].tokens[: len(tokens)] == tuple(tokens))
    return next(of, last)


def _candidate(state: DenoisingState, config: GenerationConfig, budget: int) -> Candidate:
    """The first row of a finished canvas, up to its end token or the budget."""
    tokens: list[int] = np.array(state.argmax)[0].tolist()
    ends = [i + 1 for i, token in enumerate(tokens) if token in config.eos_token_ids]
    kept = min([*ends[:1], budget, len(tokens)])
    entropies: list[float] = np.array(state.entropy)[0].tolist()
    converged = bool(np.array(state.converged)[0])
    return Candidate(tuple(tokens[:kept]), tuple(entropies[:kept]), converged)
