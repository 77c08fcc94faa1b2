"""What a checkpoint is, from its headers alone: nothing is loaded."""

from dataclasses import dataclass
from math import prod
from pathlib import Path

from ..model.config import Config
from .files import ITEM_BYTES, Tensor, quantization_of, read_json, read_tensors

# Part of the model by the name of the module that a tensor belongs to; the first that fits.
_PARTS = (
    ("vision", (".vision_tower.", ".embed_vision.")),
    ("experts", (".experts.",)),
    ("embedding", (".embed_tokens.",)),
    ("attention", (".self_attn.",)),
    ("dense mlp", (".mlp.",)),
    ("router", (".router.",)),
    ("self-conditioning", (".self_conditioning.",)),
    ("norms and scalars", ("",)),
)


@dataclass(frozen=True)
class Part:
    """`formats` tells how the weights are stored, e.g. ("4-bit affine, group 64",)."""

    name: str
    parameters: int
    bytes: int
    formats: tuple[str, ...]


@dataclass(frozen=True)
class Info:
    """Sizes are in bytes. `cache_bytes_per_token` grows with the context (full layers); the
    sliding layers hold at most `cache_bytes_window` in all. `loaded_bytes` are those of the text
    model in the type it computes in, `table_bytes` those of a quantized embedding table once it is
    dequantized, else 0; `step_bytes` is what a denoising step needs beside both."""

    layers: int
    canvas_length: int
    context: int
    vocabulary: int
    parts: tuple[Part, ...]
    cache_bytes_per_token: int
    cache_bytes_window: int
    loaded_bytes: int
    table_bytes: int
    step_bytes: int

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def text_parameters(self) -> int:
        """Numbers that are loaded: all but vision."""
        return sum(part.parameters for part in self.parts if part.name != "vision")

    def memory_needed(self, context: int) -> int:
        """Bytes to run with so many tokens of context: weights, cache and one denoising step."""
        cache = self.cache_bytes_per_token * context + self.cache_bytes_window
        return self.loaded_bytes + cache + self.step_bytes


# Floating-point bytes of a number by what is computed in.
_FLOATS = {"float32": 4, "bfloat16": 2, "float16": 2}

# A step's arrays over blocks of the vocabulary, as measured (docs/performance.md), or for a small
# vocabulary as many copies of its logits.
STEP_BYTES = 350_000_000

_COPIES = 8


def inspect(directory: Path, dtype: str | None = None) -> Info:
    """Read config and headers; `dtype` is what will be computed in, None the type as stored.

    Raises:
        CheckpointError: a file is missing or damaged, or the config is not one of ours.
    """
    raw = read_json(directory, "config.json")
    config = Config.from_dict(raw)
    tensors = read_tensors(directory)
    grouped: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        part = next(part for part, marks in _PARTS if any(mark in name for mark in marks))
        grouped.setdefault(part, []).append(tensor)

    def parameters(tensor: Tensor) -> int:
        module, _, leaf = tensor.name.rpartition(".")
        if f"{module}.scales" not in tensors:
            return prod(tensor.shape)
        bits = quantization_of(raw, module).bits
        return prod(tensor.shape) * 32 // bits if leaf == "weight" else 0

    def formats(part: list[Tensor]) -> tuple[str, ...]:
        found = set()
        for tensor in part:
            module, _, leaf = tensor.name.rpartition(".")
            if f"{module}.scales" not in tensors:
                found.add(tensor.dtype)
            elif leaf == "weight":
                q = quantization_of(raw, module)
                found.add(f"{q.bits}-bit {q.mode}, group {q.group_size}")
        return tuple(sorted(found))

    parts = tuple(
        Part(
            name,
            sum(parameters(t) for t in grouped[name]),
            sum(t.end - t.start for t in grouped[name]),
            formats(grouped[name]),
        )
        for name, _ in _PARTS
        if name in grouped
    )

    def loaded(tensor: Tensor) -> int:
        floating = tensor.dtype in ("F32", "BF16", "F16")
        return prod(tensor.shape) * size if floating else tensor.end - tensor.start

    text = [tensor for part, group in grouped.items() if part != "vision" for tensor in group]
    stored = {ITEM_BYTES[tensor.dtype] for tensor in text if tensor.dtype in ("F32", "BF16", "F16")}
    size = _FLOATS[dtype] if dtype else max(stored, default=2)
    quantized = any(tensor.name.endswith("embed_tokens.scales") for tensor in text)
    logits = 4 * config.canvas_length * config.vocab_size
    per_layer = [
        2 * size * layer.num_key_value_heads * layer.head_dim * (layer.window or 1)
        for layer in config.layers
    ]
    sliding = [layer.window is not None for layer in config.layers]
    return Info(
        layers=len(config.layers),
        canvas_length=config.canvas_length,
        context=config.max_position_embeddings,
        vocabulary=config.vocab_size,
        parts=parts,
        cache_bytes_per_token=sum(b for b, s in zip(per_layer, sliding, strict=True) if not s),
        cache_bytes_window=sum(b for b, s in zip(per_layer, sliding, strict=True) if s),
        loaded_bytes=sum(map(loaded, text)),
        table_bytes=size * config.vocab_size * config.hidden_size if quantized else 0,
        step_bytes=min(STEP_BYTES, _COPIES * logits),
    )
