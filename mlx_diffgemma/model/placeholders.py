"""Where pictures stand in a prompt: their embeddings in place of tokens', and who sees whom.

A picture is a run of placeholder tokens, one for each of its embeddings; other tokens separate it
from the next.
"""

from collections.abc import Sequence
from typing import Literal

import mlx.core as mx
import numpy as np

from ..arguments import SettingError
from .cache import EncoderMask, LayerCache, Mask

# How the tokens of one picture see each other beside what is causal. "reference" is what generate()
# of transformers 5.23 does: in all layers, whatever the window. "gemma" is Gemma 4's rule, which
# the weights were probably trained with: in sliding layers alone, within the window.
PictureRule = Literal["reference", "gemma"]


def runs(ids: Sequence[int], placeholder: int) -> list[int]:
    """Of each token the picture that it is of, counted from 0; -1 is text."""
    found, picture, inside = [], -1, False
    for token in ids:
        picture += token == placeholder and not inside
        inside = token == placeholder
        found.append(picture if inside else -1)
    return found


def placed(embedded: mx.array, pictures: Sequence[mx.array], of: Sequence[int]) -> mx.array:
    """Embeddings (1, T, hidden) in which pictures (tokens, hidden) stand for their placeholders.

    Raises:
        SettingError: runs and pictures differ in number or length.
    """
    places = np.asarray(of)
    lengths = [int((places == picture).sum()) for picture in range(places.max(initial=-1) + 1)]
    if lengths != [len(each) for each in pictures]:
        raise SettingError(
            f"pictures of {[len(each) for each in pictures]} tokens do not go with placeholders "
            f"for {lengths}"
        )
    if not lengths:
        return embedded
    whole = mx.array(embedded)  # written to, and the caller's stays as it is
    where = mx.array(np.flatnonzero(places >= 0))
    whole[:, where] = mx.concatenate(list(pictures)).astype(embedded.dtype)
    return whole


def picture_mask(of: Sequence[int], rule: PictureRule = "reference") -> EncoderMask:
    """Mask for new tokens of which some are pictures', as `runs` says; whole ones, never parts.

    What the cache holds already is seen as any context is.
    """
    new = np.asarray(of)

    def mask(layer: LayerCache, count: int) -> Mask:
        if len(new) != count:
            raise SettingError(f"a mask for {len(new)} tokens, and {count} are new")
        window = layer.window
        if (rule == "gemma" and window is None) or not (new >= 0).any():
            return layer.encoder_mask(count)
        ahead = np.arange(layer.size, layer.size + count)[:, None] - np.arange(layer.size + count)
        seen_as = np.concatenate([np.full(layer.size, -1), new])
        same = (new[:, None] == seen_as) & (new[:, None] >= 0)
        near = ahead < window if window is not None else np.ones_like(same)
        seen = (ahead >= 0) & near | same if rule == "reference" else ((ahead >= 0) | same) & near
        return mx.array(seen)

    return mask
