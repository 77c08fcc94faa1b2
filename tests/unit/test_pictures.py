"""Files of pictures: what is read, and the one sentence about what is not."""

import struct
import zlib
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from mlx_diffgemma.arguments import SettingError
from mlx_diffgemma.images.files import MOST_PIXELS, read_picture
from mlx_diffgemma.images.picture import Grid, Picture, PictureError, picture_of, resized


def drawn(height: int, width: int) -> Image.Image:
    numbers = np.random.default_rng(1).integers(0, 256, (height, width, 3))
    return Image.fromarray(numbers.astype(np.uint8))


def stored(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it is so large; behind its header there is next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" * 9)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n%%EndComments\n%%EOF\n"

WRONG = {
    "0 bytes": (b"", "is empty"),
    "truncated": (stored(drawn(60, 80))[:2000], "cannot be read: image file is truncated"),
    "only a header": (stored(drawn(60, 80))[:20], "cannot be read: Truncated File Read"),
    "truncated JPEG": (stored(drawn(60, 80), "JPEG")[:900], "cannot be read: image file is trunc"),
    "1 x 1": (stored(drawn(1, 1)), "is 1 x 1 pixels; a picture has 4 on each side at least"),
    "1 x 30,000": (stored(drawn(30_000, 1)), "is 1 x 30,000 pixels; a picture has 4"),
    "20,000 x 20,000": (bomb(20_000, 20_000), "has more than 67,108,864 pixels"),
    "10,000 x 10,000": (bomb(10_000, 10_000), "is 10,000 x 10,000 pixels; a picture has 67,108"),
    "text": (b"not a picture at all\n" * 40, "is not a picture in PNG"),
    "damaged": (bomb(60, 80), "cannot be read: "),
    "HEIC": (b"\0\0\0\x18ftypheic" + bytes(90), "is HEIC, which Pillow does not read: save it as"),
    "a program": (EPS, "is not a picture in PNG"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.filterwarnings("error")
def test_a_wrong_file_is_one_sentence(case: str, tmp_path: Path) -> None:
    """As bytes and as a file; a bomb is known by its header, without a warning of Pillow's."""
    data, said = WRONG[case]
    path = tmp_path / "it.png"
    path.write_bytes(data)
    for given, name in ((data, "the picture"), (path, str(path))):
        with pytest.raises(PictureError) as raised:
            read_picture(given)
        assert str(raised.value).startswith(f"{name} {said}")
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 200 + len(name)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match="is not a file"):
        read_picture(tmp_path)
    with pytest.raises(PictureError, match="does not exist"):
        read_picture(tmp_path / "none.png")


@pytest.mark.filterwarnings("error")
def test_every_cut_of_a_file_is_read_or_refused() -> None:
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        whole = stored(drawn(24, 40), kind)
        for end in range(0, len(whole), max(1, len(whole) // 60)):
            damaged = bytearray(whole)
            damaged[end] ^= 0xFF
            for data in (whole[:end], bytes(damaged)):
                with suppress(PictureError):
                    assert read_picture(data).mode == "RGB"


def test_pictures_stand_upright() -> None:
    """EXIF's orientation, of files and of Pillow's images."""
    image = drawn(30, 50)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = stored(image, exif=exif)
        upright = ImageOps.exif_transpose(Image.open(BytesIO(data)))
        assert read_picture(data).tobytes() == upright.tobytes()
        assert read_picture(Image.open(BytesIO(data))).size == upright.size
    assert upright.size == (30, 50)


def test_transparent_parts_are_white_and_16_bits_keep_their_shades() -> None:
    """Pillow shows what lies under a transparent part, and cuts 16 bits of grey at 255: white."""
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert read_picture(stored(clear)).getpixel((0, 0)) == (255, 255, 255)
    palette = clear.convert("RGB").quantize(4)
    assert read_picture(stored(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    grey = Image.fromarray(np.full((8, 8), 0x8040, np.uint16))
    assert read_picture(stored(grey)).getpixel((0, 0)) == (128, 128, 128)


def test_the_first_picture_of_an_animation_is_read() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = stored(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert read_picture(data).getpixel((0, 0)) == (255, 0, 0)


def test_what_is_no_size() -> None:
    assert resized(1, 30_000, 70) == (48, 70 * 48)
    for height, width, budget in ((0, 5, 70), (5, 0, 70), (5, 5, 0)):
        with pytest.raises(SettingError, match="pixels do not become"):
            resized(height, width, budget)
    with pytest.raises(SettingError, match="in RGB here, not L"):
        picture_of(drawn(8, 8).convert("L"), 70)


def test_a_digest_tells_pixels_and_sizes_apart() -> None:
    one = picture_of(drawn(60, 90), 70)
    assert one.digest == picture_of(drawn(60, 90), 70).digest
    assert one.digest != picture_of(drawn(60, 90), 140).digest
    other = one.pixels.copy()
    other[5, 5, 1] ^= 1
    assert Picture(other).digest != one.digest
    turned = Picture(np.ascontiguousarray(one.pixels.reshape(-1, 48, 3)))
    assert turned.digest != one.digest
    assert Picture(one.pixels, Grid(patch_size=8)).digest != one.digest


def test_the_bound_is_on_pixels() -> None:
    side = int(MOST_PIXELS**0.5)
    read_picture(stored(Image.new("1", (side, side))))
    with pytest.raises(PictureError, match="at most"):
        read_picture(Image.new("1", (side, side + 1)))
