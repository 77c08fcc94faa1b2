"""What a conversion will write, from the headers alone: every tensor, its type and its shape."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import mlx.core as mx

from mlx_diffgemma.checkpoint.files import (
    FLOATS,
    ITEM_BYTES,
    Tensor,
    check_type,
)
from mlx_diffgemma.checkpoint.quantization import Quantization, quantization_of
from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.model.diffusion_gemma import parameter_name

from .recipes import Recipe, fitting

SHARD_BYTES = 5_000_000_000

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


Entry = tuple[str, str, tuple[int, ...]]  # name, dtype and shape of a tensor that is written


# What fine-tuning makes of some rows of a matrix, in float32: given which, from one to another.
Change = Callable[[mx.array, int, int], mx.array]


@dataclass(frozen=True)
class Job:
    """One matrix or vector of the source and the tensors it becomes, in the order of `parts`.

    `sources` is (weight,), or (weight, scales[, biases]) of a module that is unpacked. Without a
    change, what stays in its format is copied.
    """

    sources: tuple[Tensor, ...]
    packed: Quantization | None  # the source's format
    wanted: Quantization | None  # the result's
    parts: tuple[Entry, ...]
    change: Change | None = None

    @property
    def copied(self) -> bool:
        """Whether packed numbers stay as they are."""
        return self.change is None and self.packed is not None and self.packed == self.wanted


def plan_jobs(
    tensors: dict[str, Tensor], config: dict[str, Any], recipe: Recipe, dtype: str | None
) -> tuple[list[Job], list[str]]:
    """Plan every output tensor from headers alone; return the matrices that stay unpacked, too."""
    jobs, unpacked = [], []
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if f"{module}.scales" in tensors and leaf in ("weight", "scales", "biases"):
            if leaf == "scales":  # the others are read with them
                jobs.append(unpacking(tensors, config, module, dtype))
            continue
        if tensor.dtype not in FLOATS:
            raise CheckpointError(f"{name} has the type {tensor.dtype}, which is not converted")
        if not prod(tensor.shape):
            raise CheckpointError(f"{name} has no numbers: its shape is {list(tensor.shape)}")
        stored = DTYPES.get(dtype or "", tensor.dtype)
        path = parameter_name(name).removesuffix(".weight")
        matrix = parameter_name(name).endswith(".weight") and len(tensor.shape) > 1
        rule = recipe.rule(path) if matrix else None
        wanted = rule and fitting(rule, tensor.shape[-1])
        if wanted is not None:
            jobs.append(_packing(tensor, path, wanted, stored))
            continue
        if rule is not None:
            unpacked.append(path)
        jobs.append(Job((tensor,), None, None, ((name, stored, tensor.shape),)))
    return jobs, unpacked


def _packing(tensor: Tensor, path: str, wanted: Quantization, stored: str) -> Job:
    """Plan a matrix that becomes weights, scales and perhaps biases."""
    return Job((tensor,), None, wanted, packed_parts(path, tensor.shape, wanted, stored))


def packed_parts(
    module: str, shape: tuple[int, ...], wanted: Quantization, stored: str
) -> tuple[Entry, ...]:
    """Tell the tensors of a packed matrix; `stored` is the type of affine scales and biases."""
    *rows, columns = shape
    groups = (*rows, columns // wanted.group_size)
    parts = [(f"{module}.weight", "U32", (*rows, columns * wanted.bits // 32))]
    if wanted.mode == "affine":
        parts += [(f"{module}.scales", stored, groups), (f"{module}.biases", stored, groups)]
    else:
        parts += [(f"{module}.scales", "U8", groups)]
    return tuple(parts)


def unpacking(
    tensors: dict[str, Tensor], config: dict[str, Any], module: str, dtype: str | None
) -> Job:
    """Plan weights, scales and perhaps biases that become a matrix."""
    packed = quantization_of(config, module)
    sources, shape = packed_of(tensors, module, packed)
    scales = tensors[f"{module}.scales"]
    stored = "BF16" if scales.dtype == "U8" else scales.dtype
    # Unpacked stacks of experts go back to Hugging Face's names.
    stacked = module.endswith((".gate_up_proj", ".down_proj")) and len(shape) == 3
    name = module if stacked else f"{module}.weight"
    return Job(sources, packed, None, ((name, DTYPES.get(dtype or "", stored), shape),))


def packed_of(
    tensors: dict[str, Tensor], module: str, packed: Quantization
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Return the tensors of a packed matrix, weight first, and its shape once it is unpacked."""
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
    """Divide jobs into shards of at most SHARD_BYTES; a job is never split."""
    shards: list[list[Job]] = [[]]
    filled = 0
    for job in jobs:
        size = sum(map(size_of, job.parts))
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(job)
        filled += size
    return shards


def size_of(part: Entry) -> int:
    """Return the bytes of a tensor that is written."""
    return prod(part[2]) * ITEM_BYTES[part[1]]


def parameters_of(job: Job) -> int:
    """Return how many numbers the source of a job holds."""
    bits = job.packed.bits if job.packed else 32
    return prod(job.sources[0].shape) * 32 // bits


def config_of(
    config: dict[str, Any],
    generation: dict[str, Any] | None,
    jobs: list[Job],
    recipe: Recipe,
    dtype: str | None,
) -> dict[str, Any]:
    """Return config.json as published MLX conversions write it.

    `config` is the source's, `generation` its generation_config.json if it has one.
    """
    out = {k: v for k, v in config.items() if k not in ("quantization", "quantization_config")}
    if generation is not None:
        out["generation_config"] = generation
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
