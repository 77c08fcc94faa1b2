"""Lines of a file of examples: what each of them says, and all that is wrong with any of them.

The formats are mlx-lm's: `messages` (with `tools`), `prompt` and `completion`, `text`. Nothing here
knows a tokenizer.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..arguments import shown
from ..errors import Error
from ..files import parse_json
from ..text.tokenizer import Declaration, Message

# Bytes of the longest line: more than a context can say, and a bound for what is read at once.
MOST_LINE = 1 << 26

# Mistakes of one file that an error repeats; the others are counted.
MOST_SAID = 3

ROLES = ("system", "developer", "user", "assistant", "tool")

Kind = Literal["prompt and completion", "messages", "text"]


class DataError(Error):
    """A file of examples that cannot be used, or lines of one."""


@dataclass(frozen=True)
class Keys:
    """How a file calls the parts of an example; the defaults are mlx-lm's."""

    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    text: str = "text"

    def kind(self, value: Mapping[str, Any]) -> Kind:
        """Which format an object has, in the order in which mlx-lm asks.

        Raises:
            DataError: it has none.
        """
        if self.prompt in value and self.completion in value:
            return "prompt and completion"
        if self.messages in value:
            return "messages"
        if self.text in value:
            return "text"
        found = f"its keys are {shown(sorted(value))}" if value else "it is empty"
        raise DataError(
            f"an example has {self.prompt} and {self.completion}, or {self.messages}, or "
            f"{self.text}; {found}"
        )


@dataclass(frozen=True)
class Conversation:
    """An example that the chat template renders; the last message is the assistant's."""

    messages: tuple[Message, ...]
    tools: tuple[Declaration, ...] = ()


@dataclass(frozen=True)
class PlainText:
    """An example that is read as it stands, without a chat template."""

    text: str


Record = Conversation | PlainText


@dataclass
class Mistakes:
    """What is wrong with the lines of a file; all of them are looked at before one is told."""

    path: Path
    said: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, line: int, what: object) -> None:
        """Keep a mistake of a line."""
        self.count += 1
        if len(self.said) < MOST_SAID:
            self.said.append(f"line {line}: {what}")

    def check(self) -> None:
        """End here if there was any.

        Raises:
            DataError: says the first ones, and how many there are.
        """
        if self.count:
            more = f" (and {self.count - len(self.said)} more)" * (self.count > len(self.said))
            raise DataError(f"{self.path}, {'; '.join(self.said)}{more}")


def read_records(path: Path, keys: Keys, mistakes: Mistakes) -> Iterator[tuple[int, Record]]:
    """Numbers of lines with what they say; empty lines do not count. The first one's format is
    that of all.

    Raises:
        DataError: the file cannot be read. What is wrong with a line goes to `mistakes`.
    """
    first: tuple[int, Kind] | None = None
    for number, line in _lines(path):
        try:
            value = _object(line)
            kind = keys.kind(value)
            if first is None:
                first = number, kind
            if kind != first[1]:
                raise DataError(f"it has {kind}, and line {first[0]} has {first[1]}")
            yield number, _record(value, kind, keys)
        except DataError as error:
            mistakes.add(number, error)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not empty, with their numbers; a longer one than is allowed is cut."""
    try:
        with path.open("rb") as file:
            start = file.read(3)
            if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise DataError(f"{path} is UTF-16 text, not UTF-8")
            if start != b"\xef\xbb\xbf":  # which some editors put before UTF-8
                file.seek(0)
            number = 0
            while line := file.readline(MOST_LINE + 1):
                number += 1
                if line.strip():
                    yield number, line
                while len(line) > MOST_LINE and not line.endswith(b"\n"):  # its rest
                    line = file.readline(MOST_LINE + 1)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _object(line: bytes) -> dict[str, Any]:
    if len(line) > MOST_LINE:
        raise DataError(f"it has more than {MOST_LINE:,} bytes")
    try:
        value = parse_json(line.decode())
    except UnicodeDecodeError:
        raise DataError("it is not UTF-8 text") from None
    except ValueError as error:
        raise DataError(f"it is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"it is not a JSON object: {shown(value)}")
    return value


def _record(value: dict[str, Any], kind: Kind, keys: Keys) -> Record:
    if kind == "text":
        text = value[keys.text]
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{keys.text} is no text, or an empty one: {shown(text)}")
        return PlainText(text)
    for name in ("image", "images", "video", "audio"):
        if value.get(name):
            raise DataError(f"it has {name}, and only text can be trained on")
    if kind == "messages":
        messages = value[keys.messages]
    else:
        prompt, answer = value[keys.prompt], value[keys.completion]
        messages = [*_turns(keys.prompt, prompt, "user"), *_turns(keys.completion, answer)]
    return Conversation(_checked(messages), _declared(value.get("tools")))


def _turns(name: str, given: object, role: str = "assistant") -> Sequence[object]:
    """The messages of a prompt or completion: a text is one."""
    if isinstance(given, str):
        if not given.strip():
            raise DataError(f"the {name} is empty")
        return [{"role": role, "content": given}]
    if not isinstance(given, list):
        raise DataError(f"the {name} is neither text nor messages: {shown(given)}")
    return given


def _checked(messages: object) -> tuple[Message, ...]:
    """Messages, the last of them an answer that can be learnt."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"messages are no list of objects: {shown(messages)}")
    found = tuple(_message(i, message) for i, message in enumerate(messages, 1))
    last = found[-1]
    if last["role"] != "assistant":
        raise DataError(f"the last message is the {last['role']}'s; it must be the assistant's")
    if len(found) == 1:
        raise DataError("the answer has no prompt before it")
    if not last.get("tool_calls") and not _spoken(last["content"]):
        raise DataError("the assistant's last message is empty")
    return found


def _message(number: int, message: object) -> Message:
    if not isinstance(message, dict) or not isinstance(role := message.get("role"), str):
        raise DataError(f"message {number} is no object with a role: {shown(message)}")
    if role not in ROLES:
        raise DataError(f"message {number} has the role {shown(role)}, none of {', '.join(ROLES)}")
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise DataError(f"message {number}: tool_calls is no list")
    content = message.get("content")
    if content is None and calls:
        content = ""
    if not isinstance(content, str | list):
        raise DataError(f"message {number} has no content that is text: {shown(content)}")
    found = {**message, "content": content}
    if calls:
        found["tool_calls"] = [_call(number, call) for call in calls]
    return found


def _call(number: int, call: object) -> dict[str, Any]:
    """A tool call whose arguments are an object: OpenAI's are JSON in a text, templates want it."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        raise DataError(f"message {number}: a tool call has no function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments)
        except ValueError as error:
            raise DataError(f"message {number}: arguments are not JSON: {error}") from None
    return {**call, "function": {**function, "arguments": arguments}}


def _spoken(content: str | list[Any]) -> bool:
    if isinstance(content, str):
        return bool(content.strip())
    return any(str(part.get("text", "")).strip() for part in content if isinstance(part, dict))


def _declared(tools: object) -> tuple[Declaration, ...]:
    if tools is None:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"tools are no list of declarations: {shown(tools)}")
    return tuple(tools)


def written(record: Record) -> str:
    """All that an example says, as one text in which names of tokens can be looked for."""
    if isinstance(record, PlainText):
        return record.text
    return json.dumps([record.messages, record.tools], ensure_ascii=False)
