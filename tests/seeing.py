"""Random checkpoints of the reference with a vision tower, small and lively; `load` reads them."""

import json
import string
from pathlib import Path
from typing import Any

import torch
from reference import SAMPLER, TEXT, layer_types
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend
from transformers.models.diffusion_gemma import generation_diffusion_gemma as generation
from transformers.models.diffusion_gemma.configuration_diffusion_gemma import (
    DiffusionGemmaConfig,
    DiffusionGemmaTextConfig,
)
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import (
    DiffusionGemmaForBlockDiffusion,
)
from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig

PATCH = 4  # pixels

IMAGE, BEGIN, END = 90, 91, 92  # ids

EOS = 95  # no token of the tokenizer

# Two layers, heads of 12 (three pairs by column, three by row); a position table as long as the
# longest side of a picture of 70 tokens.
TOWER: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 12,
    "pooling_kernel_size": 3,
    "patch_size": PATCH,
    "position_embedding_size": 210,
    "standardize": True,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
}


def seeing_checkpoint(
    directory: Path,
    *,
    seed: int = 0,
    tower: dict[str, Any] | None = None,
    pattern: str = "sfsf",
    text: dict[str, Any] | None = None,
    feedback: float = 1.0,
) -> DiffusionGemmaForBlockDiffusion:
    """Write one as transformers does, with a tokenizer; the model stays here.

    `feedback` scales self-conditioning, which makes the loop of a random model chaotic.

    Defaults of norms, tables and standardization would hide mistakes, so all are random.
    """
    torch.manual_seed(seed)
    text = {**TEXT, "num_hidden_layers": len(pattern), "sliding_window": 8, **(text or {})}
    config = DiffusionGemmaConfig(
        text_config=DiffusionGemmaTextConfig(**text, layer_types=layer_types(pattern)),
        vision_config=Gemma4VisionConfig(**{**TOWER, **(tower or {})}),
        image_token_id=IMAGE,
        boi_token_id=BEGIN,
        eoi_token_id=END,
        canvas_length=16,
    )
    model = DiffusionGemmaForBlockDiffusion(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1, 0.3)
            elif parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            if "self_conditioning" in name:
                parameter *= feedback
        model.model.decoder.embed_tokens.weight[EOS] = 0  # never the best token
        seen = model.model.encoder.vision_tower
        if seen.config.standardize:
            seen.std_bias.normal_()
            seen.std_scale.normal_(1, 0.1)
    values = {**SAMPLER, "max_new_tokens": 32, "eos_token_id": [EOS]}
    model.generation_config = generation.DiffusionGemmaGenerationConfig(
        **json.loads(json.dumps(values))
    )
    model.save_pretrained(directory)
    (directory / "generation_config.json").write_text(json.dumps(values))
    write_tokenizer(directory)
    return model


CHARACTERS = string.ascii_letters + string.digits + "\n .,:;?!-'\"/()[]{}<>|_"

TEMPLATE = """{{ bos_token }}{% for m in messages %}<|turn>{{ m['role'] }}
{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}
{{- '<|image|>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}<turn|>
{% endfor %}{% if add_generation_prompt %}<|turn>model
{% endif %}"""


def write_tokenizer(directory: Path) -> None:
    """A token a character, and the markers of pictures; `TEMPLATE` writes parts in turn."""
    special = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<|turn>": 3, "<turn|>": 4}
    special |= {"<|image|>": IMAGE, "<|image>": BEGIN, "<image|>": END, "<unk>": 96}
    vocab = special | {character: 5 + i for i, character in enumerate(CHARACTERS)}
    backend = Backend(models.BPE(vocab, [], unk_token="<unk>"))
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    backend.decoder = decoders.Fuse()
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>"}))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
