"""Where pictures stand in a prompt, and who sees whom there.

A picture stands for a run of placeholder tokens, one for each of its embeddings; other tokens
separate it from the next. A placeholder knows its picture: equal ids of two pictures are not alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn, Protocol, get_args

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..arguments import SettingError
from ..errors import Error
from .cache import EncoderMask, LayerCache, Mask

# How the tokens of one picture see each other beside what is causal. "reference" is what generate()
# of transformers 5.23 does: in all layers, whatever the window. "gemma" is Gemma 4's rule, which
# the weights were probably trained with: in sliding layers alone, within the window.
PictureRule = Literal["reference", "gemma", "causal"]

RULES: tuple[PictureRule, ...] = get_args(PictureRule)


class LostPicture(Error):
    """A picture has to be read again, and its pixels were not kept."""


class Pixels(Protocol):
    """A picture that is ready to be seen."""

    @property
    def digest(self) -> bytes:
        """Tells it from others."""

    @property
    def rows(self) -> int:
        """Patches of a column."""

    @property
    def columns(self) -> int:
        """Patches of a row."""

    @property
    def tokens(self) -> int:
        """Tokens that it takes in a prompt."""

    @property
    def patches(self) -> npt.NDArray[np.float32]:
        """(rows x columns, 3 patch_size^2) numbers from 0 to 1."""


@dataclass(frozen=True)
class Kept:
    """What is left of a picture that was read: digest and size tell whether another is the same."""

    digest: bytes
    rows: int
    columns: int
    tokens: int

    @property
    def patches(self) -> NoReturn:
        """There are none.

        Raises:
            LostPicture: always.
        """
        raise LostPicture(
            "a picture of this conversation has to be read again, and its pixels were not kept: "
            "give it once more in a new message"
        )


class Placeholder(int):
    """The id of a token of a picture; equal to the same token of the same picture alone."""

    picture: Pixels
    place: int  # of the picture's tokens, counted from 0

    def __new__(cls, token: int, picture: Pixels, place: int) -> "Placeholder":
        made = super().__new__(cls, token)
        made.picture, made.place = picture, place
        return made

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Placeholder)
            and int(self) == int(other)
            and self.place == other.place
            and self.picture.digest == other.picture.digest
        )

    def __ne__(self, other: object) -> bool:  # int has one of its own
        return not self == other

    __hash__ = int.__hash__

    def __getnewargs__(self) -> tuple[int, Pixels, int]:  # type: ignore[override]
        return int(self), self.picture, self.place


def placeholders(token: int, pictures: Sequence[Pixels]) -> list[Placeholder]:
    """Those of all pictures, one after another."""
    return [Placeholder(token, each, place) for each in pictures for place in range(each.tokens)]


def pictures_in(tokens: Sequence[int]) -> list[Pixels]:
    """The pictures that begin among these tokens."""
    return [token.picture for token in tokens if isinstance(token, Placeholder) and not token.place]


def without_pixels(tokens: Sequence[int]) -> list[int]:
    """The same tokens, whose pictures are digests and sizes: what was read needs no pixels."""
    kept: dict[bytes, Kept] = {}
    found: list[int] = []
    for token in tokens:
        if isinstance(token, Placeholder):
            seen = token.picture
            if seen.digest not in kept:
                kept[seen.digest] = Kept(seen.digest, seen.rows, seen.columns, seen.tokens)
            token = Placeholder(int(token), kept[seen.digest], token.place)
        found.append(token)
    return found


def runs(tokens: Sequence[int]) -> list[int]:
    """Of each token the picture that it is of, counted from 0; -1 is text.

    Raises:
        SettingError: only a part of a picture is there, or its parts are in another order.
    """
    found, picture, left = [], -1, 0
    for token in tokens:
        inside = isinstance(token, Placeholder)
        if isinstance(token, Placeholder) and not token.place and not left:
            picture, left = picture + 1, token.picture.tokens
        if inside != (left > 0) or (
            isinstance(token, Placeholder) and token.place + left != token.picture.tokens
        ):
            raise SettingError("a picture stands in a prompt as a whole, or not at all")
        left -= inside
        found.append(picture if inside else -1)
    if left:
        raise SettingError("a picture stands in a prompt as a whole, or not at all")
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

    What the cache holds already is seen as any context is. Each token sees one stretch of tokens,
    since those of its picture are neighbours.
    """
    new = np.asarray(of)
    first, last = np.arange(len(new)), np.arange(len(new))
    for picture in range(new.max(initial=-1) + 1):
        inside = np.flatnonzero(new == picture)
        first[inside], last[inside] = inside[0], inside[-1]

    def mask(layer: LayerCache, count: int) -> Mask:
        if len(new) != count:
            raise SettingError(f"a mask for {len(new)} tokens, and {count} are new")
        window = layer.window
        causal = rule == "causal" or (rule == "gemma" and window is None)
        if causal or not (new >= 0).any():
            return layer.encoder_mask(count)
        key = mx.arange(layer.size + count)
        seen = key <= mx.array(layer.size + last)[:, None]
        if window is None:
            return seen
        oldest = layer.size + np.arange(count) - window + 1
        if rule == "reference":
            oldest = np.minimum(oldest, layer.size + first)
        return seen & (key >= mx.array(oldest)[:, None])

    return mask


def pieces(tokens: Sequence[int], chunk: int) -> list[int]:
    """Where chunks of at most `chunk` tokens end; before a picture rather than within it.

    A picture that is longer than a chunk is one by itself.
    """
    ends, start = [], 0
    while start < len(tokens):
        end = min(start + chunk, len(tokens))
        if end < len(tokens) and isinstance(token := tokens[end], Placeholder) and token.place:
            begin = end - token.place
            end = begin if begin > start else begin + token.picture.tokens
        ends.append(end)
        start = end
    return ends
