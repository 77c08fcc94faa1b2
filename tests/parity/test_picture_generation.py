"""Answers to prompts with pictures = the reference's, step by step, with its own random draws."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reference import Replay, Run, record
from replaying import assert_same, steps_of
from seeing import IMAGE, PATCH, seeing_checkpoint
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import (
    DiffusionGemmaForBlockDiffusion,
)
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from mlx_diffgemma import DiffusionGemma, Request, Tokenizer
from mlx_diffgemma.checkpoint.load import load
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
