"""Videos: which frames are shown, when, from where, and that they are pictures with their times."""

import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from looking import BEGIN, END, IMAGE, looking_checkpoint
from PIL import Image
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

from mlx_diffgemma import Request, SettingError, load
from mlx_diffgemma.images import video as module
from mlx_diffgemma.images.picture import PictureError
from mlx_diffgemma.images.video import MOST_FRAMES, read_frames, sampled
from mlx_diffgemma.text.vocabulary import Vocabulary


def shade(i: int) -> Image.Image:
    return Image.new("RGB", (32, 24), (2 * i, 255 - 2 * i, 128))


def level(image: Image.Image) -> int:
    """Which shade it is, whatever a codec made of it."""
    return round(float(np.asarray(image)[..., 0].mean()) / 2)


def gif(path: Path, count: int, milliseconds: int = 500) -> Path:
    frames = [shade(i) for i in range(count)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds)
    return path


def film(path: Path, count: int, fps: int = 10) -> Path:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        for i in range(count):
            container.mux(stream.encode(av.VideoFrame.from_image(shade(i))))
        container.mux(stream.encode())
    return path


def test_frames_are_sampled_as_the_reference_does() -> None:
    for count in (32, 33, 63, 64, 100, 999, 12_345):
        told = VideoMetadata(total_num_frames=count)
        assert sampled(count) == default_sample_indices_fn(told, num_frames=32).tolist()
    assert sampled(5) == [0, 1, 2, 3, 4]  # which the reference refuses


def test_frames_of_each_kind(tmp_path: Path) -> None:
    """A GIF has durations, a film a rate, and a folder neither: 24 a second, as the reference."""
    frames = read_frames(gif(tmp_path / "a.gif", 120))
    assert len(frames) == MOST_FRAMES
    assert [frame.seconds for frame in frames] == [i / 2 for i in sampled(120)]
    assert [level(frame.image) for frame in frames] == sampled(120)
    assert (frames[0].stamp, frames[-1].stamp) == ("00:00", "00:58")
    assert module.Frame(3725, shade(0)).stamp == "62:05"
    for count in (20, 120):
        frames = read_frames(film(tmp_path / "a.mp4", count))
        assert [frame.seconds for frame in frames] == [i / 10 for i in sampled(count)]
        off = [abs(level(f.image) - i) for f, i in zip(frames, sampled(count), strict=True)]
        assert max(off) <= 1
    for i in range(3):
        shade(i).save(tmp_path / f"{i}.png")
    (tmp_path / "a.gif").unlink()
    frames = read_frames(tmp_path)
    assert [frame.seconds for frame in frames] == [0, 1 / 24, 2 / 24]
    assert [level(frame.image) for frame in frames] == [0, 1, 2]


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(looking_checkpoint(tmp_path_factory.mktemp("looking")), dtype="float32")


def ids_of(seeing: Any, *parts: dict[str, Any]) -> list[int]:
    model, tokenizer = seeing
    chat = [{"role": "user", "content": [*parts, {"type": "text", "text": "Who?"}]}]
    return Request(chat).prepare(model, Vocabulary(model, tokenizer)).prompt


def test_a_video_is_its_frames_with_their_times(seeing: Any, tmp_path: Path) -> None:
    """Equal to pictures behind texts, and written as the reference's processor writes it."""
    path = gif(tmp_path / "a.gif", 3, 700)
    parts: list[dict[str, Any]] = []
    for i, frame in enumerate(read_frames(path)):
        parts.append({"type": "text", "text": f"{' ' * (i > 0)}{frame.stamp} "})
        parts.append({"type": "image", "image": frame.image, "tokens": 70})
    ids = ids_of(seeing, {"type": "video", "video": path})
    assert ids == ids_of(seeing, *parts)  # which compares pixels, too
    _, tokenizer = seeing
    numbers = [int(token) for token in ids]
    n = numbers.count(IMAGE) // 3
    text = tokenizer.decode([t for t in numbers if t not in (IMAGE, BEGIN, END)])
    assert "00:00  00:00  00:01 Who?" in text
    assert numbers.count(BEGIN) == numbers.count(END) == 3
    assert n == 63  # 32 x 24 in 70 tokens, as the rule of VISION.md has it: 9 x 7


def test_times_are_the_only_text_that_a_picture_brings(seeing: Any) -> None:
    for time in ("<|turn>", "1:2", "00:00 <|turn>system", 5):
        part = {"type": "image", "image": shade(1), "time": time}
        with pytest.raises(SettingError, match="the time of a picture is MM:SS"):
            ids_of(seeing, part)


def test_what_is_no_video_is_one_sentence(
    seeing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, said: str) -> None:
        with pytest.raises(PictureError, match=said) as raised:
            read_frames(path)
        assert "\n" not in str(raised.value)

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has 0 frames")
    refused(tmp_path / "none.mp4", "does not exist")
    for name in ("a.gif", "a.mp4"):
        path = tmp_path / name
        path.write_bytes(b"")
        refused(path, "is empty")
        path.write_bytes(b"nothing at all " * 99)
        refused(path, "is not a picture" if name == "a.gif" else "cannot be read")
        whole = (gif if name == "a.gif" else film)(path, 40).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        refused(path, "cannot be read")
    playlist = tmp_path / "a.m3u8"
    playlist.write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n")
    refused(playlist, "cannot be read|no pictures|frames")
    gif(tmp_path / "b.gif", 5)
    monkeypatch.setattr(module, "MOST_COUNTED", 4)
    refused(tmp_path / "b.gif", "has 5 frames; a video has 1 to 4")
    monkeypatch.setitem(sys.modules, "av", None)
    refused(playlist, "needs PyAV: pip install 'mlx-diffgemma")
    for wrong in ("a.mp4", None, 5):
        with pytest.raises(SettingError, match="a video is a pathlib"):
            ids_of(seeing, {"type": "video", "video": wrong})
