"""What a run will need of memory, part by part, before anything is loaded.

Weights, what is trained, gradients and the optimizer's arrays are counted. What a step holds beside
them is modelled by the numbers that a layer keeps for its gradient. Factors were fitted to peaks
that scripts/training_memory.py measures, in float32 on MLX's CPU backend.
"""

from dataclasses import dataclass, replace

from rich.filesize import decimal

from ..checkpoint.adapter import AdapterConfig, add_adapter, trained
from ..checkpoint.files import Headers
from ..checkpoint.fit import MACS, TooLarge, usable
from ..checkpoint.info import config_of, info_of, number_bytes
from ..checkpoint.load import build_model
from ..checkpoint.weights import DType
from ..model.config import Config, LayerConfig
from ..model.diffusion_gemma import is_text
from ..model.settings import GenerationConfig
from .cross_entropy import block_tokens
from .settings import OptimizerName, Settings

# Arrays of an optimizer for each number that is trained.
OPTIMIZER_ARRAYS: dict[OptimizerName, int] = {
    "adam": 2,
    "adamw": 2,
    "muon": 1,
    "sgd": 1,
    "adafactor": 1,
}

# Gigabytes of Macs on which models are trained.
SIZES = (*MACS, 96, 128, 192, 256, 512)

# As measured: arrays over a block of the vocabulary, and blocks of the table, that exist at once;
# copies of what a checkpointed layer keeps, and of what a layer that is computed again does. One
# that is not needs its numbers once for its gradient, beside those that are held.
BLOCKS, TABLES = 14, 5
KEPT, AGAIN = 3, 2


@dataclass(frozen=True)
class Part:
    name: str
    bytes: int


