"""Scores: what is encoded, what is refused, what a result sums up; parity has the numbers."""

import math
from typing import Any

import mlx.core as mx
import pytest
from held import active_memory
from random_model import untrained

from mlx_diffgemma import (
    ContextError,
    DiffusionGemma,
    Done,
    Error,
    PromptCache,
    Reading,
    ScoreRequest,
    ScoreResult,
    SettingError,
    Tokenizer,
    load,
    score,
    stream_generate,
)
from mlx_diffgemma.diffusion import head
from mlx_diffgemma.tasks import generate
from mlx_diffgemma.tasks.request import encode_prompt, stream
from mlx_diffgemma.tasks.score import MOST_TOP


@pytest.fixture(scope="module")
def loaded() -> tuple[DiffusionGemma, Tokenizer]:
    return load()


def test_the_trained_model_knows_the_answer_from_a_wrong_one(
    loaded: tuple[DiffusionGemma, Tokenizer],
) -> None:
    question = "What is the capital of Norway?"
    right = score(*loaded, question, "The capital of Norway is Oslo.<turn|>")
    wrong = score(*loaded, question, "The capital of Norway is Rome.<turn|>")
    assert right.greedy
    assert not wrong.greedy
    assert right.perplexity < 1.1 < wrong.perplexity
    assert wrong.least < math.log(0.1) < right.least
    assert right.total == pytest.approx(right.mean * len(right.tokens))
    assert "".join(right.pieces) == "The capital of Norway is Oslo."  # the end leaves no trace
    at = wrong.log_probabilities.index(wrong.least)
    assert loaded[1].pieces([wrong.top[at][0][0]]) == [right.pieces[at]]


def test_a_prompt_is_read_once_for_several_texts(
    loaded: tuple[DiffusionGemma, Tokenizer],
) -> None:
    model, tokenizer = loaded
    cache, asked = PromptCache(model), [5, 361, 359, 345] * 80
    alone = [score(model, tokenizer, asked, [i, 300, 301], top=2) for i in (9, 10)]
    found = []
    for i in (9, 10):
        assert cache.shared(asked) == (0 if i == 9 else len(asked) - 1)
        found.append(score(model, tokenizer, asked, [i, 300, 301], top=2, prompt_cache=cache))
        assert cache.tokens == (*asked, i, 300, 301)
    for one, other in zip(found, alone, strict=True):
        assert one.log_probabilities == pytest.approx(other.log_probabilities, abs=1e-4)
        assert [[t for t, _ in best] for best in one.top] == [
            [t for t, _ in best] for best in other.top
        ]


def test_a_long_text_is_read_in_chunks_between_which_others_go_on(
    loaded: tuple[DiffusionGemma, Tokenizer],
) -> None:
    items: list[Any] = list(stream(*loaded, ScoreRequest([2, 5, 6], [300] * 10, prefill_chunk=4)))
    assert [(i.done, i.total) for i in items if isinstance(i, Reading)] == [(6, 13), (10, 13)]
    assert isinstance(items[-1], ScoreResult)
    assert len(items[-1].log_probabilities) == 10


def test_what_cannot_be_scored_is_refused_before_it_is_computed(
    loaded: tuple[DiffusionGemma, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DiffusionGemma, "encode", None)
    given: list[tuple[Any, Any, int, type[Error], str]] = [
        ("", "x", 1, ContextError, "the prompt is empty"),
        ([], "x", 1, ContextError, "the prompt is empty"),
        ("x", "", 1, ContextError, "the text is empty"),
        (None, [], 1, ContextError, "the text is empty"),
        ([2], [768], 1, SettingError, "a token id must be from 0 to 767"),
        ([2], [-1], 1, SettingError, "a token id must be from 0 to 767"),
        ([2], [3], 0, SettingError, "top must be from 1"),
        ([2], [3], MOST_TOP + 1, SettingError, f"top must be from 1 to {MOST_TOP}"),
        ([2] * 4096, [3], 1, ContextError, "4,096 tokens and the text 1, together more than the"),
        (None, "a" * 1_000_000, 1, ContextError, "no more fits into the context"),
    ]
    for prompt, text, top, kind, message in given:
        with pytest.raises(kind, match=message):
            score(*loaded, prompt, text, top=top)


def test_all_of_the_context_may_be_scored(loaded: tuple[DiffusionGemma, Tokenizer]) -> None:
    """Behind a text there has to be no room for a canvas."""
    model = untrained(768, 64, context=100, windows=(8, None))
    found = score(model, loaded[1], [2], [i * 7 for i in range(99)], top=MOST_TOP)
    assert len(found.top[98]) == MOST_TOP
    for best in found.top:
        chances = [chance for _, chance in best]
        assert chances == sorted(chances, reverse=True)
        assert len({token for token, _ in best}) == MOST_TOP


@pytest.mark.parametrize("top", [1, 5])
def test_the_logits_of_a_text_are_never_whole(
    loaded: tuple[DiffusionGemma, Tokenizer], monkeypatch: pytest.MonkeyPatch, top: int
) -> None:
    monkeypatch.setattr(head, "BLOCK_BYTES", 1 << 20)
    model = untrained(20_000, 64)
    text = list(range(700))
    score(model, loaded[1], [2], [3])  # weights are computed
    mx.reset_peak_memory()
    before = active_memory()
    score(model, loaded[1], [2], text, top=top)
    whole = 4 * len(text) * model.config.vocab_size
    assert mx.get_peak_memory() - before < whole / 2


@pytest.mark.parametrize(
    ("prompt", "canvases"), [([5, 361, 359], 3), ([2], 3), ("What is the capital of Norway?", 1)]
)
def test_an_answer_knows_how_likely_it_is(
    loaded: tuple[DiffusionGemma, Tokenizer], prompt: Any, canvases: int
) -> None:
    """Of one canvas and of several, of a prompt that is new and of one that is known."""
    model, tokenizer = loaded
    if canvases > 1:  # the small one never writes so much
        model = untrained(768, 64, windows=(8, None))
    ids = encode_prompt(tokenizer, prompt)
    cache = PromptCache(model)
    for known in (0, len(ids) - 1):
        done, written = answered((model, tokenizer), prompt, cache, likelihood=True)
        assert (done.canvases, done.cached_tokens) == (canvases, known)
        found = score(model, tokenizer, ids, written)
        assert done.mean_log_probability == pytest.approx(found.mean, abs=1e-4)
        assert done.least_log_probability == pytest.approx(found.least, abs=1e-4)
        assert cache.tokens == (*ids, *written)  # a next turn encodes nothing again
    plain, same = answered((model, tokenizer), prompt, PromptCache(model))
    assert same == written
    assert plain.mean_log_probability is plain.least_log_probability is None


def answered(
    loaded: tuple[DiffusionGemma, Tokenizer], prompt: Any, cache: PromptCache, **options: Any
) -> tuple[Done, list[int]]:
    """The end of an answer, and the tokens that were committed."""
    written: list[int] = []
    commit = generate._Teller._commit

    def noted(self: Any, item: generate.Committed) -> Any:
        written.extend(item.tokens)
        return commit(self, item)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate._Teller, "_commit", noted)
        events = stream_generate(
            *loaded, prompt, prompt_cache=cache, seed=1, steps=6, max_tokens=150, **options
        )
        *_, done = events
    assert isinstance(done, Done)
    return done, written
