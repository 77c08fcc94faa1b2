"""Training on pictures: what is held out, and that what is computed is what others compute."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import tiny_objective
import train_pictures as training
from tiny_model import Model, Shape
from tiny_pictures import KINDS, draw, draw_scene, held_out, questions, record
from tiny_tower import Tower, patches_of, pixels_of
from transformers.cache_utils import DynamicCache
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import (
    DiffusionGemmaForBlockDiffusion,
)
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from mlx_diffgemma import Request, load
from mlx_diffgemma.text.vocabulary import Vocabulary

SHAPE = Shape(training.VOCAB, hidden=32, intermediate=32, expert=16, layers=3, heads=2, experts=4)


def test_no_scene_is_both_trained_on_and_held_out() -> None:
    rng = random.Random(0)
    trained = {record(draw_scene(rng, held_out=False)) for _ in range(3000)}
    tested = {record(scene) for scene, _, _ in held_out(300, 1)}
    assert len(tested) > 100
    assert not trained & tested


def test_every_kind_is_asked_and_answers_follow_from_the_scene() -> None:
    cases = held_out(60, 2)
    assert {question.kind for _, _, question in cases} == set(KINDS)
    for scene, _, question in cases:
        found = [each for each in scene if each.colour == question.answer]
        assert question.kind != "colour" or found
        assert question.kind != "record" or question.answer == record(scene)


@torch.no_grad()
def test_a_picture_read_once_for_several_questions_is_read_as_the_reference_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training's short way, its long way, transformers' classes, and the package's prompt."""
    torch.manual_seed(0)
    tower, model = Tower(SHAPE.hidden), Model(SHAPE)
    tower.start()
    model.start()
    rng = random.Random(3)
    scene = draw_scene(rng, held_out=True)
    image = draw(rng, scene)
    patches = patches_of(np.stack([pixels_of(image)]))
    tower.standardize(patches)
    stored = [*model.state_dict().values(), *tower.state_dict().values()]
    for array in stored:  # as a file holds them
        array.copy_(array.bfloat16())
    tokenizer = training.make_tokenizer()
    training.save(model, tower, tokenizer, tmp_path)
    asked = questions(rng, scene)[:2]
    pictures = tower.embed_vision(tower.features(patches))
    long, short = (training.rows(tokenizer, asked, whole=each) for each in (True, False))
    canvas = torch.randint(training.VOCAB, long.target.shape)
    nothing = torch.zeros(*canvas.shape, SHAPE.hidden)
    real = long.prompt > 0
    _, cache = model.encode(long.prompt, real, pictures.repeat(2, 1, 1))
    expected = model.decode(canvas, nothing, cache, real)

    found = []

    def decoded(model: Model, batch: object, cache: object, real: object, first: object) -> object:
        found.append(model.decode(canvas, nothing, cache, real, first))
        return torch.zeros(2)

    monkeypatch.setattr(training, "denoising_loss", decoded)
    before = tokenizer.encode(training.BEFORE, add_special_tokens=False).ids
    training.loss_behind(model, torch.tensor([before]), pictures, short)
    assert torch.allclose(found[0], expected, atol=1e-4)

    kind = DiffusionGemmaForBlockDiffusion
    theirs = kind.from_pretrained(tmp_path / "tiny_vision", dtype=torch.float32).eval()
    ours, ids = load(tmp_path / "tiny_vision")
    parts = [{"type": "image", "image": image}, {"type": "text", "text": asked[0].prompt}]
    chat = [{"role": "user", "content": parts}]
    prompt = [int(i) for i in Request(chat).prepare(ours, Vocabulary(ours, ids)).prompt]
    assert prompt == long.prompt[0][real[0]].tolist()
    processor = Gemma4ImageProcessorPil(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70)
    pixels = processor([image], return_tensors="pt")
    tokens = torch.tensor([prompt])
    cache = DynamicCache(config=theirs.config.text_config)
    masks = theirs.model.encoder.create_masks_for_generate(
        config=theirs.config,
        inputs_embeds=torch.empty(1, len(prompt), 0),
        attention_mask=torch.ones_like(tokens).bool(),
        past_key_values=cache,
        position_ids=torch.arange(len(prompt))[None],
        mm_token_type_ids=(tokens == theirs.config.image_token_id).long(),
    )
    theirs.model.encoder(
        input_ids=tokens,
        attention_mask=masks,
        pixel_values=pixels["pixel_values"].float(),
        image_position_ids=pixels["image_position_ids"],
        past_key_values=cache,
    )
    written = theirs.model.decoder(decoder_input_ids=canvas[:1], past_key_values=cache)
    assert torch.allclose(written.last_hidden_state, expected[:1], atol=1e-3)


def test_sampling_counts_what_is_right() -> None:
    """`tested` names every kind, and says none is right where nothing was learnt."""
    torch.manual_seed(0)
    model, tower = Model(SHAPE), Tower(SHAPE.hidden)
    model.start()
    tower.start()
    cases = held_out(6, 4)
    batch = training.rows(training.make_tokenizer(), [q for _, _, q in cases], whole=True)
    pictures = torch.randn(6, training.TOKENS, SHAPE.hidden)
    said = training.tested(model, pictures, batch)
    assert all(f"{kind} 0" in said for kind in KINDS)
    assert tiny_objective.right(batch.target, batch).all()
