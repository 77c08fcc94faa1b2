"""Files of prompts and of answers, a JSON object a line."""

import fcntl
import json
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

from ..arguments import shown
from ..errors import Error
from ..files import parse_json
from ..tasks.generate import Request
from ..tasks.request import Done, Event
from ..text.turns import Text, Thought, ToolCall
from .terminal import visible

# What a line may say, beside its prompt or messages; the rest is the command's.
OWN: dict[str, type] = {"max_tokens": int, "steps": int, "seed": int, "schema": dict, "id": str}

# Bytes of the longest line: more than a context can say, and a bound for what is read at once.
MOST_LINE = 1 << 26

# How a line of answers begins, apart from its number: what a killed run leaves does so too.
_BEGINNINGS = tuple(b'{"index": 0, "%s": "' % name for name in (b"id", b"text", b"error"))
_BEGINNINGS += (b'{"index": 0, "labels": {"',)


class BatchError(Error):
    """A file of prompts or answers, or a line of one, that cannot be used."""


@dataclass
class Prompts:
    """What a file asks: a request a line, or what is wrong with it; and ids that lines give."""

    requests: list[Request | BatchError] = field(default_factory=list)
    ids: dict[int, str] = field(default_factory=dict)


def read_prompts(path: Path) -> bytes:
    """A file of prompts, as bytes.

    Raises:
        BatchError: it cannot be read, or is no text of lines at all.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BatchError(f"{path} cannot be read: {error.strerror}") from None
    if b"\0" in content:  # UTF-16 too
        raise BatchError(f"{path} is not UTF-8 text")
    return content


def read_requests(path: Path, template: Request, system: str | None) -> Prompts:
    """The requests of a file, see `requests_of`.

    Raises:
        BatchError: the file cannot be read, or is no text of lines at all.
    """
    return requests_of(read_prompts(path), path.parent, template, system)


def requests_of(content: bytes, place: Path, template: Request, system: str | None) -> Prompts:
    """The requests of a file that lies in `place`; empty lines do not count.

    A line is `{"prompt": "..."}`, perhaps with `"images": ["FILE", ...]`, or `{"messages": [...]}`,
    before which `system` is put; a part of a content may be `{"type": "image", "image": "FILE"}`.
    Names of files are read from where the batch file lies. What else
    a request has is that of `template`, but for a line's own `max_tokens`, `steps`, `seed` and
    `schema`. The template's seed counts up from line to line: equal noise for all would make luck
    common to all. A line that is not of this form is an error in its request's place: the others
    go on.
    """
    found = Prompts()
    lines_of_ids: dict[str, int] = {}
    for number, line in _numbered(content):
        index = len(found.requests)
        try:
            given = _object(line)
            name = given.get("id")
            if isinstance(name, str):
                if name in lines_of_ids:
                    raise BatchError(f"the id {shown(name)} is that of line {lines_of_ids[name]}")
                lines_of_ids[name] = number
                found.ids[index] = name
            found.requests.append(_request(given, template, system, index, place))
        except BatchError as error:
            found.requests.append(BatchError(f"line {number}: {error}"))
    return found


def _numbered(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Lines that are not empty, with their numbers."""
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def json_lines(content: bytes) -> Iterator[tuple[int, Callable[[], dict[str, Any]]]]:
    """Lines that are not empty: their numbers, and what reads their objects or raises."""
    return ((number, partial(_object, line)) for number, line in _numbered(content))


def _request(
    given: dict[str, Any], template: Request, system: str | None, index: int, place: Path
) -> Request:
    """What a line asks; names of pictures are those of files in `place`."""
    if unknown := given.keys() - OWN.keys() - {"prompt", "messages", "images"}:
        raise BatchError(f"{shown(min(unknown))} is not known")
    prompt, messages = given.get("prompt"), given.get("messages")
    if (prompt is None) == (messages is None):
        raise BatchError("there must be either a prompt or messages")
    if messages is None:
        if not isinstance(prompt, str) or not prompt.strip():
            raise BatchError("the prompt is no text")
        messages = [{"role": "user", "content": prompt}]
    elif "images" in given:
        raise BatchError("images go with a prompt; among messages they are parts")
    elif not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise BatchError("messages are no list of objects with a role and a content")
    for name, kind in OWN.items():
        if name in given and (not isinstance(given[name], kind) or isinstance(given[name], bool)):
            raise BatchError(f"{name} has the wrong type")
    if system and messages[:1] and messages[0].get("role") != "system":
        messages = [{"role": "system", "content": system}, *messages]
    messages = _with_pictures(messages, given.get("images", []), place)
    own = {name: given[name] for name in OWN if name in given and name != "id"}
    seed = None if template.seed is None else template.seed + index
    return replace(template, prompt=messages, **{"seed": seed, **own})


