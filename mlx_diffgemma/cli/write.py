"""Commands about a given text: `fill`, `edit`, `choose`."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..files import read_text, replacing
from .options import (
    Load,
    LoadFaithful,
    Quiet,
    Sampling,
    Show,
    from_argument,
    with_options,
)
from .terminal import fail, put, say

if TYPE_CHECKING:
    from ..tasks.edit import EditResult

app = typer.Typer()


@app.command()
@with_options
def fill(
    template: Annotated[
        str, typer.Argument(help="File with holes, or the text itself; - reads stdin.")
    ] = "-",
    *,
    prompt: Annotated[str | None, typer.Option(help="What the text is to say.")] = None,
    load: Load,
    sampling: Sampling,
    show: Show = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the values of the holes as JSON.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Fill holes in a text: {{}}, {{name}}, {{name:12}} (tokens), {{name:int}}, {{name:a|b}}."""
    text = from_argument(template, "the text", holes=True)
    from ..tasks.fill import FillRequest, FillResult
    from ..tasks.request import stream
    from ..text.template import parse_template
    from .display import watch

    request = FillRequest(
        parse_template(text),
        prompt,
        steps=sampling.steps,
        seed=sampling.seed,
        sampler=sampling.rule(),
    )
    if not quiet:
        load.introduce()
    model, tokenizer = load()
    show = show and not quiet
    for event in watch(stream(model, tokenizer, request), tokenizer, live=show, lines=show):
        if isinstance(event, FillResult):
            if as_json:
                put(json.dumps(event.values, ensure_ascii=False))
            else:
                put(event.text, end="" if event.text.endswith("\n") else "\n")
            if not quiet:
                say(f"{event.steps} steps", *event.notes)


@app.command()
@with_options
def edit(
    file: Annotated[str, typer.Argument(help="The file; - reads stdin.")],
    *,
    instruction: Annotated[str, typer.Option("--instruction", "-i", help="What to do.")],
    lines: Annotated[
        str | None, typer.Option(help="Lines to rewrite, such as 10:20. [all]")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(min=0, max=1, help="How much may change, over 0 to 1. [0.4]")
    ] = None,
    load: Load,
    sampling: Sampling,
    show: Show = False,
    in_place: Annotated[bool, typer.Option("--in-place", help="Rewrite the file.")] = False,
    whole: Annotated[
        bool, typer.Option("--text", help="Print the text instead of a diff.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Rewrite lines of a file; prints what changes as a unified diff."""
    if in_place and file == "-":
        fail("--in-place needs a file, not stdin", code=2)
    span = None if lines is None else _span(lines)
    text = sys.stdin.read() if file == "-" else read_text(Path(file))
    from ..tasks.edit import STRENGTH, EditRequest, EditResult, split_lines
    from ..tasks.request import stream
    from .display import watch

    split_lines(text, span)
    request = EditRequest(
        text,
        instruction,
        lines=span,
        strength=STRENGTH if strength is None else strength,
        steps=sampling.steps,
        seed=sampling.seed,
        sampler=sampling.rule(),
    )
    if not quiet:
        load.introduce()
    model, tokenizer = load()
    show = show and not quiet
    for event in watch(stream(model, tokenizer, request), tokenizer, live=show, lines=show):
        if isinstance(event, EditResult):
            _tell_edit(event, text, file, whole=whole, in_place=in_place)
            if not quiet:
                say(f"{event.steps} steps", *event.notes)


def _span(lines: str) -> tuple[int, int]:
    """First and last line of --lines."""
    first, _, last = lines.partition(":")
    if not (first.isdecimal() and (last or first).isdecimal()):
        fail(f"--lines takes a line or a range such as 10:20, not {lines}", code=2)
    return int(first), int(last or first)


def _tell_edit(result: "EditResult", text: str, file: str, *, whole: bool, in_place: bool) -> None:
    """Print what has become of a text, whole or as a diff, and write it back if that is wanted."""
    from difflib import unified_diff

    if whole:
        put(result.text, end="")
    else:
        name = "stdin" if file == "-" else file
        old, new = (t.splitlines(keepends=True) for t in (text, result.text))
        for line in unified_diff(old, new, f"a/{name}", f"b/{name}"):
            put(line, end="" if line.endswith("\n") else "\n\\ No newline at end of file\n")
    if text == result.text:
        say("Nothing changes.")
    elif in_place:
        _replace_text(Path(file), result.text)


def _replace_text(path: Path, text: str) -> None:
    """Replace a file's text at once, and keep its mode."""
    from shutil import copymode

    try:
        with replacing(path) as fresh:
            fresh.write_text(text, encoding="utf-8", newline="")
            copymode(path, fresh)
    except OSError as error:
        fail(f"{path} cannot be written: {error.strerror}")


@app.command()
@with_options
def choose(
    prompt: Annotated[str, typer.Argument(help="The question; - reads it from stdin.")] = "-",
    *,
    labels: Annotated[
        list[str],
        typer.Option(help="Labels, yes,no; of a named slot: spam=yes,no. Can be given again."),
    ],
    template: Annotated[
        str | None, typer.Option(help="The answer, with {name} where a slot stands.")
    ] = None,
    isolated: Annotated[
        bool, typer.Option("--isolated", help="Slots do not see each other's text.")
    ] = False,
    draws: Annotated[int, typer.Option(min=1, help="Noise canvases to average over.")] = 1,
    load: LoadFaithful,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Say how likely each label is, in one pass and without writing anything."""
    slots: dict[str, list[str]] = {}
    for given in labels:
        name, found, listed = given.partition("=")
        slots[name if found else "label"] = (listed if found else given).split(",")
    prompt = from_argument(prompt, "the prompt")
    from ..tasks.choose import choose

    if not quiet:
        load.introduce()
    model, tokenizer = load()
    chances = choose(
        model,
        tokenizer,
        prompt,
        slots,
        template=template,
        isolated=isolated,
        seed=seed,
        draws=draws,
    )
    if as_json:
        put(json.dumps(chances, ensure_ascii=False))
        return
    for name, known in chances.items():
        for label, chance in sorted(known.items(), key=lambda pair: -pair[1]):
            put(f"{name + ': ' if len(chances) > 1 else ''}{label}\t{chance:.4f}")
