"""Write a random checkpoint with the real model's names and shapes, of any size, in little memory.

    python scripts/make_checkpoint.py /tmp/big --layers 4           # about 8 GB
    python scripts/make_checkpoint.py /tmp/big --layers 4 --measure # and convert it, measured

Shards are cut by size alone, so the tensors of a layer straddle them, as in the published files.
`--measure` converts in a process of its own and prints its peak memory and time.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

# The published config.json, cut to what shapes depend on.
TEXT: dict[str, Any] = {
    "model_type": "diffusion_gemma_text",
    "vocab_size": 262144,
    "hidden_size": 2816,
    "intermediate_size": 2112,
    "moe_intermediate_size": 704,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "num_global_key_value_heads": 2,
    "global_head_dim": 512,
    "num_experts": 128,
    "top_k_experts": 8,
    "sliding_window": 1024,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "use_bidirectional_attention": "vision",
}
VISION: dict[str, Any] = {
    "model_type": "gemma4_vision",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 72,
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "position_embedding_size": 10240,
    "rms_norm_eps": 1e-6,
}
GENERATION = {
    "confidence_threshold": 0.005,
    "eos_token_id": [1, 106, 50],
    "max_denoising_steps": 48,
    "max_new_tokens": 256,
    "pad_token_id": 0,
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
    "stability_threshold": 1,
    "t_max": 0.8,
    "t_min": 0.4,
}


def config(layers: int, vision: bool = False, text: dict[str, Any] | None = None) -> dict[str, Any]:
    """config.json cut to so many layers, every sixth and the last with full attention.

    `text` replaces numbers of the text config, to make the model narrower.
    """
    full = "full_attention"
    kinds = [full if i % 6 == 5 or i == layers - 1 else "sliding_attention" for i in range(layers)]
    return {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "model_type": "diffusion_gemma",
        "canvas_length": 256,
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        "text_config": {**TEXT, "num_hidden_layers": layers, "layer_types": kinds, **(text or {})},
        "vision_config": VISION if vision else None,
    }


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor, as in the published files."""
    text = config["text_config"]
    hidden, inner, moe = (
        text[k] for k in ("hidden_size", "intermediate_size", "moe_intermediate_size")
    )
    experts = text["num_experts"]
    found: dict[str, tuple[int, ...]] = {
        "model.decoder.embed_tokens.weight": (text["vocab_size"], hidden)
    }
    for i, kind in enumerate(text["layer_types"]):
        full = kind == "full_attention"
        head = text["global_head_dim" if full else "head_dim"]
        keys = text["num_global_key_value_heads" if full else "num_key_value_heads"] * head
        queries = text["num_attention_heads"] * head
        layer = f"model.decoder.layers.{i}"
        found |= {
            f"{layer}.experts.down_proj": (experts, hidden, moe),
            f"{layer}.experts.gate_up_proj": (experts, 2 * moe, hidden),
            f"{layer}.layer_scalar": (1,),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.router.per_expert_scale": (experts,),
            f"{layer}.router.proj.weight": (experts, hidden),
            f"{layer}.router.scale": (hidden,),
            f"{layer}.self_attn.k_norm.weight": (head,),
            f"{layer}.self_attn.k_proj.weight": (keys, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, queries),
            f"{layer}.self_attn.q_norm.weight": (head,),
            f"{layer}.self_attn.q_proj.weight": (queries, hidden),
            f"model.encoder.language_model.layers.{i}.layer_scalar": (1,),
        }
        if not full:
            found[f"{layer}.self_attn.v_proj.weight"] = (keys, hidden)
        norms = "input post_attention pre_feedforward post_feedforward".split()
        found |= {f"{layer}.{norm}_layernorm.weight": (hidden,) for norm in norms}
        numbered = "post_feedforward_layernorm_1 post_feedforward_layernorm_2".split()
        for norm in [*numbered, "pre_feedforward_layernorm_2"]:
            found[f"{layer}.{norm}.weight"] = (hidden,)
    found |= {
        "model.decoder.norm.weight": (hidden,),
        "model.decoder.self_conditioning.down_proj.weight": (hidden, inner),
        "model.decoder.self_conditioning.gate_proj.weight": (inner, hidden),
        "model.decoder.self_conditioning.up_proj.weight": (inner, hidden),
        "model.decoder.self_conditioning.pre_norm.weight": (hidden,),
    }
    if config["vision_config"]:
        found |= vision_shapes(config["vision_config"], hidden)
    return found


