"""Files of prompts and of answers, a JSON object a line."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from .errors import Error
from .files import read_text
from .generation import Done, Event, Request
from .turns import Text, Thought, ToolCall

# What a line may say, beside its prompt or messages; the rest is the command's.
OWN: dict[str, type] = {"max_tokens": int, "steps": int, "seed": int, "schema": dict, "id": str}


class BatchError(Error):
    """A file of prompts or answers that cannot be used."""


def read_requests(
    path: Path, template: Request, system: str | None
) -> tuple[list[Request], dict[int, str]]:
    """The requests of a file, and the ids that lines may give themselves, by index.

    A line is `{"prompt": "..."}` or `{"messages": [...]}`, before which `system` is put. What else
    a request has is that of `template`, but for a line's own `max_tokens`, `steps`, `seed` and
    `schema`. The template's seed counts up from line to line: equal noise for all would make luck
    common to all.

    Raises:
        BatchError: the file cannot be read, or a line is not of this form; the message says which.
    """
    found: list[Request] = []
    ids: dict[int, str] = {}
    for number, line in enumerate(_lines(path), 1):
        given = _object(path, number, line)
        where = f"{path}, line {number}"
        if unknown := given.keys() - OWN.keys() - {"prompt", "messages"}:
            raise BatchError(f"{where}: {sorted(unknown)[0]} is not known")
        prompt, messages = given.get("prompt"), given.get("messages")
        if (prompt is None) == (messages is None):
            raise BatchError(f"{where}: there must be either a prompt or messages")
        if messages is None:
            if not isinstance(prompt, str) or not prompt.strip():
                raise BatchError(f"{where}: the prompt is no text")
            messages = [{"role": "user", "content": prompt}]
        elif not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise BatchError(f"{where}: messages are no list of objects")
        for name, kind in OWN.items():
            if name in given and (not isinstance(given[name], kind) or given[name] is True):
                raise BatchError(f"{where}: {name} has the wrong type")
        if system and messages[:1] and messages[0].get("role") != "system":
            messages = [{"role": "system", "content": system}, *messages]
        own = {name: given[name] for name in OWN if name in given and name != "id"}
        seed = None if template.seed is None else template.seed + number - 1
        if "id" in given:
            ids[len(found)] = given["id"]
        found.append(replace(template, prompt=messages, **{"seed": seed, **own}))
    return found, ids


def _lines(path: Path) -> list[str]:
    return [line for line in read_text(path, BatchError).split("\n") if line.strip()]


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise BatchError(f"{path}, line {number}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BatchError(f"{path}, line {number}: not an object")
    return value


class Answers:
    """Puts the events of each request together to a line of the answers' file."""

    def __init__(self, ids: dict[int, str]) -> None:
        self.failed = 0
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
                known = {
                    "finish_reason": event.finish_reason,
                    "prompt_tokens": event.prompt_tokens,
                    "generated_tokens": event.generated_tokens,
                    "denoising_steps": event.denoising_steps,
                }
                return json.dumps(parts | known, ensure_ascii=False)
            case Error():
                del self._parts[index]
                self.failed += 1
                failed = {"index": index, **named, "error": str(event)}
                return json.dumps(failed, ensure_ascii=False)
        return None


def finished(path: Path) -> set[int]:
    """Indices of the requests that a file of answers holds; errors count as not answered.

    Raises:
        BatchError: it exists and is no file of answers.
    """
    if not path.exists():
        return set()
    found = set()
    lines = _lines(path)
    for number, line in enumerate(lines, 1):
        try:
            value = _object(path, number, line)
        except BatchError:
            if number == len(lines):  # the last run was killed while it wrote
                break
            raise
        if not isinstance(value.get("index"), int):
            raise BatchError(f"{path}, line {number}: not an answer")
        if "error" not in value:
            found.add(value["index"])
    return found


@contextmanager
def append(path: Path) -> Iterator[TextIO]:
    """The file, open for more lines; half a line that a killed run left is cut off.

    Raises:
        BatchError: it cannot be written.
    """
    try:
        with path.open("a+b") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1 if end else 0)
        with path.open("a", encoding="utf-8") as out:
            yield out
    except OSError as error:
        raise BatchError(f"{path} cannot be written: {error.strerror}") from None
