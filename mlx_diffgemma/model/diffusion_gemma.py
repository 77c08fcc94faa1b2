"""DiffusionGemma: the encoder writes a prompt to the cache, the decoder denoises a canvas.

The encoder and the decoder of the paper are one stack of blocks: the encoder calls it with a causal
mask, its own layer scalars and a cache that is written; the decoder with no mask, its own scalars
and a cache that is only read. The model builds graphs and its caller evaluates them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn

from ..arguments import SettingError
from ..distributed.launch import LaunchError
from .adapters import Side
from .cache import EncoderMask, Evaluate, LayerCache
from .config import Config, LayerConfig
from .layers import Block, SelfConditioning, View
from .part import Kept, ModelPart
from .placeholders import Pixels
from .settings import GenerationConfig
from .sight import Sight

READS_TEXT = (
    "only text content is supported by this model, no images, audio or files: its checkpoint has "
    "no vision tower"
)

# Bytes that a block of the embedding table may take where it has to be dequantized.
TABLE_BYTES = 1 << 26


class Decoder(nn.Module):
    """All weights but the encoder's layer scalars."""

    def __init__(self, config: Config, part: ModelPart):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        pairs = zip(config.layers, part.layers, strict=True)
        self.layers = [Block(config, layer, own) for layer, own in pairs]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_conditioning = SelfConditioning(config, len(part.conditioning), part.share)


class LayerScalar(nn.Module):
    """Holds what the encoder has of its own in a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_scalar = mx.ones((1,))


class LanguageModel(nn.Module):
    """The encoder's layers, as far as they are not the decoder's."""

    def __init__(self, config: Config):
        super().__init__()
        self.layers = [LayerScalar() for _ in config.layers]


class Encoder(nn.Module):
    """`language_model`, as the checkpoint names it; the vision tower is a module of its own."""

    def __init__(self, config: Config):
        super().__init__()
        self.language_model = LanguageModel(config)


class Backbone(nn.Module):
    """`decoder` and `encoder` as the checkpoint names them; the encoder owns only its scalars."""

    def __init__(self, config: Config, part: ModelPart):
        super().__init__()
        self.decoder = Decoder(config, part)
        self.encoder = Encoder(config)


@dataclass(frozen=True)
class Pass:
    """Asks for canvases (B, L) behind one prompt cache to be decoded, or for some positions of one.

    Attributes:
        canvas: ids of what is decoded: all positions, or (1, P) of those in `positions`.
        self_conditioning: (B, L or P, hidden), the embedding that the last step expects, or None.
        positions: (P,) of the canvas whose keys and values the last pass left in the cache; those
            of the others stay as they are, and are attended to.
        wanted: (W,) of the canvas's positions, where a pass over all of one asks for the hidden
            states of these alone: the last layer makes keys and values of the others, no more.
    """

    canvas: mx.array
    cache: list[LayerCache]
    self_conditioning: mx.array | None = None
    positions: mx.array | None = None
    wanted: mx.array | None = None

    @property
    def read_off(self) -> mx.array | None:
        """Positions of the canvas whose hidden states come back; None is all."""
        return self.positions if self.wanted is None else self.wanted

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the hidden states that come back, but for their width."""
        rows, count = self.canvas.shape
        return rows, count if self.wanted is None else len(self.wanted)

    def decoded(self, layers: int) -> int:
        """Positions of a row that it decodes; one that is not wanted counts but for the last of
        the layers, and their sum is rounded up."""
        count = self.canvas.shape[1]
        return count - (count - self.shape[1]) // layers

    def view(self, layer: int, all_look: bool) -> View:
        """What a layer's tokens attend to; or those that are wanted, if not all look."""
        rows, count = self.canvas.shape
        read = partial(self.cache[layer].read, positions=self.positions)
        return View(rows, count, None, read, queries=count if all_look else self.shape[1])


