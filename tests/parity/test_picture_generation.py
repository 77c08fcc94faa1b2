"""Answers to prompts with pictures = the reference's, step by step, with its own random draws."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from looking import IMAGE, PATCH
from PIL import Image
from reference import Replay, Run, record
from replaying import assert_same, steps_of
from seeing import seeing_checkpoint
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import (
    DiffusionGemmaForBlockDiffusion,
)
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from mlx_diffgemma import DiffusionGemma, PromptCache, Request, Tokenizer
from mlx_diffgemma.checkpoint.files import read_tensors
from mlx_diffgemma.checkpoint.load import load
from mlx_diffgemma.checkpoint.vision import load_vision
from mlx_diffgemma.convert import convert
from mlx_diffgemma.model.placeholders import RULES
from mlx_diffgemma.model.sight import Sight
from mlx_diffgemma.text.vocabulary import Vocabulary


def noise(height: int, width: int) -> Image.Image:
    drawn = np.random.default_rng(height).integers(0, 256, (height, width, 3))
    return Image.fromarray(drawn.astype(np.uint8))


ONE, OTHER = noise(90, 130), noise(200, 40)


def said(role: str, *parts: str | Image.Image) -> dict[str, Any]:
    """A message of texts and pictures."""
    kinds = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part, "tokens": 70}
        for part in parts
    ]
    return {"role": role, "content": kinds}


# The window is of 8 tokens: each picture is longer, and of some the canvas sees nothing there.
CHATS: dict[str, list[dict[str, Any]]] = {
    "first": [said("user", ONE, "What?")],
    "in the middle": [said("user", "Look here: ", ONE, " What is it?")],
    "two": [said("user", "Compare ", ONE, " and ", OTHER, ".")],
    "two next to each other": [said("user", ONE, OTHER)],
    "the same twice": [said("user", ONE, "and", ONE)],
    "beyond the window": [said("user", ONE, "A question of more characters than the window has.")],
    "of a system message and a tool": [
        said("system", "See ", ONE),
        said("user", "What?"),
        said("tool", OTHER),
    ],
}


def recorded(
    reference: DiffusionGemmaForBlockDiffusion, ids: list[int], images: list[Image.Image]
) -> Run:
    """What the reference makes of a prompt."""
    processor = Gemma4ImageProcessorPil(patch_size=PATCH, max_soft_tokens=70)
    given = processor(images, return_tensors="pt")
    return record(
        reference,
        [int(token) for token in ids],
        seed=1,
        pixel_values=given["pixel_values"].float(),
        image_position_ids=given["image_position_ids"],
        mm_token_type_ids=(torch.tensor([ids]) == IMAGE).long(),
    )


def images_of(chat: list[dict[str, Any]]) -> list[Image.Image]:
    return [part["image"] for each in chat for part in each["content"] if "image" in part]


def prompt_of(model: DiffusionGemma, tokenizer: Tokenizer, chat: list[dict[str, Any]]) -> list[int]:
    return Request(chat).prepare(model, Vocabulary(model, tokenizer)).prompt


CHUNKS = [*((case, 10_000) for case in CHATS), ("in the middle", 5), ("two", 30), ("two", 5)]


@pytest.mark.parametrize(("case", "chunk"), CHUNKS)
def test_an_answer_to_pictures(tmp_path: Path, case: str, chunk: int) -> None:
    """In one chunk, and in chunks that would end within a picture or are shorter than one."""
    reference = seeing_checkpoint(tmp_path, feedback=0.1)
    model, tokenizer = load(tmp_path, dtype="float32")
    ids = prompt_of(model, tokenizer, CHATS[case])
    run = recorded(reference, ids, images_of(CHATS[case]))
    states, tokens = steps_of(model, ids, Replay(run), chunk)
    assert_same(states, tokens, run)
    assert len(run.ends) == 2
    assert tokens == run.sequence


@pytest.mark.parametrize("border", [60, None])
def test_a_picture_in_the_second_turn(tmp_path: Path, border: int | None) -> None:
    """Behind a first turn that is in the cache, with a picture of its own and an answer: as one
    prefill of both. Others read it causally then."""
    reference = seeing_checkpoint(tmp_path, feedback=0.1)
    model, tokenizer = load(tmp_path, dtype="float32")
    before = [said("user", ONE, "What?"), {"role": "assistant", "content": "A cat"}]
    chat = [*before, said("user", "And ", OTHER, " here?")]
    ids = prompt_of(model, tokenizer, chat)
    run = recorded(reference, ids, [ONE, OTHER])
    first = prompt_of(model, tokenizer, before[:1])
    cache = PromptCache(model)
    cache.read(first)
    cache.extend(ids[len(first) : len(first) + 3])  # of the answer
    assert cache.shared(ids) == len(first) + 3
    states, tokens = steps_of(model, ids, Replay(run), border or 10_000, cache)
    assert_same(states, tokens, run)
    assert tokens == run.sequence


def test_a_packed_model_is_its_own_unpacked_one(tmp_path: Path) -> None:
    """In the layout of published 4-bit files: tower as it was, projection and text model packed."""
    tower = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 64}
    text = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
    seeing_checkpoint(tmp_path / "source", tower=tower, text=text, feedback=0.1)
    packed = convert(tmp_path / "source", tmp_path / "packed", dtype="float32").directory
    plain = convert(packed, tmp_path / "plain", dequantize=True, dtype="float32").directory
    names = read_tensors(packed)
    assert names["model.encoder.embed_vision.embedding_projection.weight"].dtype == "U32"
    inner = "model.encoder.vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight"
    assert names[inner].dtype == "F32"
    assert "model.decoder.layers.0.experts.gate_up_proj.scales" in names
    half = convert(tmp_path / "source", tmp_path / "half", dtype="bfloat16").directory
    assert read_tensors(half)[inner].dtype == "BF16"
    (packed / "generation_config.json").unlink()  # theirs stands in config.json alone
    reference = DiffusionGemmaForBlockDiffusion.from_pretrained(plain, dtype="float32").eval()
    model, tokenizer = load(packed, dtype="float32")
    ids = prompt_of(model, tokenizer, CHATS["two"])
    run = recorded(reference, ids, [ONE, OTHER])
    states, tokens = steps_of(model, ids, Replay(run))
    assert_same(states, tokens, run)
    assert tokens == run.sequence
    assert len(run.ends) == 2


@pytest.mark.parametrize("rule", ["reference", "gemma"])
def test_both_rules_give_the_same_in_chunks(tmp_path: Path, rule: str) -> None:
    """And another than each other, so that the setting is not ignored."""
    seeing_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "picture_mask": rule}))
    model, tokenizer = load(tmp_path, dtype="float32")
    ids = prompt_of(model, tokenizer, CHATS["two"])
    canvas = mx.array([ids[:16]])
    found = []
    for chunk in (10_000, 70, 9):
        cache = PromptCache(model)
        cache.read(ids, chunk)
        found.append(np.array(model(canvas, cache.cache)))
    for each in found[1:]:
        assert np.abs(each - found[0]).max() < 1e-4
    model.sight = Sight({**config, "picture_mask": RULES[rule == "reference"]}, *late(tmp_path))
    cache = PromptCache(model)
    cache.read(ids)
    assert np.abs(np.array(model(canvas, cache.cache)) - found[0]).max() > 1e-2


def late(directory: Path) -> tuple[Any, Any]:
    return lambda: load_vision(directory), lambda: 4096
