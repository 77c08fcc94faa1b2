"""The command line. Answers go to stdout, everything else to stderr.

Imports of MLX and of the rest of the package stand inside the commands: `--help` must not wait.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeVar

import typer

from ..errors import Error
from ..files import read_text, replacing
from .terminal import write

if TYPE_CHECKING:
    from ..diffusion.guards import Guards
    from ..measure.evaluate import Case
    from ..model.diffusion_gemma import DiffusionGemma
    from ..tasks.generate import Request
    from ..text.tokenizer import Tokenizer


Item = TypeVar("Item")

app = typer.Typer(
    name="mlx-diffgemma",
    help="Run DiffusionGemma on Apple silicon.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

DTypeName = Literal["float32", "bfloat16", "float16"]

QuantMode = Literal["affine", "mxfp4", "nvfp4", "mxfp8"]

SpeedName = Literal["faithful", "balanced", "fast"]

OverflowName = Literal["refuse", "truncate"]

SamplerName = Literal["entropy", "confidence"]

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        envvar="MLX_DIFFGEMMA_MODEL",
        help="Checkpoint directory, or a name on the hub. [tiny, which ships with us]",
    ),
]

Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the hub.")]

DType = Annotated[
    DTypeName | None, typer.Option(help="Compute in this type instead of the checkpoint's.")
]

SpeedOption = Annotated[
    SpeedName,
    typer.Option(
        "--speed", help="Fewer denoising steps for a loss that docs/performance.md states."
    ),
]

MaxMemory = Annotated[
    str | None,
    typer.Option(help="Memory that the model may take with its context, e.g. 12GB. [what is free]"),
]

MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="Most tokens to write. [checkpoint's setting]")
]

Steps = Annotated[
    int | None, typer.Option(min=1, help="Most denoising steps a canvas. [checkpoint's setting]")
]

Seed = Annotated[int | None, typer.Option(min=0, help="Makes the answer repeatable.")]

System = Annotated[str | None, typer.Option(help="System message.")]

SamplerOption = Annotated[
    SamplerName | None,
    typer.Option(
        "--sampler",
        help="entropy is the reference's; confidence keeps what it accepts. [checkpoint's setting]",
    ),
]

Threshold = Annotated[
    float | None, typer.Option(min=0, max=1, help="Probability that --sampler confidence accepts.")
]

ThinkingBudget = Annotated[
    int | None, typer.Option(min=1, help="Most tokens of thought before the answer.")
]

Shrink = Annotated[
    bool, typer.Option("--shrink", help="Canvases no longer than what is left of --max-tokens.")
]

GUARDS = "empty,not_converged,repetition"

Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No statistics and no progress on stderr.")
]

Show = Annotated[bool, typer.Option("--show", help="Draw the canvas as it denoises.")]


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The question; - reads it from stdin.")] = "-",
    *,
    model: Model = None,
    revision: Revision = None,
    dtype: DType = None,
    max_memory: MaxMemory = None,
    speed: SpeedOption = "faithful",
    max_tokens: MaxTokens = None,
    steps: Steps = None,
    seed: Seed = None,
    system: System = None,
    sampler: SamplerOption = None,
    threshold: Threshold = None,
    show: Show = False,
    schema: Annotated[
        Path | None, typer.Option(help="JSON Schema that the answer must follow.")
    ] = None,
    thinking: Annotated[
        bool, typer.Option("--thinking", help="Ask for thoughts first; they go to stderr.")
    ] = False,
    thinking_budget: ThinkingBudget = None,
    guards: Annotated[
        str, typer.Option(help=f"What to do about bad canvases: all, none, or of {GUARDS}.")
    ] = "none",
    shrink: Shrink = False,
    prompt_cache: Annotated[
        Path | None,
        typer.Option(help="Keep what was read in this file; the next run pays for the rest."),
    ] = None,
    batch: Annotated[
        Path | None, typer.Option(help="Answer all prompts of this file, a JSON object a line.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="With --batch: answers go here; run again to go on.")
    ] = None,
    max_batch: Annotated[
        int, typer.Option(min=1, help="With --batch: prompts that are answered side by side.")
    ] = 8,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the answer and its statistics as JSON.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Answer one prompt, or with --batch the prompts of a file."""
    if batch is not None:
        if prompt != "-" or prompt_cache is not None or show:
            fail("--batch goes with neither a prompt nor --prompt-cache nor --show", code=2)
        from ..checkpoint.load import load
        from ..tasks.generate import Request
        from ..text.schema import read_supported

        template = Request(
            "",
            max_tokens=max_tokens,
            steps=steps,
            seed=seed,
            sampler=choose_sampler(sampler, threshold),
            schema=None if schema is None else read_supported(schema),
            enable_thinking=thinking,
            guards=read_guards(guards, thinking_budget),
            shrink=shrink,
        )
        if not quiet:
            introduce(model)
        chosen_load = partial(
            load, model, revision=revision, dtype=dtype, max_memory=size(max_memory), speed=speed
        )
        generate_batch(batch, output, max_batch, chosen_load, quiet, template, system)
        return
    prompt = from_argument(prompt, "the prompt")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    if not prompt.strip():
        fail("the prompt is empty", code=2)
    chosen = choose_sampler(sampler, threshold)
    watchful = read_guards(guards, thinking_budget)

    from rich.console import Console

    from ..checkpoint.load import load
    from ..diffusion.prompt_cache import PromptCache, Reading
    from ..tasks.generate import stream_generate
    from ..tasks.request import Done, Draft, Notice
    from ..text.turns import BadToolCall, Text, Thought, ToolCall
    from .display import Screen, progress, summary, told

    wanted = None
    if schema is not None:
        from ..text.schema import read_supported

        wanted = read_supported(schema)
    if not quiet:
        introduce(model)
    loaded, tokenizer = load(
        model, revision=revision, dtype=dtype, max_memory=size(max_memory), speed=speed
    )
    context = PromptCache(loaded)
    if prompt_cache is not None and prompt_cache.exists():
        context, _ = PromptCache.load(prompt_cache, loaded)
    events = stream_generate(
        loaded,
        tokenizer,
        messages,
        max_tokens=max_tokens,
        steps=steps,
        seed=seed,
        sampler=chosen,
        schema=wanted,
        enable_thinking=thinking,
        prompt_cache=context,
        guards=watchful,
        shrink=shrink,
    )
    answer = thoughts = ""
    calls = []
    console = Console(stderr=True, highlight=False)
    with Screen(console, sys.stdout, live=show and not quiet) as screen:
        for event in events:
            match event:
                case Draft() if screen.live:
                    screen.draft(event, tokenizer.pieces(event.tokens))
                case Draft() if show and not quiet:
                    say(f"{progress(event)} | {event.text!r}")
                case Reading() if not quiet:
                    screen.reading(event.done, event.total)
                case Text():
                    answer += event.text
                    if not as_json:
                        screen.text(event.text)
                case Thought():
                    thoughts += event.text
                case ToolCall():
                    calls.append(vars(event))
                case BadToolCall() if not quiet:
                    screen.note(f"[a tool call that cannot be read: {event.problem}]")
                case Notice() if not quiet:
                    screen.note(told(event))
                case Done():
                    done = event
        if as_json:
            parts = {"text": answer, "thought": thoughts, "tool_calls": calls}
            put(json.dumps({**parts, **vars(done)}, ensure_ascii=False))
        else:
            for call in calls:
                screen.text(json.dumps(call, ensure_ascii=False))
            screen.end()
        if not quiet:
            if thoughts and not as_json:
                screen.note(thoughts.strip())
            screen.note(summary(done))
    if prompt_cache is not None:
        context.save(prompt_cache)


