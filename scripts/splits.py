"""Files of examples to fine-tune on: which side an example is on, and how its side is written."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

Example = dict[str, str]


def side(canonical: str) -> str:
    """The split, stable across machines and runs: one class in five is `test`, one `valid`."""
    number = int.from_bytes(hashlib.sha256(canonical.encode()).digest()[:4]) % 10
    return "test" if number < 2 else "valid" if number < 4 else "train"


def example(prompt: str, completion: str) -> Example:
    """One line of a file, as `mlx-diffgemma lora` and mlx-lm read it."""
    return {"prompt": prompt, "completion": completion}


def write(directory: Path, files: Mapping[str, Iterable[Mapping[str, object]]]) -> None:
    """Write `NAME.jsonl` for each name, an object a line."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        with (directory / f"{name}.jsonl").open("w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
