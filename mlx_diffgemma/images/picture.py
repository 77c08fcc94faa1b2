"""A picture at the size that the model sees: the resize rule, patches, a digest of its pixels."""

import math
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..arguments import SettingError
from ..errors import Error

if TYPE_CHECKING:
    from PIL import Image


class PictureError(Error):
    """A picture that cannot be read, or not by this model."""


@dataclass(frozen=True)
class Grid:
    """How a model cuts pictures: `pool` x `pool` patches of `patch_size` pixels make a token."""

    patch_size: int = 16
    pool: int = 3

    @property
    def side(self) -> int:
        """Pixels of a side of what becomes one token."""
        return self.patch_size * self.pool


GRID = Grid()  # the published model's


def resized(height: int, width: int, budget: int, grid: Grid = GRID) -> tuple[int, int]:
    """Height and width of a picture once it is resized to at most `budget` tokens.

    It always fills the budget, so small pictures grow; proportions are kept but for rounding down
    to whole tokens.

    Raises:
        SettingError: there is no picture, or no budget.
    """
    if min(height, width, budget) < 1:
        raise SettingError(f"{width} x {height} pixels do not become {budget} tokens")
    side, pixels = grid.side, budget * grid.side**2
    factor = math.sqrt(pixels / (height * width))
    rows, columns = int(factor * height / side), int(factor * width / side)
    if not rows:  # the sides as they were are divided, as the reference does
        rows, columns = 1, min(width // height, budget)
    elif not columns:
        rows, columns = min(height // width, budget), 1
    return rows * side, columns * side


@dataclass(frozen=True)
class Picture:
    """Pixels (height, width, 3) uint8 at the size that the model sees."""

    pixels: npt.NDArray[np.uint8]
    grid: Grid = GRID

    @property
    def rows(self) -> int:
        """Patches of a column."""
        return len(self.pixels) // self.grid.patch_size

    @property
    def columns(self) -> int:
        """Patches of a row."""
        return self.pixels.shape[1] // self.grid.patch_size

    @property
    def tokens(self) -> int:
        """Tokens that the picture takes in a prompt."""
        return self.rows * self.columns // self.grid.pool**2

    @property
    def patches(self) -> npt.NDArray[np.float32]:
        """Numbers from 0 to 1 (rows x columns, 3 patch_size^2), in a patch (y, x, channel)."""
        size = self.grid.patch_size
        cut = self.pixels.reshape(self.rows, size, self.columns, size, 3).swapaxes(1, 2)
        # The reference divides in float64 and rounds then; there are only 256 numbers.
        levels = (np.arange(256) * (1 / 255)).astype(np.float32)
        return levels[cut.reshape(self.rows * self.columns, -1)]

    @cached_property
    def digest(self) -> bytes:
        """Tells pictures apart: SHA-256 of size and pixels, 32 bytes.

        The budget has no part in it: what the model is given follows from the pixels alone.
        """
        size = f"{self.pixels.shape}{self.grid}".encode()
        return sha256(size + np.ascontiguousarray(self.pixels).data).digest()


def picture_of(image: "Image.Image", budget: int, grid: Grid = GRID) -> Picture:
    """Resize a picture in RGB; the reference's PIL backend gives the same, bit for bit.

    Raises:
        SettingError: it is not in RGB, or has no pixels, or no budget.
    """
    from PIL.Image import Resampling

    if image.mode != "RGB":
        raise SettingError(f"a picture is in RGB here, not {image.mode}")
    height, width = resized(image.height, image.width, budget, grid)
    if image.size != (width, height):
        image = image.resize((width, height), Resampling.BICUBIC)
    return Picture(np.asarray(image), grid)
