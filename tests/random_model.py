"""A model that knows nothing: random weights in MLX, for properties that hold for any model."""

import mlx.core as mx
from mlx.utils import tree_map

from mlx_diffgemma import DiffusionGemma, GenerationConfig
from mlx_diffgemma.model import Config, LayerConfig


def untrained(
    vocab_size: int,
    canvas: int,
    *,
    seed: int = 3,
    eos: tuple[int, ...] = (1, 6),
    context: int = 4096,
) -> DiffusionGemma:
    """One full layer of width 32; 64 tokens and 48 steps are the checkpoint's defaults."""
    layers = (LayerConfig(16, 1, None, 1e4, 8),)
    config = Config(vocab_size, 32, 32, 16, 2, 2, 1, 1e-6, 30.0, context, canvas, layers)
    generation = GenerationConfig(max_new_tokens=64, eos_token_ids=eos)
    model = DiffusionGemma(config, generation)
    keys = iter(mx.random.split(mx.random.key(seed), 99))
    model.update(
        tree_map(lambda p: mx.random.normal(p.shape, key=next(keys)) * 0.5, model.parameters())
    )
    return model
