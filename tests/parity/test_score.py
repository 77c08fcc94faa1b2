"""Scores = the head over the reference's encoder states, in float32."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import random_checkpoint
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import (
    DiffusionGemmaForBlockDiffusion,
)

from mlx_diffgemma import PromptCache, Tokenizer, score
from mlx_diffgemma.checkpoint.load import EMBEDDED, load_model
from mlx_diffgemma.diffusion import head


def reference_log_p(reference: DiffusionGemmaForBlockDiffusion, ids: list[int]) -> np.ndarray:
    """Log-probabilities (T, V) of what follows each id."""
    with torch.no_grad():
        hidden = reference.model.encoder(torch.tensor([ids])).last_hidden_state
        logits = reference.lm_head(hidden).float()
        cap = reference.final_logit_softcapping
        log_p: np.ndarray = torch.log_softmax(torch.tanh(logits / cap) * cap, -1)[0].numpy()
        return log_p


# Prompt and text, the chunk that is encoded at once, how many of the likeliest tokens are told.
@pytest.mark.parametrize(
    ("pattern", "window", "prompt", "text", "chunk", "top"),
    [
        ("sf", 64, 20, 10, 2048, 1),
        ("ssf", 12, 1, 70, 2048, 5),
        ("ssfsf", 20, 75, 40, 7, 3),
        ("sssf", 9, 30, 1, 1, 1),
    ],
)
def test_random_checkpoint(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pattern: str,
    window: int,
    prompt: int,
    text: int,
    chunk: int,
    top: int,
) -> None:
    reference = random_checkpoint(tmp_path, pattern, text={"sliding_window": window})
    model = load_model(tmp_path, dtype="float32")
    tokenizer = Tokenizer.from_directory(EMBEDDED)
    monkeypatch.setattr(head, "_tokens_at_once", lambda model, positions: 32)  # of 97
    rng = random.Random(pattern)
    ids = [rng.randrange(97) for _ in range(prompt + text)]
    expected = reference_log_p(reference, ids)[prompt - 1 :]
    cache = PromptCache(model)
    for _ in range(2):  # the second time, the prompt is known
        found = score(
            model, tokenizer, ids[:prompt], ids[prompt:],
            top=top, prefill_chunk=chunk, prompt_cache=cache,
        )  # fmt: skip
        wanted = expected[np.arange(text), ids[prompt:]]
        assert np.abs(np.array(found.log_probabilities) - wanted).max() <= 1e-4
        assert [len(best) for best in found.top] == [top] * text
        told = [*found.top, found.following]
        best = np.array([[token for token, _ in best] for best in told])
        assert np.array_equal(best, np.argsort(-expected, axis=-1)[:, :top])
        chances = np.array([[chance for _, chance in best] for best in told])
        assert np.abs(chances - np.take_along_axis(expected, best, -1)).max() <= 1e-4
    assert cache.tokens == tuple(ids)


def test_trained_checkpoint() -> None:
    """An answer to a chat, and a text of several windows without a prompt."""
    reference = DiffusionGemmaForBlockDiffusion.from_pretrained(EMBEDDED, dtype="float32").eval()
    model = load_model(EMBEDDED, dtype="float32")
    tokenizer = Tokenizer.from_directory(EMBEDDED)
    chat = tokenizer.encode(
        tokenizer.apply_chat_template([{"role": "user", "content": "Fix: a small hosue"}])
    )
    story = "The capital of Norway is Oslo. A small house stands near the river.\n" * 24
    for prompt, text, before in (
        ("Fix: a small hosue", "a small house<turn|>", chat),
        (None, story, [tokenizer.token_id("<bos>")]),
    ):
        ids = tokenizer.encode(text)
        expected = reference_log_p(reference, [*before, *ids[:-1]])[len(before) - 1 :]
        found = score(model, tokenizer, prompt, text)
        assert found.tokens == tuple(ids)
        wanted = expected[np.arange(len(ids)), ids]
        assert np.abs(np.array(found.log_probabilities) - wanted).max() <= 1e-4
        assert found.greedy == bool((expected.argmax(-1) == ids).all())
        assert found.mean == pytest.approx(wanted.mean(), abs=1e-4)
        assert found.perplexity == pytest.approx(np.exp(-wanted.mean()), rel=1e-3)
    assert len(ids) > 2 * 512
