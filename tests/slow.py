"""What readout.py does, slowly: with all logits at once, by the book."""

import mlx.core as mx

from mlx_diffgemma import DiffusionGemma
from mlx_diffgemma.diffusion.constraints import NEVER, Constraint


def table(model: DiffusionGemma) -> mx.array:
    """The whole embedding table."""
    return model.embedding(mx.arange(model.config.vocab_size))


def soft_embedding(model: DiffusionGemma, logits: mx.array) -> mx.array:
    """Expected embedding (B, L, hidden) under logits (B, L, V)."""
    return model.scaled(mx.softmax(logits, axis=-1) @ table(model))


def entropy(logits: mx.array) -> mx.array:
    """Nats (B, L) of softmax(logits)."""
    log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return -(mx.exp(log_p) * log_p).sum(axis=-1)


def best_canvas(
    constraint: Constraint,
    logits: mx.array,
    fixed: mx.array | None = None,
    canvas: mx.array | None = None,
) -> mx.array:
    """(B, L) ids of the allowed canvas with the highest sum of logits (B, L, V)."""
    allowed = constraint.allowed(0, logits.shape[-1], mx.arange(logits.shape[1]))
    masked = logits if allowed is None else mx.where(allowed, logits, NEVER)
    given = mx.zeros(logits.shape[:2], dtype=mx.int32) if canvas is None else canvas
    return constraint.choose(constraint.score(masked, 0), fixed, given)
