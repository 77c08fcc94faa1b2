"""`generate`: an answer to one prompt, or with --batch to those of a file."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..distributed.launch import place
from .images import Pictures, path_of
from .inputs import optional_text, text_of
from .options import (
    Answering,
    Load,
    PromptOption,
    Quiet,
    Show,
    System,
    messages_of,
    prompt_of,
    with_options,
)
from .ranks import apart
from .strict import Strict
from .terminal import fail

app = typer.Typer()


@dataclass(frozen=True)
class Batch:
    """A file of prompts, where answers go, and how many are made side by side."""

    batch: Annotated[
        Path | None, typer.Option(help="Answer all prompts of this file, a JSON object a line.")
    ] = None
    output: Annotated[
        Path | None, typer.Option(help="With --batch: answers go here; run again to go on.")
    ] = None
    max_batch: Annotated[
        int, typer.Option(min=1, help="With --batch: prompts that are answered side by side.")
    ] = 8


@app.command()
@with_options
def generate(
    prompt: Annotated[str, typer.Argument(help="The question; @FILE reads a file, - stdin.")] = "-",
    *,
    asked: PromptOption = None,
    load: Load,
    answering: Answering,
    system: System = None,
    pictures: Pictures,
    video: Annotated[
        list[Path] | None,
        typer.Option(help="A video before the prompt: a file, or a folder of its frames."),
    ] = None,
    show: Show = False,
    schema: Annotated[
        Path | None, typer.Option(help="JSON Schema that the answer must follow.")
    ] = None,
    thinking: Annotated[
        bool, typer.Option("--thinking", help="Ask for thoughts first; they go to stderr.")
    ] = False,
    likelihood: Annotated[
        bool, typer.Option("--likelihood", help="Say how likely the encoder finds the answer.")
    ] = False,
    prompt_cache: Annotated[
        Path | None,
        typer.Option(help="Keep what was read in this file; the next run pays for the rest."),
    ] = None,
    many: Batch,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the answer and its statistics as JSON.")
    ] = False,
    strict: Strict = False,
    quiet: Quiet = False,
) -> None:
    """Answer one prompt, or with --batch the prompts of a file."""
    prompt = prompt_of(prompt, asked)
    system = optional_text(system, "the system message")
    if many.batch is None:
        if place().size > 1 and not load.shard:
            fail("under mlx.launch, generate goes with --batch or --shard", code=2)
        if many.output is not None:
            fail("--output goes with --batch; one answer goes to stdout", code=2)
        parts = [*pictures.parts(prompt), *_frames(video or ())]
        messages = messages_of(text_of(prompt, "the prompt"), system, parts)
    elif prompt != "-" or prompt_cache is not None or show or pictures.image or video:
        fail("--batch goes with no prompt, --image, --video, --prompt-cache or --show", code=2)
    from ..diffusion.cache_file import check_destination
    from ..tasks.generate import Request
    from ..text.schema import read_supported

    request = Request(
        messages if many.batch is None else "",
        **answering.settings(),
        seed=answering.seed,
        schema=None if schema is None else read_supported(schema),
        enable_thinking=thinking,
        likelihood=likelihood,
    )
    request.check_options()
    if prompt_cache is not None:
        check_destination(prompt_cache)
    if not quiet:
        load.introduce()
    if many.batch is not None:
        from .batch import answer_many

        with nullcontext(None) if load.shard else apart() as link:
            answer_many(
                many.batch,
                many.output,
                many.max_batch,
                load,
                quiet,
                request,
                system,
                strict=strict,
                link=link,
            )
        return
    from .answer import answer_one

    answer_one(request, load, prompt_cache, show=show, as_json=as_json, quiet=quiet, strict=strict)


def _frames(videos: Sequence[Path]) -> list[dict[str, Any]]:
    """Videos as parts of a message; what is wrong with one does not wait for a model."""
    if not videos:
        return []
    from ..tasks.pictures import video_parts

    return [part for each in videos for part in video_parts(path_of(str(each)))]