def generate_batch(
    file: Path,
    output: Path | None,
    max_batch: int,
    load: "Callable[[], tuple[DiffusionGemma, Tokenizer]]",
    quiet: bool,
    template: "Request",
    system: str | None,
) -> None:
    """Answer the prompts of a file, side by side; what `output` holds already is skipped.

    `load` is called once the files have been read, and if a line asks anything. `template` is what
    a line's request is made of, with `system` before its messages.
    """
    from rich.console import Console
    from rich.progress import Progress

    from ..tasks.batch import stream_batch
    from ..tasks.generate import Request
    from ..tasks.request import Event
    from .batchfile import Answers, read_requests, writing

    prompts = read_requests(file, template, system)
    answers = Answers(prompts.ids)
    console = Console(stderr=True)
    progress = Progress(console=console, transient=True, disable=quiet or not console.is_terminal)
    with writing(output, file, len(prompts.requests)) as out:
        left = [i for i in range(len(prompts.requests)) if i not in out.finished]
        if not quiet and out.finished:
            say(f"{len(out.finished)} of {len(prompts.requests)} are answered already.")
        asked = [(i, each) for i in left if isinstance(each := prompts.requests[i], Request)]
        for i in left:
            if isinstance(each := prompts.requests[i], Error):
                out.write(answers.failure(i, each))
        if asked:
            loaded, tokenizer = load()
            requests = (request for _, request in asked)
            events: Iterator[tuple[int, Event | Error]] = stream_batch(
                loaded, tokenizer, requests, max_batch=max_batch
            )
            with progress:
                task = progress.add_task("answering", total=len(asked))
                for number, event in events:
                    if (line := answers.take(asked[number][0], event)) is not None:
                        out.write(line)
                        progress.advance(task)
    if not quiet:
        say(f"{len(left) - answers.failed} answered, {answers.failed} failed")
    if answers.failed:
        raise SystemExit(1)


