"""The tensors of a plan, read, packed and written slice by slice into safetensors files."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from mlx_diffgemma.checkpoint.files import ITEM_BYTES, Tensor
from mlx_diffgemma.checkpoint.quantization import Quantization
from mlx_diffgemma.errors import CheckpointError

from .plan import Job, parameters_of, size_of
from .source import Fetched, Source
from .staging import ConvertError, Stage, write_json

# Of a source tensor in memory at a time. Packing needs up to 35 times as much (nvfp4 on the CPU);
# 64 MB took more memory than 8 MB and was no faster.
SLICE_BYTES = 8_000_000

# MLX's types by a header's names.
_FLOATS = {"F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16}

_ARRAYS = {**_FLOATS, "U32": mx.uint32, "U8": mx.uint8}

# The largest weight that a format holds, where it is less than any that a model could have: its
# scales are 8-bit floats of at most 448, its numbers 4-bit ones of at most 6.
_LARGEST = {"nvfp4": 448.0 * 6.0}

# Bounds to which an image encoder clips: none is written as an infinity.
_BOUNDS = ("input_min", "input_max", "output_min", "output_max")


@dataclass(frozen=True)
class Written:
    """Progress: source bytes converted so far."""

    tensor: str
    bytes_done: int
    bytes_total: int


def write_shards(
    stage: Stage, shards: list[list[Job]], source: Source, notes: dict[str, Any]
) -> Iterator[Written | Fetched]:
    """Write all shards and their index, reporting what is fetched and each slice that is written.

    Jobs that a former run has finished are left as they are. `notes` are recorded for the next.
    """
    total = sum(_source_bytes(job) for shard in shards for job in shard)
    number = done = 0
    placed: dict[str, str] = {}
    for count, shard in enumerate(shards, 1):
        name = f"model-{count:05}-of-{len(shards):05}.safetensors"
        name = name if len(shards) > 1 else "model.safetensors"
        placed |= {part[0]: name for job in shard for part in job.parts}
        with _opened(stage.fresh / name, shard, anew=number >= stage.done) as (file, at):
            for job in shard:
                if number >= stage.done:
                    yield from source.ready(number)
                    for size in _write(file, at, job):
                        yield Written(job.sources[0].name, done + size, total)
                    if dropped := source.read_last(number):
                        _sync(file)
                        stage.record(number + 1, notes)
                        source.drop(dropped)
                number += 1
                done += _source_bytes(job)
            _sync(file)
    jobs = [job for shard in shards for job in shard]
    index = {
        "metadata": {
            "total_size": sum(map(size_of, (part for job in jobs for part in job.parts))),
            "total_parameters": sum(map(parameters_of, jobs)),
        },
        "weight_map": dict(sorted(placed.items())),
    }
    write_json(stage.fresh / "model.safetensors.index.json", index)


@contextmanager
def _opened(path: Path, jobs: list[Job], anew: bool) -> Iterator[tuple[BinaryIO, dict[str, int]]]:
    """Open one safetensors file, with the offset of each tensor; not `anew`, parts of it are there.

    The header is known before any data, so slices go straight to their final offset.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for part in (part for job in jobs for part in job.parts):
        name, dtype, shape = part
        offsets = [offset, offset + size_of(part)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        offset += size_of(part)
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    start = len(encoded).to_bytes(8, "little") + encoded
    at = {name: len(start) + entry["data_offsets"][0] for name, entry in list(header.items())[1:]}
    if not anew and not _begins_with(path, start, len(start) + offset):
        raise ConvertError(
            f"{path} is not what a former run has left there; now it is removed: convert again"
        )
    with path.open("wb" if anew else "r+b") as file:
        if anew:
            file.write(start)
            file.truncate(len(start) + offset)
        yield file, at


def _begins_with(path: Path, start: bytes, size: int) -> bool:
    """Whether it is a file of this size that begins so."""
    if not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        return file.read(len(start)) == start


def _write(file: BinaryIO, at: dict[str, int], job: Job) -> Iterator[int]:
    """Write the parts of a job, yielding the bytes of its source that are converted."""
    damaged = lost = 0
    for piece in converted(job):
        damaged, lost = damaged + piece.damaged, lost + piece.lost
        for (name, _, _), array in zip(job.parts, piece.arrays, strict=True):
            data = np.array(mx.contiguous(array).reshape(-1).view(mx.uint8))
            file.seek(at[name])
            file.write(data.data)
            at[name] += data.nbytes
        yield int(_source_bytes(job) * piece.share)
    _check_finite(job, damaged, lost)


def _source_bytes(job: Job) -> int:
    return sum(tensor.end - tensor.start for tensor in job.sources)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


@dataclass(frozen=True)
class Piece:
    """Some rows of a job's parts; of their numbers, `damaged` were not finite in the source and
    `lost` are not any more. `share` of all rows are done with them."""

    arrays: list[mx.array]
    damaged: int
    lost: int
    share: float


def converted(job: Job) -> Iterator[Piece]:
    """Yield the parts of a job in slices of whole rows: packing works on rows."""
    weight = job.sources[0]
    rows = prod(weight.shape[:-1])
    step = max(1, SLICE_BYTES * rows // max(1, weight.end - weight.start))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        arrays = [_read(tensor, start, stop) for tensor in job.sources]
        if job.copied:
            yield Piece(arrays, 0, 0, stop / rows)
            continue
        plain = arrays[0] if job.packed is None else _unpacked(arrays, job.packed)
        if job.change is not None:
            plain = job.change(plain.astype(mx.float32), start, stop)
        target = _FLOATS.get(job.parts[-1][1], plain.dtype)
        damaged = _not_finite(weight.name, plain)
        made = [plain.astype(target)]
        lost = 0 if plain.dtype == target else _not_finite(weight.name, made[0]) - damaged
        if job.wanted is not None:
            made = list(mx.quantize(made[0], **asdict(job.wanted)))
            lost = lost or _not_packed(plain, made, job.wanted) - damaged
        yield Piece(made, damaged, lost, stop / rows)
        mx.clear_cache()


def _unpacked(arrays: list[mx.array], packed: Quantization) -> mx.array:
    """Dequantize in float32: in the scales' own type numbers would be rounded twice."""
    weight, *others = arrays
    scales, *biases = (a if a.dtype == mx.uint8 else a.astype(mx.float32) for a in others)
    size, bits, mode = packed.group_size, packed.bits, packed.mode
    return mx.dequantize(
        weight, scales, biases[0] if biases else None, size, bits, mode, dtype=mx.float32
    )


def _not_finite(name: str, numbers: mx.array) -> int:
    """Count numbers that are NaN, or infinite where the name is not one of a bound."""
    bad = mx.isnan(numbers) if name.endswith(_BOUNDS) else ~mx.isfinite(numbers)
    return int(bad.sum())


def _not_packed(plain: mx.array, made: list[mx.array], wanted: Quantization) -> int:
    """Count the numbers that a format could not hold: they came out infinite, or far too small."""
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
    """Read rows start..stop of a tensor seen as (rows, columns); a vector is one row."""
    columns = tensor.shape[-1] if tensor.shape else 1
    width = columns * ITEM_BYTES[tensor.dtype]
    data = np.fromfile(
        tensor.file, np.uint8, count=(stop - start) * width, offset=tensor.start + start * width
    )
    if len(data) != (stop - start) * width:
        raise CheckpointError(f"{tensor.file} has become shorter")
    return mx.array(data).view(_ARRAYS[tensor.dtype]).reshape(stop - start, columns)
