"""The adapter for lm-evaluation-harness, where the extra is installed."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from mlx_diffgemma import load, score
from mlx_diffgemma.measure.lm_eval import DiffusionGemmaLM

ROOM = 300  # tokens of context: a whole one takes minutes


@pytest.fixture
def short() -> DiffusionGemmaLM:
    """The small model with a short context."""
    made = DiffusionGemmaLM()
    made._model.context = ROOM
    return made


def asking(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def test_answers_are_cut_at_stop_strings_and_budgets() -> None:
    model = DiffusionGemmaLM("tiny-puzzles", steps=2)
    grid = "12.4\n.412\n2.43\n43.1"

    def ask(context: str = grid, **flags: Any) -> str:
        return model.generate_until([asking(context, flags)], disable_tqdm=True)[0]

    whole = ask()
    assert "\n" in whole
    assert ask(until=["\n"]) == whole.split("\n")[0]
    assert ask(until="\n", max_gen_toks=2) == whole[:2]
    assert ask(model.apply_chat_template([{"role": "user", "content": grid}])) == whole


def test_likelihoods_are_scores(short: DiffusionGemmaLM) -> None:
    loaded, tokenizer = load()
    bos = tokenizer.token_id("<bos>")
    asked = [
        ("The capital of Norway is", " Oslo."),
        ("", "a small house"),
        ("The capital of Norway is ", "Rome."),
        ("a " * ROOM, "river"),  # longer than the context: its end is what counts
    ]
    found = short.loglikelihood([asking(*each) for each in asked], disable_tqdm=True)
    for (context, text), (total, greedy) in zip(asked, found, strict=True):
        whole = [bos, *tokenizer.encode(context + text)]
        ids = whole[len(tokenizer.encode(context.rstrip())) + 1 :]
        before = whole[: -len(ids)][-(ROOM - len(ids)) :]
        expected = score(loaded, tokenizer, before, ids)
        assert total == pytest.approx(expected.total, abs=1e-3)
        assert greedy == expected.greedy


def test_a_text_beyond_the_context_is_scored_in_windows(short: DiffusionGemmaLM) -> None:
    loaded, tokenizer = load()
    story = "a small house near the river\n" * 15
    ids = tokenizer.encode(story)
    left = len(ids) - (ROOM - 1)
    assert 0 < left < ROOM
    asked = [asking(story), asking(""), asking("a house")]
    rolled = short.loglikelihood_rolling(asked, disable_tqdm=True)
    first = score(loaded, tokenizer, None, ids[: ROOM - 1]).total
    rest = score(loaded, tokenizer, ids[-ROOM:-left], ids[-left:]).total
    assert rolled[0] == pytest.approx(first + rest, rel=1e-4)
    assert rolled[1:] == [0, pytest.approx(score(loaded, tokenizer, None, "a house").total)]
