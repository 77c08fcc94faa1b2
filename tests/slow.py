"""What readout.py does, slowly: with all logits at once, by the book."""

import mlx.core as mx

from mlx_diffgemma import DiffusionGemma


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
