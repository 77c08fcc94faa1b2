"""Memory of MLX as tests compare it."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx


def active_memory() -> int:
    """Bytes of arrays, once nothing waits to be freed. Cached buffers go, as an array may be given
    one that is larger than it needs."""
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    return mx.get_active_memory()


@contextmanager
def exact_memory() -> Iterator[None]:
    """Have every array take what it needs: none is given a buffer that was freed meanwhile."""
    limit = mx.set_cache_limit(0)
    try:
        yield
    finally:
        mx.set_cache_limit(limit)
