"""Fills as an editor wants them: bounded work, whatever stands around the hole, and little read."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_model import untrained

from mlx_diffgemma import Tokenizer
from mlx_diffgemma.checkpoint.load import EMBEDDED
from mlx_diffgemma.diffusion.prompt_cache import PrefixCache
from mlx_diffgemma.tasks.fill import QUICK_STEPS, FillRequest, FillResult, fill
from mlx_diffgemma.tasks.gaps import QUICK_LENGTHS, WINDOW, steady
from mlx_diffgemma.tasks.request import run_prepared
from mlx_diffgemma.text.template import Hole
from mlx_diffgemma.text.vocabulary import Vocabulary

TOKENIZER = Tokenizer.from_directory(EMBEDDED)

MODEL = untrained(TOKENIZER.vocab_size, 96, context=6000, windows=(16, None))

AROUND = st.text("ab (\t\r\n)é😀\U0001f9d1\u200d", max_size=30) | st.sampled_from(
    ["", "x = 1\r\n" * 60, "\n", ")", " ", "word " * 400]
)


@settings(max_examples=10, deadline=None)
@given(AROUND, AROUND, st.sampled_from([1, 4, 16, 100_000]), st.booleans(), st.integers(0, 99))
def test_work_is_bounded_whatever_stands_around(
    before: str, behind: str, most: int, line: bool, seed: int
) -> None:
    """A model that never settles took all 48 steps, of whole canvases."""
    parts = [part for part in (before, Hole("x", most=most, line=line), behind) if part != ""]
    result = fill(MODEL, TOKENIZER, parts, prompt="x", seed=seed, quick=True)
    written = len(result.probabilities["x"])
    assert 1 <= written <= min(most, 32)
    assert result.text == before + str(result.values["x"]) + behind
    assert not (line and "\n" in str(result.values["x"]))
    assert result.steps <= QUICK_STEPS + 1 + written
    assert result.positions_decoded <= 96 * (len(QUICK_LENGTHS) * QUICK_STEPS + 1 + written)


def test_what_was_read_for_one_keystroke_serves_the_next() -> None:
    """Typing changed the last token, and with it all was read again."""
    cache, vocabulary = PrefixCache(MODEL, 10**9), Vocabulary(MODEL, TOKENIZER)
    text = "".join(f"line {i} has the number {i * i}\n" for i in range(100))
    new: list[int] = []
    for typed in ("t", "th", "the", "o", "of", "\n"):
        parts = [text + typed, Hole("x", most=2), "\nend"]
        prepared = FillRequest(parts, steps=1, seed=0, quick=True).prepare(MODEL, vocabulary)
        prompt_cache = cache.take(prepared.prompt)
        *_, result = run_prepared(MODEL, prepared, prompt_cache)
        assert isinstance(result, FillResult)
        cache.give(prompt_cache)
        new.append(result.read_tokens - result.cached_tokens)
    assert new[0] > 1000
    assert max(new[1:]) < 100, new


def test_a_window_that_moves_begins_where_it_began() -> None:
    lines = [f"    total_{i} = {i * i}  # of {i}\n" for i in range(700)]
    begins: list[str] = []
    for cursor in range(300, 600):
        near = steady("".join(lines[cursor - 256 : cursor]) + "x")
        assert len(near) > 0.7 * 256 * len(lines[400])
        assert near.endswith(lines[cursor - 1] + "x")
        begins.append(near[: near.index("\n") + 1])
    assert set(begins) <= set(lines)
    assert len(set(begins)) < 30
    short = "x" * (WINDOW - 1)
    assert steady(short) == short
    assert steady("y" * 50_000, 9_000) == "y" * 9_000


@pytest.mark.parametrize(("text", "room"), [("ab ", 12), ("word " * 99, 6), ("ab" * 20, 48)])
def test_a_canvas_is_no_longer_than_it_needs_to_be(text: str, room: int) -> None:
    """A long text left of the hole is context; a short one stands on the canvas, as elsewhere."""
    vocabulary = Vocabulary(MODEL, TOKENIZER)
    parts = [text, Hole("x", most=2), " cd"]
    assert FillRequest(parts, quick=True).prepare(MODEL, vocabulary).room == room
    assert FillRequest(parts).prepare(MODEL, vocabulary).room == 96
    far = [*parts[:2], "word " * 999]
    assert FillRequest(far, quick=True).prepare(MODEL, vocabulary).room == 48
