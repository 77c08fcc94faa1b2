"""DoRA where ranks have columns of a map: what stands before a row takes the norm of all of it."""

from collections.abc import Sequence
from itertools import accumulate

import mlx.core as mx
from mlx.utils import tree_unflatten

from ..model.adapters import ScaledRows
from ..model.diffusion_gemma import DiffusionGemma


def over_ranks(model: DiffusionGemma, names: Sequence[str]) -> None:
    """Put factors that are known from now on in the place of DoRA's magnitudes over norms, in the
    maps of these names, of whose columns each rank has some. All ranks call it, with the same.

    mlx-lm's module computes the norms of the columns that it has, anew with each pass. The squares
    of all columns are put together here, once and in one go.
    """
    from mlx_lm.tuner.lora import LoRALinear

    if not names:
        return
    modules = dict(model.named_modules())
    maps = [modules[name] for name in names]
    squares = []
    for each in maps:
        adapted = each._dequantized_weight() + (each.scale * each.lora_b.T) @ each.lora_a.T
        squares.append(mx.square(adapted.astype(mx.float32)).sum(axis=1))
        mx.eval(squares[-1])  # or the unpacked weights of all maps would be there at once
    ends = list(accumulate(map(len, squares)))[:-1]
    norms = mx.split(mx.sqrt(model.part.share.sum(mx.concatenate(squares))), ends)
    places = []
    for name, each, norm in zip(names, maps, norms, strict=True):
        rank = each.lora_b.shape[0]
        terms = LoRALinear.from_base(each.linear, rank, 0.0, each.scale)
        terms.lora_a, terms.lora_b = each.lora_a, each.lora_b
        places.append((name, ScaledRows(terms, each.m / norm)))
    model.update_modules(tree_unflatten(places))
