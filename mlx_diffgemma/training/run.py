"""From a folder of examples and a model to a folder with an adapter, and what tests say of it."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..arguments import SettingError
from ..checkpoint.adapter import AdapterConfig, add_adapter
from ..checkpoint.files import DEFAULT, read_json, resolve
from ..checkpoint.fit import free_memory
from ..checkpoint.hub import headers_of
from ..checkpoint.load import computed_in, load, read_generation, read_tokenizer
from ..errors import CheckpointError
from ..model.config import Config
from ..model.diffusion_gemma import DiffusionGemma
from ..text.tokenizer import Tokenizer
from .data import Data, Encoder, read_data
from .events import Event, Measuring, Stopped, Succeeded, Validated
from .exchange import BY_ITSELF, Together
from .folder import Folder, Mode, RunError, Stored, clear, locked, read_state
from .lines import Keys
from .loop import Run, digest, resume
from .measuring import Stop, answer_cases, answerable, validate
from .objective import Sample
from .plan import fitting
from .ranks import begin_alike
from .settings import Settings
from .step import Trainer
from .teaching import as_examples, read_taught, teach, write_taught


def never() -> bool:
    """Ask nobody to stop."""
    return False


def encoder_of(directory: Path, settings: Settings) -> Encoder:
    """How examples become ids of the model in a directory; its weights are not looked at.

    Raises:
        CheckpointError: its tokenizer or a config is missing or damaged.
    """
    values = read_json(directory, "config.json")
    config = Config.from_dict(values)
    return Encoder(
        tokenizer=read_tokenizer(directory),
        ends=tuple(read_generation(directory, values).eos_token_ids),
        canvas_length=config.canvas_length,
        context=config.max_position_embeddings,
        most=settings.max_seq_length,
    )


def train(
    path_or_repo: str | Path | None,
    data: str | Path,
    adapter_path: str | Path,
    *,
    settings: Settings | None = None,
    adapter: AdapterConfig | None = None,
    mode: Mode = "new",
    stopped: Stop = never,
) -> Iterator[Event]:
    """Fine-tune a checkpoint by a folder of examples, as the command `lora` does.

    Its events (`training.events`) come as they happen; the folder holds what becomes of it.

    Args:
        path_or_repo: as of `load`.
        data: a folder with train.jsonl, and valid.jsonl if something is to be measured.
        adapter_path: the run's folder, which is made if need be.
        settings: numbers of the run; None are the defaults.
        adapter: what is trained; None are the defaults.
        mode: "new" refuses a folder that holds a run, "resume" goes on with it, "overwrite"
            removes it first.
        stopped: asked between steps; once it is true, the run is saved and ends.

    Raises:
        DataError: an example cannot be used.
        CheckpointError: the checkpoint cannot be found, fetched or read.
        TooLarge: training would not fit; all of these before anything is loaded.
        RunError: the folder is used by another process, or is not what `mode` needs.
        SettingError: the model has no such parts, or the settings are of another run.
        Diverged: the loss is no finite number any more.
    """
    settings, adapter = settings or Settings(), adapter or AdapterConfig()
    name = DEFAULT if path_or_repo is None else str(path_or_repo)
    encoder = encoder_of(resolve(name, weights=False), settings)
    examples = read_data(Path(data), encoder, Keys(), train=True, test=False)
    tokens, memory, dtype = examples.longest, free_memory(), computed_in(None)
    fitting(headers_of(name), settings, adapter, tokens=tokens, memory=memory, dtype=dtype)
    path = Path(adapter_path)
    with locked(path, mode):
        model, tokenizer = load(name)
        yield from train_in(
            path, model, tokenizer, examples, settings, adapter, mode=mode, stopped=stopped
        )


def train_in(
    path: Path,
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    data: Data,
    settings: Settings,
    adapter: AdapterConfig,
    *,
    mode: Mode,
    arguments: Mapping[str, Any] | None = None,
    weights: Path | None = None,
    stopped: Stop = never,
    together: Together = BY_ITSELF,
) -> Iterator[Event]:
    """Train a model as `train` does, in a folder that is locked already.

    `arguments` are kept beside the adapter; `weights` is a file that its first values come from.
    Where several learn `together`, this is rank 0, and the others do `ranks.learn_along`.
    """
    stored = read_state(path) if mode == "resume" else None
    known = digest([*data.train, *data.valid])
    if stored is not None:
        check_same(path, stored, settings, known)
    if settings.distill is not None:
        samples: list[Sample] = []
        if stored is not None:
            samples = read_taught(path, model.config.vocab_size)
        else:
            for event in teach(model, data.train, settings.seed, stopped):
                if isinstance(event, Sample):
                    samples.append(event)
                else:
                    yield event
            if stopped():
                yield Stopped(0)
                return
        data = replace(data, train=as_examples(samples))
    mx.random.seed(settings.seed)  # which the first values of an adapter are drawn from
    add_adapter(model, adapter)
    if weights is not None:
        load_weights(model, weights)
    trainer = Trainer(model, settings, model.generation.eos_token_ids[0], together)
    progress = None if stored is None else resume(trainer, stored)
    begin_alike(trainer)
    if mode == "overwrite":
        clear(path)
    if settings.distill is not None and stored is None:
        write_taught(path, samples)
    folder = Folder(path, adapter, {**vars(settings), **(arguments or {})}, known)
    if progress is not None:
        folder.trim_log(progress.iteration)
    yield from Run(trainer, tokenizer, data, folder, stopped).train(progress)


def check_same(path: Path, stored: Stored, settings: Settings, data: str) -> None:
    """Refuse to go on with other numbers or examples than those of the run.

    Raises:
        RunError: they differ; it says in what.
    """
    names = {name for name in vars(settings) if name in stored.arguments}
    before = Settings(**{name: stored.arguments[name] for name in names})
    if changed := settings.same_run(before):
        name = changed[0]
        raise RunError(
            f"the run in {path} has {name} {getattr(before, name)}, not {getattr(settings, name)}; "
            "--resume-adapter-file starts another one from its weights"
        )
    if data != stored.data:
        raise RunError(f"the examples are not those of the run in {path}")
    if settings.iters < stored.progress.iteration:
        raise RunError(
            f"the run in {path} has done {stored.progress.iteration} iterations, and iters is "
            f"{settings.iters}"
        )


def load_weights(model: DiffusionGemma, file: Path) -> None:
    """Give an adapter that is in place the values of a file, as far as it has them.

    Raises:
        CheckpointError: the file cannot be read, or is no adapter of this kind.
    """
    from ..checkpoint.adapter import trained

    try:
        found = mx.load(str(file), format="safetensors")
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{file} cannot be read: {reason}") from None
    own = trained(model)
    assert isinstance(found, dict)
    for name, array in found.items():
        if name not in own or own[name].shape != array.shape:
            raise CheckpointError(f"{file}: {name} is no adapted parameter of this run")
    if not found:
        raise CheckpointError(f"{file} holds nothing")
    weights = [(name, array.astype(own[name].dtype)) for name, array in found.items()]
    mx.eval([array for _, array in weights])  # the file may be about to be replaced
    model.load_weights(weights, strict=False)


def run_test(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    data: Data,
    settings: Settings,
    *,
    iteration: int = 0,
    stopped: Stop = never,
) -> Iterator[Measuring | Validated | Succeeded]:
    """Measure losses and exact answers of the test examples."""
    if not data.test:
        raise SettingError("there are no test examples")
    end = model.generation.eos_token_ids[0]
    yield from validate(model, data.test, settings, end, iteration, stopped, of="test")
    if cases := answerable(data.test, settings.test_cases):
        yield from answer_cases(model, tokenizer, cases, settings, iteration, stopped, of="test")