def vision_shapes(vision: dict[str, Any], text_hidden: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the image encoder's tensors."""
    width, inner = vision["hidden_size"], vision["intermediate_size"]
    tower = "model.encoder.vision_tower"
    found: dict[str, tuple[int, ...]] = {
        "model.encoder.embed_vision.embedding_projection.weight": (text_hidden, width),
        f"{tower}.patch_embedder.input_proj.weight": (width, 3 * vision["patch_size"] ** 2),
        f"{tower}.patch_embedder.position_embedding_table": (
            2,
            vision["position_embedding_size"],
            width,
        ),
        f"{tower}.std_bias": (width,),
        f"{tower}.std_scale": (width,),
    }
    for i in range(vision["num_hidden_layers"]):
        layer = f"{tower}.encoder.layers.{i}"
        norms = "input post_attention pre_feedforward post_feedforward".split()
        found |= {f"{layer}.{norm}_layernorm.weight": (width,) for norm in norms}
        found |= {f"{layer}.self_attn.{n}_norm.weight": (vision["head_dim"],) for n in "qk"}
        found |= {f"{layer}.self_attn.{n}_proj.linear.weight": (width, width) for n in "qkvo"}
        found |= {
            f"{layer}.mlp.down_proj.linear.weight": (width, inner),
            f"{layer}.mlp.gate_proj.linear.weight": (inner, width),
            f"{layer}.mlp.up_proj.linear.weight": (inner, width),
        }
    return found


def write(
    directory: Path,
    layers: int,
    shard_bytes: float,
    vision: bool = False,
    text: dict[str, Any] | None = None,
) -> int:
    """Write the checkpoint; returns its bytes. Values are bfloat16 of magnitude about 0.02."""
    directory.mkdir(parents=True)
    made = config(layers, vision, text)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in sorted(shapes(made).items()):
        if shards[-1] and filled + 2 * prod(shape) > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += 2 * prod(shape)
    random = np.random.default_rng(0)
    # Sign, an exponent near that of 0.02 and a random mantissa: cheap and never NaN.
    noise = random.integers(0, 1 << 16, 1 << 24, dtype=np.uint16)
    noise = (noise & np.uint16(0x80FF)) | np.uint16(0x3C00)
    weight_map = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, offset = {}, 0
        for name, shape in shard.items():
            end = offset + 2 * prod(shape)
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
            weight_map[name] = file_name
            offset = end
        encoded = json.dumps(header).encode()
        with (directory / file_name).open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for shape in shard.values():
                left = prod(shape)
                while left:
                    part = noise[: min(left, len(noise))]
                    file.write(part.data)
                    left -= len(part)
        total += offset
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(made, indent=1))
    (directory / "generation_config.json").write_text(json.dumps(GENERATION, indent=1))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--shard-gb", type=float, default=2.0)
    parser.add_argument("--vision", action="store_true", help="with the image encoder, 1.1 GB")
    parser.add_argument("--measure", action="store_true", help="convert it and print the cost")
    arguments = parser.parse_args()
    shard_bytes = arguments.shard_gb * 1e9
    total = write(arguments.directory, arguments.layers, shard_bytes, arguments.vision)
    print(f"{arguments.directory}: {total / 1e9:.2f} GB, {arguments.layers} layers")
    if arguments.measure:
        out = arguments.directory.with_name(arguments.directory.name + "-mlx")
        command = [
            sys.executable,
            "-m",
            "mlx_diffgemma",
            "convert",
            str(arguments.directory),
            str(out),
        ]
        started = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
        size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        print(
            f"converted to {size / 1e9:.2f} GB in {seconds:.0f} s, peak memory {peak / 1e9:.2f} GB"
        )


if __name__ == "__main__":
    main()
