"""What each recipe would make of a checkpoint, from its headers alone: on the disk, in memory."""

from dataclasses import dataclass
from pathlib import Path

from mlx_diffgemma.checkpoint.files import Headers, Tensor
from mlx_diffgemma.checkpoint.fit import MACS
from mlx_diffgemma.checkpoint.info import info_of

from .plan import config_of, plan_jobs, size_of
from .recipes import RECIPES, Recipe
from .staging import ConvertError

# Tokens of context that the memory is told for, and that a Mac has to hold.
CONTEXT = 8192


@dataclass(frozen=True)
class Estimate:
    """Bytes of the result, and in memory with `context` tokens; `macs` are the gigabytes of Macs
    whose GPU may hold all of that without swapping."""

    recipe: str
    context: int
    disk: int
    memory: int
    macs: tuple[int, ...]


def estimates(headers: Headers, dtype: str | None = None) -> list[Estimate]:
    """Compute what each recipe would make; `dtype` is computed in, None keeps the source's.

    Raises:
        CheckpointError: the config is not one of ours, or a tensor is not converted.
        ConvertError: it is quantized already, which no recipe goes on with.
    """
    if any(name.endswith(".scales") for name in headers.tensors):
        raise ConvertError(f"{headers.directory} is quantized already: no recipe applies to it")
    return [_estimate(name, recipe, headers, dtype) for name, recipe in RECIPES.items()]


def _estimate(name: str, recipe: Recipe, headers: Headers, dtype: str | None) -> Estimate:
    jobs, _ = plan_jobs(headers.tensors, headers.config, recipe, None)
    made = {
        part[0]: Tensor(*part, Path("model.safetensors"), 0, size_of(part))
        for job in jobs
        for part in job.parts
    }
    config = config_of(headers.config, None, jobs, recipe, None)
    info = info_of(Headers(headers.directory, config, made), dtype)
    context = min(CONTEXT, info.context)
    needed = info.memory_needed(context)
    macs = tuple(size for size, usable in MACS.items() if needed <= usable)
    return Estimate(name, context, info.bytes, needed, macs)
