"""Options that commands share, each declared once, and how a command gets them.

A group is a frozen dataclass whose fields are options. A command that is decorated with
`with_options` names groups among its parameters and is called with what they were made of.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..distributed.launch import place
from .habits import SCHEDULE
from .seen import first_today
from .terminal import fail, say

if TYPE_CHECKING:
    from ..diffusion.guards import Guards
    from ..distributed.share import Share
    from ..model.diffusion_gemma import DiffusionGemma
    from ..model.settings import Sampler
    from ..tasks.request import Settings
    from ..text.tokenizer import Tokenizer

Command = Callable[..., None]

DTypeName = Literal["float32", "bfloat16", "float16"]

SpeedName = Literal["faithful", "balanced", "fast"]

ModeName = Literal["denoise", "causal", "speculative"]

AcceptanceName = Literal["exact", "typical"]

SamplerName = Literal["entropy", "confidence"]

GUARDS = ("empty", "not_converged", "repetition")

_LISTED = ",".join(GUARDS)

Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the hub.")]

DType = Annotated[
    DTypeName | None, typer.Option(help="Compute in this type instead of the checkpoint's.")
]

MaxMemory = Annotated[
    str | None,
    typer.Option(help="Memory that the model may take with its context, e.g. 12GB. [what is free]"),
]

Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        "--adapter-path",
        help="Adapter that fine-tuning has written: a directory, or a name on the hub.",
    ),
]

MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="Most tokens to write. [checkpoint's setting]")
]

Steps = Annotated[
    int | None, typer.Option(min=1, help="Most denoising steps a canvas. [checkpoint's setting]")
]

GuardNames = Annotated[
    str, typer.Option(help=f"What to do about bad canvases: all, none, or of {_LISTED}.")
]

System = Annotated[str | None, typer.Option(help="System message; @FILE reads one.")]

PromptOption = Annotated[
    str | None, typer.Option("--prompt", "-p", help="The question, as mlx-lm takes it.")
]

Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No statistics and no progress on stderr.")
]

Show = Annotated[bool, typer.Option("--show", help="Draw the canvas as it denoises.")]


def _shipped(begun: str) -> list[str]:
    """Names that a shell completes; it completes directories itself."""
    from ..checkpoint.files import SHIPPED

    return [name for name in SHIPPED if name.startswith(begun)]


def with_options(command: Command) -> Command:
    """Give a command the options of each group among its parameters, in the group's place.

    Typer reads `__signature__`, which has a parameter for each option.
    """
    shown: list[Parameter] = []
    groups: dict[str, type[Any]] = {}
    for parameter in signature(command).parameters.values():
        group = parameter.annotation
        if not is_dataclass(group):
            shown.append(parameter)
            continue
        assert isinstance(group, type)
        groups[parameter.name] = group
        shown += [
            Parameter(f.name, Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
            for f in fields(group)
        ]

    @wraps(command)
    def run(**given: Any) -> None:
        made = {
            name: group(**{f.name: given.pop(f.name) for f in fields(group)})
            for name, group in groups.items()
        }
        for group in made.values():
            if isinstance(group, LoadFaithful):
                group.begin()
        command(**given, **made)

    run.__signature__ = Signature(shown)  # type: ignore[attr-defined]
    return run


@dataclass(frozen=True)
class LoadFaithful:
    """Loads the checkpoint that the options name, once it is called.

    Raises:
        Error: --max-memory is no size.
    """

    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            envvar="MLX_DIFFGEMMA_MODEL",
            autocompletion=_shipped,
            help="Checkpoint directory, or a name on the hub. [tiny, which ships with us]",
        ),
    ] = None
    revision: Revision = None
    dtype: DType = None
    max_memory: MaxMemory = None
    adapter: Adapter = None
    shard: Annotated[
        bool, typer.Option("--shard", help="Under mlx.launch: each rank has a part of the model.")
    ] = False

    def __post_init__(self) -> None:
        size(self.max_memory)  # a mistake in it should not have to wait
        if self.shard and place().size == 1:
            fail("--shard goes with mlx.launch", code=2)

    def begin(self) -> None:
        """With --shard, meet the other ranks; in another than rank 0, do what that says, and end.

        Raises:
            SystemExit: it is another.
        """
        if not self.shard:
            return
        from .sharing import help_out, lead

        if place().leads:
            lead()
        else:
            help_out(self._load_part, self._facts)

    def __call__(self) -> "tuple[DiffusionGemma, Tokenizer]":
        """The model and its tokenizer.

        Raises:
            Error: as `checkpoint.load.load`.
        """
        if not self.shard:
            from ..distributed.share import ALONE

            return self._load_part(ALONE)
        from .sharing import share_model

        return share_model(self._load_part, self._facts())

    @property
    def _speed(self) -> SpeedName:
        return "faithful"

    def _load_part(self, share: "Share") -> "tuple[DiffusionGemma, Tokenizer]":
        from ..checkpoint.load import load

        return load(
            self.model,
            revision=self.revision,
            dtype=self.dtype,
            max_memory=size(self.max_memory),
            speed=self._speed,
            adapter=self.adapter,
            share=share,
        )

    def _facts(self) -> "dict[str, Any]":
        """What all ranks that share a model must agree on."""
        from ..checkpoint.adapter import find_adapter, fingerprint
        from ..checkpoint.load import directory_of
        from .sharing import facts_of

        directory = directory_of(self.model, self.revision)
        adapter = None if self.adapter is None else fingerprint(find_adapter(self.adapter))
        return facts_of(directory, dtype=self.dtype, speed=self._speed, adapter=adapter)

    def introduce(self) -> None:
        """Tell those who named no model which one answers, and how to get the real one; once a
        day, as who uses the small one knows it by then."""
        if self.model is None and first_today("small-model"):
            say(
                "Model: the small demonstration model of mlx-diffgemma (3.5 M parameters). For the "
                "26 B one: mlx-diffgemma convert google/diffusiongemma-26B-A4B-it DIR, then "
                "--model DIR"
            )


@dataclass(frozen=True)
class Load(LoadFaithful):
    """Loads as `LoadFaithful`, perhaps to run with fewer denoising steps."""

    speed: Annotated[
        SpeedName,
        typer.Option(help="Fewer denoising steps for a loss that docs/performance.md states."),
    ] = "faithful"

    @property
    def _speed(self) -> SpeedName:
        return self.speed


@dataclass(frozen=True)
class Sampling:
    """How canvases are denoised; None leaves it to the checkpoint."""

    steps: Steps = None
    seed: Annotated[int | None, typer.Option(min=0, help="Makes the answer repeatable.")] = None
    sampler: Annotated[
        SamplerName | None,
        typer.Option(
            help="entropy is the reference's; confidence keeps what it accepts. "
            "[checkpoint's setting]",
        ),
    ] = None
    threshold: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Probability that --sampler confidence accepts."),
    ] = None

    def __post_init__(self) -> None:
        if self.threshold is not None and self.sampler != "confidence":
            fail("--threshold goes with --sampler confidence", code=2)

    def rule(self) -> "Sampler | None":
        """What decides which tokens are accepted."""
        if self.sampler != "confidence":
            return None  # a checkpoint's sampler is always the entropy bound
        from ..model.settings import ConfidenceThreshold

        return (
            ConfidenceThreshold() if self.threshold is None else ConfidenceThreshold(self.threshold)
        )


@dataclass(frozen=True)
class Encoder:
    """How the encoder chooses its tokens, in the modes in which it does."""

    temperature: Annotated[
        float | None,
        typer.Option(help="With --mode causal or speculative: draw tokens; 0 takes the best. [0]"),
    ] = None
    acceptance: Annotated[
        AcceptanceName | None,
        typer.Option(
            help="With --mode speculative: exact takes what causal would write, typical also what "
            "is likely enough. [exact]"
        ),
    ] = None


@dataclass(frozen=True)
class Answering(Encoder, Sampling):
    """How answers of several canvases are decoded."""

    max_tokens: MaxTokens = None
    thinking_budget: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of thought before the answer.")
    ] = None
    guards: GuardNames = "none"
    shrink: Annotated[
        bool,
        typer.Option("--shrink", help="Canvases no longer than what is left of --max-tokens."),
    ] = False
    mode: Annotated[
        ModeName,
        typer.Option(
            help="denoise is the model's own way; causal writes what its encoder finds likeliest, "
            "token by token; speculative the same, from drafts."
        ),
    ] = "denoise"
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Denoise again what the encoder doubts in a canvas."),
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._named() - set(GUARDS):
            fail(f"--guards takes all, none, or of {_LISTED}; not {self.guards}", code=2)
        if self.mode != "denoise" and (self.verify or self.shrink):
            given = "--verify" if self.verify else "--shrink"
            fail(f"--mode {self.mode} does not go with {given}", code=2)
        if self.mode == "denoise" and self.temperature is not None:
            fail(f"--temperature goes with --mode causal or speculative: {SCHEDULE}", code=2)
        if self.mode != "speculative" and self.acceptance is not None:
            fail("--acceptance goes with --mode speculative", code=2)

    def settings(self) -> "Settings":
        """The settings of all answers, see `tasks.request.Settings`."""
        return {
            "max_tokens": self.max_tokens,
            "steps": self.steps,
            "sampler": self.rule(),
            "guards": self._guards(),
            "shrink": self.shrink,
            "mode": self.mode,
            "verify": self.verify,
            "temperature": self.temperature,
            "acceptance": self.acceptance,
        }

    def _named(self) -> set[str]:
        if self.guards in ("all", "none"):
            return set(GUARDS) if self.guards == "all" else set()
        return set(self.guards.split(","))

    def _guards(self) -> "Guards":
        from ..diffusion.guards import Guards

        on = {name: name in self._named() for name in GUARDS}
        return Guards(**on, thinking_budget=self.thinking_budget)


def prompt_of(argument: str, option: str | None) -> str:
    """What was asked, as an argument or with --prompt; "-" where nothing was."""
    if option is None:
        return argument
    if argument != "-":
        fail("the prompt is given twice, as an argument and with --prompt", code=2)
    return option


def size(given: str | None) -> int | None:
    """Bytes of --max-memory."""
    if given is None:
        return None
    from ..checkpoint.fit import read_size

    return read_size(given)


def messages_of(
    prompt: str, system: str | None, pictures: Sequence[dict[str, Any]] = ()
) -> list[dict[str, Any]]:
    """A chat of one question behind pictures, with a system message before it if there is one."""
    if not prompt.strip():
        fail("the prompt is empty", code=2)
    before = [{"role": "system", "content": system}] if system else []
    content = [*pictures, {"type": "text", "text": prompt}] if pictures else prompt
    return [*before, {"role": "user", "content": content}]
