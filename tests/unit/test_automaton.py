"""Patterns against a slow, obviously right reading of them, on hand-made and random cases."""

import itertools
import time
import tracemalloc
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow import best_canvas

from mlx_diffgemma.diffusion.automaton import (
    Alternation,
    Characters,
    Concat,
    Deadline,
    Exactly,
    Graph,
    Machine,
    Pattern,
    PatternError,
    PatternTimeout,
    Repeat,
    Tokens,
    compile_pattern,
)
from mlx_diffgemma.diffusion.plans import Plans

VOCAB = 6
PAD = 5  # fills what follows a pattern, as <eos> fills a canvas
LEAVES = st.one_of(
    st.sets(st.integers(0, 4), min_size=1, max_size=3).map(lambda s: Tokens(tuple(sorted(s)))),
    st.lists(st.integers(0, 4), max_size=2).map(lambda ids: Exactly(tuple(ids))),
    st.tuples(st.integers(0, 2), st.integers(0, 2)).map(
        lambda n: Characters({1: (0, 1), 2: (2,)}, n[0], n[0] + n[1])
    ),
    st.just(Characters({1: (0,), 3: (4,)}, 1, None)),
)
PATTERNS: st.SearchStrategy[Pattern] = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda parts: Concat(tuple(parts))),
        st.lists(inner, min_size=1, max_size=3).map(lambda options: Alternation(tuple(options))),
        st.tuples(inner, st.integers(0, 2), st.sampled_from([0, 1, None])).map(
            lambda r: Repeat(r[0], r[1], None if r[2] is None else r[1] + r[2])
        ),
    ),
    max_leaves=5,
)


def matches(pattern: Pattern, tokens: tuple[int, ...]) -> set[int]:
    """How many tokens from the front the pattern can take: backtracking, word by word."""
    match pattern:
        case Tokens(ids):
            return {1} if tokens and tokens[0] in ids else set()
        case Exactly(ids):
            return {len(ids)} if tokens[: len(ids)] == ids else set()
        case Characters(by_length, least, most):
            found = set()
            chars = 0
            for taken, token in enumerate((*tokens, None)):
                if chars >= least and (most is None or chars <= most):
                    found.add(taken)
                length = next((n for n, ids in by_length.items() if token in ids), None)
                if length is None:
                    break
                chars += length
            return found
        case Concat(parts):
            ends = {0}
            for part in parts:
                ends = {e + n for e in ends for n in matches(part, tokens[e:])}
            return ends
        case Alternation(options):
            return set().union(*(matches(option, tokens) for option in options))
        case Repeat(part, least, most):
            ends, found = {0}, set()
            for count in itertools.count():
                if count >= least:
                    if most is None and ends <= found:
                        return found
                    found |= ends
                if count == most or not ends or count > least + len(tokens) + 1:
                    return found
                ends = {e + n for e in ends for n in matches(part, tokens[e:])}
    raise TypeError(pattern)


def canvases(length: int) -> Iterator[tuple[int, ...]]:
    return itertools.product(range(VOCAB), repeat=length)


def padded(pattern: Pattern) -> Concat:
    return Concat((pattern, Repeat(Tokens((PAD,)))))


def allowed_slowly(pattern: Pattern, length: int) -> set[tuple[int, ...]]:
    return {t for t in canvases(length) if length in matches(padded(pattern), t)}


