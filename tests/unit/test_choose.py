"""Probabilities of labels, against the chain rule written out one canvas at a time."""

import math
from typing import Any

import mlx.core as mx
import pytest

from mlx_diffgemma import DiffusionGemma, Tokenizer, load
from mlx_diffgemma.diffusion.draws import SeededDraws
from mlx_diffgemma.diffusion.prompt_cache import prefill
from mlx_diffgemma.model.diffusion_gemma import Pass
from mlx_diffgemma.tasks.choose import (
    MOST_CANVASES,
    Choice,
    ChooseError,
    ChooseRequest,
    _read,
    choose,
)
from mlx_diffgemma.tasks.request import encode_prompt
from mlx_diffgemma.text.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def loaded() -> tuple[DiffusionGemma, Tokenizer]:
    return load()


def chance(
    loaded: tuple[DiffusionGemma, Tokenizer], canvas: list[int | None], position: int, token: int
) -> float:
    """log p of a token at a position of one canvas, None being the noise of seed 0."""
    model, tokenizer = loaded
    cache = model.make_cache()
    prefill(model, encode_prompt(tokenizer, "Is it so?"), cache)
    noise = SeededDraws(0, model.config.vocab_size).tokens((1, 64))[0].tolist()
    ids = [n if t is None else t for t, n in zip(canvas, noise, strict=True)]
    p = mx.softmax(model(mx.array([ids]), cache)[0, position])
    return math.log(p[token].item())


def normalised(scores: dict[str, float]) -> dict[str, float]:
    total = sum(map(math.exp, scores.values()))
    return {label: math.exp(score) / total for label, score in scores.items()}


def test_labels_of_one_length_see_the_text_behind_them(
    loaded: tuple[DiffusionGemma, Tokenizer],
) -> None:
    _, tokenizer = loaded
    left, right = tokenizer.encode("a"), tokenizer.encode("b")
    tail = [*right, 6, *[1] * (64 - len(left) - 2 - len(right) - 1)]
    scores = {}
    for label in ("12", "13", "45"):
        first, second = tokenizer.encode(label)
        scores[label] = chance(loaded, [*left, None, None, *tail], len(left), first)
        scores[label] += chance(loaded, [*left, first, None, *tail], len(left) + 1, second)
    found = choose(*loaded, "Is it so?", {"x": list(scores)}, template="a{x}b")
    assert found == {"x": pytest.approx(normalised(scores), rel=1e-3)}
    assert sum(found["x"].values()) == pytest.approx(1)


def test_labels_of_different_lengths_count_the_token_behind_them(
    loaded: tuple[DiffusionGemma, Tokenizer],
) -> None:
    scores = {}
    for label in ("1", "12", "345"):
        ids = loaded[1].encode(label)
        scores[label] = sum(
            chance(loaded, [*ids[:i], *[None] * (64 - i)], i, token)
            for i, token in enumerate([*ids, 6])
        )
    found = choose(*loaded, "Is it so?", {"x": list(scores)})
    assert found == {"x": pytest.approx(normalised(scores), rel=1e-3)}


