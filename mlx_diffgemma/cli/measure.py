"""Commands that measure: `eval`, `bench`, `doctor`."""

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..distributed.launch import place
from ..files import replacing
from .options import Encoder, Load, MaxTokens, Quiet, Steps, size, with_options
from .ranks import apart
from .terminal import fail, put, say

if TYPE_CHECKING:
    from ..measure.evaluate import Case, Score

app = typer.Typer()


@app.command(name="eval")
@with_options
def evaluate(
    *,
    load: Load,
    steps: Annotated[str, typer.Option(help="Step budgets to compare.")] = "1,2,4,8,16,48",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each case.")] = 3,
    limit: Annotated[int | None, typer.Option(min=1, help="Most cases of a task.")] = None,
    recipes: Annotated[
        str | None, typer.Option(help="Convert to these recipes first, and compare: none,8bit,...")
    ] = None,
    tasks: Annotated[
        Path | None, typer.Option(help="Own cases, JSON lines: prompt, and answer or regex.")
    ] = None,
    pinned: Annotated[
        bool, typer.Option("--pinned", help="Only Sudokus, as templates whose clues are pinned.")
    ] = False,
    mode: Annotated[
        str, typer.Option(help="Modes to compare: denoise, verify, causal, speculative.")
    ] = "denoise",
    encoder: Encoder,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a row.")] = False,
    quiet: Quiet = False,
) -> None:
    """Exact success on held-out tasks, by steps, recipe and mode."""
    if load.shard:
        fail("--shard does not go with eval, whose runs ranks divide among them", code=2)
    budgets = _budgets(steps)
    from ..tasks.modes import ways_of

    ways = ways_of(mode.split(","), encoder.temperature, encoder.acceptance)
    if pinned and any(way.mode != "denoise" for way in ways):
        fail("--pinned goes with --mode denoise,verify: templates are filled so", code=2)
    from itertools import product

    from ..measure.evaluate import (
        HELD_OUT,
        SPECIALIST,
        at_most,
        evaluate,
        pinned_sudokus,
        read_cases,
    )
    from .counting import counting
    from .dealing import Shared

    cases = read_cases(tasks or HELD_OUT)
    if pinned:
        cases = pinned_sudokus(cases)
    if limit is not None:
        cases = at_most(limit, cases)
    wanted = _recipes(recipes)
    if not quiet:
        load.introduce()
    answers: dict[str, list[Case]] = {}  # by checkpoint
    for case in cases:
        # An adapter is for one model: no other answers then.
        best = "tiny" if load.adapter else SPECIALIST.get(case.task, "tiny")
        answers.setdefault(load.model or best, []).append(case)
    if not as_json:
        heads = f"{'recipe':<11}{'task':<17}{'steps':>5}{'success':>16}{'steps/canvas':>14}"
        print(f"{heads}{'decoded':>9}{'tokens/pass':>13}  repair")
    total = len(cases) * seeds * len(budgets) * len(ways) * len(wanted or [""])
    with apart() as link, counting("runs", total, quiet=quiet) as counted:
        spread = None if link is None else Shared(link, counted.advance)
        for name, source in product(wanted or ["as it is"], answers):
            with _converted(name if wanted else None, replace(load, model=source)) as checkpoint:
                model, tokenizer = checkpoint()
                found = evaluate(
                    model, tokenizer, answers[source], budgets, seeds, counted.advance, ways, spread
                )
                for score in found:
                    with counted.hidden():
                        _tell_score(name, score, as_json=as_json)


def _budgets(steps: str) -> list[int]:
    try:
        return [int(part) for part in steps.split(",")]
    except ValueError:
        fail(f"--steps takes numbers and commas, not {steps}", code=2)


def _recipes(given: str | None) -> list[str]:
    from ..convert import RECIPES

    wanted = given.split(",") if given else []
    if unknown := [name for name in wanted if name not in RECIPES]:
        fail(f"there is no recipe {unknown[0]}; there are {', '.join(RECIPES)}", code=2)
    return wanted


@contextmanager
def _converted(recipe: str | None, load: Load) -> Iterator[Load]:
    """Loads the checkpoint as it is, or a conversion of it that is gone in the end."""
    if recipe is None:
        yield load
        return
    from tempfile import TemporaryDirectory

    from ..checkpoint.files import resolve
    from ..convert import RECIPES, convert

    source = resolve(load.model or "tiny", revision=load.revision)
    with TemporaryDirectory() as directory:
        made = Path(directory) / recipe
        convert(source, made, recipe=RECIPES[recipe])
        yield replace(load, model=str(made), revision=None)


def _tell_score(recipe: str, score: "Score", *, as_json: bool) -> None:
    """Print a row of the table, or its JSON."""
    from dataclasses import asdict

    if as_json:
        put(json.dumps({"recipe": recipe, **asdict(score)}))
        return
    success = f"{100 * score.success:.1f} ±{100 * score.error:.1f} %"
    repair = ""
    if score.typos_fixed is not None and score.clean_damaged is not None:
        fixed, damaged = 100 * score.typos_fixed, 100 * score.clean_damaged
        repair = f"  {fixed:.1f} % of typos fixed, {damaged:.2f} % damaged"
    task = score.task if score.mode == "denoise" else f"{score.task}, {score.mode}"
    put(
        f"{recipe:<11}{task:<17}{score.steps:>5}{success:>16}"
        f"{score.steps_per_canvas:>14.1f}{score.decoded_per_canvas:>9.2f}{score.tokens_per_forward:>13.1f}{repair}"
    )
    if score.calibration_error is not None:
        put(f"{'':<11}calibration error {100 * score.calibration_error:.1f} %")
    for each in score.reliability:
        put(
            f"{'':<11}  {100 * each.low:.0f} to {100 * each.high:.0f} % sure: {each.count:>5} "
            f"answers, {100 * each.confidence:5.1f} % sure, {100 * each.right:5.1f} % right"
        )


