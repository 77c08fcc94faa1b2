"""The small model that was trained to see answers as transformers does, draw for draw."""

import json

import torch
from paths import SEEING
from PIL import Image
from reference import Replay, record
from replaying import assert_same, steps_of
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import (
    DiffusionGemmaForBlockDiffusion,
)
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from mlx_diffgemma import Request
from mlx_diffgemma.checkpoint.load import load
from mlx_diffgemma.text.vocabulary import Vocabulary


def test_a_trained_tower_and_what_is_answered_behind_it() -> None:
    reference = DiffusionGemmaForBlockDiffusion.from_pretrained(SEEING, dtype="float32").eval()
    model, tokenizer = load(SEEING, dtype="float32")
    assert model.sight is not None
    config = model.sight.config
    processor = Gemma4ImageProcessorPil(
        patch_size=config.vision.patch_size,
        pooling_kernel_size=config.vision.pool,
        max_soft_tokens=config.budget,
    )
    lines = (SEEING / "questions.jsonl").read_text().splitlines()[:12]
    with Image.open(SEEING / "pictures.png") as opened:
        sheet = opened.convert("RGB")
    steps = set()
    for number, line in enumerate(lines):
        image, case = sheet.crop((64 * number, 0, 64 * (number + 1), 64)), json.loads(line)
        parts = [{"type": "image", "image": image}, {"type": "text", "text": case["prompt"]}]
        chat = [{"role": "user", "content": parts}]
        ids = Request(chat).prepare(model, Vocabulary(model, tokenizer)).prompt
        given = processor([image], return_tensors="pt")
        run = record(
            reference,
            [int(token) for token in ids],
            seed=number,
            pixel_values=given["pixel_values"].float(),
            image_position_ids=given["image_position_ids"],
            mm_token_type_ids=(torch.tensor([ids]) == config.image).long(),
        )
        states, tokens = steps_of(model, ids, Replay(run))
        assert_same(states, tokens, run)
        steps.add(len(states))
    assert len(steps) > 1  # not one lucky length
