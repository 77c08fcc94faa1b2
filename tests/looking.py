"""Random checkpoints with a vision tower and a tokenizer that writes pictures, without torch."""

import base64
import json
import string
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from mlx_diffgemma import GenerationConfig
from mlx_diffgemma.checkpoint.load import build_model
from mlx_diffgemma.model.vision import Vision
from mlx_diffgemma.model.vision_config import VisionConfig

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

CONFIG: dict[str, Any] = {
    "model_type": "diffusion_gemma",
    "canvas_length": 16,
    "image_token_id": IMAGE,
    "boi_token_id": BEGIN,
    "eoi_token_id": END,
    "vision_soft_tokens_per_image": 70,
    "vision_config": {"model_type": "gemma4_vision", **TOWER},
    "text_config": {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "moe_intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_experts": 4,
        "top_k_experts": 2,
        "num_hidden_layers": 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "max_position_embeddings": 4096,
    },
}

GENERATION = {"max_denoising_steps": 4, "max_new_tokens": 16, "eos_token_id": [EOS]}


def looking_checkpoint(directory: Path, *, tower: bool = True, **changes: Any) -> Path:
    """Write one, `tower` or not; `changes` are of config.json."""
    config = {**CONFIG, **changes}
    numbers = VisionConfig.from_dict(CONFIG)
    assert numbers is not None
    model = build_model(CONFIG, GenerationConfig(), set())
    keys = iter(mx.random.split(mx.random.key(7), 999))

    def drawn(name: str, array: mx.array) -> mx.array:
        noise = mx.random.normal(array.shape, key=next(keys))
        return 1 + 0.3 * noise if "norm" in name else noise * array.shape[-1] ** -0.5

    weights = {name: drawn(name, array) for name, array in tree_flatten(model.parameters())}
    if tower:
        for name, array in tree_flatten(Vision(numbers).parameters()):
            inner = name.startswith("vision_tower.encoder.") and "_proj." in name
            name = name.replace("_proj.", "_proj.linear.") if inner else name
            weights[f"model.encoder.{name}"] = drawn(name, array)
    directory.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(directory / "model.safetensors"), weights)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps(GENERATION))
    write_tokenizer(directory)
    return directory


# A file of ten pixels by ten.
PIXELS = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAoAAAAKCAIAAAACUFjqAAAAEklEQVR4nGP4z8CAB+GTG8HSALfKY52fTcuYAAAA"
    "AElFTkSuQmCC"
)


def content_checkpoint(directory: Path) -> Path:
    """One that is content with what it writes at once, or guards would leave all of it out."""
    settings = {**GENERATION, "stability_threshold": 0, "confidence_threshold": 99}
    looking_checkpoint(directory)
    (directory / "generation_config.json").write_text(json.dumps(settings))
    return directory


CHARACTERS = string.ascii_letters + string.digits + "\n .,:;?!-'\"/()[]{}<>|_"

TEMPLATE = """{{ bos_token }}{% for m in messages %}<|turn>{{ m['role']
  | replace('assistant', 'model') }}
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
