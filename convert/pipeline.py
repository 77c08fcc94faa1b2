"""A conversion from beginning to end: refuse what cannot be done, plan, write, put into place."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_diffgemma.checkpoint.files import (
    NEEDED,
    Headers,
    read_headers,
    read_json,
    resolve,
)
from mlx_diffgemma.checkpoint.load import build_model, check_tensors, read_generation
from mlx_diffgemma.checkpoint.quantization import quantization_settings
from mlx_diffgemma.model.diffusion_gemma import is_text

from .card import model_card
from .plan import DTYPES, config_of, parameters_of, plan_jobs, size_of, split
from .recipes import DEFAULT_RECIPE, RECIPES, Recipe
from .staging import ConvertError, check_vacant, staged, workspace_of
from .write import Written, write_json, write_shards

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
) -> Summary:
    """Convert a checkpoint; arguments and errors as in `stream_convert`."""
    events = stream_convert(
        source,
        destination,
        recipe=recipe,
        dtype=dtype,
        dequantize=dequantize,
        revision=revision,
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
) -> Iterator[Written | Summary]:
    """Convert a checkpoint in Hugging Face or MLX layout, reporting each tensor, then the result.

    Everything is written beside the destination, in `.NAME.incomplete`, and moved there at the
    end, so a directory with the destination's name is complete. Two runs cannot write one
    destination. Peak memory does not depend on the checkpoint's size.

    Args:
        source: directory or hub name.
        destination: must not exist, or be an empty directory.
        recipe: what to quantize and how; None is the default recipe (with `dequantize`: nothing).
        dtype: "float32", "bfloat16" or "float16" for all that is not packed; None keeps the
            source's.
        dequantize: unpack a quantized source, which goes with no recipe. Without it a quantized
            source is refused: packing twice loses twice.

    Raises:
        CheckpointError: the source is missing, damaged or incomplete.
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
    headers = _opened(str(source), revision, target, dequantize)
    if recipe is None:
        recipe = RECIPES["none" if dequantize else DEFAULT_RECIPE]
    jobs, unpacked = plan_jobs(headers.tensors, headers.config, recipe, dtype)
    shards = split(jobs)
    total = sum(size_of(part) for job in jobs for part in job.parts)
    try:
        with staged(target) as fresh:
            _check_free(target.parent, total)
            yield from write_shards(fresh, shards)
            _copy_files(headers.directory, fresh)
            card = model_card(headers.directory, str(source), target.name, recipe)
            (fresh / "README.md").write_text(card, encoding="utf-8")
            # Last: without it no tool takes the directory for a checkpoint.
            generation = _generation(headers.directory)
            config = config_of(headers.config, generation, jobs, recipe, dtype)
            write_json(fresh / "config.json", config)
    except OSError as error:
        raise ConvertError(f"writing {target} failed: {error.strerror or error}") from None
    yield Summary(
        directory=target,
        source_bytes=sum(tensor.end - tensor.start for tensor in headers.tensors.values()),
        bytes=total,
        shards=len(shards),
        bits_per_weight=8 * total / sum(map(parameters_of, jobs)),
        seconds=time.perf_counter() - started,
        unpacked=tuple(unpacked),
    )


def _opened(source: str, revision: str | None, target: Path, dequantize: bool) -> Headers:
    """Read the headers of a source, which has to be complete, make a model and be (un)packed."""
    directory = resolve(source, revision=revision)
    if directory.resolve().is_relative_to(workspace_of(target).resolve()):
        raise ConvertError(f"{source} is where a conversion to {target} is written")
    quantization_settings(read_json(directory, "config.json"))  # refuses foreign formats by name
    headers = read_headers(directory)
    text = {name: tensor for name, tensor in headers.tensors.items() if is_text(name)}
    generation = read_generation(directory, headers.config)
    check_tensors(build_model(headers.config, generation, set(text)), text)
    packed = any(name.endswith(".scales") for name in headers.tensors)
    if packed and not dequantize:
        raise ConvertError(f"{source} is quantized already; --dequantize unpacks it")
    if dequantize and not packed:
        raise ConvertError(f"{source} is not quantized")
    return headers


def _check_free(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        need = f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
        raise ConvertError(f"{directory} has too little room: {need}")


def _generation(directory: Path) -> dict[str, Any] | None:
    """Read generation_config.json as it stands."""
    name = "generation_config.json"
    return read_json(directory, name) if (directory / name).exists() else None


def _copy_files(source: Path, destination: Path) -> None:
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