def _with_pictures(messages: list[Any], images: object, place: Path) -> list[Any]:
    """Messages in which names of pictures are files beside the batch file; `images` stand before
    the text of the last message."""
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise BatchError("images are no list of files")
    found = []
    for message in messages:
        if isinstance(content := message.get("content"), list):
            message = {**message, "content": [_with_path(part, place) for part in content]}
        found.append(message)
    if images:
        shown_first = [{"type": "image", "image": place / name} for name in images]
        text = {"type": "text", "text": found[-1]["content"]}
        found[-1] = {**found[-1], "content": [*shown_first, text]}
    return found


def _with_path(part: Any, place: Path) -> Any:
    match part:
        case {"type": "image", "image": str(name)}:
            return {**part, "image": place / name}
    return part


def _is_message(message: object) -> bool:
    """Whether a template can make something of it; it says nothing about what it cannot."""
    match message:
        case {"role": str(), "tool_calls": list(calls), **rest}:
            known = all(isinstance(call, dict) for call in calls)
            return known and isinstance(rest.get("content", ""), str | list | None)
        case {"role": str(), "content": str() | list(), **rest}:
            return "tool_calls" not in rest
    return False


def _object(line: bytes) -> dict[str, Any]:
    if len(line) > MOST_LINE:
        raise BatchError(f"more than {MOST_LINE} bytes")
    try:
        value = parse_json(line.decode())
    except UnicodeDecodeError:
        raise BatchError("not UTF-8 text") from None
    except ValueError as error:
        raise BatchError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BatchError("not an object")
    return value


class Answers:
    """Puts the events of each request together to a line of the answers' file."""

    def __init__(self, ids: dict[int, str]) -> None:
        self.failed = self.unsettled = 0
        self._ids = ids
        self._parts: dict[int, dict[str, Any]] = {}

    def take(self, index: int, event: Event | Error) -> str | None:
        """The line of a request that has ended, else None."""
        named = {"id": self._ids[index]} if index in self._ids else {}
        parts = self._parts.setdefault(index, {"index": index, **named, "text": ""})
        match event:
            case Text():
                parts["text"] += event.text
            case Thought():
                parts["thought"] = parts.get("thought", "") + event.text
            case ToolCall():
                parts.setdefault("tool_calls", []).append(vars(event))
            case Done():
                del self._parts[index]
                self.unsettled += event.finish_reason == "not_converged"
                known: dict[str, Any] = {
                    "finish_reason": event.finish_reason,
                    "prompt_tokens": event.prompt_tokens,
                    "generated_tokens": event.generated_tokens,
                    "denoising_steps": event.denoising_steps,
                    "positions_decoded": event.positions_decoded,
                }
                if event.mean_log_probability is not None:
                    known["mean_log_probability"] = event.mean_log_probability
                    known["least_log_probability"] = event.least_log_probability
                return json.dumps(parts | known, ensure_ascii=False)
            case Error():
                del self._parts[index]
                return self.failure(index, event)
        return None

    def count(self, line: str) -> int:
        """Count the line of another rank's answer as one of these, and tell whose it is."""
        found = json.loads(line)
        self.failed += "error" in found
        self.unsettled += found.get("finish_reason") == "not_converged"
        return int(found["index"])

    def failure(self, index: int, error: Error) -> str:
        """The line of a request that has failed, or could not be read."""
        self.failed += 1
        named = {"id": self._ids[index]} if index in self._ids else {}
        return json.dumps({"index": index, **named, "error": str(error)}, ensure_ascii=False)