class DiffusionGemma(nn.Module):
    """The text model: `encode` writes a prompt to the cache, a call denoises a canvas.

    One of several ranks has a `part` of it, and what comes out is the same on all.
    """

    def __init__(self, config: Config, generation: GenerationConfig, part: ModelPart | None = None):
        super().__init__()
        self.config = config
        self.generation = generation
        self.part = part or ModelPart.whole(config)
        self.model = Backbone(config, self.part)
        self.context = config.max_position_embeddings  # tokens, or fewer where memory is short
        self.sight: Sight | None = None  # of a checkpoint that has a vision tower
        self.side = Side()
        self.adapter: str | None = None  # what an adapter that is in place says of itself
        # Of a part, what of a parameter it has, by the parameter's name; None is all of it.
        self.cut: Callable[[str], Kept | None] = lambda name: None
        self.identity: str | None = None  # of a part, what tells the whole from other models
        self._table: mx.array | None = None

    @property
    def layers(self) -> list[Block]:
        """The blocks, where mlx-lm's functions for adapters look for them."""
        return self.model.decoder.layers

    def __repr__(self) -> str:
        # The tree of modules, which MLX prints, is thousands of characters: `model.model` has it.
        config = self.config
        return (
            f"DiffusionGemma({len(config.layers)} layers, width {config.hidden_size}, "
            f"vocabulary {config.vocab_size:,}, canvas {config.canvas_length}, "
            f"context {self.context:,}{f', {self.adapter}' if self.adapter else ''})"
        )

    def make_cache(self) -> list[LayerCache]:
        """An empty cache, a layer an entry."""
        return [LayerCache(layer.window) for layer in self.config.layers]

    def embedding(self, tokens: mx.array) -> mx.array:
        """(B, T) ids -> rows of the table (B, T, hidden)."""
        embed = self.model.decoder.embed_tokens
        rows: mx.array = embed(tokens)
        if isinstance(embed, nn.QuantizedEmbedding):
            # Where scales are no floats, MLX gives bfloat16 whatever is computed in.
            rows = rows.astype(self.model.decoder.norm.weight.dtype)
        return rows

    def embed(self, tokens: mx.array) -> mx.array:
        """(B, T) ids -> what a layer is given (B, T, hidden)."""
        return self.scaled(self.embedding(tokens))

    def scaled(self, embedded: mx.array) -> mx.array:
        """Rows of the table times sqrt(hidden)."""
        # The reference rounds the factor to the embedding's type.
        return embedded * mx.array(self.config.hidden_size**0.5, dtype=embedded.dtype)

    def see(self, picture: Pixels) -> mx.array:
        """Embeddings (tokens, hidden) that stand for a picture's tokens, computed.

        Raises:
            SettingError: this model reads text alone.
            LaunchError: another rank cannot see it.
            Error: as `Sight`.
        """
        if self.sight is None:
            raise SettingError(READS_TEXT)
        self.context = min(self.context, self.sight.context)
        share, failed = self.part.share, None
        try:
            seen = self.sight(picture)
        except Exception as error:
            failed = error
        # One that goes on without another would wait for it for ever.
        alone = share.sum(mx.array(failed is not None, mx.int32)).item()
        if failed is not None:
            raise failed
        if alone:
            raise LaunchError(f"{alone} of the ranks cannot see a picture that others see")
        return seen

    def encode(
        self,
        tokens: mx.array,
        cache: list[LayerCache],
        input_embeddings: mx.array | None = None,
        *,
        mask: EncoderMask = LayerCache.encoder_mask,
        evaluate: Evaluate | None = None,
    ) -> mx.array:
        """Append (B, T) ids to the cache -> hidden states (B, T, hidden).

        To evaluate only the cache does not compute the last layer's attention and experts.

        Args:
            tokens: ids.
            cache: written.
            input_embeddings: (B, T, hidden) to take in place of `embed(tokens)`.
            mask: what each layer's new tokens see, given its cache and their number; causal, and
                within the window of a sliding layer, by default.
            evaluate: called with parts of long prompts, so that their scores do not pile up.
        """
        self.side.encodes = True
        x = self.embed(tokens) if input_embeddings is None else input_embeddings
        first = cache[0].length
        rotations = self.rotations(mx.array([[float(first + i) for i in range(x.shape[1])]]))
        scalars = self.model.encoder.language_model.layers
        for block, layer, own in zip(self.model.decoder.layers, cache, scalars, strict=True):
            # Nothing is evaluated in the last layer: its output may not be wanted.
            on_the_way = None if layer is cache[-1] else evaluate
            rows, count, _ = x.shape
            view = View(rows, count, mask(layer, count), layer.append, on_the_way)
            x = block(x, [view], rotations[block.self_attn.layer], own.layer_scalar)
        return self.model.decoder.norm(x)

    def decode(self, passes: Sequence[Pass], evaluate: Evaluate | None = None) -> list[mx.array]:
        """Hidden states (B, L, P or W, hidden) of what each pass asks for.

        Every canvas position sees the whole canvas and, of its cache, all that is held: in a
        sliding layer the last `window - 1` tokens. Passes do not see each other. `evaluate` is
        called with each layer's output.
        """
        self.side.encodes = False
        wanted = _wanted(passes)
        x = self.model.decoder.self_conditioning(
            self.embed(_in_a_row([each.canvas for each in passes])), self._expected(passes)
        )
        rotations = self.rotations(_in_a_row([self._positions(each) for each in passes]))
        *_, last = self.model.decoder.layers
        for i, block in enumerate(self.model.decoder.layers):
            kept = wanted if block is last else None
            views = [each.view(i, all_look=kept is None) for each in passes]
            x = block(x, views, rotations[block.self_attn.layer], block.layer_scalar, kept)
            self.part.share.compare(x, f"what layer {i} gives")
            if evaluate is not None:
                evaluate(x)
        x = self.model.decoder.norm(x)
        if len(passes) == 1:
            return [x]
        ends = list(accumulate(rows * count for rows, count in (each.shape for each in passes)))
        parts = zip(passes, mx.split(x[0], ends[:-1]), strict=True)
        return [part.reshape(*each.shape, -1) for each, part in parts]

    def _expected(self, passes: Sequence[Pass]) -> mx.array | None:
        """The passes' self-conditioning; None is one of zeros: norm and MLP leave them zero."""
        known = [each.self_conditioning for each in passes]
        given = next((each for each in known if each is not None), None)
        if given is None:
            return None
        shapes = [(*each.canvas.shape, self.config.hidden_size) for each in passes]
        return _in_a_row(
            [
                mx.zeros(shape, given.dtype) if each is None else each
                for shape, each in zip(shapes, known, strict=True)
            ]
        )

    def _positions(self, asked: Pass) -> mx.array:
        """Where the canvases' tokens stand, behind what the cache has read: float32 (1 or B, T)."""
        rows, count = asked.canvas.shape
        behind = asked.cache[0].length
        if asked.positions is None:
            return mx.array([[float(behind + i) for i in range(count)]] * rows)
        return (asked.positions + behind).astype(mx.float32)[None]

    def rotations(self, positions: mx.array) -> dict[LayerConfig, mx.array]:
        """Rotation at float32 positions (B or 1, T), for each kind of layer."""
        kinds = {block.self_attn.layer: block.self_attn for block in self.model.decoder.layers}
        return {layer: attention.rotation(positions) for layer, attention in kinds.items()}

    def merge(self) -> None:
        """Products of one input become one product; for weights that stay as they are."""
        for block in self.model.decoder.layers:
            block.merge()
        self.model.decoder.self_conditioning.merge()

    def take_weights(self, other: "DiffusionGemma") -> None:
        """Compute with the modules of another model of the same config; those of before go.

        So a model can be known, and requests be prepared for it, while its weights come and go.
        """
        self.model, self.side, self._table = other.model, other.side, other._table

    @property
    def constants(self) -> list[mx.array]:
        """Arrays beside the parameters that a forward pass needs, to be evaluated with them.

        What stays lazy belongs to the thread that made it, and fails in any other.
        """
        return [array for block in self.model.decoder.layers for array in block.constants]

    @property
    def dequantizes(self) -> bool:
        """Tells whether each step dequantizes the embedding table."""
        quantized = isinstance(self.model.decoder.embed_tokens, nn.QuantizedEmbedding)
        return quantized and self._table is None

    def keep_table(self, evaluate: Evaluate) -> None:
        """Hold the embedding table dequantized, beside its packed form: the rows read off here.

        `evaluate` is called with the table after each block of it.
        """
        width, own = self.config.hidden_size, self.part.vocabulary
        table = mx.zeros((len(own), width), self.model.decoder.norm.weight.dtype)
        for first, rows in self.vocabulary(TABLE_BYTES // (32 * width)):
            at = first - own.start
            table[at : at + len(rows)] = rows
            evaluate(table)  # in place: at once, temporaries would be several times as large
        self._table = table

    def vocabulary(self, count: int) -> Iterator[tuple[int, mx.array]]:
        """The embedding table, `count` ids at a time: the first id and rows (count, hidden).

        Of several ranks each has some of the ids: parts of the same blocks.

        Rows are dequantized once for the head and for self-conditioning: on Apple GPUs that is
        faster than a quantized product with the table not transposed.
        """
        embed = self.model.decoder.embed_tokens
        whole, own = self._table, self.part.vocabulary
        if not isinstance(embed, nn.QuantizedEmbedding):
            whole = embed.weight[own.start : own.stop] if self.part.share.size > 1 else embed.weight
        for block in range(own.start // count * count, own.stop, count):
            first, end = max(block, own.start), min(block + count, own.stop)
            if whole is not None:
                yield first, whole[first - own.start : end - own.start]
                continue
            some = slice(first, end)
            rows = mx.dequantize(
                embed.weight[some],
                embed.scales[some],
                None if embed.get("biases") is None else embed.biases[some],
                group_size=embed.group_size,
                bits=embed.bits,
                mode=embed.mode,
            )
            yield first, rows.astype(self.model.decoder.norm.weight.dtype)

    def logits(self, hidden: mx.array) -> mx.array:
        """(..., hidden) -> float32 (..., vocabulary), softly capped by tanh."""
        cap = self.config.final_logit_softcapping
        raw = self.model.decoder.embed_tokens.as_linear(hidden).astype(mx.float32)
        return mx.tanh(raw / cap) * cap

    def __call__(
        self, canvas: mx.array, cache: list[LayerCache], self_conditioning: mx.array | None = None
    ) -> mx.array:
        """One denoising pass: canvas (B, L) -> float32 logits (B, L, vocabulary)."""
        return self.logits(self.decode([Pass(canvas, cache, self_conditioning)])[0])


def _in_a_row(parts: Sequence[mx.array]) -> mx.array:
    """One array (B, T, ...) as it is; several as one row, token after token."""
    if len(parts) == 1:
        return parts[0]
    return mx.concatenate([mx.flatten(part, 0, 1) for part in parts])[None]


def _wanted(passes: Sequence[Pass]) -> mx.array | None:
    """Where in a row of all passes' tokens those stand that come back; None is all."""
    if all(each.wanted is None for each in passes):
        return None
    tokens = [each.canvas.size for each in passes]
    firsts = accumulate(tokens, initial=0)
    return mx.concatenate(
        [
            first + (mx.arange(count) if each.wanted is None else each.wanted)
            for each, count, first in zip(passes, tokens, firsts, strict=False)
        ]
    )


def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Checkpoint tensors -> parameters: raw expert stacks gain `.weight`, the rest is dropped.

    Dropped are the vision tower and the copies of tied tensors that some files carry.
    """
    return {parameter_name(name): array for name, array in weights.items() if is_text(name)}


def parameter_name(tensor: str) -> str:
    """The parameter a checkpoint tensor belongs to."""
    raw = tensor.endswith((".experts.gate_up_proj", ".experts.down_proj"))
    return tensor + ".weight" if raw else tensor


def is_text(tensor: str) -> bool:
    """Tell whether a checkpoint tensor is one of this model's (not vision, not a tied copy)."""
    if tensor.startswith("model.decoder."):
        return True
    return tensor.startswith("model.encoder.language_model.") and tensor.endswith(".layer_scalar")
