"""The prompts of a file, answered side by side into another; by one process or by several."""

from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress

from ..errors import Error
from ..model.diffusion_gemma import DiffusionGemma
from ..tasks.batch import stream_batch
from ..tasks.generate import Request
from ..tasks.request import Event
from ..text.tokenizer import Tokenizer
from .batchfile import (
    Answers,
    InOrder,
    read_prompts,
    requests_of,
    writing,
)
from .dealing import Dealt, given
from .strict import tell_unsettled
from .terminal import fail, say

if TYPE_CHECKING:
    from ..distributed.link import Link

Loader = Callable[[], tuple[DiffusionGemma, Tokenizer]]

# Prompts without an answer that are named.
MOST_NAMED = 20


def answer_many(
    file: Path,
    output: Path | None,
    max_batch: int,
    load: Loader,
    quiet: bool,
    template: Request,
    system: str | None,
    *,
    strict: bool = False,
    link: "Link | None" = None,
) -> None:
    """Answer the prompts of a file; what `output` holds already is skipped.

    `load` is called once the files have been read, and if a line asks anything. `template` is what
    a line's request is made of, with `system` before its messages. With `link` all ranks answer:
    rank 0 reads and writes, and lines come in the file's order.

    Raises:
        BatchError: a file cannot be read or written.
        SystemExit: a prompt has failed, or a rank, or with `strict` an answer did not converge.
    """
    if link is not None and not link.place.leads:
        _answer_share(link, file.parent, max_batch, load, template, system)
        return
    content = read_prompts(file)
    prompts = requests_of(content, file.parent, template, system)
    answers = Answers(prompts.ids)
    with writing(output, file, len(prompts.requests)) as out:
        left = [i for i in range(len(prompts.requests)) if i not in out.finished]
        if not quiet and out.finished:
            say(f"{len(out.finished)} of {len(prompts.requests)} are answered already.")
        asked: list[tuple[int, Request]] = []
        ordered = None if link is None else InOrder(left, out.write)
        take = (lambda _, line: out.write(line)) if ordered is None else ordered.take
        for i in left:
            if isinstance(each := prompts.requests[i], Error):
                take(i, answers.failure(i, each))
            else:
                asked.append((i, each))
        try:
            dealt = Dealt(link, content, [i for i, _ in asked], answers)
            lost = _answer(asked, dealt, answers, take, max_batch, load, quiet)
        finally:
            if ordered is not None:
                ordered.close()
    if not quiet:
        say(f"{len(left) - answers.failed - len(lost)} answered, {answers.failed} failed")
    if lost:
        fail(_unanswered(lost))
    if answers.failed:
        raise SystemExit(1)
    if answers.unsettled:
        tell_unsettled(f"{answers.unsettled} of {len(left)} answers", strict=strict)


def _answer(
    asked: Sequence[tuple[int, Request]],
    dealt: Dealt,
    answers: Answers,
    take: Callable[[int, str], None],
    max_batch: int,
    load: Loader,
    quiet: bool,
) -> list[int]:
    """Answer this rank's part of the requests and collect the others'; which have no answer."""
    if not asked:
        return []
    console = Console(stderr=True)
    progress = Progress(console=console, transient=True, disable=quiet or not console.is_terminal)
    waiting = {i for i, _ in asked}
    mine = [(i, request) for i, request in asked if i not in dealt]
    with dealt.ending() as ended, progress:
        task = progress.add_task("answering", total=len(asked))

        def told(index: int, line: str) -> None:
            take(index, line)
            waiting.discard(index)
            progress.advance(task)

        for found in _answers(mine, answers, max_batch, load) if mine else ():
            if found is not None:
                told(*found)
            for each in dealt.heard():
                told(*each)
            if ended.is_set():
                break
        for each in dealt.rest(ended):
            told(*each)
    return sorted(waiting)


def _answers(
    asked: Sequence[tuple[int, Request]], answers: Answers, max_batch: int, load: Loader
) -> Generator[tuple[int, str] | None, None, None]:
    """Numbers and lines of requests, as they are answered; None between them."""
    model, tokenizer = load()
    requests = (request for _, request in asked)
    events: Iterator[tuple[int, Event | Error]] = stream_batch(
        model, tokenizer, requests, max_batch=max_batch
    )
    for number, event in events:
        index = asked[number][0]
        line = answers.take(index, event)
        yield None if line is None else (index, line)


def _answer_share(
    link: "Link",
    place: Path,
    max_batch: int,
    load: Loader,
    template: Request,
    system: str | None,
) -> None:
    """Answer what rank 0 gives this rank of a file in `place`."""
    content, indexes = given(link)
    prompts = requests_of(content, place, template, system)
    asked = [(i, each) for i in indexes if isinstance(each := prompts.requests[i], Request)]
    if not asked:
        return
    for found in _answers(asked, Answers(prompts.ids), max_batch, load):
        if found is not None:
            link.send(b"=" + found[1].encode(errors="replace"))


def _unanswered(lost: Sequence[int]) -> str:
    named = ", ".join(map(str, lost[:MOST_NAMED]))
    more = f" and {len(lost) - MOST_NAMED} more" if len(lost) > MOST_NAMED else ""
    prompts = "prompt" if len(lost) == 1 else "prompts"
    return f"{prompts} {named}{more} (counted from 0) got no answer; the same command answers them"
