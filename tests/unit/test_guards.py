"""Guards, each against a model that is written to misbehave in its way."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gemma import gemma_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from random_model import scripted

from mlx_diffgemma import Done, Draft, Event, Guards, Notice, Text, Thought, stream_generate
from mlx_diffgemma.diffusion.guards import OFF, Candidate, Thinking, certain_part, repeated_from

TOKENIZER = gemma_tokenizer()
END = 6
ON = Guards()


def ids(text: str, *, end: bool = True) -> list[int]:
    return TOKENIZER.encode(text) + [END] * end


def answer(
    canvases: Sequence[Sequence[int | None]], guards: Guards, **settings: Any
) -> tuple[str, Done, list[Event]]:
    """The text, the last event and all events of a model that writes these canvases."""
    model = scripted()
    model.begin(*canvases)
    events = list(stream_generate(model, TOKENIZER, "x", seed=0, guards=guards, **settings))
    done = events[-1]
    assert isinstance(done, Done)
    assert model._next == len(canvases)
    return "".join(e.text for e in events if isinstance(e, Text)), done, events


def notices(events: Sequence[Event]) -> list[str]:
    return [event.guard for event in events if isinstance(event, Notice)]


def test_an_empty_answer_is_tried_again() -> None:
    """Terse prompts give an end token at the first position: an answer without a word."""
    text, done, _ = answer([[END]], OFF)
    assert (text, done.generated_tokens) == ("", 1)
    text, done, events = answer([[END], ids("Hello")], ON)
    assert (text, notices(events)) == ("Hello", ["empty"])
    assert done.denoising_steps == 4
    # Another end token is no way around it, and a model that insists still has to say something.
    insists = [[1], [END, *ids("ello")]]
    _, done, events = answer(insists, Guards(not_converged=False))
    assert notices(events) == ["empty"]
    assert done.generated_tokens > 1


def test_the_forbidden_end_reaches_self_conditioning() -> None:
    """Masked only when sampling, self-conditioning would go on telling the model to end."""
    model = scripted(one_hot=True)
    model.begin([END], [END, *ids("ello")])
    guards = Guards(not_converged=False)
    list(stream_generate(model, TOKENIZER, "x", seed=0, guards=guards))
    self_conditioning = np.array(mx.stack(model._conditioned_on))[:, 0, 0] / 768**0.5
    assert self_conditioning[0, END] > 0.99
    assert (self_conditioning[-1, [1, END]] == 0).all()


def test_a_canvas_that_does_not_converge() -> None:
    good = ids("First one. Second one. Third", end=False)
    bad: list[int | None] = [*good, *[None] * (64 - len(good))]
    worse: list[int | None] = [*good[:12], *[None] * 52]
    text, done, events = answer([bad], OFF)
    assert text.startswith("First one. Second one. Third")
    assert (done.finish_reason, notices(events)) == ("not_converged", [])
    # The better attempt counts, up to the last sentence before its doubts.
    text, done, events = answer([bad, worse], ON)
    assert text.rstrip() == "First one. Second one."
    assert notices(events) == ["not_converged", "not_converged"]
    assert (done.finish_reason, done.canvases, done.denoising_steps) == ("not_converged", 1, 96)
    # The last draft tells its probabilities; it was the other attempt's.
    drafts = [event for event in events if isinstance(event, Draft)]
    assert drafts[-1].tokens[: len(good)] == tuple(good)
    text, done, events = answer([bad, ids("Fine.")], ON)
    assert (text, done.finish_reason, notices(events)) == ("Fine.", "stop", ["not_converged"])
    text, done, _ = answer([[None] * 64] * 2, ON)
    assert (text, done.generated_tokens, done.finish_reason) == ("", 0, "not_converged")


def test_few_steps_are_not_a_fault() -> None:
    """With fewer steps than the checkpoint's, a canvas that has not converged was asked for."""
    guards = Guards(repetition=False)
    text, done, events = answer([[*ids("Quick", end=False), *[None] * 60]], guards, steps=2)
    assert text.startswith("Quick")
    assert (done.denoising_steps, notices(events)) == (2, [])


def test_going_round_in_circles_ends_the_answer() -> None:
    loop = ids("and so on, ", end=False)
    canvas = (ids("It goes ", end=False) + loop * 20)[:64]
    after = (loop * 20)[(64 - 8) % len(loop) :][:64]
    text, done, events = answer([canvas, after], OFF, max_tokens=128)
    assert len(text) > 100
    text, done, events = answer([canvas], ON, max_tokens=128)
    assert text == "It goes and so on,"  # the space before it belongs to the run
    assert (done.finish_reason, notices(events)) == ("repetition", ["repetition"])
    # Where the run begins in a canvas that is committed already, that one stays.
    first = ids("The quick brown fox jumps over it all ", end=False)
    run = loop * 30
    first, after = [*first, *run][:64], run[64 - len(first) :][:64]
    text, done, _ = answer([first, after], ON, max_tokens=128)
    assert (text, done.finish_reason) == (TOKENIZER.decode(first), "repetition")


