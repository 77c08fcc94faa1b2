"""Guards: what a diffusion model does wrong now and then, seen at a finished canvas.

They judge tokens and know no text; where sentences end is told to them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from .constraints import Constraint, ForbidFirst

FinishReason = Literal["stop", "length", "not_converged", "repetition"]

Guard = Literal["empty", "not_converged", "repetition", "thinking_budget"]

# Nats a token that a sentence may have on average and still count as certain: what the entropy
# bound lets all tokens of a step have together.
CERTAIN = 0.1

# Tokens of a run, and how often its shortest part must come, before it counts as repetition.
RUN_TOKENS = 48

RUN_TIMES = 4

LONGEST_PERIOD = 64


@dataclass(frozen=True)
class Guards:
    """Which guards are on.

    Attributes:
        empty: an answer that would be empty is tried again, with no end token at its front.
        not_converged: a canvas that used all its steps is tried once more with other noise, then
            kept up to its last certain sentence. Off while fewer steps are allowed than the
            checkpoint's: there, such a canvas is what was asked for.
        repetition: an answer that goes round in circles ends.
        thinking_budget: most tokens of thought, after which the answer has to begin; None is no
            limit, except that a turn does not end inside a thought.
    """

    empty: bool = True
    not_converged: bool = True
    repetition: bool = True
    thinking_budget: int | None = None


OFF = Guards(empty=False, not_converged=False, repetition=False)


@dataclass(frozen=True)
class Candidate:
    """A finished canvas: tokens up to the end token or budget, and their entropies in nats."""

    tokens: tuple[int, ...]
    entropies: tuple[float, ...]
    converged: bool


@dataclass(frozen=True)
class Retry:
    """Denoise this canvas once more, with other noise and under this constraint."""

    guard: Guard
    constraint: Constraint | None = None


@dataclass(frozen=True)
class Commit:
    """Commit these tokens; a finish reason ends the answer. `guard` says who changed them."""

    tokens: tuple[int, ...]
    finish_reason: FinishReason | None = None
    guard: Guard | None = None


# What becomes of a canvas, by the tokens before it and all attempts at it, the newest last.
Judge = Callable[[Sequence[int], Sequence[Candidate]], Retry | Commit]


def trust(generated: Sequence[int], attempts: Sequence[Candidate]) -> Commit:
    """Commit what comes, as the reference does."""
    return Commit(attempts[-1].tokens)


@dataclass(frozen=True)
class Thinking:
    """The markers of a thought, and whether the prompt has opened one."""

    opens: int
    closes: int
    begun: bool

    def spent(self, tokens: Sequence[int]) -> list[int]:
        """Positions that belong to a thought, its opening marker and header included."""
        inside, at, found = self.begun, 0, list[int]()
        while at < len(tokens):  # from marker to marker, as this is asked for again and again
            marker = self.closes if inside else self.opens
            end = tokens.index(marker, at) if marker in tokens[at:] else len(tokens)
            if inside:
                found += range(at, end)
            inside, at = not inside, end + inside  # an opening marker is part of it
        return found

    def open_after(self, tokens: Sequence[int]) -> bool:
        """Tell whether the tokens end inside a thought."""
        for token in reversed(tokens):
            if token in (self.opens, self.closes):
                return token == self.opens
        return self.begun


def judge_by(
    guards: Guards,
    ends: frozenset[int],
    sentences: Callable[[Sequence[int]], Sequence[int]],
    thinking: Thinking | None,
) -> Judge:
    """The judge that applies guards.

    Args:
        guards: which are on.
        ends: the tokens that end an answer.
        sentences: lengths of the given tokens at which a sentence is complete.
        thinking: None where the model has no thoughts.
    """

    def judge(generated: Sequence[int], attempts: Sequence[Candidate]) -> Retry | Commit:
        now = attempts[-1]
        silent = not generated or (thinking is not None and generated[-1] == thinking.closes)
        if guards.empty and silent and len(attempts) == 1 and now.tokens[0] in ends:
            return Retry("empty", ForbidFirst(tuple(ends)))
        if guards.not_converged and not now.converged:
            if len(attempts) == 1:
                return Retry("not_converged")
            tokens = certain_part(min(attempts, key=mean_entropy), sentences)
            return Commit(tokens, "not_converged", "not_converged")
        if thinking is not None:
            cut = _thought_too_long(guards, generated, now.tokens, thinking, ends)
            if cut is not None:
                return Commit((*now.tokens[:cut], thinking.closes), guard="thinking_budget")
        if guards.repetition:
            before = list(generated[-RUN_TIMES * LONGEST_PERIOD :])
            kept = repeated_from([*before, *now.tokens], len(now.tokens))
            if kept is not None:  # what has been committed stays
                new = max(kept - len(before), 0)
                return Commit(now.tokens[:new], "repetition", "repetition")
        return Commit(now.tokens)

    return judge


def _thought_too_long(
    guards: Guards,
    generated: Sequence[int],
    tokens: Sequence[int],
    thinking: Thinking,
    ends: frozenset[int],
) -> int | None:
    """Count the new tokens to keep before the thought is closed; None: it need not be."""
    everything = [*generated, *tokens]
    budget = guards.thinking_budget
    if budget is not None and len(everything) > budget:
        spent = thinking.spent(everything)
        if len(spent) > budget and spent[budget] >= len(generated):
            return spent[budget] - len(generated)
    if tokens[-1] in ends and thinking.open_after(everything):
        return len(tokens) - 1
    return None


def mean_entropy(candidate: Candidate) -> float:
    """Mean entropy of a canvas."""
    return sum(candidate.entropies) / max(len(candidate.entropies), 1)


def certain_part(
    candidate: Candidate, sentences: Callable[[Sequence[int]], Sequence[int]]
) -> tuple[int, ...]:
    """The tokens up to the last sentence before the first one that is not certain."""
    kept = 0
    for end in sentences(candidate.tokens):
        entropies = candidate.entropies[kept:end]
        if sum(entropies) > CERTAIN * len(entropies):
            break
        kept = end
    return candidate.tokens[:kept]


def repeated_from(tokens: Sequence[int], new: int | None = None) -> int | None:
    """Find where what follows only repeats what stands before it; None if nothing does.

    A run counts when one part of at most `LONGEST_PERIOD` tokens comes `RUN_TIMES` times or more
    in it, over `RUN_TOKENS` or more. The answer keeps the part once. With `new` only runs count
    that reach their length in so many last tokens, which costs no more in a long answer.
    """
    first = 1 if new is None else len(tokens) - new + 1
    found: list[int] = []
    for period in range(1, LONGEST_PERIOD + 1):
        size = max(RUN_TOKENS, RUN_TIMES * period)
        for end in range(max(first, size), len(tokens) + 1):
            if tokens[end - 1] != tokens[end - 1 - period]:
                continue
            begin = end - size
            if tokens[begin + period : end] == tokens[begin : end - period]:
                found.append(begin + period)
                break
    return min(found, default=None)
