"""A small model that was trained to see tells what is on pictures that its training held out."""

import json
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from paths import SEEING
from PIL import Image

from mlx_diffgemma import DiffusionGemma, Tokenizer, generate, load
from mlx_diffgemma.convert import RECIPES, convert
from mlx_diffgemma.model.cache import LayerCache
from mlx_diffgemma.model.placeholders import picture_mask
from mlx_diffgemma.model.sight import SightConfig

SIDE = 64  # pixels of a stored picture

QUESTIONS = [json.loads(line) for line in (SEEING / "questions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[DiffusionGemma, Tokenizer]:
    converted = tmp_path_factory.mktemp("seeing") / "out"
    convert(SEEING, converted, recipe=RECIPES["none"])
    return load(converted)


def picture(number: int) -> Image.Image:
    with Image.open(SEEING / "pictures.png") as sheet:
        return sheet.convert("RGB").crop((SIDE * number, 0, SIDE * (number + 1), SIDE))


def asked(image: Image.Image, question: str) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


def test_questions_about_pictures_are_answered(loaded: tuple[DiffusionGemma, Tokenizer]) -> None:
    """Number, colour, place, digit, and the record; larger pictures are seen at the same size."""
    right = []
    for number, case in enumerate(QUESTIONS):
        image = picture(number)
        if number % 2:
            image = image.resize((4 * SIDE, 4 * SIDE), Image.Resampling.NEAREST)
        answer = generate(*loaded, asked(image, case["prompt"]), seed=number)
        right.append(answer == case["answer"])
    assert {case["kind"] for case in QUESTIONS} >= {"number", "colour", "place", "digit", "record"}
    assert len(right) >= 40
    assert np.mean(right) >= 0.95


def test_without_the_right_picture_they_are_not(loaded: tuple[DiffusionGemma, Tokenizer]) -> None:
    """What is answered comes from the picture, not from the question."""
    others = zip(QUESTIONS, np.roll(np.arange(len(QUESTIONS)), 1), strict=True)
    right = [
        generate(*loaded, asked(picture(int(number)), case["prompt"])) == case["answer"]
        for case, number in others
    ]
    assert np.mean(right) < 0.5


def test_a_config_that_reads_both_ways_nowhere_reads_pictures_as_text() -> None:
    """They saw each other whatever the config said; transformers reads them causally then."""
    values = json.loads((SEEING / "config.json").read_text())
    text = {**values["text_config"], "use_bidirectional_attention": None}
    assert SightConfig.from_dict(values).rule == "reference"
    assert SightConfig.from_dict({**values, "text_config": text}).rule == "causal"
    layer = LayerCache(4)
    for new in ([-1, 0, 0, 0, -1], [0] * 9):
        mask, plain = picture_mask(new, "causal")(layer, len(new)), layer.encoder_mask(len(new))
        assert mask == "causal" if plain == "causal" else mx.array_equal(mask, plain)
