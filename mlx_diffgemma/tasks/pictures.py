"""Pictures in messages: parts of a message -> markers in its text -> ids that know their picture.

All of it is Pillow and numpy: any thread may prepare a prompt with pictures.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..arguments import SettingError, shown
from ..diffusion.prompt_cache import ContextError
from ..images.files import read_picture
from ..images.picture import Grid, Picture, PictureError, picture_of
from ..model.diffusion_gemma import READS_TEXT
from ..model.placeholders import Kept, Pixels, placeholders
from ..model.sight import Sight, SightConfig
from ..model.vision_config import BUDGETS
from ..text.tokenizer import Message, Tokenizer, TokenizerError, no_check

if TYPE_CHECKING:
    from PIL import Image

# What a part of a message may hold. A path is a `Path` and never text: text may come from a
# stranger, who would then be shown what lies on this machine.
Given: TypeAlias = "Path | bytes | Image.Image | Picture | Kept"

# Pictures of one prompt. Each may take a second to decode, whatever its file's size.
MOST_PICTURES = 64

# Levels of a message that are looked through; what is nested deeper no chat template renders.
DEPTH = 32


@dataclass(frozen=True)
class Markers:
    """How pictures are written: `image` by the template, and around it `begin` and `end`."""

    image: str
    begin: str
    end: str

    def neutral(self, value: Any, depth: int = DEPTH) -> Any:
        """A value in whose texts no marker stands: a blank goes behind its first character."""
        if isinstance(value, str):
            for marker in (self.image, self.begin, self.end):
                if marker in value:
                    value = value.replace(marker, f"{marker[0]} {marker[1:]}")
            return value
        if depth and isinstance(value, Mapping):
            return {key: self.neutral(each, depth - 1) for key, each in value.items()}
        if depth and isinstance(value, list | tuple):
            return [self.neutral(each, depth - 1) for each in value]
        return value

    def expanded(self, text: str, pictures: Sequence[Pixels]) -> str:
        """A rendered chat in which as many markers stand as each picture has tokens.

        Raises:
            TokenizerError: it has not one marker for each picture.
        """
        parts = text.split(self.image)
        if len(parts) - 1 != len(pictures):
            raise TokenizerError(
                f"the chat template writes {len(parts) - 1} places for {len(pictures)} pictures"
            )
        shown_as = [f"{self.begin}{self.image * each.tokens}{self.end}" for each in pictures]
        return "".join(a + b for a, b in zip(parts, [*shown_as, ""], strict=True))


def markers_of(tokenizer: Tokenizer, config: SightConfig) -> Markers:
    """How a tokenizer writes the ids that stand for pictures.

    Raises:
        TokenizerError: it does not, or would not read them again.
    """
    names = []
    for token in (config.image, config.begin, config.end):
        name = tokenizer.token(token)
        if not name or len(name) < 2 or tokenizer.encode(name) != [token]:
            raise TokenizerError(f"this tokenizer has no marker of pictures for the id {token}")
        names.append(name)
    return Markers(*names)


def show(given: Any, sight: Sight, budget: int | None = None) -> Pixels:
    """A picture at the size that a model sees it, of at most so many tokens.

    Raises:
        PictureError: it cannot be read, or is too thin.
        SettingError: the budget is none that there is, or it is no picture at all.
    """
    if isinstance(given, Picture | Kept):
        return given
    config = sight.config
    if budget is not None and (type(budget) is not int or budget not in BUDGETS):
        known = ", ".join(map(str, BUDGETS))
        raise SettingError(f"a picture has at most {known} tokens; not {shown(budget)}")
    if not isinstance(given, Path | bytes) and not _is_image(given):
        raise SettingError(
            "a picture is a pathlib.Path, bytes of a file or an image of Pillow, not "
            f"{shown(given)}"
        )
    vision = config.vision
    grid = Grid(vision.patch_size, vision.pool)
    picture = picture_of(read_picture(given), budget or config.budget, grid)
    if max(picture.rows, picture.columns) > vision.position_embedding_size:
        raise PictureError("the picture is too long and thin for this model")
    return picture


def _is_image(given: Any) -> bool:
    """Whether it is one of Pillow's, which need not be there."""
    try:
        from PIL import Image
    except ImportError:
        return False
    return isinstance(given, Image.Image)


def shown_messages(
    messages: Sequence[Message],
    sight: Sight | None,
    most: int,
    check: Callable[[], None] = no_check,
) -> list[Message]:
    """Messages whose pictures are at the size that the model sees; others stay as they are.

    Raises:
        SettingError: the model reads text alone, or a part is no picture, or there are too many.
        PictureError: one cannot be read.
        ContextError: they have more than `most` tokens together.
        TooLarge: there is no memory for the vision tower.
    """
    count = tokens = 0
    found = []
    for message in messages:
        content = message.get("content")
        if not isinstance(content, list | tuple) or not any(map(_is_picture, content)):
            found.append(message)
            continue
        if sight is None:
            raise SettingError(READS_TEXT)
        most = min(most, sight.context)
        parts = []
        for part in content:
            if not _is_picture(part):
                parts.append(part)
                continue
            check()
            count += 1
            if count > MOST_PICTURES:
                raise SettingError(f"a prompt has at most {MOST_PICTURES} pictures")
            picture = show(part.get("image"), sight, part.get("tokens"))
            tokens += picture.tokens
            if tokens > most:
                raise ContextError(
                    f"the pictures of the prompt have more than {most:,} tokens, and no more fits "
                    "into the context"
                )
            parts.append({"type": "image", "image": picture})
        found.append({**message, "content": parts})
    return found


def _is_picture(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "image"


def pictures_of(messages: Sequence[Message]) -> list[Pixels]:
    """The pictures of messages that `shown_messages` gave, in their order."""
    contents = [message.get("content") for message in messages]
    return [
        part["image"]
        for content in contents
        if isinstance(content, list)
        for part in content
        if _is_picture(part)
    ]


def bare(messages: Sequence[Message]) -> list[Message]:
    """The same as a template renders them: of a picture, that there is one."""
    return [
        {**message, "content": [{"type": "image"} if _is_picture(p) else p for p in content]}
        if isinstance(content := message.get("content"), list)
        else message
        for message in messages
    ]


def placed_ids(ids: list[int], pictures: Sequence[Pixels], config: SightConfig) -> list[int]:
    """Ids of an expanded text, in which those of pictures know them.

    Raises:
        TokenizerError: they are not as many as the pictures have tokens.
    """
    places = [i for i, token in enumerate(ids) if token == config.image]
    tokens = placeholders(config.image, pictures)
    if len(places) != len(tokens):
        raise TokenizerError(
            f"the tokenizer makes {len(places)} tokens of pictures that have {len(tokens)}"
        )
    for i, token in zip(places, tokens, strict=True):
        ids[i] = token
    return ids
