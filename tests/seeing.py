"""Random checkpoints of the reference with a vision tower, small and lively; `load` reads them."""

import json
from pathlib import Path
from typing import Any

import torch
from looking import BEGIN, END, EOS, IMAGE, TOWER, write_tokenizer
from reference import SAMPLER, TEXT, layer_types
from transformers.models.diffusion_gemma import generation_diffusion_gemma as generation
from transformers.models.diffusion_gemma.configuration_diffusion_gemma import (
    DiffusionGemmaConfig,
    DiffusionGemmaTextConfig,
)
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import (
    DiffusionGemmaForBlockDiffusion,
)
from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig


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