@app.command()
def chat(
    *,
    model: Model = None,
    revision: Revision = None,
    dtype: DType = None,
    max_memory: MaxMemory = None,
    speed: SpeedOption = "faithful",
    max_tokens: MaxTokens = None,
    steps: Steps = None,
    seed: Seed = None,
    system: System = None,
    sampler: SamplerOption = None,
    threshold: Threshold = None,
    thinking: Annotated[
        bool | None,
        typer.Option("--thinking/--no-thinking", help="Ask for thoughts before an answer."),
    ] = None,
    thinking_budget: ThinkingBudget = None,
    guards: Annotated[str, typer.Option(help=f"Which are on: all, none, or of {GUARDS}.")] = "all",
    shrink: Shrink = False,
    overflow: Annotated[
        OverflowName, typer.Option(help="Beyond the context: refuse, or forget the oldest turns.")
    ] = "refuse",
    tools: Annotated[
        Path | None, typer.Option(help="Functions in a .py, or declarations in a .json.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Call tools without asking.")] = False,
    session: Annotated[
        Path | None, typer.Option(help="Go on with this file if it exists, and save to it.")
    ] = None,
    live: Annotated[
        bool, typer.Option("--live/--no-live", help="Draw the canvas while it denoises.")
    ] = True,
) -> None:
    """Talk with the model; /help lists what can be typed."""
    chosen = choose_sampler(sampler, threshold)
    wanted = read_guards(guards, thinking_budget)

    from ..checkpoint.load import load
    from ..tasks.session import ChatSession
    from ..tasks.tools import by_name, read_tools
    from .chat import Chat

    known = by_name(read_tools(tools)) if tools else {}
    introduce(model)
    loaded, tokenizer = load(
        model, revision=revision, dtype=dtype, max_memory=size(max_memory), speed=speed
    )
    talk = ChatSession(
        loaded,
        tokenizer,
        tools=[tool.declaration for tool in known.values()],
        guards=wanted,
        overflow=overflow,
        max_tokens=max_tokens,
        steps=steps,
        sampler=chosen,
        shrink=shrink,
    )
    if session is not None and session.exists():
        talk.restore(session)
        say(f"Going on with {len(talk.messages)} messages of {session}.")
    if system is not None:
        talk.system = system
    if thinking is not None:
        talk.enable_thinking = thinking
    conversation = Chat(talk, tokenizer, seed=seed, tools=known, yes=yes, live=live)
    try:
        conversation.run()
    except KeyboardInterrupt:
        # Whoever leaves by Ctrl-C may press it again: the session is saved all the same.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise
    finally:
        if session is not None:
            talk.save(session)


