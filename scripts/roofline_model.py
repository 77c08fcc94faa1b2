"""FLOPs and bytes of denoising steps and of tokens decoded one by one; see `roofline.py`."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, islice

from mlx_diffgemma.model.config import Config


@dataclass(frozen=True)
class Chip:
    """Its peaks: GB/s and TFLOPS."""

    name: str
    bandwidth: float
    tflops: float


@dataclass(frozen=True)
class Part:
    """What one part of a pass computes and moves."""

    name: str
    flops: float
    bytes: float

    def seconds(self, chip: Chip) -> float:
        return max(self.flops / chip.tflops / 1e12, self.bytes / chip.bandwidth / 1e9)


def seconds(parts: list[Part], chip: Chip) -> float:
    """Of parts that follow each other."""
    return sum(part.seconds(chip) for part in parts)


@dataclass(frozen=True)
class Assumed:
    """What is assumed of a model beside its config.

    Attributes:
        bits: of all weights but the experts'.
        vocabulary_gb: vocabulary-sized arrays that a step over a whole canvas moves.
        concentration: the popularity of experts falls as 1/rank to this power; 0 is uniform.
    """

    bits: float
    expert_bits: float
    vocabulary_gb: float
    concentration: float = 0.0


def stored(weights: float, bits: float) -> float:
    """Bytes of weights; below 16 bits with a bfloat16 scale and bias per 64."""
    return weights * (bits + (0.5 if bits < 16 else 0)) / 8


@lru_cache
def touched(experts: int, top_k: int, tokens: int, concentration: float = 0.0) -> float:
    """Experts that at least one token chooses, expected; the tokens choose independently."""
    popularity = [rank**-concentration for rank in range(1, experts + 1)]
    sure = 0  # so many are so popular that each token chooses them
    while (top_k - sure) * popularity[sure] > sum(popularity[sure:]) and sure < top_k:
        sure += 1
    share = (top_k - sure) / sum(popularity[sure:]) if sure < experts else 0
    return sure + sum(1 - (1 - share * each) ** tokens for each in popularity[sure:])


def layers(config: Config, assumed: Assumed, context: int, rows: int, canvas: int) -> list[Part]:
    """All layers, for `rows` positions of a canvas behind a context."""
    hidden = config.hidden_size
    projections = scores = cache = 0.0
    for layer in config.layers:
        queries = config.num_attention_heads * layer.head_dim
        keys = layer.num_key_value_heads * layer.head_dim
        projections += hidden * (2 * queries + (1 if layer.window is None else 2) * keys)
        held = context if layer.window is None else min(context, layer.window - 1)
        scores += 2 * 2 * rows * (held + canvas) * queries
        cache += 2 * 2 * keys * (held + canvas)
    layer_count = len(config.layers)
    dense = layer_count * 3 * hidden * config.intermediate_size
    router = layer_count * hidden * config.num_experts
    expert = 3 * hidden * config.moe_intermediate_size
    chosen = touched(config.num_experts, config.top_k_experts, rows, assumed.concentration)
    return [
        Part("attention, projections", 2 * rows * projections, stored(projections, assumed.bits)),
        Part("attention, scores and cache", scores, cache),
        Part("dense MLP", 2 * rows * dense, stored(dense, assumed.bits)),
        Part("router", 2 * rows * router, stored(router, assumed.bits)),
        Part(
            "experts",
            2 * rows * config.top_k_experts * layer_count * expert,
            stored(layer_count * chosen * expert, assumed.expert_bits),
        ),
    ]


def head(config: Config, assumed: Assumed, rows: int) -> list[Part]:
    """The head and what is made of its logits."""
    table = config.vocab_size * config.hidden_size
    moved = assumed.vocabulary_gb * 1e9 * rows / config.canvas_length
    return [
        Part("head", 2 * rows * table, stored(table, assumed.bits)),
        Part("sampler, vocabulary arrays", 0, moved),
    ]


def step(config: Config, assumed: Assumed, context: int, rows: int) -> list[Part]:
    """One denoising step that decodes `rows` positions of its canvas."""
    hidden = config.hidden_size
    mixing = config.vocab_size * hidden + 3 * hidden * config.intermediate_size
    return [
        *layers(config, assumed, context, rows, config.canvas_length),
        *head(config, assumed, rows),
        Part("self-conditioning", 2 * rows * mixing, stored(mixing, assumed.bits)),
    ]


def encoding(config: Config, assumed: Assumed, context: int) -> list[Part]:
    """Keys and values of a canvas that was committed."""
    length = config.canvas_length
    return layers(config, assumed, context, length, length)


def token(config: Config, assumed: Assumed, context: int) -> list[Part]:
    """A token of the same backbone that decodes one after the other."""
    return [*layers(config, assumed, context, 1, 1), *head(config, assumed, 1)]


@dataclass(frozen=True)
class Answers:
    """Times of an answer's tokens behind a context; `passes` is how many of each number of
    positions a canvas takes, on average."""

    config: Config
    assumed: Assumed
    context: int
    passes: dict[int, float]

    def canvases(self, chip: Chip) -> Iterator[float]:
        """Seconds until the end of each canvas."""
        spent = 0.0
        for behind in count(self.context, self.config.canvas_length):
            if behind > self.context:
                before = behind - self.config.canvas_length
                spent += seconds(encoding(self.config, self.assumed, before), chip)
            for rows, times in self.passes.items():
                spent += times * seconds(step(self.config, self.assumed, behind, rows), chip)
            yield spent

    def tokens(self, chip: Chip) -> Iterator[float]:
        """Seconds until each token, where they are decoded one after the other."""
        spent = 0.0
        for behind in count(self.context):
            spent += seconds(token(self.config, self.assumed, behind), chip)
            yield spent

    def compare(self, chip: Chip, canvases: int) -> tuple[list[float], list[float]]:
        """Seconds of answers of 1, 2, ... tokens: of diffusion, and one after the other."""
        length = self.config.canvas_length
        diffusion = [s for s in islice(self.canvases(chip), canvases) for _ in range(length)]
        return diffusion, list(islice(self.tokens(chip), canvases * length))


def ahead(diffusion: list[float], single: list[float]) -> int | None:
    """The shortest answer that diffusion gives first, if any."""
    pairs = enumerate(zip(diffusion, single, strict=True), start=1)
    return next((length for length, (a, b) in pairs if a <= b), None)