def test_repetition_is_told_from_lists() -> None:
    assert repeated_from([5] * 47) is None
    assert repeated_from([5] * 48) == 1
    assert repeated_from([1, 2, *[5] * 48]) == 3
    assert repeated_from([9, *[1, 2, 3] * 16]) == 4
    assert repeated_from([*range(20)] * 3) is None  # three times a long part is a list
    assert repeated_from([*range(20)] * 4) == 20
    assert repeated_from([i for n in range(40) for i in (1, n)]) is None


def test_sentences_are_kept_while_they_are_certain() -> None:
    tokens = tuple(range(9))
    sure = Candidate(tokens, (0.0,) * 9, False)
    ends = [3, 6]
    assert certain_part(sure, lambda tokens: ends) == tokens[:6]
    doubtful = replace(sure, entropies=(0, 0.2, 0, 0, 0, 0.4, 0, 0, 0))
    assert certain_part(doubtful, lambda tokens: ends) == tokens[:3]


@pytest.mark.parametrize("budget", [5, 20, 30])
def test_a_thought_has_a_budget(budget: int) -> None:
    """Thinking used to be able to spend all tokens and leave none for the answer."""
    thought = "<|channel>thought\n" + "hm, let me think about it " * 3
    long = ids(thought, end=False)[:64]
    text, done, events = answer([long, ids("Yes.")], Guards(thinking_budget=budget), max_tokens=90)
    assert (text, done.finish_reason) == ("Yes.", "stop")
    assert notices(events) == ["thinking_budget"]
    assert done.generated_tokens == budget + 1 + len(ids("Yes."))  # and the closing marker
    thoughts = "".join(event.text for event in events if isinstance(event, Thought))
    whole = TOKENIZER.decode(long[1:budget]).removeprefix("thought\n")
    assert thoughts == ("" if budget == 5 else whole)
    short = ids("<|channel>thought\nhm<channel|>Yes.")
    text, _, events = answer([short], Guards(thinking_budget=30))
    assert (text, notices(events)) == ("Yes.", [])


def test_a_turn_does_not_end_inside_a_thought() -> None:
    text, done, _ = answer([ids("<|channel>thought\nhm")], OFF)
    assert (text, done.finish_reason) == ("", "stop")
    text, done, events = answer([ids("<|channel>thought\nhm"), ids("Yes.")], ON)
    assert (text, notices(events)) == ("Yes.", ["thinking_budget"])
    # And if what follows is empty, that is tried again too.
    text, _, events = answer([ids("<|channel>thought\nhm"), [END], ids("Yes.")], ON)
    assert (text, notices(events)) == ("Yes.", ["thinking_budget", "empty"])


def test_the_budget_of_tokens_is_exact_over_canvases() -> None:
    canvas = ids("abcdefgh" * 9, end=False)[:64]
    for guards in (OFF, replace(ON, repetition=False)):
        for budget in (1, 63, 64, 65, 100, 128):
            count = -(-budget // 64)
            _, done, _ = answer([canvas] * count, guards, max_tokens=budget)
            assert (done.generated_tokens, done.finish_reason) == (budget, "length")


def test_drafts_hide_thoughts_and_markers() -> None:
    canvas = ids("<|channel>thought\nhm<channel|>Yes.")
    _, _, events = answer([canvas], ON)
    draft = next(event for event in events if isinstance(event, Draft) and event.step == 2)
    assert draft.text == "Yes."
    assert draft.end == len(canvas) - 1
    assert sum(draft.visible[: draft.end]) == len(TOKENIZER.encode("Yes."))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=300), st.booleans())
def test_what_is_asked_token_by_token_is_as_over_the_whole(tokens: list[int], begun: bool) -> None:
    """Token by token, all of an answer was gone through again for each."""
    inside, spent = begun, []
    for i, token in enumerate(tokens):
        inside = (inside or token == 0) and token != 1
        spent += [i] * inside
    assert Thinking(0, 1, begun).spent(tokens) == spent
    tokens = [*tokens, *tokens[-2:] * 24]
    grown = (repeated_from(tokens[: i + 1], 1) for i in range(len(tokens)))
    first = next((found for found in grown if found is not None), None)
    assert (first is None) == (repeated_from(tokens) is None)
