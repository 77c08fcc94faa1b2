"""The command that fine-tunes: `lora`."""

import os
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .options import DType, LoadFaithful, MaxMemory, Quiet, Revision, with_options
from .terminal import fail, put, say

if TYPE_CHECKING:
    from ..model.diffusion_gemma import DiffusionGemma
    from ..text.tokenizer import Tokenizer
    from ..training.data import Data
    from ..training.events import Finished
    from ..training.exchange import Together
    from ..training.folder import Mode
    from .lora_config import Asked

app = typer.Typer()

DEFAULT = "tiny"  # the model where none is named

MODEL = "MLX_DIFFGEMMA_MODEL"  # which a YAML file and the run that goes on come before

FineTuneType = Literal["lora", "dora", "full"]

OptimizerName = Literal["adam", "adamw", "muon", "sgd", "adafactor"]


@dataclass(frozen=True)
class Base:
    """The model that is fine-tuned."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Checkpoint directory, or a name on the hub. [MLX_DIFFGEMMA_MODEL, else tiny, "
            "which ships with us]",
        ),
    ] = None
    revision: Revision = None
    dtype: DType = None
    max_memory: MaxMemory = None


@dataclass(frozen=True)
class Adapting:
    """What is trained. None leaves it to the YAML file, or to the defaults, as all that follows."""

    fine_tune_type: Annotated[
        FineTuneType | None,
        typer.Option(help="Low-rank terms, those with magnitudes, or all parameters. [lora]"),
    ] = None
    num_layers: Annotated[
        int | None, typer.Option(help="Last layers that are adapted; -1 is all. [-1]")
    ] = None
    rank: Annotated[int | None, typer.Option(min=1, help="Of low-rank terms. [16]")] = None
    scale: Annotated[
        float | None, typer.Option(help="Factor of low-rank terms, alpha / rank. [2.0]")
    ] = None
    dropout: Annotated[float | None, typer.Option(help="Of what goes into them. [0.0]")] = None
    keys: Annotated[
        str | None,
        typer.Option(help="Maps of a layer, with commas. [attention's and the dense MLP's]"),
    ] = None


@dataclass(frozen=True)
class Learning:
    """How it is trained."""

    iters: Annotated[int | None, typer.Option(min=1, help="Iterations. [1000]")] = None
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples of an iteration. [4]")] = (
        None
    )
    grad_accumulation_steps: Annotated[
        int | None, typer.Option(min=1, help="Iterations of an update of the weights. [1]")
    ] = None
    learning_rate: Annotated[
        float | None, typer.Option(help="At its highest: it rises, and falls to a tenth. [0.00015]")
    ] = None
    optimizer: Annotated[OptimizerName | None, typer.Option(help="[adamw]")] = None
    max_seq_length: Annotated[
        int | None, typer.Option(min=2, help="Most tokens of an example. [2048]")
    ] = None
    grad_checkpoint: Annotated[
        bool | None,
        typer.Option("--grad-checkpoint", help="Less memory, for a third more time."),
    ] = None
    mask_prompt: Annotated[
        bool | None,
        typer.Option("--mask-prompt", help="Denoise answers alone, which is always done."),
    ] = None
    encoder_weight: Annotated[
        float | None,
        typer.Option(help="Of the encoder's loss beside the denoiser's; 0 is none of it. [1.0]"),
    ] = None
    distill: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="STEPS", help="Experiment: learn to answer in so few steps as in all."
        ),
    ] = None
    seed: Annotated[int | None, typer.Option(min=0, help="Of all that is drawn. [0]")] = None


@dataclass(frozen=True)
class Watching:
    """What is measured on the way, and on test.jsonl."""

    steps_per_report: Annotated[
        int | None, typer.Option(min=1, help="Iterations between two reports. [10]")
    ] = None
    steps_per_eval: Annotated[
        int | None, typer.Option(min=1, help="Iterations between two measurements. [200]")
    ] = None
    val_batches: Annotated[
        int | None, typer.Option(help="Batches of the validation loss; -1 is all. [8]")
    ] = None
    success_cases: Annotated[
        int | None, typer.Option(min=0, help="Validation examples that are answered. [16]")
    ] = None
    success_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of answers. [--distill, else checkpoint's setting]"),
    ] = None
    test_batches: Annotated[
        int | None, typer.Option(help="Batches of the test's loss; -1 is all. [500]")
    ] = None
    test_cases: Annotated[
        int | None, typer.Option(min=0, help="Test examples that are answered. [100]")
    ] = None


@dataclass(frozen=True)
class Keeping:
    """Where a run is kept, and what it begins with."""

    adapter_path: Annotated[
        str | None, typer.Option(help="Folder of the run and its adapter. [adapters]")
    ] = None
    save_every: Annotated[
        int | None, typer.Option(min=1, help="Iterations between two checkpoints. [100]")
    ] = None
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the run in the folder has stopped.")
    ] = False
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run that is in the folder.")
    ] = False
    resume_adapter_file: Annotated[
        str | None, typer.Option(help="Begin with the weights of this file.")
    ] = None
    clear_cache_threshold: Annotated[
        str | None, typer.Option(help="Memory that MLX may keep for later, e.g. 2GB. [0]")
    ] = None

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            fail("--resume and --overwrite exclude each other", code=2)
        if self.resume and self.resume_adapter_file:
            fail("--resume and --resume-adapter-file exclude each other", code=2)

    @property
    def mode(self) -> "Mode":
        return "resume" if self.resume else "overwrite" if self.overwrite else "new"


@app.command()
@with_options
def lora(
    *,
    base: Base,
    train: Annotated[bool | None, typer.Option("--train", help="Train.")] = None,
    test: Annotated[bool | None, typer.Option("--test", help="Measure on test.jsonl.")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print the memory that training needs, and end.")
    ] = False,
    data: Annotated[
        str | None, typer.Option(help="Folder with train.jsonl, valid.jsonl, test.jsonl.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML file of mlx-lm's form.")
    ] = None,
    adapting: Adapting,
    learning: Learning,
    watching: Watching,
    keeping: Keeping,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a model to a task by examples: LoRA, DoRA or all its parameters."""
    from .learning import check_asked, enter_training

    enter_training()
    flags: dict[str, Any] = {"train": train, "test": test, "data": data}
    for group in (base, adapting, learning, watching, keeping):
        flags |= asdict(group)
    asked, notes = _asked(flags, config, keeping)
    if notes and not quiet:
        say(*(f"note: {each}" for each in notes))
    check_asked(asked, plan=plan)
    if plan:
        _plan(asked, _loading(base, asked))
        return
    if not (asked.train or asked.test):
        fail("nothing is asked for: --train, --test or both", code=2)
    if asked.data is None:
        fail("--data names the folder with the examples", code=2)
    if asked.train and asked.adapter_path is None:
        fail("--adapter-path names the folder of the run", code=2)
    load = _loading(base, asked)
    if not quiet:
        load.introduce()
    _work(asked, load, keeping.mode, quiet=quiet)


