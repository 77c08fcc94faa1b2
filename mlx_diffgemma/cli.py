"""The command line. Answers go to stdout, everything else to stderr.

Imports of MLX and of the rest of the package stand inside the commands: `--help` must not wait.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from .errors import Error

if TYPE_CHECKING:
    from .generation import Event
    from .tokenizer import Tokenizer

app = typer.Typer(
    name="mlx-diffgemma",
    help="Run DiffusionGemma on Apple silicon.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class DTypeName(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class QuantMode(StrEnum):
    affine = "affine"
    mxfp4 = "mxfp4"
    nvfp4 = "nvfp4"
    mxfp8 = "mxfp8"


class SamplerName(StrEnum):
    entropy = "entropy"
    confidence = "confidence"


Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        envvar="MLX_DIFFGEMMA_MODEL",
        help="Checkpoint directory, or a name on the Hugging Face hub.",
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the hub.")]
DType = Annotated[
    DTypeName | None, typer.Option(help="Compute in this type instead of the checkpoint's.")
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


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The question; - reads it from stdin.")] = "-",
    *,
    model: Model,
    revision: Revision = None,
    dtype: DType = None,
    max_tokens: MaxTokens = None,
    steps: Steps = None,
    seed: Seed = None,
    system: System = None,
    sampler: SamplerOption = None,
    threshold: Threshold = None,
    show: Annotated[bool, typer.Option("--show", help="Draw the canvas as it denoises.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the answer and its statistics as JSON.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No statistics and no progress on stderr.")
    ] = False,
) -> None:
    """Answer one prompt."""
    if prompt == "-":
        if sys.stdin.isatty():
            say("Reading the prompt from the terminal; end it with Ctrl-D.")
        prompt = sys.stdin.read()
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    if not prompt.strip():
        fail("the prompt is empty", code=2)
    chosen = choose_sampler(sampler, threshold)

    from . import display
    from .generation import Done, Text, stream_generate
    from .loading import load

    loaded, tokenizer = load(model, revision=revision, dtype=dtype and dtype.value)
    events = stream_generate(
        loaded,
        tokenizer,
        messages,
        max_tokens=max_tokens,
        steps=steps,
        seed=seed,
        sampler=chosen,
    )
    answer = ""
    for event in watch(events, tokenizer, live=show and not quiet, lines=show and not quiet):
        if isinstance(event, Text):
            answer += event.text
            if not as_json:
                print(event.text, end="", flush=True)
        elif isinstance(event, Done):
            if as_json:
                print(json.dumps({"text": answer, **vars(event)}, ensure_ascii=False))
            else:
                print()
            if not quiet:
                say(display.summary(event))


@app.command()
def chat(
    *,
    model: Model,
    revision: Revision = None,
    dtype: DType = None,
    max_tokens: MaxTokens = None,
    steps: Steps = None,
    seed: Seed = None,
    system: System = None,
    sampler: SamplerOption = None,
    threshold: Threshold = None,
) -> None:
    """Talk with the model: /reset starts over, /quit (or Ctrl-D) leaves."""
    chosen = choose_sampler(sampler, threshold)

    from . import display
    from .generation import Done, Text, stream_generate
    from .loading import load

    loaded, tokenizer = load(model, revision=revision, dtype=dtype and dtype.value)
    opening = [{"role": "system", "content": system}] if system else []
    messages: list[dict[str, Any]] = list(opening)
    if sys.stdin.isatty():
        say("Type a message. /reset starts over, /quit leaves.")
    for line in typed_lines():
        if line == "/quit":
            break
        if line == "/reset":
            messages = list(opening)
            say("Started over.")
            continue
        if line.startswith("/"):
            say(f"{line.split()[0]} is not a command; there are /reset and /quit.")
            continue
        asked = [*messages, {"role": "user", "content": line}]
        answer = ""
        try:
            events = stream_generate(
                loaded,
                tokenizer,
                asked,
                max_tokens=max_tokens,
                steps=steps,
                seed=seed,
                sampler=chosen,
            )
            for event in watch(events, tokenizer, live=True, lines=False):
                if isinstance(event, Text):
                    answer += event.text
                    print(event.text, end="", flush=True)
                elif isinstance(event, Done):
                    print(flush=True)
                    if sys.stdin.isatty():
                        say(display.summary(event))
        except KeyboardInterrupt:
            print(flush=True)
            say("Stopped; /quit leaves.")
        except Error as error:  # the conversation outlives a message that does not fit
            say(f"error: {error}")
            continue
        messages = [*asked, {"role": "assistant", "content": answer}]


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or hub name.")],
    *,
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a checkpoint is: size by part, quantization, memory it needs."""
    from dataclasses import asdict

    from .checkpoint import resolve
    from .info import inspect

    found = inspect(resolve(model, revision=revision))
    if as_json:
        print(json.dumps(asdict(found)))
        return
    print(f"{found.parameters / 1e6:,.1f} M parameters, {found.bytes / 1e9:.3f} GB")
    print(
        f"{found.layers} layers, vocabulary {found.vocabulary:,}, canvas {found.canvas_length}, "
        f"context {found.context:,}"
    )
    for part in found.parts:
        print(
            f"  {part.name:<18}{part.parameters / 1e6:>12,.2f} M{part.bytes / 1e9:>10.3f} GB  "
            f"{'; '.join(part.formats)}"
        )
    for context in sorted({min(4096, found.context), found.context}):
        needed = found.memory_needed(context) / 1e9
        print(f"needs about {needed:.2f} GB with {context:,} tokens of context")


def watch(
    events: "Iterator[Event]", tokenizer: "Tokenizer", *, live: bool, lines: bool
) -> "Iterator[Event]":
    """Pass events on while showing drafts on stderr.

    `live` redraws the canvas in place on a terminal; `lines` prints a line a step elsewhere.
    """
    from rich.console import Console

    from .display import LiveCanvas, progress
    from .generation import Draft

    console = Console(stderr=True, highlight=False)
    with LiveCanvas(console) as canvas:
        for event in events:
            if not isinstance(event, Draft):
                canvas.erase()
                yield event
            elif live and console.is_terminal:
                canvas.show(event, tokenizer.pieces(event.tokens))
            elif lines:
                say(f"{progress(event)} | {event.text!r}")


def choose_sampler(name: SamplerName | None, threshold: float | None) -> Any:
    """The sampler that the flags ask for; None leaves it to the checkpoint."""
    if threshold is not None and name is not SamplerName.confidence:
        fail("--threshold goes with --sampler confidence", code=2)
    if name is not SamplerName.confidence:
        return None  # a checkpoint's sampler is always the entropy bound
    from .sampler import ConfidenceThreshold

    return ConfidenceThreshold() if threshold is None else ConfidenceThreshold(threshold)


def typed_lines() -> Iterator[str]:
    """Lines that are not empty, from a prompt with line editing or from a pipe."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  (importing it is what gives input() its editing)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            say("\n/quit or Ctrl-D leaves.")
            continue
        if line:
            yield line


def say(text: str) -> None:
    """To stderr."""
    print(text, file=sys.stderr, flush=True)


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
