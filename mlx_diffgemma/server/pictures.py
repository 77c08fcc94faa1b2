"""Reads pictures that clients send as data: URLs, within bounds. Nothing is ever fetched."""

import base64
import binascii
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..images.files import can_read, picture_size
from ..images.picture import Picture, PictureError
from ..model.config import ConfigError
from ..model.diffusion_gemma import READS_TEXT, DiffusionGemma
from ..model.sight import Sight
from ..model.vision_config import BUDGETS
from ..tasks.pictures import MOST_PICTURES, show
from ..text.tokenizer import Message
from .body import Body
from .refused import Refused

# Pixels of all pictures of a request, by their headers: one of the largest that there may be, or
# five of a phone. Decoding takes about a second for it, of a file that may be tiny.
MOST_REQUEST_PIXELS = 1 << 26

# What an address of bytes may say that they are; what they are is seen by themselves.
KINDS = ("png", "jpeg", "jpg", "webp", "gif", "bmp", "tiff", "avif")

HOW = "a picture is sent as it is, in an address data:image/png;base64,..."

_DATA = re.compile(r"data:([^,;]{0,100})((?:;[^,;]{0,100}){0,4}),", re.IGNORECASE)

Detail = Literal["low", "high", "auto"]


class ImageUrl(Body):
    url: str
    detail: Detail | None = None


@dataclass(frozen=True)
class Sent:
    """A picture as it was sent; `place` is the field's name."""

    url: str
    detail: Detail | None
    place: str

    @classmethod
    def of(cls, given: str | ImageUrl, place: str) -> "Sent":
        """One that is an address, or says its detail as well."""
        if isinstance(given, str):
            return cls(given, None, place)
        return cls(given.url, given.detail, f"{place}.url")

    def refused(self, reason: str) -> Refused:
        """Make the refusal that names the field."""
        return Refused(400, f"{self.place}: {reason}", param=self.place)

    def data(self) -> bytes:
        """Give the bytes of the file.

        Raises:
            Refused: it is no data: URL of a picture in base64.
        """
        found = _DATA.match(self.url)
        if found is None:
            scheme = self.url[:40].partition(":")[0].lower()
            if scheme in ("http", "https", "file", "ftp", "blob"):
                raise self.refused(f"the server fetches nothing: {HOW}")
            raise self.refused(HOW)
        kind, settings = found[1].strip().lower(), found[2].lower().split(";")
        if kind.removeprefix("image/") not in KINDS or not kind.startswith("image/"):
            raise self.refused(f"{kind[:60] or 'text'!r} is none of image/{', image/'.join(KINDS)}")
        if "base64" not in settings:
            raise self.refused("the picture is not in base64")
        try:
            # Some write it in lines.
            return base64.b64decode("".join(self.url[found.end() :].split()), validate=True)
        except (binascii.Error, ValueError):
            raise self.refused("the picture is not in base64") from None


def sees(model: DiffusionGemma) -> bool:
    """Say whether pictures may be sent: there is a tower, and what reads files."""
    try:
        return model.sight is not None and model.sight.config is not None and can_read()
    except ConfigError:
        return False


def seen(sent: Sequence[Sent], model: DiffusionGemma, check: Callable[[], None]) -> list[Picture]:
    """Read pictures of a request, all of them or none; for a thread that prepares.

    Count and pixels are known before one is decoded; `check` is called between them.

    Raises:
        Refused: one is no picture, they are too many or too large, or the model reads text alone.
    """
    if not sent:
        return []
    if model.sight is None:
        raise Refused(400, READS_TEXT, param=sent[0].place)
    if len(sent) > MOST_PICTURES:
        raise Refused(400, f"a request has at most {MOST_PICTURES} pictures, not {len(sent)}")
    files, pixels = [], 0
    for each in sent:
        check()
        files.append(each.data())
        try:
            width, height = picture_size(files[-1])
        except PictureError as error:
            raise each.refused(str(error)) from None
        pixels += width * height
        if pixels > MOST_REQUEST_PIXELS:
            raise each.refused(
                f"the pictures of a request have {MOST_REQUEST_PIXELS:,} pixels together at most"
            )
    high = _high(sent, model.sight, model.context - model.config.canvas_length)
    found = []
    for each, file in zip(sent, files, strict=True):
        check()
        budget = {"low": BUDGETS[0], "high": high}.get(each.detail or "auto")
        try:
            picture = show(file, model.sight, budget)
        except PictureError as error:
            raise each.refused(str(error)) from None
        assert isinstance(picture, Picture)  # of a file
        found.append(picture)
    return found


def _high(sent: Sequence[Sent], sight: Sight, room: int) -> int:
    """Give the tokens of each picture in high detail: as many as all of them have room for."""
    details = [each.detail or "auto" for each in sent]
    others = {"low": BUDGETS[0], "auto": sight.config.budget, "high": 0}
    room = min(room, sight.context) - sum(others[each] for each in details)
    fitting = [each for each in BUDGETS if each * details.count("high") <= room]
    return max(fitting, default=BUDGETS[0])


def has_picture(content: object) -> bool:
    """Say whether the content of a message has a picture among its parts."""
    return isinstance(content, list) and any(part["type"] == "image" for part in content)


def with_pictures(
    messages: Sequence[Message], model: DiffusionGemma, check: Callable[[], None]
) -> list[Message]:
    """Messages in which each `Sent` of a part is a picture that was read; errors as in `seen`."""
    sent = [
        part["image"]
        for message in messages
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image"
    ]
    read = iter(seen(sent, model, check))

    def part_of(part: dict[str, Any]) -> dict[str, Any]:
        return {**part, "image": next(read)} if part["type"] == "image" else part

    return [
        {**message, "content": [*map(part_of, content)]}
        if isinstance(content := message["content"], list)
        else message
        for message in messages
    ]