@settings(max_examples=150, deadline=None)
@given(PATTERNS, st.integers(1, 4), st.integers(0, 2**31))
def test_the_chosen_canvas_is_the_best_allowed_one(
    pattern: Pattern, length: int, seed: int
) -> None:
    machine = compile_pattern(padded(pattern))
    expected = allowed_slowly(pattern, length)
    try:
        plans = Plans([machine.plan(length, length)], VOCAB)
    except PatternError:
        assert not expected
        return
    logits = mx.random.normal((1, length, VOCAB), key=mx.random.key(seed))
    chosen = tuple(best_canvas(plans, logits)[0].tolist())
    best = max(expected, key=lambda t: sum(np.array(logits)[0, i, x] for i, x in enumerate(t)))
    assert chosen == best
    # The mask leaves exactly the tokens that some allowed canvas has at a position.
    open_to = np.array(plans.allowed(0, VOCAB, mx.arange(length)))[0]
    for i in range(length):
        assert set(np.flatnonzero(open_to[i]).tolist()) == {t[i] for t in expected}
    assert machine.accepts(chosen)
    for tokens in itertools.islice(canvases(length), 0, None, 7):
        assert machine.accepts(tokens) == (tokens in expected)


def test_a_pattern_goes_on_in_the_next_canvas_and_ends_within_the_budget() -> None:
    machine: Machine = compile_pattern(padded(Concat((Repeat(Tokens((0, 1))), Exactly((3,))))))
    states = frozenset([machine.first])
    written: list[int] = []
    longing = mx.array([[[0.0, 9.0, 0.0, -9.0, 0.0, 0.0]] * 3])  # never wants to end
    for _ in range(3):
        plan = machine.plan(3, 8 - len(written), states)
        canvas = best_canvas(Plans([plan], VOCAB), longing)[0].tolist()
        states = machine.advance(states, canvas)
        written += canvas
    assert written == [1] * 7 + [3, PAD]
    with pytest.raises(PatternError, match="at least 4 tokens, more than 3"):
        compile_pattern(Exactly((1, 2, 3, 4))).plan(3, 3)


def test_rows_have_their_own_patterns_and_forced_tokens_are_known() -> None:
    first = compile_pattern(padded(Concat((Exactly((1,)), Tokens((0, 2))))))
    second = compile_pattern(padded(Alternation((Exactly((3, 3)), Exactly((4,))))))
    plans = [machine.plan(3, 3) for machine in (first, second)]
    assert plans[0].forced() == [1, None, PAD]
    assert plans[1].forced() == [None, None, PAD]
    logits = mx.zeros((2, 3, VOCAB)) + mx.array([0.0, 0, 2, 0, 1, 0])
    assert best_canvas(Plans(plans, VOCAB), logits).tolist() == [[1, 2, PAD], [4, PAD, PAD]]


def test_a_pattern_too_large_is_refused() -> None:
    with pytest.raises(PatternError, match=r"more than 200,000 (edges|states)"):
        compile_pattern(Repeat(Repeat(Tokens((1,)), 0, 1000), 0, 1000))


def test_a_pattern_is_given_up_at_its_deadline() -> None:
    """However long a pattern took, it was compiled to its end."""
    slow = Repeat(Alternation((Exactly((1, 2)), Repeat(Tokens((1,)), 0, 50))), 0, 500)
    with pytest.raises(PatternTimeout, match="took longer than 3 seconds"):
        compile_pattern(slow, Deadline(3, time.monotonic() - 1))
    with pytest.raises(PatternTimeout):
        slow.build(Graph(deadline=Deadline(3, time.monotonic() - 1)), 0)
    began = time.monotonic()
    with pytest.raises(PatternTimeout, match="took longer than 0 seconds"):
        compile_pattern(slow, Deadline.within(10, began))
    assert compile_pattern(Exactly((1, 2)), Deadline.within(60, began + 60)).shortest == 2


def test_a_path_through_the_largest_automaton_takes_no_memory_for_what_it_cannot_reach() -> None:
    """It held a number for each position and state: gigabytes, and a second a step."""
    machine = compile_pattern(
        padded(Alternation(tuple(Exactly((i % 5,) * 900) for i in range(200))))
    )
    assert machine.states > 170_000
    plan = machine.plan(128, 1000)
    scores = np.zeros((128, len(machine.sets)))
    wanted = machine.readable(3).index(True)
    scores[:, wanted] = 1.0
    tracemalloc.start()
    assert plan.best_path(scores) == [wanted] * 128
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20
