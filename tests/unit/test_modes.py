"""Modes: what the encoder writes is what it scores highest, and drafts change nothing of it."""

from typing import Any

import pytest

from mlx_diffgemma import DiffusionGemma, Done, Draft, Text, Tokenizer, load, score, stream_generate
from mlx_diffgemma.tasks.request import encode_prompt

QUESTIONS = (
    "What is the capital of Norway?",
    "Record: Anna Berg from Norway, born 1984-03-12",
    "Fix: they were much in eviednce during the fighing",
)


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
