"""A context that is gone on with is one that was encoded from scratch, and costs what is new."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from held import active_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from random_model import untrained

from mlx_diffgemma import DiffusionGemma, PromptCache, SessionError, SettingError
from mlx_diffgemma.diffusion import prompt_cache as module
from mlx_diffgemma.diffusion.cache_file import fingerprint
from mlx_diffgemma.diffusion.prompt_cache import PrefixCache, prefill

MODEL = untrained(20, 8, windows=(6, None, 9))
CANVAS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])


def logits(model: DiffusionGemma, prompt_cache: PromptCache) -> np.ndarray[Any, Any]:
    return np.array(model(CANVAS, prompt_cache.cache))


def fresh(model: DiffusionGemma, tokens: list[int]) -> np.ndarray[Any, Any]:
    prompt_cache = PromptCache(model)
    assert prompt_cache.read(tokens) == len(tokens)
    return logits(model, prompt_cache)


Prompts = st.lists(
    st.tuples(st.integers(0, 40), st.lists(st.integers(0, 19), max_size=25)), max_size=6
)


@settings(max_examples=40, deadline=None)
@given(Prompts, st.integers(1, 30))
def test_any_sequence_of_prompts_gives_the_logits_of_the_last_one_alone(
    edits: list[tuple[int, list[int]]], worth: int
) -> None:
    """Each prompt keeps a part of the one before and goes on differently."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WORTH_A_SNAPSHOT", worth)
        prompt_cache, tokens = PromptCache(MODEL), [7]
        for kept, more in edits:
            tokens = [7, *tokens[1:kept], *more]
            saved = prompt_cache.shared(tokens)
            assert prompt_cache.read(tokens) == len(tokens) - saved
            assert prompt_cache.tokens == tuple(tokens)
    prompt_cache.read(tokens)
    np.testing.assert_allclose(
        logits(MODEL, prompt_cache), fresh(MODEL, tokens), rtol=2e-4, atol=2e-4
    )


def test_only_what_is_new_is_encoded() -> None:
    prompt_cache = PromptCache(MODEL)
    document = [i % 20 for i in range(400)]
    assert prompt_cache.read([*document, 1, 2]) == 402
    assert prompt_cache.read([*document, 1, 2, 3, 4]) == 2
    assert prompt_cache.read([*document, 1, 2]) == 0  # back to a mark
    # No mark stands where the document ends: the second question pays for it, the third does not.
    assert prompt_cache.read([*document, 5, 6, 7]) == 403
    assert prompt_cache.read([*document, 8]) == 1
    assert prompt_cache.read([9]) == 1


def test_reading_takes_no_more_memory_for_a_long_prompt() -> None:
    """The copy of a full layer into a larger buffer, at each chunk, used to grow with the prompt.

    Of three layers the last is not computed, as nobody asks for its output.
    """
    model = untrained(20, 8, windows=(6, None, None))
    for length in (500, 2_000):  # the first compiles
        prompt_cache = PromptCache(model)
        before = active_memory()
        mx.reset_peak_memory()
        prompt_cache.read([i % 20 for i in range(length)], 4)
    above = mx.get_peak_memory() - before - prompt_cache.nbytes
    assert prompt_cache.nbytes > 5e5
    assert above < prompt_cache.nbytes / 2  # one of the two full layers


def test_marks_stay_within_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt_cache = PromptCache(MODEL)
    for count in range(20, 200, 20):
        prompt_cache.read([1] * count)
    # Keys and values, two sliding layers that keep 5 and 8 tokens of 16 numbers.
    mark = 2 * (5 + 8) * 16 * 4
    full = 2 * 180 * 16 * 4
    assert prompt_cache.nbytes == full + mark + 9 * mark
    monkeypatch.setattr(module, "SNAPSHOT_BYTES", 3 * mark)
    prompt_cache.read([1] * 200)
    assert prompt_cache.nbytes == full + 2 * 20 * 16 * 4 + mark + 3 * mark
    assert prompt_cache.read([1] * 160 + [2]) == 1
    assert prompt_cache.read([1] * 20) == 20  # that mark is gone


