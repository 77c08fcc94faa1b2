"""Editing: the rest of a text stays, files are replaced at once, nothing is half-written."""

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_model import untrained

from mlx_diffgemma import Tokenizer, load
from mlx_diffgemma.arguments import SettingError
from mlx_diffgemma.checkpoint.load import EMBEDDED
from mlx_diffgemma.diffusion.decoding import drive
from mlx_diffgemma.diffusion.denoise import denoise
from mlx_diffgemma.diffusion.draws import SeededDraws
from mlx_diffgemma.diffusion.prompt_cache import prefill
from mlx_diffgemma.tasks.edit import EditError, _without, edit, edit_start, split_lines
from mlx_diffgemma.tasks.request import encode_prompt
from mlx_diffgemma.tasks.starts import CanvasError
from mlx_diffgemma.text.vocabulary import Vocabulary

TOKENIZER = Tokenizer.from_directory(EMBEDDED)
RANDOM = untrained(TOKENIZER.vocab_size, 32, context=400)


def test_lines() -> None:
    text = "a\nb\r\nc\n\n"
    assert split_lines(text, None) == ("", "a\nb\r\nc", "\n\n")
    assert split_lines(text, (2, 2)) == ("a\n", "b", "\r\nc\n\n")
    assert split_lines(text, (2, 3)) == ("a\n", "b\r\nc", "\n\n")
    for lines, message in (((2, 1), "no range"), ((0, 1), "no range"), ((1, 5), "no line 5")):
        with pytest.raises(EditError, match=message):
            split_lines(text, lines)


LINE = st.text("ab 12é日.,", max_size=7)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(LINE, min_size=1, max_size=12),
    st.integers(0, 11),
    st.integers(0, 3),
    st.sampled_from([0.05, 0.4, 1.0]),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_only_the_part_changes(
    lines: list[str], first: int, more: int, strength: float, seed: int, verify: bool
) -> None:
    """Any model; the text behind the part is longer than a canvas, shorter, or nothing."""
    first = min(first, len(lines) - 1)
    last = min(first + more, len(lines) - 1)
    text = "\n".join(lines) + "\n"
    span = (first + 1, last + 1)
    arguments = {"lines": span, "strength": strength, "steps": 3, "seed": seed, "verify": verify}
    if not "".join(lines[first : last + 1]).strip():
        with pytest.raises(EditError, match="nothing to edit"):
            edit(RANDOM, TOKENIZER, text, "x", **arguments)
        return
    result = edit(RANDOM, TOKENIZER, text, "x", **arguments)
    left, _, right = split_lines(text, (first + 1, last + 1))
    assert result.text.startswith(left)
    assert result.text.endswith(right)
    assert len(result.text) >= len(left) + len(right)


def test_what_is_not_accepted_goes_back_to_the_users_text() -> None:
    """Fresh noise used to destroy a text that was to be repaired."""
    model, tokenizer = load()
    draws = SeededDraws(2, model.config.vocab_size)
    text = "a smal hosue near the river"
    start = edit_start(model, Vocabulary(model, tokenizer), text, "", 0.4, model.generation, draws)
    ids = tokenizer.encode(text)
    own = mx.array(ids)
    assert start.background is not None
    assert start.background[0, : len(ids)].tolist() == ids
    noised = (start.canvas[0, : len(ids)] != own).sum().item()
    assert 0 < noised < len(ids)
    assert start.first_step == 1 + round(0.6 * 47)
    cache = model.make_cache()
    prefill(model, encode_prompt(tokenizer, f"Fix: {text}"), cache)
    for state in drive(model, denoise(model, cache, model.generation, draws, start)):
        free = ~state.accepted[0, : len(ids)]
        assert (mx.where(free, state.canvas[0, : len(ids)], own) == own).all().item()


def test_the_part_ends_where_the_text_behind_it_begins() -> None:
    end = 99
    assert _without([1, 2, 3, 7, 8, end, 0, 0], end, [7, 8]) == [1, 2, 3]
    assert _without([1, 2, 3, 7, 8], end, [7, 8, 9, 9]) == [1, 2, 3]
    assert _without([1, 7, 7, 7], end, [7, 7, 8]) == [1, 7]
    assert _without([1, 2, 3, end], end, []) == [1, 2, 3]


def test_a_long_part_is_rewritten_in_pieces_and_a_long_line_is_refused() -> None:
    text = "".join(f"line {i} ab\n" for i in range(12))
    result = edit(RANDOM, TOKENIZER, text, "x", steps=4, strength=0.05, seed=0)
    assert result.steps >= 4
    with pytest.raises(CanvasError, match="line 2 of what is to be edited is over 24 tokens long"):
        edit(RANDOM, TOKENIZER, "a\n" + "1" * 40, "x")
    with pytest.raises(SettingError, match="strength"):
        edit(RANDOM, TOKENIZER, "a", "x", strength=0)
    with pytest.raises(EditError, match="nothing to edit"):
        edit(RANDOM, TOKENIZER, " \n", "x")
