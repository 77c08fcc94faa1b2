"""`choose --batch`: the items of a file, JSON lines or CSV, into a file of labels."""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..arguments import shown
from ..errors import Error
from ..model.diffusion_gemma import DiffusionGemma
from ..tasks.batch import stream_batch
from ..tasks.choose import Choice, ChooseRequest, likeliest
from ..text.tokenizer import Tokenizer
from .batchfile import BatchError, json_lines, read_prompts, writing
from .terminal import say


@dataclass(frozen=True)
class Item:
    """What one line asks about."""

    prompt: str
    name: str | None  # its "id"


def choose_many(
    file: Path,
    output: Path | None,
    max_batch: int,
    load: Callable[[], tuple[DiffusionGemma, Tokenizer]],
    make: Callable[[str, int], ChooseRequest],
    *,
    quiet: bool,
) -> None:
    """Weigh labels for the items of a file; what `output` holds already is skipped.

    `make` gives the request of a prompt and its number. The model is loaded if an item is left.

    Raises:
        BatchError: a file cannot be read or written.
        SystemExit: an item has failed.
    """
    items = read_items(file)
    failed = 0
    with writing(output, file, len(items)) as out:
        left = [i for i in range(len(items)) if i not in out.finished]
        if not quiet and out.finished:
            say(f"{len(out.finished)} of {len(items)} are answered already.")
        asked: list[tuple[int, Item]] = []
        for i in left:
            if isinstance(item := items[i], Item):
                asked.append((i, item))
            else:
                failed += 1
                out.write(json.dumps({"index": i, "error": str(item)}, ensure_ascii=False))
        requests = (make(item.prompt, i) for i, item in asked)
        for number, event in stream_batch(*load(), requests, max_batch=max_batch) if asked else ():
            i, item = asked[number]
            told: dict[str, Any] = {"index": i} | ({} if item.name is None else {"id": item.name})
            if isinstance(event, Error):
                failed += 1
                told["error"] = str(event)
            elif isinstance(event, Choice):
                best = {slot: likeliest(known) for slot, known in event.items()}
                told |= {"labels": best, **event.facts()}
            else:
                continue
            out.write(json.dumps(told, ensure_ascii=False))
    if not quiet:
        say(f"{len(left) - failed} answered, {failed} failed")
    if failed:
        raise SystemExit(1)


def read_items(file: Path) -> list[Item | BatchError]:
    """The items of a file, or what is wrong with each.

    Raises:
        BatchError: it cannot be read, is no text of lines, or a CSV without a column `prompt`.
    """
    content = read_prompts(file)
    if file.suffix.lower() == ".csv":
        return _of_csv(file, content)
    found: list[Item | BatchError] = []
    for number, read in json_lines(content):
        try:
            given = read()
            if unknown := given.keys() - {"prompt", "id"}:
                raise BatchError(f"{shown(min(unknown))} is not known")
            found.append(_item(given.get("prompt"), given.get("id")))
        except BatchError as error:
            found.append(BatchError(f"line {number}: {error}"))
    return found


def _of_csv(file: Path, content: bytes) -> list[Item | BatchError]:
    """The rows of a table with a column `prompt`, perhaps `id`, and others, which do not count."""
    found: list[Item | BatchError] = []
    try:
        rows = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        if "prompt" not in (rows.fieldnames or ()):
            raise BatchError(f"{file} has no column prompt")
        for row in rows:
            try:
                found.append(_item(row["prompt"], row.get("id") or None))
            except BatchError as error:
                found.append(BatchError(f"line {rows.line_num}: {error}"))
    except UnicodeDecodeError:
        raise BatchError(f"{file} is not UTF-8 text") from None
    except csv.Error as error:
        raise BatchError(f"{file} is no CSV: {error}") from None
    return found


def _item(prompt: object, name: object) -> Item:
    if not isinstance(prompt, str) or not prompt.strip():
        raise BatchError("the prompt is no text")
    if name is not None and not isinstance(name, str):
        raise BatchError("id has the wrong type")
    return Item(prompt, name)
