"""Prompts with pictures: the encoder's masks and hidden states equal transformers'."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from PIL import Image
from seeing import BEGIN, END, IMAGE, PATCH, seeing_checkpoint
from transformers import DynamicCache
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.gemma4.modeling_gemma4 import Gemma4ForConditionalGeneration

from mlx_diffgemma.arguments import SettingError
from mlx_diffgemma.checkpoint.load import load_model
from mlx_diffgemma.checkpoint.vision import load_vision
from mlx_diffgemma.images.picture import Grid, picture_of
from mlx_diffgemma.model.placeholders import (
    Kept,
    PictureRule,
    picture_mask,
    placed,
    placeholders,
    runs,
)

TEXT, MORE = [2, 5, 6, 9, 11, 3, 4, 8, 1, 7], [8, 9, 10]


def image(height: int, width: int) -> Image.Image:
    drawn = np.random.default_rng(height).integers(0, 256, (height, width, 3))
    return Image.fromarray(drawn.astype(np.uint8))


IMAGES = [image(90, 130), image(200, 40)]


def tokens(count: int) -> list[int]:
    """Those of some picture."""
    return [*placeholders(IMAGE, [Kept(bytes([count]), 3, 3 * count, count)])]


def prompt(counts: list[int]) -> list[int]:
    """Text, a picture, text, another, text."""
    first, second = ([BEGIN, *tokens(count), END] for count in counts)
    return [*TEXT, *first, *MORE, *second, *MORE]


def reference_masks(model: Any, ids: list[int], cache: Any) -> Any:
    tokens = torch.tensor([ids])
    return model.model.encoder.create_masks_for_generate(
        config=model.config,
        inputs_embeds=torch.empty(1, len(ids), 0),
        attention_mask=torch.ones_like(tokens).bool(),
        past_key_values=cache,
        position_ids=torch.arange(len(ids))[None],
        mm_token_type_ids=(tokens == IMAGE).long(),
    )


@pytest.mark.parametrize("borders", [[], [10], [4, 10]])
def test_the_encoder_reads_pictures_as_the_reference_does(
    tmp_path: Path, borders: list[int]
) -> None:
    """Two pictures longer than the window: at once, or behind text that was read before."""
    model = seeing_checkpoint(tmp_path)
    processor = Gemma4ImageProcessorPil(patch_size=PATCH, max_soft_tokens=70)
    given = processor(IMAGES, return_tensors="pt")
    ids = prompt([int(each) for each in given["num_soft_tokens_per_image"]])
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        theirs = model.model.encoder(
            input_ids=torch.tensor([ids]),
            attention_mask=reference_masks(model, ids, cache),
            pixel_values=given["pixel_values"].float(),
            image_position_ids=given["image_position_ids"],
            past_key_values=cache,
        ).last_hidden_state[0]
    ours, seen = load_model(tmp_path), load_vision(tmp_path)
    pictures = [picture_of(each, 70, Grid(patch_size=PATCH)) for each in IMAGES]
    features = [seen(mx.array(each.patches), each.rows, each.columns) for each in pictures]
    embedded = placed(ours.embed(mx.array([ids])), features, runs(ids))
    held, parts = ours.make_cache(), []
    for first, last in zip([0, *borders], [*borders, len(ids)], strict=True):
        mask = picture_mask(runs(ids[first:last]))
        tokens = mx.array([ids[first:last]])
        parts.append(ours.encode(tokens, held, embedded[:, first:last], mask=mask))
    hidden = np.array(mx.concatenate(parts, axis=1)[0])
    assert np.abs(hidden - theirs.numpy()).max() < 1e-4 * np.abs(theirs.numpy()).max()


@pytest.mark.parametrize("rule", ["reference", "gemma"])
def test_masks_are_those_of_both_references(tmp_path: Path, rule: PictureRule) -> None:
    """DiffusionGemma's, and Gemma 4's, which was corrected and DiffusionGemma's was not."""
    model = seeing_checkpoint(tmp_path)
    ids = prompt([20, 11])
    cache = DynamicCache(config=model.config.text_config)
    if rule == "reference":
        theirs = reference_masks(model, ids, cache)
    else:
        tokens = torch.tensor([ids])
        theirs = Gemma4ForConditionalGeneration.create_masks_for_generate(
            config=model.config,
            inputs_embeds=torch.empty(1, len(ids), 0),
            attention_mask=torch.ones_like(tokens).bool(),
            past_key_values=cache,
            position_ids=torch.arange(len(ids))[None],
            mm_token_type_ids=(tokens == IMAGE).long(),
        )
    made = picture_mask(runs(ids), rule)
    for layer in load_model(tmp_path).make_cache():
        kind = "full_attention" if layer.window is None else "sliding_attention"
        mask = made(layer, len(ids))
        if isinstance(mask, str):
            mask = mx.tri(len(ids)).astype(mx.bool_)
        wanted = theirs[kind]
        if wanted is None:
            assert (rule, kind) == ("gemma", "full_attention")  # causal
            continue
        wanted = wanted[0, 0] if wanted.dtype == torch.bool else wanted[0, 0] == 0
        assert np.array_equal(np.array(mask), wanted.numpy())


def test_pictures_and_placeholders_have_to_go_together() -> None:
    of = runs([1, *tokens(2), 2, *tokens(1)])
    assert of == [-1, 0, 0, -1, 1]
    embedded = mx.zeros((1, 5, 4))
    one, two = mx.ones((2, 4)), mx.ones((1, 4))
    assert placed(embedded, [one, two], of).sum().item() == 12
    assert embedded.sum().item() == 0
    for pictures in ([one], [two, one], [one, two, two], []):
        with pytest.raises(SettingError, match="do not go with placeholders"):
            placed(embedded, pictures, of)
    for parts in (tokens(3)[:2], tokens(3)[1:], [*tokens(3)[:2], 4], tokens(2)[::-1]):
        with pytest.raises(SettingError, match="as a whole, or not at all"):
            runs([1, *parts])
    assert runs([*tokens(2), *tokens(2)]) == [0, 0, 1, 1]