def test_one_decoder_pass_for_all_slots(
    loaded: tuple[DiffusionGemma, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    decode = DiffusionGemma.decode

    def counted(self: DiffusionGemma, asked: list[Pass], *evaluate: Any) -> list[mx.array]:
        passes.extend(asked)
        return decode(self, asked, *evaluate)

    monkeypatch.setattr(DiffusionGemma, "decode", counted)
    slots = {"spam": ["yes", "no"], "mood": ["good", "bad", "so so"]}
    found = choose(*loaded, "Is it so?", slots, template="spam: {spam}\nmood: {mood}.")
    assert len(passes) == 1
    assert {name: list(known) for name, known in found.items()} == slots
    alone = choose(*loaded, "Is it so?", {"mood": slots["mood"]}, template="\nmood: {mood}.")
    isolated = choose(
        *loaded, "Is it so?", slots, template="spam: {spam}\nmood: {mood}.", isolated=True
    )
    assert isolated["mood"] == pytest.approx(alone["mood"], rel=1e-3)
    assert isolated["mood"] != pytest.approx(found["mood"], rel=1e-3)


def test_a_trained_model_chooses_what_its_prompt_says(
    loaded: tuple[DiffusionGemma, Tokenizer],
) -> None:
    slots = {"item": ["pears", "books", "lamps"], "to": ["Anna", "Berta"]}
    template = '{"item":"{item}","count":12,"price":345,"to":"{to}"}'
    for item, to in zip(slots["item"], ["Anna", "Berta", "Anna"], strict=True):
        prompt = f"Record: 12 {item} at 345 to {to}"
        found = choose(*loaded, prompt, slots, template=template, draws=2)
        assert max(found["item"], key=found["item"].__getitem__) == item
        assert max(found["to"], key=found["to"].__getitem__) == to


def test_slots_that_cannot_be_scored(loaded: tuple[DiffusionGemma, Tokenizer]) -> None:
    for slots, template, message in (
        ({}, None, "no slot"),
        ({"x": ["a"]}, None, "at least two labels"),
        ({"x": ["a", ""]}, None, "at least two labels"),
        ({"x": ["a", "b"]}, "nothing", "must have {x} once"),
        ({"x": ["a", "b"]}, "{x}{x}", "must have {x} once"),
        ({"x": ["a", "b"]}, "1" * 64 + "{x}", "longer than a canvas of 64"),
        ({"x": ["1", "12"], "y": ["1", "2"]}, "{x}{y}", "text must stand behind"),
    ):
        with pytest.raises(ChooseError, match=message):
            choose(*loaded, "Is it so?", slots, template=template)


def test_what_cannot_fit_is_refused_before_it_is_encoded(
    loaded: tuple[DiffusionGemma, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template of a million braces took 47 s, on the thread that everybody waits for."""
    model, tokenizer = loaded
    vocabulary = Vocabulary(model, tokenizer)
    encode, sizes = Tokenizer.encode, []

    def noted(self: Tokenizer, text: str) -> list[int]:
        sizes.append(len(text))
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode", noted)
    two = ["a", "b"]
    for slots, template, isolated, message in (
        ({"x": two}, "{" * 1_000_000 + "{x}", False, "1,000,003 characters; a canvas has room for"),
        ({"x": two}, "{" * 1_000_000 + "{x}", True, "1,000,003 characters; a canvas has room for"),
        ({"n" * 9_000: two}, None, False, "names have more than 1,024 characters"),
        ({"x": ["a" * 90_000, "b"]}, None, False, "more than 4096 tokens together"),
    ):
        with pytest.raises(ChooseError, match=message):
            ChooseRequest("x", slots, template, isolated).prepare(model, vocabulary)
    assert sizes == []
    many = {"x": [f"{i:03}{i:03}" for i in range(500)]}
    with pytest.raises(ChooseError, match=rf"more than {MOST_CANVASES:,} canvases.* 64 draws"):
        ChooseRequest("x", many, draws=64).prepare(model, vocabulary)
    known = ChooseRequest("x", many).prepare(model, vocabulary)
    assert len(known.rows) < 500 * 4  # labels that begin alike share canvases


def test_what_is_read_of_a_canvas_is_a_number_for_each_label(
    loaded: tuple[DiffusionGemma, Tokenizer],
) -> None:
    """It was the whole vocabulary: of 4,000 canvases, four gigabytes with the real one."""
    model, tokenizer = loaded
    slots = {"x": ["12", "13", "4"]}
    question = ChooseRequest("x", slots, "{x}.").prepare(model, Vocabulary(model, tokenizer))
    run = _read(model, model.make_cache(), question.rows, mx.zeros((1, 64), dtype=mx.int32))
    asked = next(run)
    with pytest.raises(StopIteration) as ended:
        run.send(model.decode([asked])[0])
    assert [len(read) for read in ended.value.value] == [len(r.asked) for r in question.rows]
    assert all(log_p < 0 for read in ended.value.value for log_p in read)


def test_means_errors_and_agreement_by_hand() -> None:
    draws = [{"x": {"a": p, "b": 1 - p}, "y": {"c": 0.6, "d": 0.4}} for p in (0.9, 0.8, 0.4, 0.7)]
    found = Choice(draws)
    assert found == {"x": pytest.approx({"a": 0.7, "b": 0.3}), "y": {"c": 0.6, "d": 0.4}}
    # Deviations 0.2, 0.1, -0.3, 0: a variance of 0.14 / 3, of which a mean of four has a quarter.
    assert found.errors is not None
    assert found.errors["x"] == pytest.approx(dict.fromkeys("ab", math.sqrt(0.14 / 12)))
    assert found.errors["y"] == pytest.approx({"c": 0, "d": 0})
    assert found.agreement == {"x": 0.75, "y": 1}
    alone = Choice(draws[:1])
    assert (alone.errors, alone.facts()) == (None, {"probabilities": draws[0]})


def test_several_noises_are_those_that_are_drawn_one_by_one(
    loaded: tuple[DiffusionGemma, Tokenizer],
) -> None:
    slots = {"x": ["1", "2", "3"]}
    both = choose(*loaded, "Is it so?", slots, seed=5, draws=2)
    first = choose(*loaded, "Is it so?", slots, seed=5)["x"]
    assert both.errors is not None
    for label, chance in both["x"].items():
        # Of two numbers, half their distance is the error of their mean.
        assert abs(first[label] - chance) == pytest.approx(both.errors["x"][label], rel=1e-3)
    assert both.draws == 2
