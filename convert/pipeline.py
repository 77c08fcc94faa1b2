"""A conversion from beginning to end: refuse what cannot be done, plan, write, put into place."""

import hashlib
import json
import shutil
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_diffgemma.checkpoint.files import (
    NEEDED,
    Headers,
    on_this_machine,
    read_headers,
    read_json,
    resolve,
)
from mlx_diffgemma.checkpoint.hub import (
    Repository,
    Unreachable,
    look_up,
    read_remote,
)
from mlx_diffgemma.checkpoint.load import (
    build_model,
    check_tensors,
    read_generation,
    read_tokenizer,
)
from mlx_diffgemma.checkpoint.quantization import quantization_settings
from mlx_diffgemma.model.diffusion_gemma import is_text
from mlx_diffgemma.text.tokenizer import has_pieces_alone

from .card import model_card
from .plan import DTYPES, Job, config_of, parameters_of, plan_jobs, size_of, split
from .recipes import DEFAULT_RECIPE, RECIPES, Recipe
from .source import Fetched, Source
from .staging import (
    ConvertError,
    NoRoom,
    Stage,
    check_vacant,
    recorded,
    staged,
    workspace_of,
    write_json,
)
from .write import Written, write_shards

# Written by us, or meaningless after a conversion.
_NOT_COPIED = {"config.json", "model.safetensors.index.json", "README.md"}


@dataclass(frozen=True)
class Summary:
    """What a conversion wrote. `unpacked` names matrices that no group size divides."""

    directory: Path
    source_bytes: int
    bytes: int
    shards: int
    bits_per_weight: float
    seconds: float
    unpacked: tuple[str, ...]


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    recipe: Recipe | None = None,
    dtype: str | None = None,
    dequantize: bool = False,
    revision: str | None = None,
    keep_download: bool = False,
) -> Summary:
    """Convert a checkpoint; arguments and errors as in `stream_convert`."""
    events = stream_convert(
        source,
        destination,
        recipe=recipe,
        dtype=dtype,
        dequantize=dequantize,
        revision=revision,
        keep_download=keep_download,
    )
    *_, report = events
    assert isinstance(report, Summary)
    return report


def stream_convert(
    source: str | Path,
    destination: str | Path,
    *,
    recipe: Recipe | None = None,
    dtype: str | None = None,
    dequantize: bool = False,
    revision: str | None = None,
    keep_download: bool = False,
) -> Generator[Written | Fetched | Summary]:
    """Convert a checkpoint in Hugging Face or MLX layout, reporting each slice, then the result.

    Everything is written beside the destination, in `.NAME.incomplete`, and moved there at the
    end, so a directory with the destination's name is complete. Two runs cannot write one
    destination. Peak memory does not depend on the checkpoint's size.

    Files of weights on the hub are fetched one after the other, each compared with the checksum
    that the hub states, converted and removed; those in the hub's cache are read there. Where the
    same conversion was cut off, interrupted or killed, it goes on.

    Args:
        source: directory or hub name.
        destination: must not exist, or be an empty directory.
        recipe: what to quantize and how; None is the default recipe (with `dequantize`: nothing).
        dtype: "float32", "bfloat16" or "float16" for all that is not packed; None keeps the
            source's.
        dequantize: unpack a quantized source, which goes with no recipe. Without it a quantized
            source is refused: packing twice loses twice.
        keep_download: fetch the whole source into the hub's cache first, where it stays.

    Raises:
        CheckpointError: the source is missing, damaged or incomplete. `hub.Unreachable`, a kind of
            it, leaves what was done to the next run.
        ConvertError: the destination is taken or being written, the disk too small, the source
            already packed, or the arguments are at odds. All of it is found out before the first
            byte is written. Or a weight is NaN or infinite, in the source or once it is converted.
    """
    started = time.perf_counter()
    target = Path(destination)
    check_vacant(target)  # before anything is fetched
    if dtype is not None and dtype not in DTYPES:
        raise ConvertError(f"there is no dtype {dtype}; there are {', '.join(DTYPES)}")
    if dequantize and recipe is not None:
        raise ConvertError("dequantize goes with no recipe: unpack first, then convert the result")
    chosen = recipe or RECIPES["none" if dequantize else DEFAULT_RECIPE]
    asked = {"source": str(source), "revision": revision, "dtype": dtype, "recipe": repr(chosen)}
    headers, repository = _opened(str(source), revision, target, asked, keep_download)
    _check_source(str(source), headers, dequantize)
    jobs, unpacked = plan_jobs(headers.tensors, headers.config, chosen, dtype)
    made = _Conversion(str(source), target, chosen, dtype, headers, repository, jobs, asked)
    yield from made.write()
    total = sum(size_of(part) for job in jobs for part in job.parts)
    yield Summary(
        directory=target,
        source_bytes=sum(tensor.end - tensor.start for tensor in headers.tensors.values()),
        bytes=total,
        shards=len(split(jobs)),
        bits_per_weight=8 * total / sum(map(parameters_of, jobs)),
        seconds=time.perf_counter() - started,
        unpacked=tuple(unpacked),
    )


