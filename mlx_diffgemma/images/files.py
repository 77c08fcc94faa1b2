"""Pictures of users: files, bytes and Pillow's images -> RGB, or a sentence about what is wrong.

A file is a stranger's: its format is one of a few, its size is known before its pixels are read,
and whatever a decoder stumbles on is told in a sentence.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, BinaryIO

from ..arguments import shown
from .picture import PictureError

if TYPE_CHECKING:
    from PIL import Image

# What Pillow decodes by itself. Others start programs (EPS) or are no pictures.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

MOST_BYTES = 64_000_000  # of a file

MOST_PIXELS = 1 << 26  # 8192 x 8192; in RGB 200 MB, with what converting it takes three times that

MISSING = "pictures need Pillow: pip install 'mlx-diffgemma[images]'"

LEAST_SIDE = 4  # pixels; less is a tracking pixel or a ruler, and nothing could be seen on it

_HEIC = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")

# One picture is decoded at a time: the filters of warnings are the process's, and so is its memory.
_decoding = Lock()


def read_picture(given: "Path | bytes | Image.Image") -> "Image.Image":
    """Read a picture in RGB, upright as EXIF says, transparent parts over white.

    Of an animation it is the first picture. Pillow's own images are turned, too.

    Raises:
        PictureError: Pillow is missing, or it cannot be read, or has too few or too many pixels.
    """
    try:
        from PIL import Image
    except ImportError:
        raise PictureError(MISSING) from None
    if isinstance(given, Image.Image):
        return upright(given, "the picture")
    if isinstance(given, bytes):
        return _decoded(BytesIO(given), len(given), "the picture")
    name = str(given)
    try:
        if not given.is_file():
            what = "is not a file" if given.exists() else "does not exist"
            raise PictureError(f"{name} {what}")
        with given.open("rb") as file:
            return _decoded(file, given.stat().st_size, name)
    except OSError as error:
        raise PictureError(f"{name} cannot be read: {error.strerror}") from None


def can_read() -> bool:
    """Say whether Pillow is there."""
    return find_spec("PIL") is not None


def picture_size(data: bytes) -> tuple[int, int]:
    """Width and height by the header of a file; its pixels are not decoded.

    Raises:
        PictureError: Pillow is missing, or it is no picture, or has too few or too many pixels.
    """
    if not can_read():
        raise PictureError(MISSING)
    with opened(BytesIO(data), len(data), "the picture") as image:
        _check_size(image, "the picture")
        return image.size


def _decoded(file: BinaryIO, size: int, name: str) -> "Image.Image":
    """Decode a file of so many bytes; no error of Pillow's leaves this."""
    with opened(file, size, name) as image:
        return upright(image, name)


@contextmanager
def opened(file: BinaryIO, size: int, name: str) -> Iterator["Image.Image"]:
    """Open a file of so many bytes, of which the header alone is read."""
    from PIL import Image, UnidentifiedImageError

    if not size:
        raise PictureError(f"{name} is empty")
    if size > MOST_BYTES:
        raise PictureError(f"{name} has {size:,} bytes; a picture has {MOST_BYTES:,} at most")
    head = file.read(12)
    file.seek(0)
    Image.init()
    formats = [each for each in FORMATS if each in Image.OPEN]
    with _decoding, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of many pixels, which are counted here, and of odd tags
        try:
            image = Image.open(file, formats=formats)
        except UnidentifiedImageError:
            what = f"is not a picture in {', '.join(FORMATS)}"
            if head[4:8] == b"ftyp" and head[8:] in _HEIC:
                what = "is HEIC, which Pillow does not read: save it as JPEG"
            raise PictureError(f"{name} {what}") from None
        except Image.DecompressionBombError:
            raise PictureError(f"{name} has more than {MOST_PIXELS:,} pixels") from None
        except Exception as error:  # decoders raise whatever the damage leads to
            raise PictureError(f"{name} cannot be read: {reason(error)}") from None
        with image:
            yield image


def upright(image: "Image.Image", name: str) -> "Image.Image":
    """Check the size, then decode, turn and convert."""
    from PIL import ImageOps

    _check_size(image, name)
    try:
        image.load()
        return _in_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # as above
        raise PictureError(f"{name} cannot be read: {reason(error)}") from None


def _check_size(image: "Image.Image", name: str) -> None:
    """Raise `PictureError` for too many pixels, or too few."""
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise PictureError(
            f"{name} is {width:,} x {height:,} pixels; a picture has {MOST_PIXELS:,} at most"
        )
    if min(width, height) < LEAST_SIDE:
        raise PictureError(
            f"{name} is {width:,} x {height:,} pixels; a picture has {LEAST_SIDE} on each side at "
            "least"
        )


def _in_rgb(image: "Image.Image") -> "Image.Image":
    """Convert to RGB as the reference does, but for 16 bits of grey, which it cuts at 255."""
    from PIL import Image

    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return _eight_bits(image).convert("RGB")
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _eight_bits(image: "Image.Image") -> "Image.Image":
    """Keep of each 16-bit grey value the upper 8."""
    import numpy as np
    from PIL import Image

    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def reason(error: Exception) -> str:
    """Put what a decoder says on one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.isprintable() and len(text) <= 100 else shown(text)
