"""What a checkpoint is, from its headers alone: nothing is loaded."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ..errors import CheckpointError
from ..model.config import Config, ConfigError
from ..model.part import ModelPart
from ..model.sight import SightConfig
from ..model.vision_config import BUDGETS, VisionConfig
from .files import FLOATS, ITEM_BYTES, Headers, Tensor, read_headers
from .quantization import quantization_of
from .slices import Cut, cut_of, kept_shape

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
    dequantized, else 0; `step_bytes` is what a denoising step needs beside both. `vision_bytes` are
    those of the vision tower, which only pictures load, `picture_bytes` what reading one of most
    tokens needs beside it, and `picture_tokens` what one takes of a prompt at most unless another
    number is asked for; all are 0 of a checkpoint that reads text alone."""

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
    vision_bytes: int = 0
    picture_bytes: int = 0
    picture_tokens: int = 0

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

    def memory_needed(self, context: int, *, pictures: bool = False) -> int:
        """Return the bytes of weights, of so many tokens of context and of one denoising step.

        With `pictures` the vision tower is among the weights. A picture is not read during a step.
        """
        cache = self.cache_bytes_per_token * context + self.cache_bytes_window
        fixed = self.loaded_bytes + cache
        if not pictures:
            return fixed + self.step_bytes
        return fixed + self.vision_bytes + max(self.step_bytes, self.picture_bytes)


# Bytes of a number by what is computed in.
_FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# A step's arrays over blocks of the vocabulary, as measured (docs/performance.md), or for a small
# vocabulary as many copies of its logits.
STEP_BYTES = 350_000_000

_COPIES = 8


def inspect(directory: Path, dtype: str | None = None) -> Info:
    """Read config and headers; `dtype` is what will be computed in, None the type as stored.

    Raises:
        CheckpointError: a file is missing or damaged, or the config is not one of ours.
    """
    return info_of(read_headers(directory), dtype)


def config_of(headers: Headers) -> Config:
    """Read the numbers of a checkpoint's config.

    Raises:
        CheckpointError: the config is not one of ours; it names the directory, and what runs models
            of another type.
    """
    try:
        return Config.from_dict(headers.config)
    except ConfigError as error:
        kind = headers.config.get("model_type")
        way = ""
        if isinstance(kind, str) and kind != "diffusion_gemma":
            other = "mlx-vlm" if "vision_config" in headers.config else "mlx-lm"
            way = f"; this runs DiffusionGemma alone, {other} runs many others"
        raise CheckpointError(f"{headers.directory}: {error}{way}") from None


def info_of(headers: Headers, dtype: str | None = None, part: ModelPart | None = None) -> Info:
    """Compute the same from headers that have been read; what is loaded and cached may be a rank's
    part of it.

    Raises:
        CheckpointError: the config is not one of ours.
    """
    config = config_of(headers)
    grouped: dict[str, list[Tensor]] = {}
    for name, tensor in headers.tensors.items():
        kind = next(kind for kind, marks in _PARTS if any(mark in name for mark in marks))
        grouped.setdefault(kind, []).append(tensor)
    text = [tensor for kind, group in grouped.items() if kind != "vision" for tensor in group]
    size = number_bytes(text, dtype)
    quantized = any(tensor.name.endswith("embed_tokens.scales") for tensor in text)
    part = part or ModelPart.whole(config)
    per_token, window = _cache_bytes(config, part, size)
    tower = sum(_loaded_bytes(each, size) for each in grouped.get("vision", []))
    return Info(
        layers=len(config.layers),
        canvas_length=config.canvas_length,
        context=config.max_position_embeddings,
        vocabulary=config.vocab_size,
        parts=tuple(_part(n, grouped[n], headers) for n, _ in _PARTS if n in grouped),
        cache_bytes_per_token=per_token,
        cache_bytes_window=window,
        loaded_bytes=sum(
            _loaded_bytes(tensor, size, cut_of(tensor.name, part, config)) for tensor in text
        ),
        table_bytes=size * len(part.vocabulary) * config.hidden_size if quantized else 0,
        step_bytes=min(STEP_BYTES, _COPIES * 4 * config.canvas_length * config.vocab_size),
        vision_bytes=tower,
        picture_bytes=_picture_bytes(headers, size) if tower else 0,
        picture_tokens=_picture_tokens(headers) if tower else 0,
    )


def number_bytes(text: Iterable[Tensor], dtype: str | None) -> int:
    """Return the bytes of a number that is computed, by the tensors of the text model."""
    stored = {ITEM_BYTES[tensor.dtype] for tensor in text if tensor.dtype in FLOATS}
    return _FLOAT_BYTES[dtype] if dtype else max(stored, default=2)


def _part(name: str, tensors: list[Tensor], headers: Headers) -> Part:
    """Sum up the tensors of one part."""
    parameters, formats = 0, set[str]()
    for tensor in tensors:
        module, _, leaf = tensor.name.rpartition(".")
        if f"{module}.scales" not in headers.tensors:
            parameters += prod(tensor.shape)
            formats.add(tensor.dtype)
        elif leaf == "weight":
            q = quantization_of(headers.config, module)
            parameters += prod(tensor.shape) * 32 // q.bits
            formats.add(f"{q.bits}-bit {q.mode}, group {q.group_size}")
    return Part(name, parameters, sum(t.end - t.start for t in tensors), tuple(sorted(formats)))


def _loaded_bytes(tensor: Tensor, size: int, cut: Cut | None = None) -> int:
    """Return the bytes of a tensor, or of what is kept of it, where floating-point numbers take
    `size` bytes."""
    item = size if tensor.dtype in FLOATS else ITEM_BYTES[tensor.dtype]
    return prod(kept_shape(tensor, cut)) * item


def _picture_bytes(headers: Headers, size: int) -> int:
    """Return what reading a picture of most tokens takes; 0 where the tower is none of ours.

    Such a tower is refused when it is loaded, and holds up nobody who reads text.
    """
    try:
        vision = VisionConfig.from_dict(headers.config)
    except ConfigError:
        return 0
    return vision.working_bytes(BUDGETS[-1], size) if vision else 0


def _picture_tokens(headers: Headers) -> int:
    """Return most tokens of a picture; 0 where config.json does not say how to see."""
    try:
        return SightConfig.from_dict(headers.config).budget
    except ConfigError:
        return 0


def _cache_bytes(config: Config, part: ModelPart, size: int) -> tuple[int, int]:
    """Return the bytes of the cache that each token adds, and those of all sliding windows."""
    per_token = window = 0
    for layer, own in zip(config.layers, part.layers, strict=True):
        entry = 2 * size * len(own.keys) * layer.head_dim
        if layer.window is None:
            per_token += entry
        else:
            window += entry * layer.window
    return per_token, window
