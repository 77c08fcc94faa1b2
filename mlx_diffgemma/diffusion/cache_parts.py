"""What ranks have of one prompt cache: put together for a file, taken apart from one, and weighed.

A rank has the keys and values of its own heads; some may have the same ones. All ranks call each of
these functions at once, but for `whole_bytes`.
"""

from collections.abc import Iterator, Sequence

import mlx.core as mx

from ..model.cache import LayerCache, LayerSnapshot
from ..model.diffusion_gemma import DiffusionGemma

# Arrays of each layer, or None, at the end of a context and then at each of its snapshots.
Layers = Sequence[Sequence[mx.array | None]]


def whole_bytes(model: DiffusionGemma, layers: Sequence[LayerCache | LayerSnapshot]) -> int:
    """Bytes of keys and values that all ranks hold, each once: what is decided by them has to be
    decided alike."""
    return sum(
        state.nbytes // state.shape[1] * 2 * layer.num_key_value_heads
        for layer, held in zip(model.config.layers, layers, strict=True)
        if (state := held.state) is not None
    )


def types_held(model: DiffusionGemma) -> list[mx.Dtype]:
    """The type of each layer's keys and values."""
    like = model.make_cache()
    model.encode(mx.array([[0]]), like)  # of one rank never computed: only its types are asked
    states = [layer.state for layer in like]
    return [state.dtype for state in states if state is not None]


def shapes_held(model: DiffusionGemma, lengths: Sequence[int]) -> list[list[list[int] | None]]:
    """Shapes of the keys and values of all heads of each layer, at the end of a context of
    `lengths[0]` tokens and at snapshots after the others."""
    found: list[list[list[int] | None]] = []
    for number, length in enumerate(lengths):
        found.append([])
        for layer in model.config.layers:
            if not length or (number and layer.window is None):
                found[-1].append(None)
                continue
            kept = length if layer.window is None else min(length, layer.window - 1)
            found[-1].append([1, 2 * layer.num_key_value_heads, kept, layer.head_dim])
    return found


def put_together(model: DiffusionGemma, layers: Layers) -> Iterator[mx.array | None]:
    """Arrays of all heads, one after another, out of each rank's own."""
    share = model.part.share
    for each in layers:
        for i, own in enumerate(each):
            if own is None or share.size == 1:
                yield own
                continue
            batch, _, length, size = own.shape
            heads = 2 * model.config.layers[i].num_key_value_heads
            whole = mx.zeros((batch, heads, length, size), own.dtype)
            if model.part.layers[i].first:
                whole[:, mx.array(_rows(model, i))] = own
            # Sums of bits, with zeros: a number would lose the sign of its zero.
            summed = share.sum(whole.view(mx.uint32)).view(own.dtype)
            mx.eval(summed)
            yield summed


def take_apart(model: DiffusionGemma, layers: Layers) -> list[list[mx.array | None]]:
    """Each rank's own heads, out of rank 0's arrays of all; the others' say their shapes."""
    share = model.part.share
    found: list[list[mx.array | None]] = []
    for each in layers:
        found.append([])
        for i, whole in enumerate(each):
            if whole is None or share.size == 1:
                found[-1].append(whole)
                continue
            (told,) = share.agreed([whole])
            own = mx.contiguous(told[:, mx.array(_rows(model, i))])
            mx.eval(own)
            found[-1].append(own)
    return found


def _rows(model: DiffusionGemma, layer: int) -> list[int]:
    """Where a rank's heads of keys, and then of values, stand among all."""
    own, count = model.part.layers[layer].keys, model.config.layers[layer].num_key_value_heads
    return [*own, *(count + head for head in own)]