class InOrder:
    """Holds lines of answers back until those before them are written; `left` says the order."""

    def __init__(self, left: Iterable[int], write: Callable[[str], None]):
        self._awaited = deque(left)
        self._write = write
        self._held: dict[int, str] = {}

    def take(self, index: int, line: str) -> None:
        """The line of a request."""
        self._held[index] = line
        while self._awaited and self._awaited[0] in self._held:
            self._write(self._held.pop(self._awaited.popleft()))

    def close(self) -> None:
        """Write what is held: what it waits for will not come."""
        for index in self._awaited:
            if index in self._held:
                self._write(self._held.pop(index))


class Output:
    """Where lines of answers go, at once and unbuffered: nothing waits behind a failed write.

    Attributes:
        finished: requests that the file holds the answers of; errors count as not answered.
    """

    def __init__(self, name: str, file: FileIO, finished: set[int]):
        self.finished = finished
        self._name = name
        self._file = file

    def write(self, line: str) -> None:
        """Add a line.

        Raises:
            BatchError: it cannot be written.
        """
        shown = visible(line) if self._file.isatty() else line
        rest = shown.encode(errors="replace") + b"\n"
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except BrokenPipeError:
            raise
        except OSError as error:
            raise BatchError(f"{self._name} cannot be written: {error.strerror}") from None


@contextmanager
def writing(path: Path | None, prompts: Path, count: int) -> Iterator[Output]:
    """The answers' file, open for more lines and locked; None is stdout.

    Half a line that a killed run left is cut off, a whole one that lacks its newline gets it.
    Nothing else that is there changes.

    Raises:
        BatchError: it is no file of answers to `count` prompts, another process writes to it, or it
            cannot be written.
    """
    if path is None:
        if not sys.stdout:  # the shell has closed it
            raise BatchError("stdout is closed")
        sys.stdout.flush()
        with FileIO(sys.stdout.fileno(), "wb", closefd=False) as file:
            yield Output("stdout", file, set())
        return
    with _locked(path, prompts) as file:
        try:
            finished = _recover(path, file, count)
        except OSError as error:
            raise BatchError(f"{path} cannot be written: {error.strerror}") from None
        yield Output(str(path), file, finished)


def _locked(path: Path, prompts: Path) -> FileIO:
    """A regular file that nobody else of us writes to."""
    try:
        if path.exists():
            if not path.is_file():
                raise BatchError(f"{path} is no regular file")
            if path.samefile(prompts):
                raise BatchError(f"{path} holds the prompts; answers need a file of their own")
        file = FileIO(path, "a+b")
    except OSError as error:
        raise BatchError(f"{path} cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed, or we are killed
    except OSError as error:
        file.close()
        taken = isinstance(error, BlockingIOError)
        problem = "another process is writing to it" if taken else error.strerror
        raise BatchError(f"{path} cannot be written: {problem}") from None
    return file


def _recover(path: Path, file: FileIO, count: int) -> set[int]:
    """Requests that are answered, once the file ends behind a whole line."""
    finished: set[int] = set()
    end = number = 0
    whole = True
    with open(file.fileno(), "rb", closefd=False) as lines:
        lines.seek(0)
        while line := lines.readline(MOST_LINE):
            number += 1
            try:
                answered = _answered(line, count)
            except BatchError as error:
                if line.endswith(b"\n") or lines.read(1) or not _is_begun(line):
                    raise BatchError(
                        f"{path} is left as it is: its line {number} is no answer, {error}"
                    ) from None
                file.truncate(end)
                return finished
            if answered is not None:
                finished.add(answered)
            end += len(line)
            whole = line.endswith(b"\n")
    if not whole:
        file.write(b"\n")
    return finished


def _answered(line: bytes, count: int) -> int | None:
    """The request that a line answers, None if it failed or the line is empty."""
    if not line.strip():
        return None
    value = _object(line)
    index = value.get("index")
    known = isinstance(value.get("text"), str) or isinstance(value.get("error"), str)
    known = known or isinstance(value.get("labels"), dict)
    if type(index) is not int or not known:
        raise BatchError("but something else")
    if not 0 <= index < count:
        raise BatchError(f"of {count}, but of index {index}")
    return None if "error" in value else index


def _is_begun(line: bytes) -> bool:
    """Whether a run of ours may have been about to write this line."""
    numbered = re.sub(rb'^(\{"index": )\d+', rb"\g<1>0", line)
    return any(numbered.startswith(way) or way.startswith(numbered) for way in _BEGINNINGS)
