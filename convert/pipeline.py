"""The conversion: plan every output byte from the headers, then stream tensors into place."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_diffgemma.checkpoint.files import (
    FLOATS,
    ITEM_BYTES,
    NEEDED,
    Quantization,
    Tensor,
    check_type,
    quantization_of,
    quantization_settings,
    read_json,
    read_tensors,
    resolve,
)
from mlx_diffgemma.checkpoint.load import build_model, check_tensors, read_generation
from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.model.diffusion_gemma import is_text, parameter_name

from .recipes import DEFAULT_RECIPE, RECIPES, Recipe, fitting
from .staging import ConvertError, check_vacant, room_of, staged

SHARD_BYTES = 5_000_000_000
# Of a source tensor in memory at a time. Packing needs up to 35 times as much (nvfp4 on the CPU);
# 64 MB took more memory than 8 MB and was no faster.
SLICE_BYTES = 8_000_000
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_FLOATS = {"F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16}
# The largest weight that a format holds, where it is less than any that a model could have: its
# scales are 8-bit floats of at most 448, its numbers 4-bit ones of at most 6.
_LARGEST = {"nvfp4": 448.0 * 6.0}
# Bounds to which an image encoder clips: none is written as an infinity.
_BOUNDS = ("input_min", "input_max", "output_min", "output_max")
_ARRAYS = {**_FLOATS, "U32": mx.uint32, "U8": mx.uint8}
# Written by us, or meaningless after a conversion.
_NOT_COPIED = {"config.json", "model.safetensors.index.json", "README.md"}


@dataclass(frozen=True)
class Written:
    """Progress: source bytes converted so far."""

    tensor: str
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True)
class Report:
    """What a conversion wrote. `unpacked` names matrices that no group size divides."""

    directory: Path
    source_bytes: int
    bytes: int
    shards: int
    bits_per_weight: float
    seconds: float
    unpacked: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """One matrix or vector of the source and the tensors it becomes, in the order of `parts`.

    `sources` is (weight,), or (weight, scales[, biases]) of a module that is unpacked.
    """

    sources: tuple[Tensor, ...]
    packed: Quantization | None  # the source's format
    wanted: Quantization | None  # the result's
    parts: tuple[tuple[str, str, tuple[int, ...]], ...]  # name, dtype, shape


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    recipe: Recipe | None = None,
    dtype: str | None = None,
    dequantize: bool = False,
    revision: str | None = None,
) -> Report:
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
    assert isinstance(report, Report)
    return report


def stream_convert(
    source: str | Path,
    destination: str | Path,
    *,
    recipe: Recipe | None = None,
    dtype: str | None = None,
    dequantize: bool = False,
    revision: str | None = None,
) -> Iterator[Written | Report]:
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
    directory = resolve(str(source), revision=revision)
    if directory.resolve().is_relative_to(room_of(target).resolve()):
        raise ConvertError(f"{source} is where a conversion to {target} is written")
    if recipe is None:
        recipe = RECIPES["none" if dequantize else DEFAULT_RECIPE]
    config, tensors = _opened(directory)
    packed = any(name.endswith(".scales") for name in tensors)
    if packed and not dequantize:
        raise ConvertError(f"{source} is quantized already; --dequantize unpacks it")
    if dequantize and not packed:
        raise ConvertError(f"{source} is not quantized")

    jobs, unpacked = plan(tensors, config, recipe, dtype)
    shards = split(jobs)
    total = sum(_size(part) for job in jobs for part in job.parts)
    parameters = sum(_parameters(job) for job in jobs)
    try:
        with staged(target) as fresh:
            free = shutil.disk_usage(target.parent).free
            if total > free:
                need = f"{total / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
                raise ConvertError(f"{target.parent} has too little room: {need}")
            yield from _write_shards(fresh, shards)
            _write_index(fresh / "model.safetensors.index.json", shards, parameters)
            _copy_files(directory, fresh)
            card = _model_card(directory, str(source), target.name, recipe)
            (fresh / "README.md").write_text(card, encoding="utf-8")
            # Last: without it no tool takes the directory for a checkpoint.
            _write_json(fresh / "config.json", _config(config, directory, jobs, recipe, dtype))
    except OSError as error:
        raise ConvertError(f"writing {target} failed: {error.strerror or error}") from None
    yield Report(
        directory=target,
        source_bytes=sum(tensor.end - tensor.start for tensor in tensors.values()),
        bytes=total,
        shards=len(shards),
        bits_per_weight=8 * total / parameters,
        seconds=time.perf_counter() - started,
        unpacked=tuple(unpacked),
    )


def _opened(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a source, which is complete and makes a model."""
    config = read_json(directory, "config.json")
    quantization_settings(config)  # refuses foreign formats by name
    tensors = read_tensors(directory)
    text = {name: tensor for name, tensor in tensors.items() if is_text(name)}
    check_tensors(build_model(config, read_generation(directory, config), set(text)), text)
    return config, tensors