@app.command()
@with_options
def bench(
    *,
    load: Load,
    compare: Annotated[
        str | None, typer.Option(help="Measure this checkpoint too, in turns with --model.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 512,
    max_tokens: MaxTokens = None,
    steps: Steps = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs; medians are printed.")] = 3,
    modes: Annotated[
        str | None,
        typer.Option(help="Measure these in turns: denoise, verify, causal, speculative."),
    ] = None,
    encoder: Encoder,
    fill: Annotated[
        bool, typer.Option("--fill", help="Measure how long an editor waits for a short hole.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Quiet = False,
) -> None:
    """Measure how fast a checkpoint is on this machine."""
    from ..tasks.modes import ways_of

    if load.shard and (compare is not None or fill):
        fail("--shard goes with neither --compare nor --fill", code=2)
    if fill:
        if compare is not None or modes is not None:
            fail("--fill goes with neither --compare nor --modes", code=2)
        _bench_fill(load, max_tokens, steps, repeats, as_json=as_json, quiet=quiet)
        return
    named = modes.split(",") if modes else ["denoise"]
    ways = ways_of(named, encoder.temperature, encoder.acceptance)
    from rich.console import Console

    from ..measure import bench as measuring
    from .display import bench_table

    if not quiet:
        load.introduce()
    sources = [(load.model or "the small model", load.model, load.revision, load.adapter)]
    sources += [] if compare is None else [(compare, compare, None, None)]
    memory = size(load.max_memory)
    subjects = [
        measuring.Subject(
            *each,
            dtype=load.dtype,
            max_memory=memory,
            speed=load.speed,
            shared=load if load.shard else None,
        )
        for each in sources
    ]
    if modes:
        subjects = [subject.in_way(way) for subject in subjects for way in ways]
    progress = (lambda line: None) if quiet else say
    reports = measuring.bench(subjects, prompt_tokens, steps, max_tokens, repeats, progress)
    if as_json:
        put(json.dumps(measuring.as_json(reports), ensure_ascii=False))
        return
    about = measuring.machine()
    Console(highlight=False).print(bench_table(reports))
    ranks = f", {place().size} ranks" if load.shard else ""
    print(f"mlx-diffgemma {about['mlx_diffgemma']}, MLX {about['mlx']}, {about['system']}{ranks}")


def _bench_fill(
    load: Load,
    max_tokens: int | None,
    steps: int | None,
    repeats: int,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure completions with a suffix, of 16 tokens at most unless --max-tokens says."""
    from dataclasses import asdict

    from ..measure.bench import machine
    from ..measure.bench_fill import MOST, fill_latency

    if not quiet:
        load.introduce()
    found = fill_latency(*load(), MOST if max_tokens is None else max_tokens, steps, repeats)
    if as_json:
        put(json.dumps({**machine(), "fill": asdict(found)}, ensure_ascii=False))
        return
    put(f"first draft\t{found.first_draft_seconds:.3f} s")
    put(f"whole\t{found.whole_seconds:.3f} s")
    put(f"steps\t{found.steps}, for at most {found.most_tokens} tokens")
    put(f"canvases\t{found.canvases:.1f}, decoded in them")


@app.command()
def doctor(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="A part of it, in seconds.")] = False,
    device: Annotated[
        Literal["cpu", "gpu"] | None, typer.Option(help="What is tested. [the GPU if there is one]")
    ] = None,
    json_file: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", help="Write all of it as JSON; - is stdout."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Compare this machine's GPU with its CPU, layer by layer; exit code 1 where they differ."""
    import time

    from ..measure import doctor as examining

    started = time.monotonic()
    reference, tested = examining.devices(device)
    with ExitStack() as stack:
        report: Path | None = None
        if json_file is not None and json_file != "-":
            # Before anything is computed: who cannot write there should not have to wait.
            try:
                report = stack.enter_context(replacing(Path(json_file)))
            except OSError as error:
                fail(f"{json_file} cannot be written: {error.strerror}")
        table = sys.stderr if json_file == "-" else sys.stdout
        known = examining.about(reference, tested)
        print(*examining.introduction(known), sep="\n", file=table, flush=True)
        results = []
        progress = (lambda line: None) if quiet else say
        for found in examining.examine(reference, tested, quick=quick, progress=progress):
            results.append(found)
            print(examining.line(found), file=table, flush=True)
        seconds = time.monotonic() - started
        print(examining.conclusion(results, seconds), file=table, flush=True)
        text = json.dumps(examining.as_json(known, results, seconds), indent=1, allow_nan=False)
        if report is not None:
            report.write_text(text + "\n", encoding="utf-8")
        elif json_file is not None:
            print(text)
    if examining.counted(results)["failed"]:
        raise SystemExit(1)
