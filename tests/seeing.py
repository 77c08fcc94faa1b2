"""Random checkpoints of the reference with a vision tower, small and lively."""

from pathlib import Path
from typing import Any

import torch
from reference import TEXT, layer_types
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
    directory: Path, *, seed: int = 0, tower: dict[str, Any] | None = None, pattern: str = "sfsf"
) -> DiffusionGemmaForBlockDiffusion:
    """Write one as transformers does; the model stays here.

    Defaults of norms, tables and standardization would hide mistakes, so all are random.
    """
    torch.manual_seed(seed)
    text = {**TEXT, "num_hidden_layers": len(pattern), "sliding_window": 8}
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
        seen = model.model.encoder.vision_tower
        if seen.config.standardize:
            seen.std_bias.normal_()
            seen.std_scale.normal_(1, 0.1)
    model.save_pretrained(directory)
    return model