def _write_shards(fresh: Path, shards: list[list[Job]]) -> Iterator[Written]:
    total = sum(t.end - t.start for shard in shards for job in shard for t in job.sources)
    done = 0
    for name, shard in _named(shards).items():
        for job in write_shard(fresh / name, shard):
            done += sum(tensor.end - tensor.start for tensor in job.sources)
            yield Written(job.sources[0].name, done, total)


def _named(shards: list[list[Job]]) -> dict[str, list[Job]]:
    """Shards by the names of their files."""
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {f"model-{i:05}-of-{count:05}.safetensors": s for i, s in enumerate(shards, 1)}


def _write_index(path: Path, shards: list[list[Job]], parameters: int) -> None:
    parts = [(part, file) for file, s in _named(shards).items() for job in s for part in job.parts]
    size = sum(_size(part) for part, _ in parts)
    weight_map = {part[0]: file for part, file in parts}
    _write_json(
        path,
        {
            "metadata": {"total_size": size, "total_parameters": parameters},
            "weight_map": dict(sorted(weight_map.items())),
        },
    )


def plan(
    tensors: dict[str, Tensor], config: dict[str, Any], recipe: Recipe, dtype: str | None
) -> tuple[list[Job], list[str]]:
    """Every output tensor from headers alone, and the matrices that the recipe could not pack."""
    jobs, unpacked = [], []
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if f"{module}.scales" in tensors and leaf in ("weight", "scales", "biases"):
            if leaf != "scales":
                continue  # read with their scales
            packed = quantization_of(config, module)
            sources, shape = _packed(tensors, module, packed)
            stored = "BF16" if tensor.dtype == "U8" else tensor.dtype
            # Unpacked stacks of experts go back to Hugging Face's names.
            raw = (
                module
                if module.endswith((".gate_up_proj", ".down_proj")) and len(shape) == 3
                else f"{module}.weight"
            )
            part = (raw, DTYPES.get(dtype or "", stored), shape)
            jobs.append(Job(sources, packed, None, (part,)))
            continue
        if tensor.dtype not in _FLOATS:
            raise CheckpointError(f"{name} has the type {tensor.dtype}, which is not converted")
        if not prod(tensor.shape):
            raise CheckpointError(f"{name} has no numbers: its shape is {list(tensor.shape)}")
        stored = DTYPES.get(dtype or "", tensor.dtype)
        path = parameter_name(name).removesuffix(".weight")
        matrix = parameter_name(name).endswith(".weight") and len(tensor.shape) > 1
        rule = recipe.rule(path) if matrix else None
        wanted = rule and fitting(rule, tensor.shape[-1])
        if wanted is None:
            if rule is not None:
                unpacked.append(path)
            jobs.append(Job((tensor,), None, None, ((name, stored, tensor.shape),)))
            continue
        *rows, columns = tensor.shape
        groups = (*rows, columns // wanted.group_size)
        parts = [(f"{path}.weight", "U32", (*rows, columns * wanted.bits // 32))]
        if wanted.mode == "affine":
            parts += [(f"{path}.scales", stored, groups), (f"{path}.biases", stored, groups)]
        else:
            parts += [(f"{path}.scales", "U8", groups)]
        jobs.append(Job((tensor,), None, wanted, tuple(parts)))
    return jobs, unpacked


def _packed(
    tensors: dict[str, Tensor], module: str, packed: Quantization
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The tensors of a packed matrix, weight first, and its shape once it is unpacked."""
    affine = packed.mode == "affine"
    names = [f"{module}.{leaf}" for leaf in ("weight", "scales", *(["biases"] if affine else []))]
    if missing := [name for name in names if name not in tensors]:
        raise CheckpointError(f"the checkpoint lacks {missing[0]}")
    weight, *others = (tensors[name] for name in names)
    check_type(weight, ("U32",))
    for tensor in others:
        check_type(tensor, FLOATS if affine else ("U8",))
    columns = (weight.shape or (0,))[-1] * 32 // packed.bits
    shape = (*weight.shape[:-1], columns)
    groups = (*weight.shape[:-1], columns // packed.group_size)
    for tensor in others:
        if not prod(groups) or tensor.shape != groups or columns % packed.group_size:
            raise CheckpointError(
                f"{tensor.name}: shape {list(tensor.shape)} does not go with that of the weight, "
                f"{list(weight.shape)}"
            )
    return (weight, *others), shape


def split(jobs: list[Job]) -> list[list[Job]]:
    """Shards of at most SHARD_BYTES; a job is never split."""
    shards: list[list[Job]] = [[]]
    filled = 0
    for job in jobs:
        size = sum(map(_size, job.parts))
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(job)
        filled += size
    return shards


def write_shard(path: Path, jobs: list[Job]) -> Iterator[Job]:
    """Write one safetensors file, yielding each job when its bytes are in place.

    The header is known before any data, so slices go straight to their final offset.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for part in (part for job in jobs for part in job.parts):
        name, dtype, shape = part
        offsets = [offset, offset + _size(part)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        offset += _size(part)
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    base = 8 + len(encoded)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(base + offset)
        for job in jobs:
            at = {name: base + header[name]["data_offsets"][0] for name, _, _ in job.parts}
            damaged = lost = 0
            for piece in converted(job):
                damaged, lost = damaged + piece.damaged, lost + piece.lost
                for (name, _, _), array in zip(job.parts, piece.arrays, strict=True):
                    data = np.array(mx.contiguous(array).reshape(-1).view(mx.uint8))
                    file.seek(at[name])
                    file.write(data.data)
                    at[name] += data.nbytes
            _check_finite(job, damaged, lost)
            yield job
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True)
class Piece:
    """Some rows of a job's parts; of their numbers, `damaged` were not finite in the source and
    `lost` are not any more."""

    arrays: list[mx.array]
    damaged: int
    lost: int


def converted(job: Job) -> Iterator[Piece]:
    """The parts of a job in slices of whole rows: packing works on rows."""
    weight = job.sources[0]
    rows = prod(weight.shape[:-1])
    step = max(1, SLICE_BYTES * rows // max(1, weight.end - weight.start))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        arrays = [_read(tensor, start, stop) for tensor in job.sources]
        plain = arrays[0] if job.packed is None else _unpacked(arrays, job.packed)
        target = _FLOATS.get(job.parts[-1][1], plain.dtype)
        damaged = _not_finite(weight.name, plain)
        made = [plain.astype(target)]
        lost = 0 if plain.dtype == target else _not_finite(weight.name, made[0]) - damaged
        if job.wanted is not None:
            made = list(mx.quantize(made[0], **asdict(job.wanted)))
            lost = lost or _not_packed(plain, made, job.wanted) - damaged
        yield Piece(made, damaged, lost)
        mx.clear_cache()


def _unpacked(arrays: list[mx.array], packed: Quantization) -> mx.array:
    """Weight, scales and biases as float32: in the scales' own type it would be rounded twice."""
    weight, *others = arrays
    scales, *biases = (a if a.dtype == mx.uint8 else a.astype(mx.float32) for a in others)
    size, bits, mode = packed.group_size, packed.bits, packed.mode
    return mx.dequantize(
        weight, scales, biases[0] if biases else None, size, bits, mode, dtype=mx.float32
    )


def _not_finite(name: str, numbers: mx.array) -> int:
    """How many are NaN, or infinite where the name is not one of a bound."""
    bad = mx.isnan(numbers) if name.endswith(_BOUNDS) else ~mx.isfinite(numbers)
    return int(bad.sum())


def _not_packed(plain: mx.array, made: list[mx.array], wanted: Quantization) -> int:
    """How many numbers a format could not hold: they came out infinite, or far too small."""
    if wanted.mode == "affine":
        scales, biases = made[1:]
        return int((~mx.isfinite(scales + biases)).sum()) * wanted.group_size
    weight, scales = made
    back = mx.dequantize(
        weight, scales, None, wanted.group_size, wanted.bits, wanted.mode, dtype=mx.float32
    )
    too_large = mx.abs(plain) > _LARGEST.get(wanted.mode, mx.inf)
    return int((~mx.isfinite(back) | too_large).sum())


def _check_finite(job: Job, damaged: int, lost: int) -> None:
    """Refuse a tensor that no model can compute with."""
    name = job.sources[0].name
    if damaged:
        raise CheckpointError(f"{damaged} numbers of {name} are NaN or infinite")
    if lost:
        held = job.wanted.mode if job.wanted else job.parts[0][1]
        raise ConvertError(f"{lost} numbers of {name} are too large for {held}")


def _read(tensor: Tensor, start: int, stop: int) -> mx.array:
    """Rows start..stop of a tensor seen as (rows, columns); a vector is one row."""
    columns = tensor.shape[-1] if tensor.shape else 1
    width = columns * ITEM_BYTES[tensor.dtype]
    data = np.fromfile(
        tensor.file, np.uint8, count=(stop - start) * width, offset=tensor.start + start * width
    )
    if len(data) != (stop - start) * width:
        raise CheckpointError(f"{tensor.file} has become shorter")
    return mx.array(data).view(_ARRAYS[tensor.dtype]).reshape(stop - start, columns)


def _size(part: tuple[str, str, tuple[int, ...]]) -> int:
    return prod(part[2]) * ITEM_BYTES[part[1]]


def _parameters(job: Job) -> int:
    bits = job.packed.bits if job.packed else 32
    return prod(job.sources[0].shape) * 32 // bits


def _config(
    config: dict[str, Any],
    directory: Path,
    jobs: list[Job],
    recipe: Recipe,
    dtype: str | None,
) -> dict[str, Any]:
    """config.json as published MLX conversions write it."""
    out = {k: v for k, v in config.items() if k not in ("quantization", "quantization_config")}
    if (directory / "generation_config.json").exists():
        out["generation_config"] = read_json(directory, "generation_config.json")
    if (out.get("generation_config") or {}).get("eos_token_id") is not None:
        out["eos_token_id"] = out["generation_config"]["eos_token_id"]
    if dtype is not None:
        out["dtype"] = dtype
        for part in ("text_config", "vision_config"):
            if isinstance(out.get(part), dict) and "dtype" in out[part]:
                out[part] = {**out[part], "dtype": dtype}
    used = {job.parts[0][0].removesuffix(".weight"): job.wanted for job in jobs if job.wanted}
    if used:
        default = recipe.default or next(iter(used.values()))
        settings: dict[str, Any] = asdict(default)
        for module, wanted in used.items():
            if wanted != default:
                # An override without a mode means affine.
                settings[module] = {"group_size": wanted.group_size, "bits": wanted.bits}
                if wanted.mode != "affine":
                    settings[module]["mode"] = wanted.mode
        out["quantization"] = out["quantization_config"] = settings
    return dict(sorted(out.items()))


def _copy_files(source: Path, destination: Path) -> None:
    """Tokenizer, template, generation and processor files, licences."""
    for pattern in NEEDED:
        for path in source.glob(pattern):
            if path.is_file() and path.name not in _NOT_COPIED:
                shutil.copyfile(path, destination / path.name)


def _model_card(directory: Path, source: str, name: str, recipe: Recipe) -> str:
    """README.md: where it comes from, how it is quantized, how to run it."""
    from huggingface_hub import ModelCardData, metadata_load

    readme = directory / "README.md"
    try:
        known = (metadata_load(readme) or {}) if readme.exists() else {}
    except Exception:  # YAML or text that cannot be read must not cost the conversion
        known = {}
    card = ModelCardData(
        library_name="mlx",
        pipeline_tag="text-generation",
        license=known.get("license"),
        license_link=known.get("license_link"),
        base_model=known.get("base_model") or (None if Path(source).exists() else source),
        tags=["mlx", "diffusion_gemma"],
    )
    return (
        f"---\n{card.to_yaml()}\n---\n\n# {name}\n\n"
        f"{Path(source).name if Path(source).exists() else source}, converted to MLX with "
        f"mlx-diffgemma: {recipe.description}.\n\n"
        f'```bash\npip install mlx-diffgemma\nmlx-diffgemma generate --model {name} "Hello"\n```\n'
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=4)
        file.flush()
        os.fsync(file.fileno())


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
