"""Modes: what the encoder writes is what it scores highest, and drafts change nothing of it."""

import json
from typing import Any

import mlx.core as mx
import pytest

from mlx_diffgemma import (
    DiffusionGemma,
    Done,
    Draft,
    PromptCache,
    Request,
    SettingError,
    Text,
    Tokenizer,
    load,
    score,
    stream_generate,
)
from mlx_diffgemma.tasks.batch import stream_batch
from mlx_diffgemma.tasks.request import encode_prompt

QUESTIONS = (
    "What is the capital of Norway?",
    "Record: Anna Berg from Norway, born 1984-03-12",
    "Fix: they were much in eviednce during the fighing",
)

FIXED = "they were much in evidence during the fighting"

# What the denoiser gets wrong now and then.
SHUFFLED = "to, price, count, item: Anna gets 12 pears, 345 each"

SHUFFLED_RECORD = '{"to":"Anna","price":345,"count":12,"item":"pears"}'


@pytest.fixture(scope="module")
def loaded() -> tuple[DiffusionGemma, Tokenizer]:
    return load()


def answered(
    loaded: tuple[DiffusionGemma, Tokenizer], prompt: Any, **options: Any
) -> tuple[Done, str]:
    events = list(stream_generate(*loaded, prompt, **options))
    assert isinstance(events[-1], Done)
    return events[-1], "".join(event.text for event in events if isinstance(event, Text))


@pytest.mark.parametrize("question", QUESTIONS)
def test_causal_is_the_best_of_score_step_by_step(
    loaded: tuple[DiffusionGemma, Tokenizer], question: str
) -> None:
    model, tokenizer = loaded
    prompt, written = encode_prompt(tokenizer, question), list[int]()
    while not written or written[-1] not in model.generation.eos_token_ids:
        ((token, _),) = score(model, tokenizer, prompt, [*written, 0]).top[-1]
        written.append(token)
    events = list(stream_generate(model, tokenizer, question, mode="causal"))
    drafts = [event for event in events if isinstance(event, Draft)]
    done = events[-1]
    assert isinstance(done, Done)
    assert [draft.tokens for draft in drafts] == [(token,) for token in written]
    assert done.finish_reason == "stop"
    assert (done.generated_tokens, done.encoder_passes) == (len(written), len(written) - 1)
    assert (done.denoising_steps, done.positions_decoded) == (0, 0)


@pytest.mark.parametrize("question", QUESTIONS)
def test_speculative_is_causal(loaded: tuple[DiffusionGemma, Tokenizer], question: str) -> None:
    causal, text = answered(loaded, question, mode="causal")
    done, drafted = answered(loaded, question, mode="speculative", seed=3)
    assert (drafted, done.generated_tokens) == (text, causal.generated_tokens)
    assert done.tokens_per_forward > causal.tokens_per_forward


def test_a_schema_holds_in_every_mode(loaded: tuple[DiffusionGemma, Tokenizer]) -> None:
    schema = {
        "type": "object",
        "properties": {"sky": {"enum": ["blue", "grey"]}, "n": {"type": "integer"}},
        "required": ["sky", "n"],
        "additionalProperties": False,
    }
    causal, text = answered(loaded, "Hello", schema=schema, mode="causal")
    assert json.loads(text)["sky"] in ("blue", "grey")
    assert causal.finish_reason == "stop"
    assert answered(loaded, "Hello", schema=schema, mode="speculative", seed=1)[1] == text
    for seed in range(3):  # that it is a document is checked at its end
        assert answered(loaded, "Hello", schema=schema, verify=True, seed=seed)[1]


def test_what_is_verified_is_liked_no_less_and_right_more_often(
    loaded: tuple[DiffusionGemma, Tokenizer],
) -> None:
    right = {False: 0, True: 0}
    for question, answer in ((QUESTIONS[2], FIXED), (SHUFFLED, SHUFFLED_RECORD)):
        for seed in range(3):
            liked = []
            for verify in (False, True):
                done, text = answered(loaded, question, seed=seed, verify=verify, likelihood=True)
                liked.append(done.mean_log_probability)
                right[verify] += text == answer
            assert liked[1] >= liked[0] - 1e-4
    assert right[True] > right[False] + 2


@pytest.mark.parametrize(
    "options", [{"mode": "causal"}, {"mode": "speculative"}, {"verify": True}], ids=str
)
def test_rows_of_a_batch_and_later_turns_are_as_alone(
    loaded: tuple[DiffusionGemma, Tokenizer], options: dict[str, Any]
) -> None:
    model, tokenizer = loaded
    alone = [answered(loaded, question, seed=2, **options)[1] for question in QUESTIONS]
    texts = ["", "", ""]
    order = list[int]()
    requests = [Request(question, seed=2, **options) for question in QUESTIONS]
    for number, event in stream_batch(model, tokenizer, requests, max_batch=3):
        order.append(number)
        if isinstance(event, Text):
            texts[number] += event.text
    assert texts == alone
    assert order != sorted(order)  # none holds up the others
    cache = PromptCache(model)  # what was read in vain leaves no trace in it
    for question, text in zip(QUESTIONS, alone, strict=True):
        assert answered(loaded, question, seed=2, prompt_cache=cache, **options)[1] == text


def test_stops_openings_and_budgets(loaded: tuple[DiffusionGemma, Tokenizer]) -> None:
    for mode in ("causal", "speculative"):
        done, text = answered(loaded, QUESTIONS[0], mode=mode, stop=["Norway"])
        assert (text, done.finish_reason) == ("The capital of ", "stop")
        done, text = answered(loaded, QUESTIONS[0], mode=mode, max_tokens=2)
        assert (done.generated_tokens, done.finish_reason) == (2, "length")
        assert answered(loaded, "Norway?", mode=mode, opening="The cap")[1].startswith("The cap")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "greedy"}, "a mode is one of denoise, causal, speculative"),
        ({"mode": "causal", "verify": True}, "mode causal does not go with verify"),
        ({"mode": "speculative", "shrink": True}, "mode speculative does not go with shrink"),
        ({"verify": 1}, "verify"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(
    loaded: tuple[DiffusionGemma, Tokenizer], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(SettingError, match=said):
        stream_generate(*loaded, "Hello", **options)


def test_trimmed_is_as_never_read(loaded: tuple[DiffusionGemma, Tokenizer]) -> None:
    """Behind what a sliding layer holds, within it, and where more was read than it can hold."""
    model, _ = loaded
    tokens = [5 + i % 700 for i in range(1700)]
    places = [(0, 20, 7), (505, 20, 512), (600, 40, 620), (600, 40, 600), (600, 900, 700)]
    for begun, read, left in places:
        cache = PromptCache(model)
        cache.extend(tokens[:begun])
        mark = cache.mark()
        cache.extend(tokens[begun : begun + read])
        cache.trim(mark, left)
        fresh = PromptCache(model)
        fresh.extend(tokens[:left])
        assert cache.tokens == fresh.tokens
        (found,), (wanted,) = cache.encoding([9]), fresh.encoding([9])
        assert mx.allclose(found, wanted, atol=1e-4)