def _loading(base: Base, asked: "Asked") -> LoadFaithful:
    """Loads the model that is asked for, once it is called."""
    return LoadFaithful(asked.model, asked.revision, asked.dtype, base.max_memory)


def _asked(
    flags: dict[str, Any], config: Path | None, keeping: Keeping
) -> tuple["Asked", list[str]]:
    """What is asked for, and what is to be said of it."""
    from ..checkpoint.fit import read_size
    from ..training.folder import read_state
    from .lora_config import ADAPTER_PATH, asked_for, read_config

    if flags["keys"] is not None:
        flags["keys"] = flags["keys"].split(",")
    if (threshold := flags["clear_cache_threshold"]) is not None:
        flags["clear_cache_threshold"] = 0 if threshold == "0" else read_size(threshold)
    values, told = read_config(config) if config else ({}, [])
    notes = [f"{config}: {line}" for line in told]
    before: dict[str, Any] = {}
    if keeping.resume:
        flags["train"] = True
        given = (flags["adapter_path"], values.get("adapter_path"), ADAPTER_PATH)
        path = next(each for each in given if each)
        before = {**read_state(Path(str(path))).arguments, "adapter_path": str(path)}
    named = {"model": os.environ.get(MODEL), **before}
    asked = asked_for(flags, values, named)
    iters = asked.settings.iters
    if before.get("iters", iters) != iters:
        was = before["iters"]
        notes.append(f"iters was {was}: the learning rate goes on as in a run of {iters}")
    return asked, notes


def _work(asked: "Asked", load: LoadFaithful, mode: "Mode", *, quiet: bool) -> None:
    """Read the examples, load the model, train and test."""
    from ..checkpoint.adapter import WEIGHTS_FILE
    from ..checkpoint.files import read_header
    from ..training.folder import check_folder, locked
    from ..training.optimizers import make_optimizer
    from ..training.plots import NO_PLOTS, can_plot
    from ..training.ranks import Work
    from ..training.run import load_weights
    from .learning import check_fit, share_work
    from .training import waiting

    path = asked.adapter_path
    if asked.train:
        assert path is not None
        check_folder(path, mode)
        if asked.resume_adapter_file is not None:
            read_header(asked.resume_adapter_file)
    with waiting("reading the examples", quiet=quiet):
        found = _examples(asked, load)
    if found.notices and not quiet:
        say(*(f"note: {notice}" for notice in found.notices))
    if not asked.train or path is None:
        adapter = None if path is None else str(path)
        model, tokenizer = replace(load, adapter=adapter)()
        _test(asked, model, tokenizer, found, quiet=quiet)
        return
    if not (quiet or can_plot()):
        say(f"note: {NO_PLOTS}")
    make_optimizer(asked.settings)
    check_fit(load, asked.settings, asked.adapter, found.longest)
    with locked(path, mode):
        samples = tuple(each.sample for each in found.train)
        together = share_work(load, Work(samples, asked.settings, asked.adapter))
        model, tokenizer = load()
        _train(asked, path, model, tokenizer, found, mode, together, quiet=quiet)
        if asked.test:
            load_weights(model, path / WEIGHTS_FILE)
            _test(asked, model, tokenizer, found, quiet=quiet)


