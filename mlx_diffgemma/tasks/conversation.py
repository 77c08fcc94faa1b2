"""A conversation as a session's file tells it: messages, pictures and tools as JSON."""

import base64
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ..diffusion.cache_file import SessionError, kept_picture
from ..images.files import read_picture
from ..images.picture import Grid, Picture, PictureError
from ..model.placeholders import Kept, Pixels
from ..text.tokenizer import Declaration, Message
from .pictures import is_time


def written_messages(messages: Sequence[Message], *, pixels: bool) -> list[Message]:
    """Messages as JSON has them: of a picture digest and size, and if asked for a PNG."""
    return [
        {**message, "content": [_written(part, pixels) for part in content]}
        if isinstance(content := message.get("content"), list)
        else message
        for message in messages
    ]


def _written(part: dict[str, Any], pixels: bool) -> dict[str, Any]:
    if part["type"] != "image":
        return part
    picture: Pixels = part["image"]
    told: dict[str, Any] = {"digest": picture.digest.hex()}
    told |= {name: getattr(picture, name) for name in ("rows", "columns", "tokens")}
    if pixels and isinstance(picture, Picture):
        told |= {"patch": picture.grid.patch_size, "pool": picture.grid.pool}
        told["png"] = _png(picture)
    return {**part, "image": told}


def _png(picture: Picture) -> str:
    from PIL import Image

    file = BytesIO()
    Image.fromarray(picture.pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _with_pictures(path: Path, message: Any) -> Any:
    """A message that was read, in which pictures are what they were, as far as that was kept.

    Raises:
        SessionError: one is damaged.
    """
    match message:
        case {"content": list(parts)}:
            return {**message, "content": [_read(path, part) for part in parts]}
    return message


def _read(path: Path, part: Any) -> Any:
    match part:
        case {"type": "image", "image": dict(told)}:
            try:
                return {**part, "image": _picture(told)}
            except (ValueError, PictureError) as error:
                raise SessionError(f"{path} is damaged: {error}") from None
    return part


def _picture(told: dict[str, Any]) -> Pixels:
    """A picture as a file tells it.

    Raises:
        ValueError: it is told in another way, or is another than its digest says.
        PictureError: what should be its PNG is none.
    """
    kept = kept_picture(told)
    match told:
        case {"png": str(text), "patch": int(patch), "pool": int(pool)} if patch > 0 < pool:
            image = read_picture(base64.b64decode(text, validate=True))
            picture = Picture(np.asarray(image), Grid(patch, pool))
            side = picture.grid.side
            if image.width % side or image.height % side or picture.digest != kept.digest:
                raise ValueError("a picture is another than its digest says")
            return picture
    return kept


def read_conversation(path: Path, extra: object) -> tuple[list[Message], list[Declaration], bool]:
    """Messages, tools and thinking, if they are what a session saves.

    Raises:
        SessionError: they are something else.
    """
    match extra:
        case {"messages": list(messages), "tools": list(tools), "thinking": bool(thinking)}:
            messages = [_with_pictures(path, message) for message in messages]
            wrong = [i for i, message in enumerate(messages) if not _is_message(message, i)]
            if wrong:
                raise SessionError(f"{path} is damaged: its message {wrong[0] + 1} is none")
            if not all(map(is_declaration, tools)):
                raise SessionError(f"{path} is damaged: a tool is no declaration of a function")
            return messages, tools, thinking
    raise SessionError(f"{path} is no session: messages, tools or thinking are missing")


def _is_message(message: object, index: int) -> bool:
    """Tell whether a session writes such messages: templates take anything else for granted."""
    match message:
        case {"role": "system", "content": str(), **rest}:
            return not index and not rest
        case {"role": "user", "content": str(), **rest}:
            return not rest
        case {"role": "user", "content": list(parts), **rest}:
            return not rest and len(parts) > 0 and all(map(is_part, parts))
        case {"role": "assistant", "content": str(), **rest}:
            thought, calls = rest.pop("reasoning", ""), rest.pop("tool_calls", [])
            if rest or not isinstance(thought, str) or not isinstance(calls, list):
                return False
            return all(map(_is_call, calls))
        case {"role": "tool", "name": str(), "tool_call_id": str(), "content": str(), **rest}:
            return not rest
        case {"role": "tool", "name": str(), "tool_call_id": str(), "content": list(parts), **rest}:
            return not rest and len(parts) > 0 and all(map(is_part, parts))
    return False


def is_part(part: object) -> bool:
    """Tell whether a message of a session may have such a part."""
    match part:
        case {"type": "text", "text": str(), **rest}:
            return not rest
        case {"type": "image", "image": Picture() | Kept(), **rest}:
            return not rest or (rest.keys() == {"time"} and is_time(rest["time"]))
    return False


def _is_call(call: object) -> bool:
    match call:
        case {"id": str(), "type": "function", "function": dict(function), **rest}:
            match function:
                case {"name": str(), "arguments": dict(), **more}:
                    return not rest and not more
    return False


def is_declaration(tool: object) -> bool:
    match tool:
        case {"function": {"name": str(), **rest}}:
            return isinstance(rest.get("parameters", {}), dict)
    return False
