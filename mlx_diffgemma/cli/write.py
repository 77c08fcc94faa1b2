"""Commands about a given text: `fill`, `edit`, `choose`."""

import json
import os
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..files import check_writable, read_text, replacing
from .images import Pictures
from .inputs import Source, optional_text, source_of, text_of
from .options import (
    Load,
    LoadFaithful,
    PromptOption,
    Quiet,
    Sampling,
    Show,
    messages_of,
    prompt_of,
    with_options,
)
from .strict import Strict, tell_unsettled
from .terminal import fail, put, say

if TYPE_CHECKING:
    from ..tasks.choose import Choice
    from ..tasks.edit import EditResult
    from ..tasks.fill import FillResult
    from ..tasks.request import Task

app = typer.Typer()

Verify = Annotated[
    bool, typer.Option("--verify", help="The encoder reads what is written, and corrects it.")
]


@dataclass(frozen=True)
class Many:
    """A file of items, where their labels go, and how many are weighed side by side."""

    batch: Annotated[
        Path | None, typer.Option(help="Weigh for all items of this file, JSON lines or .csv.")
    ] = None
    output: Annotated[
        Path | None, typer.Option(help="With --batch: labels go here; run again to go on.")
    ] = None
    max_batch: Annotated[
        int, typer.Option(min=1, help="With --batch: items that are weighed side by side.")
    ] = 8


@app.command()
@with_options
def fill(
    template: Annotated[
        str, typer.Argument(help="Text with holes, or a file that has it; - reads stdin.")
    ] = "-",
    *,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="What the text is to say; @FILE reads one.")
    ] = None,
    pictures: Pictures,
    load: Load,
    sampling: Sampling,
    show: Show = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the values of the holes as JSON.")
    ] = False,
    verify: Verify = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="As an editor wants it: fewer lengths and steps.")
    ] = False,
    strict: Strict = False,
    quiet: Quiet = False,
) -> None:
    """Fill holes in a text: {{}}, {{name}}, {{name:12}} (tokens), {{name:int}}, {{name:a|b}}."""
    images = pictures.given(template)
    text = source_of(template, "the text", text="{{" in template).text
    from ..tasks.fill import FillRequest
    from ..text.template import parse_template

    request = FillRequest(
        parse_template(text),
        optional_text(prompt, "the prompt"),
        steps=sampling.steps,
        seed=sampling.seed,
        sampler=sampling.rule(),
        verify=verify,
        images=images,
        image_tokens=pictures.image_tokens,
        quick=quick,
    )
    result: FillResult = _result(request, load, show=show, quiet=quiet)
    if as_json:
        put(json.dumps(result.values, ensure_ascii=False))
    else:
        put(result.text, end="" if result.text.endswith("\n") else "\n")
    _tell_run(result, quiet=quiet)
    if not result.converged:
        tell_unsettled("the text", strict=strict)


def _result(request: "Task[Any]", load: LoadFaithful, *, show: bool, quiet: bool) -> Any:
    """What becomes of a request, while its drafts are shown if that is wanted."""
    from ..tasks.request import stream
    from .display import watch

    if not quiet:
        load.introduce()
    model, tokenizer = load()
    show = show and not quiet
    events = watch(stream(model, tokenizer, request), tokenizer, live=show, lines=show)
    *_, result = events
    return result


def _tell_run(result: "FillResult | EditResult", *, quiet: bool) -> None:
    if not quiet:
        passes = f", {result.encoder_passes} passes of the encoder" if result.encoder_passes else ""
        say(f"{result.steps} steps{passes}", *result.notes)


@app.command()
@with_options
def edit(
    file: Annotated[str, typer.Argument(help="The file, or the text itself; - reads stdin.")],
    *,
    instruction: Annotated[
        str, typer.Option("--instruction", "-i", help="What to do; @FILE reads it.")
    ],
    lines: Annotated[
        str | None, typer.Option(help="Lines to rewrite, such as 10:20 or 10-20. [all]")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(min=0, max=1, help="How much may change, over 0 to 1. [0.4]")
    ] = None,
    load: Load,
    sampling: Sampling,
    show: Show = False,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Rewrite the file; what it was is kept in FILE.bak.")
    ] = False,
    backup: Annotated[
        bool, typer.Option("--backup/--no-backup", help="With --in-place: keep what it was.")
    ] = True,
    whole: Annotated[
        bool, typer.Option("--text", help="Print the text instead of a diff.")
    ] = False,
    verify: Verify = False,
    strict: Strict = False,
    quiet: Quiet = False,
) -> None:
    """Rewrite lines of a file; prints what changes as a unified diff."""
    span = None if lines is None else _span(lines)
    words = any(map(str.isspace, file)) and not os.path.exists(file)
    source = source_of(file, "the text", text=words)
    if in_place:
        _check_in_place(source)
    from ..tasks.edit import STRENGTH, EditRequest

    request = EditRequest(
        source.text,
        text_of(instruction, "the instruction"),
        lines=span,
        strength=STRENGTH if strength is None else strength,
        steps=sampling.steps,
        seed=sampling.seed,
        sampler=sampling.rule(),
        verify=verify,
    )
    request.split()
    result: EditResult = _result(request, load, show=show, quiet=quiet)
    _tell_edit(result, source, whole=whole)
    _tell_run(result, quiet=quiet)
    left = in_place and strict and not result.converged
    if in_place and not left and result.text != source.text:
        _rewrite(source, result.text, backup=backup, quiet=quiet)
    if not result.converged:
        tell_unsettled("the edit", strict=strict, so="; the file is left as it is" * left)


