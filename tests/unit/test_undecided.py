"""Passes over some positions of a canvas, the rule that chooses them, and what it guarantees."""

import gc
import weakref
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import FIRST

from mlx_diffgemma import (
    DiffusionGemma,
    Done,
    Draft,
    EntropyBound,
    Request,
    SeededDraws,
    SettingError,
    Text,
    Tokenizer,
    edit,
    fill,
    load,
    stream_batch,
    stream_generate,
)
from mlx_diffgemma.diffusion import sampler as rules
from mlx_diffgemma.diffusion.automaton import Alternation, Repeat, Tokens, compile_pattern
from mlx_diffgemma.diffusion.constraints import ForbidFirst
from mlx_diffgemma.diffusion.decoding import drive
from mlx_diffgemma.diffusion.denoise import DenoisingState, Start, denoise
from mlx_diffgemma.diffusion.head import read_out
from mlx_diffgemma.diffusion.plans import Plans
from mlx_diffgemma.diffusion.prompt_cache import PromptCache, prefill
from mlx_diffgemma.diffusion.undecided import Known, Undecided
from mlx_diffgemma.model.cache import LayerCache
from mlx_diffgemma.model.diffusion_gemma import Pass
from mlx_diffgemma.model.settings import Settling
from mlx_diffgemma.tasks.request import encode_prompt
from mlx_diffgemma.tasks.starts import pinned_start

QUESTIONS = [
    "Record: Anna Berg from Norway",
    "What is the capital of Italy?",
    "Hello",
    "What is the currency of Japan?",
]


@pytest.fixture(scope="module")
def loaded() -> tuple[DiffusionGemma, Tokenizer]:
    """The first small model leaves more undecided after a step than the one that ships."""
    return load(FIRST / "tiny", speed="balanced")


def cache_of(model: DiffusionGemma, tokenizer: Tokenizer, question: str) -> list[LayerCache]:
    cache = model.make_cache()
    prefill(model, encode_prompt(tokenizer, question), cache)
    return cache


def states_of(
    model: DiffusionGemma, cache: list[LayerCache], seed: int, start: Start | None = None
) -> list[DenoisingState]:
    draws = SeededDraws(seed, model.config.vocab_size)
    return list(drive(model, denoise(model, cache, model.generation, draws, start)))


SMALL = load(FIRST / "tiny")