def test_an_interrupted_read_leaves_nothing_half_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some layers used to hold the new tokens and some not."""
    prompt_cache = PromptCache(MODEL)
    prompt_cache.read([1, 2, 3])

    def interrupted(model: DiffusionGemma, tokens: Any, cache: Any, *given: Any) -> None:
        cache[0].length += 2
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "prefill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prompt_cache.read([1, 2, 3, 4, 5])
    assert len(prompt_cache) == 0
    prompt_cache.read([1, 2, 3, 4, 5])
    np.testing.assert_array_equal(logits(MODEL, prompt_cache), fresh(MODEL, [1, 2, 3, 4, 5]))


def test_what_cannot_be_read_leaves_the_context_as_it_was() -> None:
    """Ids beyond the vocabulary were read from beyond the table; a chunk of 0 never ended."""
    prompt_cache = PromptCache(MODEL)
    prompt_cache.read([1, 2, 3])
    for ids in ([1, 20], [-1], [2**40], [1.0], [True], ["1"]):
        wrong: Any = ids
        for take in (
            prompt_cache.read,
            prompt_cache.extend,
            lambda i: prefill(MODEL, i, prompt_cache.cache),
        ):
            with pytest.raises(SettingError, match="a token id must be"):
                take(wrong)
    for chunk in (0, -1, 1.5, True):
        with pytest.raises(SettingError, match="prefill_chunk"):
            prompt_cache.read([1, 2, 3, 4], chunk)  # type: ignore[arg-type]
        with pytest.raises(SettingError, match="prefill_chunk"):
            prompt_cache.extend([4], chunk)  # type: ignore[arg-type]
    assert prompt_cache.tokens == (1, 2, 3)
    np.testing.assert_array_equal(logits(MODEL, prompt_cache), fresh(MODEL, [1, 2, 3]))


@pytest.mark.parametrize("prompts", [[[1, 2, 3]], [[1] * 30, [1] * 30 + [2] * 9], []])
def test_save_and_load(prompts: list[list[int]], tmp_path: Path) -> None:
    prompt_cache = PromptCache(MODEL)
    for prompt in prompts:
        prompt_cache.read(prompt)
    prompt_cache.extend([4, 4])
    file = tmp_path / "chat"
    prompt_cache.save(file, {"said": "ähem"})
    assert [path.name for path in tmp_path.iterdir()] == ["chat"]
    again, extra = PromptCache.load(file, MODEL)
    assert extra == {"said": "ähem"}
    assert again.tokens == prompt_cache.tokens
    np.testing.assert_array_equal(logits(MODEL, again), logits(MODEL, prompt_cache))
    for prompt in [*reversed(prompts), [5, 6]]:
        assert again.read(prompt) == prompt_cache.read(prompt)
        np.testing.assert_array_equal(logits(MODEL, again), logits(MODEL, prompt_cache))


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "chat"
    prompt_cache = PromptCache(MODEL)
    prompt_cache.read([1, 2, 3])
    prompt_cache.save(file)
    other = untrained(20, 8, windows=(6, None, 9), seed=4)
    with pytest.raises(SessionError, match="another model"):
        PromptCache.load(file, other)
    with pytest.raises(SessionError, match="not a file"):
        PromptCache.load(tmp_path / "nothing", MODEL)
    mx.save_safetensors(str(tmp_path / "weights.safetensors"), {"a": mx.zeros(2)})
    with pytest.raises(SessionError, match="not a context"):
        PromptCache.load(tmp_path / "weights.safetensors", MODEL)
    whole = file.read_bytes()
    for size in (0, 5, 200, len(whole) - 8):
        file.write_bytes(whole[:size])
        with pytest.raises(SessionError, match="damaged"):
            PromptCache.load(file, MODEL)
    with pytest.raises(SessionError, match="cannot be written"):
        prompt_cache.save(tmp_path / "no" / "such" / "folder")
    with pytest.raises(SessionError, match="cannot be written"):
        prompt_cache.save(Path("/dev/full/x"))


def test_a_fingerprint_tells_weights_apart() -> None:
    same = untrained(20, 8, windows=(6, None, 9))
    assert fingerprint(same) == fingerprint(MODEL)
    same.model.decoder.layers[2].mlp.down_proj.weight = mx.zeros(
        same.model.decoder.layers[2].mlp.down_proj.weight.shape
    )
    assert fingerprint(same) != fingerprint(MODEL)


def test_contexts_of_earlier_prompts_are_kept_within_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = PrefixCache(MODEL, 1 << 20)
    first = kept.take([1] * 300)
    assert first.read([1] * 300) == 300
    kept.give(first)
    # Two at once may go on from it, and neither changes it for the other.
    one, two = kept.take([1] * 300 + [2]), kept.take([1] * 300 + [3])
    assert (one.read([1] * 300 + [2]), two.read([1] * 300 + [3, 4])) == (1, 2)
    np.testing.assert_allclose(
        logits(MODEL, two), fresh(MODEL, [1] * 300 + [3, 4]), rtol=2e-4, atol=2e-4
    )
    kept.give(one)
    kept.give(two)
    assert kept.take([1] * 300 + [2]).shared([1] * 300 + [2]) == 301
    assert len(kept.take([9])) == 0
    monkeypatch.setattr(module, "MOST_CACHES", 1)
    kept.give(kept.take([9]))
    assert kept.take([1] * 300 + [2]).shared([1] * 300 + [2]) == 0
    # What begins alike and goes on otherwise, as prompts that declare other tools, was read whole
    # each time: nothing was left to go back to.
    for last, saved in ((5, 0), (6, 0), (7, 290)):
        other = kept.take([1] * 290 + [last] * 20)
        assert other.read([1] * 290 + [last] * 20) == 310 - saved
        kept.give(other)
    none = PrefixCache(MODEL, 0)
    none.give(first)
    assert none.nbytes == 0