def _span(lines: str) -> tuple[int, int]:
    """First and last line of --lines."""
    first, _, last = lines.replace("-", ":").partition(":")
    if not (first.isdecimal() and (last or first).isdecimal()):
        fail(f"--lines takes a line or a range such as 10:20 or 10-20, not {lines}", code=2)
    return int(first), int(last or first)


def _check_in_place(source: Source) -> None:
    """Refuse what could not be rewritten before anything is loaded."""
    if source.path is None:
        fail(f"--in-place needs a file, not {source.name}", code=2)
    try:
        check_writable(source.path)
    except OSError as error:
        fail(f"{source.path} cannot be written: {error.strerror}")


def _tell_edit(result: "EditResult", source: Source, *, whole: bool) -> None:
    """Print what has become of a text, whole or as a diff."""
    from difflib import unified_diff

    if whole:
        put(result.text, end="")
    else:
        old, new = (t.splitlines(keepends=True) for t in (source.text, result.text))
        for line in unified_diff(old, new, f"a/{source.name}", f"b/{source.name}"):
            put(line, end="" if line.endswith("\n") else "\n\\ No newline at end of file\n")
    if source.text == result.text:
        say("Nothing changes.")


def _rewrite(source: Source, text: str, *, backup: bool, quiet: bool) -> None:
    """Replace a file's text at once, and keep what it was as a backup."""
    path = source.path
    assert path is not None
    if read_text(path) != source.text:
        fail(f"{path} was changed by somebody else meanwhile, and is left as it is")
    try:
        kept = _backup(path) if backup else None
        with replacing(path) as fresh:
            fresh.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        fail(f"{path} cannot be written: {error.strerror}")
    if kept is not None and not quiet:
        say(f"What it was is kept in {kept}.")


def _backup(path: Path) -> Path:
    """A copy beside a file; no older one is lost, as nobody knows which of them is still wanted."""
    from shutil import copymode

    content = path.read_bytes()
    for number in count(1):
        kept = path.with_name(f"{path.name}.bak{number if number > 1 else ''}")
        try:
            with kept.open("xb") as file:
                file.write(content)
            copymode(path, kept)
        except FileExistsError:
            continue
        except OSError:
            kept.unlink(missing_ok=True)  # half of it, as the disk is full
            raise
        return kept
    raise AssertionError


@app.command()
@with_options
def choose(
    prompt: Annotated[str, typer.Argument(help="The question; @FILE reads a file, - stdin.")] = "-",
    *,
    asked: PromptOption = None,
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
    pictures: Pictures,
    load: LoadFaithful,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    many: Many,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Say how likely each label is, in one pass and without writing anything."""
    slots = _slots(labels)
    prompt = prompt_of(prompt, asked)
    if many.batch is not None:
        if prompt != "-" or pictures.image:
            fail("--batch goes with no prompt and no --image", code=2)
        _choose_many(many.batch, many, load, slots, template, isolated, draws, seed, quiet)
        return
    if many.output is not None:
        fail("--output goes with --batch; one choice goes to stdout", code=2)
    parts = pictures.parts(prompt)
    messages = messages_of(text_of(prompt, "the prompt"), None, parts)
    from ..tasks.choose import ChooseRequest

    answer = optional_text(template, "the template")
    request = ChooseRequest(messages, slots, answer, isolated, seed, draws)
    request.check_options()
    found: Choice = _result(request, load, show=False, quiet=quiet)
    if as_json:
        put(json.dumps(found.facts() if found.errors else found, ensure_ascii=False))
        return
    for name, known in found.items():
        begun = f"{name}: " if len(found) > 1 else ""
        for label, chance in sorted(known.items(), key=lambda pair: -pair[1]):
            error = f"\t±{found.errors[name][label]:.4f}" if found.errors else ""
            put(f"{begun}{label}\t{chance:.4f}{error}")
        if found.errors and not quiet:
            agreed = round(found.agreement[name] * draws)
            say(f"{begun}{agreed} of {draws} draws find the same label likeliest")


def _choose_many(
    file: Path,
    many: Many,
    load: LoadFaithful,
    slots: dict[str, list[str]],
    template: str | None,
    isolated: bool,
    draws: int,
    seed: int,
    quiet: bool,
) -> None:
    """Choose for each item of a file. The seed counts up, else one noise would sway all alike."""
    from ..tasks.choose import ChooseRequest
    from .choosing import choose_many

    answer = optional_text(template, "the template")

    def make(prompt: str, number: int) -> ChooseRequest:
        messages = messages_of(prompt, None)
        return ChooseRequest(messages, slots, answer, isolated, seed + number, draws)

    make("x", 0).check_options()
    if not quiet:
        load.introduce()
    choose_many(file, many.output, many.max_batch, load, make, quiet=quiet)


def _slots(given: list[str]) -> dict[str, list[str]]:
    """Labels by slot; spaces around commas are none of theirs."""
    slots: dict[str, list[str]] = {}
    for each in given:
        name, found, listed = each.partition("=")
        name = name.strip() if found else "label"
        if name in slots:
            fail(f"--labels of {name} are given twice", code=2)
        slots[name] = [label.strip() for label in (listed if found else each).split(",")]
    return slots