# Passes ------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.sets(st.integers(0, 63), min_size=1), st.booleans(), st.integers(0, 99))
def test_a_pass_over_some_gives_what_one_over_all_gives(
    some: set[int], empty: bool, seed: int
) -> None:
    """Nothing has changed, so the keys and values that stay are those that a full pass computes."""
    model, tokenizer = SMALL
    cache = model.make_cache() if empty else cache_of(model, tokenizer, QUESTIONS[0])
    draws = SeededDraws(seed, model.config.vocab_size)
    canvas = draws.tokens((1, 64))
    expected = model.embed(draws.tokens((1, 64)))
    whole = model.decode([Pass(canvas, cache, expected)])[0]
    at = mx.array(sorted(some))
    part = model.decode([Pass(canvas[:, at], cache, expected[:, at], at)])[0]
    assert mx.allclose(part, whole[:, at], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("changed", [1, 24, 63])
def test_the_others_keys_and_values_stay(changed: int) -> None:
    """The slow way: what stays is moved into the context, and the rest is a canvas behind it."""
    model, tokenizer = SMALL
    fast, slow = (cache_of(model, tokenizer, QUESTIONS[0]) for _ in range(2))
    draws = SeededDraws(0, model.config.vocab_size)
    first, second = draws.tokens((1, 64)), draws.tokens((1, changed))
    for cache in fast, slow:
        model.decode([Pass(first, cache)])
    at = mx.arange(64 - changed, 64)
    new = model.decode([Pass(second, fast, positions=at)])[0]
    for layer in slow:
        held = layer.size + 64 - changed
        assert layer._buffer is not None
        layer.set_state(layer.length + 64 - changed, layer._buffer[:, :, :held])
    right = model.decode([Pass(second, slow)])[0]
    assert mx.allclose(new, right, rtol=1e-3, atol=1e-4)
    # The buffer is written in place: the next pass over all finds nothing of it.
    again = model.decode([Pass(first, fast)])[0]
    fresh = model.decode([Pass(first, cache_of(model, tokenizer, QUESTIONS[0]))])[0]
    assert mx.allclose(again, fresh, rtol=1e-3, atol=1e-4)


def test_passes_of_any_sizes_are_decoded_together() -> None:
    """Rows of a batch had to be of one length: each was padded to the longest, or waited."""
    model, tokenizer = SMALL
    draws = SeededDraws(1, model.config.vocab_size)
    canvases = [draws.tokens((1, 64)) for _ in QUESTIONS]
    ats = [None, mx.array([3]), mx.arange(10, 33), None]

    def passes() -> list[Pass]:
        caches = [cache_of(model, tokenizer, question) for question in QUESTIONS]
        model.decode([Pass(canvas, cache) for canvas, cache in zip(canvases, caches, strict=True)])
        # And canvases side by side on one context, shorter than the others'.
        several = Pass(mx.concatenate(canvases)[:, :20], cache_of(model, tokenizer, "Hello"))
        return [
            *(
                Pass(canvas if at is None else canvas[:, at], cache, positions=at)
                for canvas, cache, at in zip(canvases, caches, ats, strict=True)
            ),
            several,
        ]

    alone = [model.decode([each])[0] for each in passes()]
    together = model.decode(passes())
    for one, other in zip(alone, together, strict=True):
        assert one.shape == other.shape
        assert mx.allclose(one, other, rtol=1e-3, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.sets(st.integers(0, 63), min_size=1), st.integers(0, 99))
def test_a_pass_gives_what_is_wanted_of_it(some: set[int], seed: int) -> None:
    """The last layer makes keys and values of the others, which later passes attend to."""
    model, tokenizer = SMALL
    draws = SeededDraws(seed, model.config.vocab_size)
    canvas, expected = draws.tokens((1, 64)), model.embed(draws.tokens((1, 64)))
    short, whole = (cache_of(model, tokenizer, QUESTIONS[0]) for _ in range(2))
    at = mx.array(sorted(some))
    all_of_it = model.decode([Pass(canvas, whole, expected)])[0]
    beside = Pass(draws.tokens((2, 20)), cache_of(model, tokenizer, "Hello"))
    alone = model.decode([beside])[0]
    for passes in (
        [Pass(canvas, short, expected, wanted=at)],
        [beside, Pass(canvas, short, expected, wanted=at)],
    ):
        *others, part = model.decode(passes)
        assert mx.allclose(part, all_of_it[:, at], rtol=1e-3, atol=1e-4)
        for other in others:
            assert mx.allclose(other, alone, rtol=1e-3, atol=1e-4)
        again = [model.decode([Pass(canvas[:, at], c, positions=at)])[0] for c in (short, whole)]
        assert mx.allclose(*again, rtol=1e-3, atol=1e-4)


def test_a_constraint_holds_at_the_positions_of_a_pass() -> None:
    model, tokenizer = SMALL
    cache = cache_of(model, tokenizer, QUESTIONS[0])
    canvas = SeededDraws(0, model.config.vocab_size).tokens((1, 64))
    hidden = model.decode([Pass(canvas, cache)])[0]
    best = int(read_out(model, hidden, 1.0).choices.tokens[0, 0, 0])
    for positions in ([0, 5, 9], [5, 0, 9]):
        at = mx.array(positions)
        seen = read_out(model, hidden[:, at], 1.0, ForbidFirst((best,)), positions=at)
        where = positions.index(0)
        assert int(seen.choices.tokens[0, where, 0]) != best


# Rules -------------------------------------------------------------------------------------------


def test_what_is_settled() -> None:
    rule = Settling(entropy=0.2, agreed=2)
    #                   agreed  accepted  entropy  end
    columns = [
        (2, True, 0.1, False),  # settled
        (1, True, 0.1, False),  # has agreed too seldom
        (2, False, 0.1, False),  # is not accepted
        (2, True, 0.3, False),  # is not certain
        (0, True, 0.1, True),  # the first end must have agreed, too
        (0, True, 0.1, True),  # behind it nothing need have
        (0, True, 0.3, False),  # but be certain
        (0, True, 0.1, False),
    ]
    agreed, accepted, entropies, ends = (
        mx.array([list(each)]) for each in zip(*columns, strict=True)
    )
    found = rules.settled(rule, agreed, accepted, entropies, ends)
    assert found.tolist() == [[True, False, False, False, False, True, False, True]]
    # An end in the last three eighths saves little, and what is behind it has to agree.
    behind = [
        mx.concatenate([mx.zeros_like(each)] * 2 + [each], axis=1)
        for each in (agreed, accepted, entropies, ends)
    ]
    late = rules.settled(rule, *behind)
    assert late[:, 16:].tolist() == [[True, False, False, False, False, False, False, False]]


def test_agreeing_counts_decodings_that_found_what_they_read() -> None:
    agreed, decoded = mx.array([[0, 3, 3, 3]]), mx.array([[1, 1, 0, 0]])
    read, best = mx.array([[7, 8, 9, 9]]), mx.array([[7, 5, 9, 4]])
    assert rules.agreeing(agreed, decoded, read, best).tolist() == [[1, 0, 3, 0]]


@pytest.mark.parametrize("length", [1, 7, 48, 64, 256])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99, 1.0])
def test_the_least_certain_fill_a_pass_up(length: int, share: float) -> None:
    rng = np.random.default_rng(length)
    settled = rng.random(length) < share
    entropies = rng.random(length, dtype=np.float32)
    found = rules.undecided(settled, entropies)
    if found is None:
        assert max((~settled).sum(), 1) > length - -(-length // rules.SIZES)
        return
    size = -(-length // rules.SIZES)
    assert len(found) % size == 0
    assert len(found) - (~settled).sum() < size or settled.all()
    left = np.setdiff1d(np.arange(length), found)
    assert settled[left].all()
    added = np.intersect1d(found, np.flatnonzero(settled))
    assert not len(added) or not len(left) or entropies[added].min() >= entropies[left].max()


def test_settings_that_make_no_sense_are_refused() -> None:
    for wrong in ({"entropy": 0.0}, {"agreed": 0}, {"tighten": -1.0}, {"refresh": float("nan")}):
        with pytest.raises(SettingError):
            Settling(**wrong)  # type: ignore[arg-type]


# The loop ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", QUESTIONS)
def test_what_converges_is_stable_under_a_pass_over_all(
    loaded: tuple[DiffusionGemma, Tokenizer], question: str
) -> None:
    """The reference's own stop rule holds: two canvases agree, the last of a full pass."""
    model, tokenizer = loaded
    seen = 0
    for seed in range(6):
        states = states_of(model, cache_of(model, tokenizer, question), seed)
        decoded = np.diff([0, *(state.decoded for state in states)])
        assert decoded[0] == 64
        assert (decoded < 64).any() or len(states) <= 3
        if not bool(np.array(states[-1].converged)[0]):
            continue
        seen += 1
        assert decoded[-1] == 64
        assert mx.array_equal(states[-1].argmax, states[-2].argmax)
        certain = float(states[-1].entropy.mean()) < model.generation.confidence_threshold
        unchanged = all(mx.array_equal(states[-1].argmax, each.argmax) for each in states[-3:])
        assert certain or unchanged
        # Once more, over all of what is committed.
        cache = cache_of(model, tokenizer, question)
        answer = states[-1].argmax
        hidden = model.decode([Pass(answer, cache, model.embed(answer))])[0]
        best = read_out(model, hidden, model.generation.t_min).choices.tokens[..., 0]
        assert float((best == answer).mean()) > 0.95
    assert seen


def test_a_settled_token_stays_and_is_the_best_one(
    loaded: tuple[DiffusionGemma, Tokenizer],
) -> None:
    model, tokenizer = loaded
    states = states_of(model, cache_of(model, tokenizer, QUESTIONS[0]), 3)
    assert any(bool(state.settled.any()) for state in states)
    for state in states:
        assert bool((state.accepted | ~state.settled).all())
        assert bool(mx.where(state.settled, state.canvas == state.argmax, True).all())


def test_faithful_decodes_all_at_every_step() -> None:
    model, tokenizer = SMALL
    states = states_of(model, cache_of(model, tokenizer, QUESTIONS[0]), 0)
    assert [state.decoded for state in states] == [64 * (i + 1) for i in range(len(states))]
    assert not any(bool(state.settled.any()) for state in states)


def form(model: DiffusionGemma, tokenizer: Tokenizer) -> Start:
    """A record in which six tokens are free."""
    row: list[int | None] = [*tokenizer.encode('{"name":"Anna Berg","from":"Norway"}'), *[1] * 64][
        :64
    ]
    row[8:14] = [None] * 6
    return pinned_start([row], SeededDraws(5, model.config.vocab_size))


def test_what_is_given_is_decoded_once(loaded: tuple[DiffusionGemma, Tokenizer]) -> None:
    """Nine tenths of a form were decoded at every step, and twice by the last layer."""
    model, tokenizer = loaded
    states = states_of(model, cache_of(model, tokenizer, QUESTIONS[0]), 0, form(model, tokenizer))
    decoded = np.diff([0, *(state.decoded for state in states)])
    over_all = 64 - 58 // 4  # the last of four layers makes keys and values of 58, no more
    assert decoded[0] == over_all
    assert bool(np.array(states[-1].converged)[0])
    assert decoded[-1] == over_all
    partial = decoded[decoded < over_all]
    assert len(partial)
    assert (partial <= 6).all()


@pytest.mark.parametrize("typed", [False, True])
def test_what_is_pinned_need_not_be_read_off(
    loaded: tuple[DiffusionGemma, Tokenizer], typed: bool
) -> None:
    """The first step finds of the free positions what it finds where all are read off."""
    fast, tokenizer = loaded
    start = form(fast, tokenizer)
    if typed:
        halves = Alternation((Tokens(tuple(range(384))), Tokens(tuple(range(384, 768)))))
        plan = compile_pattern(Repeat(halves)).plan(64, 64)
        start = replace(start, constraint=Plans([plan], fast.config.vocab_size))
    states = []
    for model in (fast, SMALL[0]):
        cache = cache_of(model, tokenizer, QUESTIONS[0])
        states.append(states_of(model, cache, 0, start)[0])
    short, whole = states
    assert short.decoded < whole.decoded == 64
    assert mx.array_equal(short.argmax, whole.argmax)
    assert mx.allclose(short.entropy, whole.entropy, rtol=1e-3, atol=1e-5)
    assert mx.allclose(short.probability, whole.probability, rtol=1e-3, atol=1e-5)


def test_a_pinned_canvas_is_stable_under_a_pass_over_all(
    loaded: tuple[DiffusionGemma, Tokenizer],
) -> None:
    """Leaving what is pinned out of the last layer changes nothing that is committed."""
    model, tokenizer = loaded
    start = form(model, tokenizer)
    assert start.pinned is not None
    for seed in range(4):
        cache = cache_of(model, tokenizer, QUESTIONS[0])
        states = states_of(model, cache, seed, start)
        if not bool(np.array(states[-1].converged)[0]):
            continue
        answer = states[-1].argmax
        assert mx.array_equal(answer, states[-2].argmax)
        assert bool(mx.where(start.pinned, answer == start.canvas, True).all())
        hidden = model.decode([Pass(answer, cache, model.embed(answer))])[0]
        best = read_out(model, hidden, model.generation.t_min).choices.tokens[..., 0]
        assert bool(mx.where(start.pinned, True, best == answer).all())


@pytest.mark.parametrize("free", [0, 1, 63, 64])
def test_forms_all_or_nothing_of_which_is_pinned(
    loaded: tuple[DiffusionGemma, Tokenizer], free: int
) -> None:
    model, tokenizer = loaded
    row: list[int | None] = [1] * 64
    row[64 - free :] = [None] * free
    start = pinned_start([row], SeededDraws(5, model.config.vocab_size))
    states = states_of(model, cache_of(model, tokenizer, QUESTIONS[0]), 0, start)
    assert (np.array(states[-1].argmax)[0, : 64 - free] == 1).all()


@pytest.mark.parametrize("noise", [0, 1])
def test_what_looks_done_is_looked_at_as_a_whole(
    loaded: tuple[DiffusionGemma, Tokenizer], noise: int
) -> None:
    """An answer that the first step had found took a pass over some, and then one over all."""
    model, tokenizer = loaded
    cache = cache_of(model, tokenizer, QUESTIONS[0])
    canvas = SeededDraws(0, model.config.vocab_size).tokens((1, 64))
    undecided = Undecided(model.generation, cache, canvas)
    asked = undecided.ask(canvas, None, last=False)
    hidden = model.decode([asked])[0]
    known = Known(hidden, 0.8, read_out(model, hidden, 0.8, self_conditioning=True))
    accepted = mx.arange(64)[None] >= noise
    entropies = mx.zeros((1, 64))
    undecided.settle(asked, canvas, canvas, canvas, accepted, entropies)
    undecided.confirmed(asked, mx.array([False]))
    undecided.turn(canvas, entropies)
    positions = undecided.ask(canvas, known, last=False).positions
    if noise:
        assert positions is not None
        assert len(positions) < 64
    else:
        assert positions is None


def test_two_canvases_on_one_cache_do_not_mix(loaded: tuple[DiffusionGemma, Tokenizer]) -> None:
    """The second overwrites the first one's keys and values, which then decodes all again."""
    model, tokenizer = loaded
    cache = cache_of(model, tokenizer, QUESTIONS[0])
    draws = [SeededDraws(seed, model.config.vocab_size) for seed in (0, 1)]
    runs = [drive(model, denoise(model, cache, model.generation, each)) for each in draws]
    last: list[DenoisingState | None] = [None, None]
    for _ in range(48):
        for i, run in enumerate(runs):
            last[i] = next(run, last[i])
    for state in last:
        assert state is not None
        assert state.decoded == 64 * state.step or bool(state.converged[0])


def test_a_batch_decodes_what_each_decodes_alone(loaded: tuple[DiffusionGemma, Tokenizer]) -> None:
    model, tokenizer = loaded
    requests = [Request(question, seed=i) for i, question in enumerate(QUESTIONS)]
    alone = [list(stream_generate(model, tokenizer, q, seed=i)) for i, q in enumerate(QUESTIONS)]
    together: list[list[object]] = [[] for _ in QUESTIONS]
    for index, event in stream_batch(model, tokenizer, requests):
        together[index].append(event)
    for one, other in zip(alone, together, strict=True):
        texts = ["".join(e.text for e in each if isinstance(e, Text)) for each in (one, other)]
        assert texts[0] == texts[1]
        drafts = [
            [(e.step, e.decoded) for e in each if isinstance(e, Draft)] for each in (one, other)
        ]
        assert drafts[0] == drafts[1]


def test_positions_are_counted(loaded: tuple[DiffusionGemma, Tokenizer]) -> None:
    model, tokenizer = loaded
    events = list(stream_generate(model, tokenizer, QUESTIONS[0], seed=0))
    done = events[-1]
    assert isinstance(done, Done)
    drafts = [event for event in events if isinstance(event, Draft)]
    assert done.positions_decoded == drafts[-1].decoded < 64 * done.denoising_steps
    assert done.positions_per_token == done.positions_decoded / done.generated_tokens
    filled = fill(model, tokenizer, "The capital of Italy is {{city}}.", seed=0)
    assert 0 < filled.positions_decoded <= 64 * 64 * filled.steps
    edited = edit(model, tokenizer, "Hello world", "Fix", seed=0)
    assert 64 <= edited.positions_decoded <= 64 * edited.steps


def test_a_cache_is_freed_with_what_read_its_canvas(
    loaded: tuple[DiffusionGemma, Tokenizer],
) -> None:
    """It held what chose the positions, which held it: memory came back when garbage was looked
    for."""
    model, tokenizer = loaded
    gc.collect()
    gc.disable()
    try:
        cache = cache_of(model, tokenizer, "Hello")
        gone = weakref.ref(cache[0])
        states_of(model, cache, 0)
        del cache
        assert gone() is None
    finally:
        gc.enable()


def test_other_samplers_and_budgets_end(loaded: tuple[DiffusionGemma, Tokenizer]) -> None:
    model, tokenizer = loaded
    for steps in (1, 2, 3):
        states = states_of(
            _with(model, max_denoising_steps=steps), cache_of(model, tokenizer, "Hello"), 0
        )
        assert len(states) <= steps
        # The last pass is over all, or what is committed would be of an older canvas.
        assert np.diff([0, *(state.decoded for state in states)])[-1] == 64
    _with(model, max_denoising_steps=48)
    settled = _with(model, sampler=EntropyBound(1e-6), settling=Settling(entropy=1e-9))
    assert states_of(settled, cache_of(model, tokenizer, "Hello"), 0)


def _with(model: DiffusionGemma, **settings_: object) -> DiffusionGemma:
    """The same model with other settings, sharing its weights."""
    from copy import copy

    other = copy(model)
    other.generation = replace(model.generation, **settings_)  # type: ignore[arg-type]
    return other


def test_a_prompt_cache_that_is_read_between_two_canvases(
    loaded: tuple[DiffusionGemma, Tokenizer],
) -> None:
    """What follows the context is another canvas's then; all of this one's is decoded anew."""
    model, tokenizer = loaded
    context = PromptCache(model)
    ids = encode_prompt(tokenizer, QUESTIONS[0])
    context.read(ids)
    first = states_of(model, context.cache, 0)
    context.read([*ids, 5, 6])
    context.read(ids)
    second = states_of(model, context.cache, 0)
    assert [state.decoded for state in first] == [state.decoded for state in second]
    assert mx.array_equal(first[-1].argmax, second[-1].argmax)
