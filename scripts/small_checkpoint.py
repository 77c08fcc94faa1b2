"""A narrow random checkpoint with the real vocabulary and canvas, for the scripts that compare."""

import json
import shutil
from pathlib import Path
from typing import Any

from make_checkpoint import write

ROOT = Path(__file__).parents[1]
# What a quantized checkpoint is made by: mlx-diffgemma's own converter, as the published one.
KINDS = ("float32", "bfloat16", "quantized")


def narrow(hidden: int, vocabulary: int) -> dict[str, Any]:
    """Numbers of the text config, all widths multiples of 64 so that they can be quantized."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": hidden,
        "moe_intermediate_size": hidden,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_global_key_value_heads": 1,
        "global_head_dim": 128,
        "num_experts": 8,
        "top_k_experts": 2,
    }


def write_small(directory: Path, layers: int, hidden: int, vocabulary: int, kind: str) -> Path:
    """Write a checkpoint of one of `KINDS`, with the small model's tokenizer; returns its place."""
    text = narrow(hidden, vocabulary)
    raw = directory.with_name(directory.name + "-raw")
    write(raw, layers, 2e9, text=text)
    if kind == "bfloat16":
        raw.rename(directory)
    elif kind == "quantized":
        from mlx_diffgemma.convert import convert

        convert(raw, directory)
    else:
        import mlx.core as mx

        raw.rename(directory)
        for file in directory.glob("*.safetensors"):
            wide = {name: array.astype(mx.float32) for name, array in mx.load(str(file)).items()}
            mx.eval(wide)
            mx.save_safetensors(str(file), wide, {"format": "pt"})
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["dtype"] = "float32" if kind == "float32" else "bfloat16"
    path.write_text(json.dumps(config, indent=1))
    source = ROOT / "mlx_diffgemma" / "data" / "tiny"
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, directory / name)
    # mlx-vlm looks every token up: give each a piece.
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    pieces = tokenizer["model"]["vocab"]
    pieces |= {f"piece{i}": i for i in range(len(pieces), vocabulary)}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.rmtree(raw, ignore_errors=True)
    return directory