@dataclass(frozen=True)
class _Conversion:
    """A conversion that is planned. `repository` is None where nothing has to be fetched, `asked`
    what the caller asked for."""

    source: str
    target: Path
    recipe: Recipe
    dtype: str | None
    headers: Headers
    repository: Repository | None
    jobs: list[Job]
    asked: dict[str, Any]

    def write(self) -> Iterator[Written | Fetched]:
        """Write the checkpoint and put it into place; errors as in `stream_convert`."""
        directory = self.headers.directory
        pieces = None
        if has_pieces_alone(directory):
            pieces = read_tokenizer(directory)  # a file that is not read is found out now
        try:
            with staged(self.target, self._key()) as stage:
                yield from self._weights(stage)
                copy_files(directory, stage.fresh)
                if pieces is not None:
                    pieces.save(stage.fresh)
                what = f"converted to MLX with mlx-diffgemma: {self.recipe.description}"
                card = model_card(directory, self.source, self.target.name, what)
                (stage.fresh / "README.md").write_text(card, encoding="utf-8")
                # Last: without it no tool takes the directory for a checkpoint.
                config = config_of(
                    self.headers.config, _generation(directory), self.jobs, self.recipe, self.dtype
                )
                write_json(stage.fresh / "config.json", config)
        except Unreachable as error:
            raise Unreachable(f"{error}; the same command goes on where this one stopped") from None
        except OSError as error:
            goes_on = "; what is done is kept for the same command" if self.repository else ""
            reason = error.strerror or error
            raise ConvertError(f"writing {self.target} failed: {reason}{goes_on}") from None

    def _weights(self, stage: Stage) -> Iterator[Written | Fetched]:
        notes = {"asked": self.asked, "commit": self.repository and self.repository.commit}
        files = Source(self.jobs, self.repository, stage.source)
        files.clear(stage.done)
        check_free(self.target.parent, files.room(stage.done))
        if self.repository is not None and not stage.done:
            stage.record(0, notes)  # whoever goes on reads the same commit
        yield from write_shards(stage, split(self.jobs), files, notes)

    def _key(self) -> str | None:
        """Name a conversion by all that decides which bytes it writes where; None: none goes on."""
        if self.repository is None:
            return None
        told: list[Any] = [self.asked, self.repository.commit]
        told += [version("mlx-diffgemma"), version("mlx")]
        for shard in split(self.jobs):
            read = [(t.name, t.file.name, t.start) for job in shard for t in job.sources]
            told += [read, [job.parts for job in shard]]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _opened(
    source: str, revision: str | None, target: Path, asked: dict[str, Any], keep_download: bool
) -> tuple[Headers, Repository | None]:
    """Read the headers of a source; with the repository if its weights have to be fetched yet."""
    workspace = workspace_of(target)
    directory = on_this_machine(source)
    if directory is None and not keep_download:
        left = recorded(workspace)
        # A branch may have moved since the run that this one goes on with.
        commit = left.get("commit") if left.get("asked") == asked else None
        try:
            repository = look_up(source, commit if isinstance(commit, str) else revision)
        except Unreachable:  # the cache may have all of it
            directory = resolve(source, revision=revision, fetch=False)
        else:
            return read_remote(repository, workspace / "source"), repository
    if directory is None:
        directory = resolve(source, revision=revision)
    if directory.resolve().is_relative_to(workspace.resolve()):
        raise ConvertError(f"{source} is where a conversion to {target} is written")
    quantization_settings(read_json(directory, "config.json"))  # refuses foreign formats by name
    return read_headers(directory), None


def _check_source(source: str, headers: Headers, dequantize: bool) -> None:
    """Refuse a source that is not complete, makes no model, or is (not) packed."""
    quantization_settings(headers.config)
    text = {name: tensor for name, tensor in headers.tensors.items() if is_text(name)}
    generation = read_generation(headers.directory, headers.config)
    check_tensors(build_model(headers.config, generation, set(text)), text)
    packed = any(name.endswith(".scales") for name in headers.tensors)
    if packed and not dequantize:
        raise ConvertError(f"{source} is quantized already; --dequantize unpacks it")
    if dequantize and not packed:
        raise ConvertError(f"{source} is not quantized")


def check_free(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        need = f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
        raise NoRoom(f"{directory} has too little room: {need}")


def _generation(directory: Path) -> dict[str, Any] | None:
    """Read generation_config.json as it stands."""
    name = "generation_config.json"
    return read_json(directory, name) if (directory / name).exists() else None


def copy_files(source: Path, destination: Path) -> None:
    """Copy tokenizer, template, generation and processor files, licences."""
    for pattern in NEEDED:
        for path in source.glob(pattern):
            if path.is_file() and path.name not in _NOT_COPIED:
                shutil.copyfile(path, destination / path.name)


def upload(directory: Path, repo: str) -> str:
    """Create a hub repository if need be and upload a converted checkpoint; returns its address.

    Raises:
        ConvertError: the hub refused or cannot be reached.
    """
    from huggingface_hub import HfApi, errors

    api = HfApi()
    try:
        address = api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=directory)
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ConvertError(f"{directory} is complete, but uploading it failed: {reason}") from None
    return str(address)
