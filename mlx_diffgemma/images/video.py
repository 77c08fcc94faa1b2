"""Videos as a few pictures with times, sampled as the reference's processor does.

A GIF, an animated WebP or a folder of pictures is read with Pillow; other files with PyAV.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import opened, read_picture, reason, upright
from .picture import PictureError

if TYPE_CHECKING:
    from PIL import Image

MOST_FRAMES = 32  # that a model is shown of one video

FRAME_TOKENS = 70  # most of each

FPS = 24.0  # where nothing says how fast the frames follow each other

# Frames of a file or folder, of which `MOST_FRAMES` are shown: each is counted, most are skipped.
MOST_COUNTED = 200_000

ANIMATED = (".gif", ".webp", ".png", ".apng", ".avif")

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")

MISSING = (
    "needs PyAV: pip install 'mlx-diffgemma[video]'; a GIF, an animated WebP or a folder "
    "of pictures does without"
)


@dataclass(frozen=True)
class Frame:
    """A picture in RGB, and when it is seen, in seconds from the beginning."""

    seconds: float
    image: "Image.Image"

    @property
    def stamp(self) -> str:
        """Minutes and seconds, as they stand before the picture."""
        return f"{int(self.seconds // 60):02d}:{int(self.seconds % 60):02d}"


def sampled(count: int) -> list[int]:
    """Which of so many frames are shown: evenly spaced from the first on, or all."""
    shown = min(count, MOST_FRAMES)
    return [i * count // shown for i in range(shown)]


def read_frames(path: Path) -> list[Frame]:
    """Read the frames of a video that are shown.

    A folder's pictures are frames by their names in order, at `FPS`.

    Raises:
        PictureError: it cannot be read, has no frames or too many, or its reader is missing.
    """
    try:
        if path.is_dir():
            return _of_folder(path)
        if not path.is_file():
            what = "is not a file" if path.exists() else "does not exist"
            raise PictureError(f"{path} {what}")
        if not path.stat().st_size:
            raise PictureError(f"{path} is empty")
        return _of_animation(path) if path.suffix.lower() in ANIMATED else _of_file(path)
    except OSError as error:
        raise PictureError(f"{path} cannot be read: {error.strerror or reason(error)}") from None


def _counted(path: Path, count: int) -> list[int]:
    """Which frames are shown; raises `PictureError` for none or too many."""
    if not 0 < count <= MOST_COUNTED:
        raise PictureError(f"{path} has {count:,} frames; a video has 1 to {MOST_COUNTED:,}")
    return sampled(count)


def _of_folder(path: Path) -> list[Frame]:
    names = sorted(each for each in path.iterdir() if each.suffix.lower() in SUFFIXES)
    return [Frame(i / FPS, read_picture(names[i])) for i in _counted(path, len(names))]


def _of_animation(path: Path) -> list[Frame]:
    """Frames of a file that Pillow reads, which has a duration for each."""
    found: list[Frame] = []
    with path.open("rb") as file, opened(file, path.stat().st_size, str(path)) as image:
        try:
            shown = _counted(path, getattr(image, "n_frames", 1))
            milliseconds = 0.0
            for i in range(shown[-1] + 1):
                image.seek(i)
                if i in shown:
                    found.append(Frame(milliseconds / 1000, upright(image.copy(), str(path))))
                milliseconds += image.info.get("duration", 1000 / FPS)
        except PictureError:
            raise
        except Exception as error:  # decoders raise whatever the damage leads to
            raise PictureError(f"{path} cannot be read: {reason(error)}") from None
    return found


def _of_file(path: Path) -> list[Frame]:
    """Frames of a file that PyAV reads; between those that are shown it skips what it can."""
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        raise PictureError(f"{path} {MISSING}") from None
    try:
        # A playlist could name other files, and addresses.
        with av.open(str(path), options={"protocol_whitelist": "file"}) as container:
            if not container.streams.video:
                raise PictureError(f"{path} has no pictures")
            return [*_decoded(path, container, container.streams.video[0])]
    except (FFmpegError, ValueError) as error:
        raise PictureError(f"{path} cannot be read: {reason(error)}") from None


def _decoded(path: Path, container: Any, stream: Any) -> Iterator[Frame]:
    """Frames that are shown, each the first at or behind its time."""
    fps = float(stream.average_rate or 0) or FPS
    seconds = float((container.duration or 0) / 1_000_000)
    shown = _counted(path, stream.frames or int(seconds * fps))
    start, base = stream.start_time or 0, stream.time_base
    frames, image = container.decode(stream), None
    for i in shown:
        time = i / fps
        if i - shown[max(shown.index(i) - 1, 0)] > fps:  # over a second: go on from a key frame
            container.seek(start + int(time / base), stream=stream)
            frames = container.decode(stream)
        for frame in frames:
            image = frame
            if frame.pts is None or float((frame.pts - start) * base) >= time - 0.5 / fps:
                break
        if image is None:
            raise PictureError(f"{path} has no pictures")
        yield Frame(time, upright(image.to_image(), str(path)))
