"""The training's own model: what it computes is what the reference's classes compute."""

import sys
from pathlib import Path

import torch
from paths import ROOT
from tokenizers import Tokenizer

sys.path.insert(0, str(ROOT / "scripts"))
import tiny_batches
import tiny_data
import train_tiny
from tiny_model import Model, Shape

SHAPE = Shape(768, hidden=64, intermediate=64, expert=32, layers=2, heads=2)


def made() -> Model:
    """A random model whose norms and scales are not all 1."""
    torch.manual_seed(0)
    model = Model(SHAPE)
    model.start()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "scale" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            parameter.copy_(parameter.bfloat16())
    return model


@torch.no_grad()
def test_padded_prompts_give_the_logits_of_the_reference(tmp_path: Path) -> None:
    from transformers.cache_utils import DynamicCache
    from transformers.models.diffusion_gemma import modeling_diffusion_gemma as reference

    model = made()
    train_tiny.export(model, tmp_path / "model")
    kind = reference.DiffusionGemmaForBlockDiffusion
    theirs = kind.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    ids, canvas = torch.randint(20, 768, (2, 12)), torch.randint(768, (2, 64))
    belief = 3 * torch.randn(2, 64, 768)
    cache = DynamicCache(config=theirs.config.text_config)
    read = theirs.model.encoder.language_model(input_ids=ids, past_key_values=cache)
    written = theirs.model.decoder(
        decoder_input_ids=canvas, past_key_values=cache, self_conditioning_logits=belief
    )
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], dim=1)
    hidden, own = model.encode(padded, padded > 0)
    assert torch.allclose(hidden[:, 5:], read.last_hidden_state, atol=1e-4)
    soft = belief.softmax(-1) @ model.embed_tokens.weight * SHAPE.hidden**0.5
    hidden = model.decode(canvas, soft, own, padded > 0)
    assert torch.allclose(hidden, written.last_hidden_state, atol=1e-4)


def test_rows_are_what_the_package_reads() -> None:
    tokenizer = Tokenizer.from_file(str(train_tiny.SHIPPED / "tokenizer.json"))
    example = tiny_data.Example(
        "gap",
        "word",
        "Fill: a ... house",
        "a small house",
        (("a", True), (" small", False), (" house", True)),
        history=(("system", "Be brief."),),
    )
    rows, kept = tiny_batches.encode(tokenizer, [example], 96)
    assert kept == [example]
    prompt = tokenizer.decode(
        rows.prompt[0][rows.prompt[0] > 0].tolist(), skip_special_tokens=False
    )
    system, user = "system\nBe brief.", "user\nFill: a ... house"
    assert prompt == f"<bos><|turn>{system}<turn|>\n<|turn>{user}<turn|>\n<|turn>model\n"
    free = rows.pinned[0] == 0
    assert tokenizer.decode(rows.target[0][free].tolist()) == " small"
    assert rows.target[0, rows.length[0, 0] - 1] == tiny_batches.END
