"""The prompts of a file, answered side by side into another."""

from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from ..errors import Error
from ..model.diffusion_gemma import DiffusionGemma
from ..tasks.batch import stream_batch
from ..tasks.generate import Request
from ..tasks.request import Event
from ..text.tokenizer import Tokenizer
from .batchfile import Answers, Output, Prompts, read_requests, writing
from .strict import tell_unsettled
from .terminal import say


def answer_many(
    file: Path,
    output: Path | None,
    max_batch: int,
    load: Callable[[], tuple[DiffusionGemma, Tokenizer]],
    quiet: bool,
    template: Request,
    system: str | None,
    *,
    strict: bool = False,
) -> None:
    """Answer the prompts of a file; what `output` holds already is skipped.

    `load` is called once the files have been read, and if a line asks anything. `template` is what
    a line's request is made of, with `system` before its messages.

    Raises:
        BatchError: a file cannot be read or written.
        SystemExit: a prompt has failed, or with `strict` an answer did not converge.
    """
    prompts = read_requests(file, template, system)
    answers = Answers(prompts.ids)
    with writing(output, file, len(prompts.requests)) as out:
        left = [i for i in range(len(prompts.requests)) if i not in out.finished]
        if not quiet and out.finished:
            say(f"{len(out.finished)} of {len(prompts.requests)} are answered already.")
        for i in left:
            if isinstance(each := prompts.requests[i], Error):
                out.write(answers.failure(i, each))
        _answer(left, prompts, answers, out, max_batch, load, quiet)
    if not quiet:
        say(f"{len(left) - answers.failed} answered, {answers.failed} failed")
    if answers.failed:
        raise SystemExit(1)
    if answers.unsettled:
        tell_unsettled(f"{answers.unsettled} of {len(left)} answers", strict=strict)


def _answer(
    left: list[int],
    prompts: Prompts,
    answers: Answers,
    out: Output,
    max_batch: int,
    load: Callable[[], tuple[DiffusionGemma, Tokenizer]],
    quiet: bool,
) -> None:
    """Answer those requests of `left` that could be read."""
    asked = [(i, each) for i in left if isinstance(each := prompts.requests[i], Request)]
    if not asked:
        return
    console = Console(stderr=True)
    progress = Progress(console=console, transient=True, disable=quiet or not console.is_terminal)
    model, tokenizer = load()
    requests = (request for _, request in asked)
    events: Iterator[tuple[int, Event | Error]] = stream_batch(
        model, tokenizer, requests, max_batch=max_batch
    )
    with progress:
        task = progress.add_task("answering", total=len(asked))
        for number, event in events:
            if (line := answers.take(asked[number][0], event)) is not None:
                out.write(line)
                progress.advance(task)