@app.command()
def fill(
    template: Annotated[
        str, typer.Argument(help="File with holes, or the text itself; - reads stdin.")
    ] = "-",
    *,
    prompt: Annotated[str | None, typer.Option(help="What the text is to say.")] = None,
    model: Model = None,
    revision: Revision = None,
    dtype: DType = None,
    max_memory: MaxMemory = None,
    speed: SpeedOption = "faithful",
    steps: Steps = None,
    seed: Seed = None,
    sampler: SamplerOption = None,
    threshold: Threshold = None,
    show: Show = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the values of the holes as JSON.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Fill holes in a text: {{}}, {{name}}, {{name:12}} (tokens), {{name:int}}, {{name:a|b}}."""
    text = from_argument(template, "the text", holes=True)
    chosen = choose_sampler(sampler, threshold)

    from ..checkpoint.load import load
    from ..tasks.fill import FillResult, stream_fill
    from ..text.template import parse_template

    parse_template(text)
    if not quiet:
        introduce(model)
    loaded, tokenizer = load(
        model, revision=revision, dtype=dtype, max_memory=size(max_memory), speed=speed
    )
    events = stream_fill(
        loaded, tokenizer, text, prompt=prompt, steps=steps, seed=seed, sampler=chosen
    )
    for event in watch(events, tokenizer, live=show and not quiet, lines=show and not quiet):
        if isinstance(event, FillResult):
            if as_json:
                put(json.dumps(event.values, ensure_ascii=False))
            else:
                put(event.text, end="" if event.text.endswith("\n") else "\n")
            if not quiet:
                say(f"{event.steps} steps", *event.notes)


@app.command()
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
    model: Model = None,
    revision: Revision = None,
    dtype: DType = None,
    max_memory: MaxMemory = None,
    speed: SpeedOption = "faithful",
    steps: Steps = None,
    seed: Seed = None,
    sampler: SamplerOption = None,
    threshold: Threshold = None,
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
    span = None
    if lines is not None:
        first, _, last = lines.partition(":")
        if not (first.isdecimal() and (last or first).isdecimal()):
            fail(f"--lines takes a line or a range such as 10:20, not {lines}", code=2)
        span = int(first), int(last or first)
    text = sys.stdin.read() if file == "-" else read_text(Path(file))
    chosen = choose_sampler(sampler, threshold)

    from difflib import unified_diff

    from ..checkpoint.load import load
    from ..tasks.edit import STRENGTH, EditResult, split_lines, stream_edit

    split_lines(text, span)
    if not quiet:
        introduce(model)
    loaded, tokenizer = load(
        model, revision=revision, dtype=dtype, max_memory=size(max_memory), speed=speed
    )
    events = stream_edit(
        loaded,
        tokenizer,
        text,
        instruction,
        lines=span,
        strength=STRENGTH if strength is None else strength,
        steps=steps,
        seed=seed,
        sampler=chosen,
    )
    for event in watch(events, tokenizer, live=show and not quiet, lines=show and not quiet):
        if isinstance(event, EditResult):
            name = "stdin" if file == "-" else file
            old, new = (t.splitlines(keepends=True) for t in (text, event.text))
            if whole:
                put(event.text, end="")
            else:
                for line in unified_diff(old, new, f"a/{name}", f"b/{name}"):
                    put(line, end="" if line.endswith("\n") else "\n\\ No newline at end of file\n")
            if text == event.text:
                say("Nothing changes.")
            elif in_place:
                replace_text(Path(file), event.text)
            if not quiet:
                say(f"{event.steps} steps", *event.notes)


@app.command()
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
    model: Model = None,
    revision: Revision = None,
    dtype: DType = None,
    max_memory: MaxMemory = None,
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

    from ..checkpoint.load import load
    from ..tasks.choose import choose

    if not quiet:
        introduce(model)
    loaded, tokenizer = load(model, revision=revision, dtype=dtype, max_memory=size(max_memory))
    chances = choose(
        loaded,
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


@app.command()
def serve(
    *,
    model: Model = None,
    revision: Revision = None,
    dtype: DType = None,
    max_memory: MaxMemory = None,
    speed: SpeedOption = "faithful",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="MLX_DIFFGEMMA_API_KEY", help="Key that clients have to send."),
    ] = None,
    cors: Annotated[
        list[str] | None, typer.Option(help="Origin whose pages may ask. Can be given again.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="Further name that the server answers to; * is any. Can be given again."),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests answered side by side.")] = 4,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait.")] = 64,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds a request may take.")] = 600,
    cache_gb: Annotated[
        float, typer.Option(min=0, help="Memory for what was read for earlier requests.")
    ] = 1,
    max_body_mb: Annotated[float, typer.Option(min=0.001, help="Largest request.")] = 4,
) -> None:
    """Serve OpenAI's API, a page to chat on, and routes for filling and choosing."""
    from copy import deepcopy

    if api_key is not None and not api_key.strip():
        fail("--api-key is empty", code=2)
    try:
        import uvicorn

        from ..server.app import make_app
        from ..server.connections import Connection
    except ImportError as error:
        fail(f"{error.name} is missing: pip install 'mlx-diffgemma[server]'")
    from ..checkpoint.load import load
    from ..server.worker import Worker

    introduce(model)
    worker = Worker(
        partial(
            load, model, revision=revision, dtype=dtype, max_memory=size(max_memory), speed=speed
        ),
        max_batch=max_batch,
        max_queue=max_queue,
        timeout=timeout,
        cache_bytes=int(cache_gb * 1e9),
    )
    worker.start()
    loopback = host in ("127.0.0.1", "localhost", "::1")
    if not loopback and api_key is None:
        say("Anybody who reaches this machine can ask; --api-key changes that.")
    served = make_app(
        worker,
        name=model or "diffgemma-small",
        api_key=api_key,
        cors=cors or (),
        loopback=loopback,
        allowed_hosts=allowed_host or (),
        most_bytes=int(max_body_mb * 1e6),
    )
    log = deepcopy(uvicorn.config.LOGGING_CONFIG)
    log["handlers"]["access"]["stream"] = "ext://sys.stderr"
    try:
        uvicorn.run(
            served,
            host=host,
            port=port,
            log_config=log,
            timeout_graceful_shutdown=10,
            http=Connection,
            ws="none",
        )
    finally:
        worker.stop()


@app.command()
def demo(
    *,
    delay: Annotated[float, typer.Option(min=0, help="Seconds a step stays on screen.")] = 0.4,
    seed: Annotated[int, typer.Option(min=0, help="Other seeds, other paths.")] = 0,
) -> None:
    """Watch the small model solve a Sudoku, fill a record and repair a sentence."""
    from time import sleep

    from ..checkpoint.load import load
    from ..measure.evaluate import SPECIALIST, events_of
    from ..measure.scenes import SCENES
    from ..tasks.request import Draft
    from ..text.turns import Text

    introduce(None)
    loaded_once = cache(load)
    for scene in SCENES:
        loaded, tokenizer = loaded_once(SPECIALIST.get(scene.case.task))
        put(f"\n{scene.title}\n{scene.case.prompt}\n")
        events = events_of(loaded, tokenizer, scene.case, None, seed)
        for event in watch(events, tokenizer, live=True, lines=True):
            if isinstance(event, Draft) and sys.stderr.isatty():
                sleep(delay)
            elif isinstance(event, Text):
                put(event.text)


@app.command(name="eval")
def evaluate(
    *,
    model: Model = None,
    revision: Revision = None,
    dtype: DType = None,
    max_memory: MaxMemory = None,
    speed: SpeedOption = "faithful",
    steps: Annotated[str, typer.Option(help="Step budgets to compare.")] = "1,2,4,8,16,48",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each case.")] = 3,
    limit: Annotated[int | None, typer.Option(min=1, help="Most cases of a task.")] = None,
    recipes: Annotated[
        str | None, typer.Option(help="Convert to these recipes first, and compare: none,8bit,...")
    ] = None,
    tasks: Annotated[
        Path | None, typer.Option(help="Own cases, JSON lines: prompt, and answer or regex.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a row.")] = False,
) -> None:
    """Exact success on held-out tasks, by steps and recipe."""
    try:
        budgets = [int(part) for part in steps.split(",")]
    except ValueError:
        fail(f"--steps takes numbers and commas, not {steps}", code=2)
    from contextlib import ExitStack
    from dataclasses import asdict
    from itertools import groupby, product
    from tempfile import TemporaryDirectory

    from ..checkpoint.files import resolve
    from ..checkpoint.load import load
    from ..convert import RECIPES, convert
    from ..measure.evaluate import HELD_OUT, SPECIALIST, evaluate, read_cases

    cases = read_cases(tasks or HELD_OUT)
    if limit is not None:
        grouped = groupby(sorted(cases, key=lambda case: case.task), key=lambda case: case.task)
        cases = [case for _, group in grouped for case in list(group)[:limit]]
    wanted = recipes.split(",") if recipes else []
    if unknown := [name for name in wanted if name not in RECIPES]:
        fail(f"there is no recipe {unknown[0]}; there are {', '.join(RECIPES)}", code=2)
    introduce(model)
    answers: dict[str, list[Case]] = {}  # by checkpoint
    for case in cases:
        answers.setdefault(model or SPECIALIST.get(case.task, "tiny"), []).append(case)
    if not as_json:
        print(f"{'recipe':<11}{'task':<17}{'steps':>5}{'success':>16}{'steps/canvas':>14}", end="")
        print(f"{'tokens/pass':>13}  repair")
    with ExitStack() as stack:
        for name, source in product(wanted or ["as it is"], answers):
            directory = resolve(source, revision=revision)
            if wanted:
                made = Path(stack.enter_context(TemporaryDirectory())) / name
                convert(directory, made, recipe=RECIPES[name])
                directory = made
            loaded, tokenizer = load(
                directory, dtype=dtype, max_memory=size(max_memory), speed=speed
            )
            for score in evaluate(loaded, tokenizer, answers[source], budgets, seeds):
                if as_json:
                    put(json.dumps({"recipe": name, **asdict(score)}))
                    continue
                success = f"{100 * score.success:.1f} ±{100 * score.error:.1f} %"
                put(
                    f"{name:<11}{score.task:<17}{score.steps:>5}{success:>16}"
                    f"{score.steps_per_canvas:>14.1f}{score.tokens_per_forward:>13.1f}",
                    end="",
                )
                if score.typos_fixed is not None and score.clean_damaged is not None:
                    fixed, damaged = 100 * score.typos_fixed, 100 * score.clean_damaged
                    print(f"  {fixed:.1f} % of typos fixed, {damaged:.2f} % damaged", end="")
                print(flush=True)


@app.command()
def bench(
    *,
    model: Model = None,
    revision: Revision = None,
    dtype: DType = None,
    max_memory: MaxMemory = None,
    speed: SpeedOption = "faithful",
    compare: Annotated[
        str | None, typer.Option(help="Measure this checkpoint too, in turns with --model.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 512,
    max_tokens: MaxTokens = None,
    steps: Steps = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs; medians are printed.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Quiet = False,
) -> None:
    """Measure how fast a checkpoint is on this machine."""
    from rich.console import Console

    from ..measure import bench as measuring
    from .display import bench_table

    if not quiet:
        introduce(model)
    memory = size(max_memory)
    named = [(model or "the small model", model, revision)]
    named += [] if compare is None else [(compare, compare, None)]
    subjects = [
        measuring.Subject(*each, dtype=dtype, max_memory=memory, speed=speed) for each in named
    ]
    reports = measuring.bench(
        subjects,
        prompt_tokens,
        steps,
        max_tokens,
        repeats,
        (lambda line: None) if quiet else say,
    )
    if as_json:
        put(json.dumps(measuring.as_json(reports), ensure_ascii=False))
        return
    about = measuring.machine()
    Console(highlight=False).print(bench_table(reports))
    print(f"mlx-diffgemma {about['mlx_diffgemma']}, MLX {about['mlx']}, {about['system']}")


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
    from contextlib import ExitStack

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


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint directory or hub name.")],
    destination: Annotated[Path, typer.Argument(help="Directory to write; must not exist.")],
    *,
    recipe: Annotated[
        str | None, typer.Option(help="Named recipe, see `mlx-diffgemma recipes`. [mixed-4-8]")
    ] = None,
    quantize: Annotated[
        bool, typer.Option("--quantize", "-q", help="Quantize uniformly, as --q-* say.")
    ] = False,
    q_bits: Annotated[int | None, typer.Option(help="Bits of a weight.")] = None,
    q_group_size: Annotated[int | None, typer.Option(help="Weights that share a scale.")] = None,
    q_mode: Annotated[QuantMode | None, typer.Option(help="Number format. [affine]")] = None,
    dtype: Annotated[DTypeName | None, typer.Option(help="Type of what is not quantized.")] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", "-d", help="Unpack a quantized checkpoint.")
    ] = False,
    upload_repo: Annotated[
        str | None, typer.Option(help="Then upload to this hub repository.")
    ] = None,
    revision: Revision = None,
) -> None:
    """Convert Hugging Face weights to quantized MLX weights."""
    uniform_flags = quantize or q_bits or q_group_size or q_mode
    if recipe is not None and uniform_flags:
        fail("--recipe and -q/--q-* exclude each other", code=2)
    if dequantize and (recipe or uniform_flags):
        fail("--dequantize goes with neither --recipe nor -q/--q-*", code=2)

    from rich.console import Console
    from rich.filesize import decimal
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from ..convert import RECIPES, Written, stream_convert, uniform, upload

    if recipe is not None and recipe not in RECIPES:
        fail(f"there is no recipe {recipe}; there are {', '.join(RECIPES)}", code=2)
    chosen = RECIPES[recipe] if recipe else None
    if uniform_flags:
        chosen = uniform(q_bits, q_group_size, q_mode or "affine")
    columns = TextColumn("converting"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("converting", total=None)
        for event in stream_convert(
            source,
            destination,
            recipe=chosen,
            dtype=dtype,
            dequantize=dequantize,
            revision=revision,
        ):
            if isinstance(event, Written):
                progress.update(task, completed=event.bytes_done, total=event.bytes_total)
            else:
                report = event
    say(
        f"{decimal(report.source_bytes)} -> {decimal(report.bytes)}, "
        f"{report.bits_per_weight:.2f} bits per weight, {report.shards} file"
        f"{'s' if report.shards > 1 else ''}, {report.seconds:.1f} s"
    )
    if report.unpacked:
        say(f"left as they are, no group size divides them: {', '.join(report.unpacked)}")
    if upload_repo:
        say(f"uploaded to {upload(report.directory, upload_repo)}")
    put(str(report.directory))


@app.command()
def recipes() -> None:
    """List the recipes that convert knows."""
    from ..convert import DEFAULT_RECIPE, RECIPES

    for name, recipe in RECIPES.items():
        print(f"{name:<12}{recipe.description}{' (default)' if name == DEFAULT_RECIPE else ''}")


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or hub name.")],
    *,
    revision: Revision = None,
    dtype: DType = None,
    max_memory: MaxMemory = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a checkpoint is: size by part, quantization, memory it needs."""
    from dataclasses import asdict

    from rich.filesize import decimal

    from ..checkpoint.files import resolve
    from ..checkpoint.fit import TooLarge, fit
    from ..checkpoint.info import inspect
    from ..checkpoint.load import computed_in

    given = size(max_memory)
    found = inspect(resolve(model, revision=revision), computed_in(dtype))
    if as_json:
        print(json.dumps(asdict(found)))
        return
    print(f"{found.parameters / 1e6:,.1f} M parameters, {decimal(found.bytes)}")
    print(
        f"{found.layers} layers, vocabulary {found.vocabulary:,}, canvas {found.canvas_length}, "
        f"context {found.context:,}"
    )
    for part in found.parts:
        put(
            f"  {part.name:<18}{part.parameters / 1e6:>12,.2f} M{decimal(part.bytes):>12}  "
            f"{'; '.join(part.formats)}"
        )
    for context in sorted({min(4096, found.context), found.context}):
        needed = decimal(found.memory_needed(context))
        print(f"needs about {needed} with {context:,} tokens of context")
    # What loading would decide, by the memory that is free now.
    try:
        here = fit(found, given)
    except TooLarge as error:
        put(f"here: {error}")
        return
    print(f"here: a context of {here.context:,} tokens")
    if found.table_bytes:
        table = "kept dequantized" if here.keep_table else "dequantized at each step"
        print(f"here: embedding table {table} ({decimal(found.table_bytes)})")


def size(given: str | None) -> int | None:
    """Bytes of --max-memory."""
    from ..checkpoint.fit import read_size

    return None if given is None else read_size(given)


def introduce(model: str | None) -> None:
    """Nobody should take the small default for the real model, or not know how to get that."""
    if model is None:
        say(
            "Model: the small demonstration model of mlx-diffgemma (1.6 M parameters). For the "
            "26 B one: mlx-diffgemma convert google/diffusiongemma-26B-A4B-it DIR, then --model DIR"
        )


def from_argument(given: str, what: str, *, holes: bool = False) -> str:
    """An argument, or stdin for "-"; with `holes`, a name of a file stands for its text."""
    if given == "-":
        if sys.stdin.isatty():
            say(f"Reading {what} from the terminal; end it with Ctrl-D.")
        # A template is a file as it stands; a prompt loses the newline that echo adds.
        return sys.stdin.read() if holes else sys.stdin.read().rstrip("\n")
    if holes and "{{" not in given:
        return read_text(Path(given))
    return given


def replace_text(path: Path, text: str) -> None:
    """Replace a file's text at once, and keep its mode."""
    from shutil import copymode

    try:
        with replacing(path) as fresh:
            fresh.write_text(text, encoding="utf-8", newline="")
            copymode(path, fresh)
    except OSError as error:
        fail(f"{path} cannot be written: {error.strerror}")


def watch(
    events: "Iterator[Item]", tokenizer: "Tokenizer", *, live: bool, lines: bool
) -> "Iterator[Item]":
    """Pass events on while showing drafts on stderr.

    `live` redraws the canvas in place on a terminal; `lines` prints a line a step elsewhere. Drafts
    are passed on after they are shown, all else when no canvas is on the screen.
    """
    from rich.console import Console

    from ..tasks.request import Draft
    from .display import Frame, can_draw, draw, progress

    console = Console(stderr=True, highlight=False)
    drawing = live and can_draw(console)
    frame = Frame(console)
    try:
        for event in events:
            if not isinstance(event, Draft):
                frame.erase()
            elif drawing:
                frame.draw(draw(event, tokenizer.pieces(event.tokens)))
            elif lines:
                say(f"{progress(event)} | {event.text!r}")
            yield event
    finally:
        frame.erase()


def choose_sampler(name: SamplerName | None, threshold: float | None) -> Any:
    """The sampler that the flags ask for; None leaves it to the checkpoint."""
    if threshold is not None and name != "confidence":
        fail("--threshold goes with --sampler confidence", code=2)
    if name != "confidence":
        return None  # a checkpoint's sampler is always the entropy bound
    from ..model.settings import ConfidenceThreshold

    return ConfidenceThreshold() if threshold is None else ConfidenceThreshold(threshold)


def read_guards(names: str, thinking_budget: int | None) -> "Guards":
    """The guards that --guards names."""
    from ..diffusion.guards import Guards

    known = {"empty", "not_converged", "repetition"}
    given = known if names == "all" else set() if names == "none" else set(names.split(","))
    if given - known:
        fail(f"--guards takes all, none, or of {GUARDS}; not {names}", code=2)
    return Guards(**{name: name in given for name in known}, thinking_budget=thinking_budget)


def put(text: str, end: str = "\n") -> None:
    """Part of the answer, to stdout."""
    write(text + end, sys.stdout)


def say(*lines: str) -> None:
    """To stderr."""
    write("\n".join(lines) + "\n", sys.stderr)


def fail(sentence: str, code: int = 1) -> NoReturn:
    """An expected failure: one sentence, no traceback."""
    say(f"error: {sentence}")
    raise SystemExit(code)


def main() -> None:
    """Entry point of the console command."""
    try:
        app()
    except Error as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        # The reader of our stdout has left; Python would complain again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