def _examples(asked: "Asked", load: LoadFaithful) -> "Data":
    """The examples, encoded for the model that is asked for."""
    from ..checkpoint.files import resolve
    from ..training.data import read_data
    from ..training.run import encoder_of

    assert asked.data is not None
    source = resolve(load.model or DEFAULT, revision=load.revision, weights=False)
    encoder = encoder_of(source, asked.settings)
    return read_data(asked.data, encoder, asked.keys, train=asked.train, test=asked.test)


def _plan(asked: "Asked", load: LoadFaithful) -> None:
    """Print what training would need, part by part, and on which Macs there is so much."""
    from rich.filesize import decimal

    from ..checkpoint.hub import headers_of
    from ..checkpoint.load import computed_in
    from ..training.plan import plan

    tokens = asked.settings.max_seq_length
    if asked.data is not None:
        tokens = _examples(replace(asked, train=True, test=False), load).longest
    headers = headers_of(load.model or DEFAULT, revision=load.revision)
    dtype = computed_in(load.dtype)
    made = plan(headers, asked.settings, asked.adapter, tokens=tokens, dtype=dtype)
    for part in made.parts:
        put(f"{part.name:<42}{decimal(part.bytes):>10}")
    put(f"{'in all':<42}{decimal(made.total):>10}")
    macs = f"Macs of {made.macs[0]} GB and more" if made.macs else "no Mac"
    put(
        f"{made.trained:,} parameters are trained, with batches of {made.batch} x {made.tokens:,} "
        f"tokens: this fits {macs}"
    )


def _train(
    asked: "Asked",
    path: Path,
    model: "DiffusionGemma",
    tokenizer: "Tokenizer",
    data: "Data",
    mode: "Mode",
    together: "Together",
    *,
    quiet: bool,
) -> None:
    """Train, and say what came of it."""
    from ..training.events import Finished, Stopped
    from ..training.run import train_in
    from .training import displaying, interruptible

    command = shlex.join(["mlx-diffgemma", "lora", "--resume", "--adapter-path", str(path)])
    told = "ending with this step; Ctrl-C again ends at once, and keeps what was saved before"
    with (
        interruptible(told) as stopped,
        displaying(path, asked.settings.iters, quiet=quiet) as show,
    ):
        events = train_in(
            path,
            model,
            tokenizer,
            data,
            asked.settings,
            asked.adapter,
            mode=mode,
            arguments=asked.values,
            weights=asked.resume_adapter_file,
            stopped=stopped,
            together=together,
        )
        for event in events:
            show(event)
    if isinstance(event, Stopped):
        say(f"stopped after iteration {event.iteration}; it goes on with: {command}")
        raise SystemExit(130)
    assert isinstance(event, Finished)
    _tell_end(path, event)


def _tell_end(path: Path, event: "Finished") -> None:
    """Which weights are kept, and what they are worth beside none."""
    from ..checkpoint.adapter import WEIGHTS_FILE

    line = f"{path / WEIGHTS_FILE}: iteration {event.kept} of {event.iteration}"
    if event.success is not None:
        line += f", which answers {event.success:.1%} of the validation cases exactly"
    if event.untrained is not None:
        line += f"; {event.untrained:.1%} before training"
    put(line)


def _test(
    asked: "Asked",
    model: "DiffusionGemma",
    tokenizer: "Tokenizer",
    data: "Data",
    *,
    quiet: bool,
) -> None:
    """Measure on the test examples, and print it."""
    from ..training.events import Succeeded, Validated
    from ..training.run import run_test
    from .training import displaying, losses

    with displaying(Path(), 0, quiet=quiet) as show:
        for event in run_test(model, tokenizer, data, asked.settings):
            match event:
                case Validated():
                    put(f"test {losses(event)}")
                case Succeeded():
                    put(f"test: {event.right} of {event.cases} answers are exactly right")
                case _:
                    show(event)