@dataclass(frozen=True)
class Plan:
    """What a run needs, in bytes by part; `tokens` are those of the longest example."""

    parts: tuple[Part, ...]
    trained: int
    batch: int
    tokens: int
    checkpointed: bool

    @property
    def total(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def macs(self) -> tuple[int, ...]:
        """Gigabytes of the Macs whose GPU may use so much."""
        return tuple(size for size in SIZES if self.total <= usable(size))


def plan(
    headers: Headers,
    settings: Settings,
    adapter: AdapterConfig,
    *,
    tokens: int,
    dtype: DType | None = None,
) -> Plan:
    """What training needs; nothing is loaded.

    Args:
        headers: the base's.
        settings: the run's.
        adapter: what is trained.
        tokens: prompt and response of the longest example, which may be cut at `max_seq_length`.
        dtype: what will be computed in; None is the stored type.

    Raises:
        CheckpointError: the config is not one of ours.
        SettingError: the model has no such layers or maps, or is packed where all is trained.
    """
    config, found = config_of(headers), info_of(headers, dtype)
    tokens = min(tokens, settings.max_seq_length)
    item = number_bytes([t for n, t in headers.tensors.items() if is_text(n)], dtype)
    count = _trained(headers, adapter)
    full = adapter.fine_tune_type == "full"
    # Low-rank terms are float32, and stand beside the weights. An update makes new arrays.
    arrays = 2 + OPTIMIZER_ARRAYS[settings.optimizer] + (not full)
    arrays += settings.grad_accumulation_steps > 1
    encoder, decoder = settings.batch_size * tokens, settings.batch_size * config.canvas_length
    held, layer = _held(config, tokens, encoder, decoder, item, settings.grad_checkpoint)
    read = encoder if settings.encoder_weight else 0  # by the loss
    loss = _loss(config, max(read, decoder), item, packed=found.table_bytes > 0)
    parts = (
        Part("weights", found.loaded_bytes),
        Part("what is trained, gradients, optimizer", count * arrays * (item if full else 4)),
        Part("held by layers for their gradients", held),
        Part("one layer's gradient, or the loss", max(layer, loss)),
    )
    return Plan(parts, count, settings.batch_size, tokens, settings.grad_checkpoint)


def fitting(
    headers: Headers,
    settings: Settings,
    adapter: AdapterConfig,
    *,
    tokens: int,
    memory: int,
    dtype: DType | None = None,
) -> Plan:
    """Plan a run in so many bytes; arguments and errors as in `plan`.

    Raises:
        TooLarge: it does not fit; the message says what would.
    """
    made = plan(headers, settings, adapter, tokens=tokens, dtype=dtype)
    if made.total <= memory:
        return made
    raise TooLarge(
        f"training needs {decimal(made.total)} ({decimal(made.parts[0].bytes)} of it weights), and "
        f"{decimal(memory)} are free: {_advice(headers, settings, adapter, made, memory, dtype)}; "
        "--max-memory overrules what is free"
    )


def _advice(
    headers: Headers,
    settings: Settings,
    adapter: AdapterConfig,
    made: Plan,
    memory: int,
    dtype: DType | None,
) -> str:
    """Say what would fit: the first of those that cost least."""
    ways: list[tuple[str, Settings]] = [("", settings)]
    if not settings.grad_checkpoint:
        ways.append(("--grad-checkpoint", replace(settings, grad_checkpoint=True)))
    for size in (settings.batch_size // 2, 1):
        if 0 < size < settings.batch_size:
            said, known = ways[-1] if not settings.grad_checkpoint else ("", settings)
            said = " ".join(filter(None, (said.split(" --batch-size")[0], f"--batch-size {size}")))
            ways.append((said, replace(known, batch_size=size)))
    said, known = ways[-1]
    length = made.tokens // 2
    while length >= 64:
        way = " ".join(filter(None, (said, f"--max-seq-length {length}")))
        ways.append((way, replace(known, max_seq_length=length)))
        length //= 2
    for said, known in ways[1:]:
        other = plan(headers, known, adapter, tokens=made.tokens, dtype=dtype)
        if other.total <= memory:
            return f"with {said} it needs {decimal(other.total)}"
    if adapter.fine_tune_type == "full":
        return "an adapter (--fine-tune-type lora) needs much less"
    return "a base of fewer bits needs less (mlx-diffgemma convert -q)"


def _trained(headers: Headers, adapter: AdapterConfig) -> int:
    """Count what is trained, on a model whose numbers are never made."""
    tensors = {name for name in headers.tensors if is_text(name)}
    model = build_model(headers.config, GenerationConfig(), tensors)
    add_adapter(model, adapter)
    return sum(int(array.size) for array in trained(model).values())


def _numbers(config: Config, layer: LayerConfig, seen: int) -> int:
    """Numbers that a layer keeps of each token for its gradient, where `seen` are attended to."""
    queries = config.num_attention_heads * layer.head_dim
    keys = layer.num_key_value_heads * layer.head_dim
    attention = 6 * queries + 10 * keys + config.num_attention_heads * seen
    experts = config.num_experts
    experts += config.top_k_experts * 3 * (config.hidden_size + config.moe_intermediate_size)
    return 14 * config.hidden_size + attention + 5 * config.intermediate_size + experts


def _held(
    config: Config, tokens: int, encoder: int, decoder: int, item: int, checkpointed: bool
) -> tuple[int, int]:
    """Bytes that all layers hold until their gradients, and that one needs for its own.

    The encoder reads `encoder` tokens, `tokens` a row; the decoder has `decoder`.
    """
    held, most = 0, 0
    for layer in config.layers:
        read = encoder * _numbers(config, layer, tokens)
        window = tokens if layer.window is None else min(tokens, layer.window - 1)
        denoised = decoder * _numbers(config, layer, window + config.canvas_length)
        most = max(most, read, denoised)
        entry = 2 * layer.num_key_value_heads * layer.head_dim
        inputs = (encoder + decoder) * config.hidden_size + encoder * entry
        held += KEPT * inputs if checkpointed else read + denoised
    return held * item, most * item * (AGAIN if checkpointed else 1)


def _loss(config: Config, rows: int, item: int, *, packed: bool) -> int:
    """Bytes that the loss of so many positions needs."""
    row = item * config.hidden_size
    count = min(block_tokens(rows, row if packed else 0), config.vocab_size)
    states = 3 * 4 * rows * config.hidden_size
    return BLOCKS * 4 * rows * count + packed * TABLES * row * count + states
