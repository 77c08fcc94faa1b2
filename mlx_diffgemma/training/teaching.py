"""What a model answers before it is trained, kept in a run's folder: targets of distillation."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..arguments import SettingError, token_ids
from ..files import read_text, replacing
from ..model.diffusion_gemma import DiffusionGemma
from .data import Example
from .distill import taught
from .events import Measuring
from .folder import TAUGHT_FILE, RunError, writing
from .measuring import Stop
from .objective import Sample


def teach(
    model: DiffusionGemma, examples: Sequence[Example], seed: int, stopped: Stop
) -> Iterator[Measuring | Sample]:
    """Answer the prompts of examples; ends early once `stopped` says so.

    Raises:
        SettingError: there is nothing to answer.
    """
    asked = [each.sample.prompt for each in examples if each.asks]
    if not asked:
        raise SettingError("distill needs examples with prompts, and these are texts")
    for done, (_, sample) in enumerate(taught(model, asked, seed=seed), 1):
        yield sample
        yield Measuring("teacher", done, len(asked))
        if stopped():
            return
    yield Measuring("teacher", len(asked), len(asked))


def as_examples(samples: Sequence[Sample]) -> tuple[Example, ...]:
    """Answers as examples to learn from; those that say nothing are none.

    Raises:
        SettingError: there is none.
    """
    found = tuple(Example(i, each) for i, each in enumerate(samples, 1) if each.response)
    if not found:
        raise SettingError("distill: none of the teacher's answers has converged")
    return found


def write_taught(path: Path, samples: Sequence[Sample]) -> None:
    """Keep answers in a run's folder.

    Raises:
        RunError: the disk refuses.
    """
    lines = (json.dumps(vars(each)) + "\n" for each in samples)
    with writing(path / TAUGHT_FILE) as file, replacing(file) as fresh:
        fresh.write_text("".join(lines), encoding="utf-8")


def read_taught(path: Path, vocab_size: int) -> list[Sample]:
    """Answers that `write_taught` has kept.

    Raises:
        RunError: the file is missing or damaged.
    """
    file = path / TAUGHT_FILE
    found = []
    for line in read_text(file, RunError).splitlines():
        try:
            value = json.loads(line)
            prompt, response = (token_ids(value[n], vocab_size) for n in ("prompt", "response"))
            found.append(Sample(tuple(prompt), tuple(response), bool(value["truncated"])))
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{file} cannot be gone on from: {error}") from None
    return found
