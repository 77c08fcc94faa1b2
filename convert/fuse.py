"""An adapter becomes part of the weights: a checkpoint as its source, with other numbers in it."""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_diffgemma.checkpoint import peft
from mlx_diffgemma.checkpoint.adapter import Stored, find_adapter, put_adapter, read_adapter
from mlx_diffgemma.checkpoint.files import FLOATS, Headers, read_headers, resolve
from mlx_diffgemma.checkpoint.load import (
    build_model,
    check_tensors,
    load,
    read_generation,
)
from mlx_diffgemma.checkpoint.quantization import (
    MODES,
    Quantization,
    quantization_of,
    quantization_settings,
)
from mlx_diffgemma.checkpoint.weights import read_weights
from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.model.adapters import LoRAExperts
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma, is_text, parameter_name
from mlx_diffgemma.model.vision import is_vision

from .card import model_card
from .pipeline import check_free, copy_files
from .plan import Job, packed_of, packed_parts, split, unpacking
from .recipes import EIGHT, fitting
from .source import Source
from .staging import ConvertError, check_vacant, staged, workspace_of, write_json
from .write import Written, write_shards


@dataclass(frozen=True)
class Fused:
    """What was written: so many matrices, or whole parameters, are others than the source's, and
    so many of them were packed again."""

    directory: Path
    changed: int
    packed: int
    bytes: int
    shards: int
    seconds: float


@dataclass(frozen=True)
class LowRank:
    """Makes rows of matrices into those with low-rank terms added, and perhaps of other lengths.

    Attributes:
        a, b: (experts, r, in) and (experts, out, r); of a matrix alone there is one expert.
        scale: stands before their product.
        lengths: (out,), what DoRA has learnt the rows' lengths to be.
    """

    a: mx.array
    b: mx.array
    scale: float
    lengths: mx.array | None = None

    def __call__(self, rows: mx.array, start: int, stop: int) -> mx.array:
        """Of rows start..stop (stop - start, in), counted through all experts."""
        outputs, done = self.b.shape[1], []
        at = start
        while at < stop:
            expert, first = divmod(at, outputs)
            last = min(outputs, first + stop - at)
            low = self.b[expert, first:last].astype(mx.float32) * self.scale
            done.append(low @ self.a[expert].astype(mx.float32))
            at += last - first
        changed = rows + (done[0] if len(done) == 1 else mx.concatenate(done))
        if self.lengths is not None:
            wanted = self.lengths[start:stop].astype(mx.float32)
            changed *= (wanted / mx.linalg.norm(changed, axis=-1))[:, None]
        return changed


def stream_fuse(
    source: str | Path,
    adapter: str | Path,
    destination: str | Path,
    *,
    dequantize: bool = False,
    bits: int | None = None,
    revision: str | None = None,
) -> Generator[Written | Fused]:
    """Write a checkpoint with an adapter in its weights, reporting each slice, then the result.

    What the adapter does not touch is copied; what it does is computed in float32 and stored as the
    source stores it, packed again in the same format. Peak memory does not depend on the source's
    size. As in a conversion, a directory with the destination's name is complete.

    Args:
        source: directory or hub name.
        adapter: directory or hub name, see `load`.
        destination: must not exist, or be an empty directory.
        dequantize: unpack all that is quantized, so that nothing is rounded to few bits again.
        bits: pack the matrices that change in so many bits; None is the format that they had.
        revision: branch, tag or commit of a source on the hub.

    Raises:
        CheckpointError: source or adapter are missing, damaged, or not for each other.
        ConvertError: the destination is taken, the disk too small, or the adapter changes encoder
            and decoder in two ways; before anything is written. Or a number comes out infinite.
    """
    started = time.perf_counter()
    target = Path(destination)
    check_vacant(target)
    if bits is not None:
        _check_bits(bits, dequantize)
    stored = read_adapter(find_adapter(str(adapter)))
    directory = resolve(str(source), revision=revision)
    if directory.resolve().is_relative_to(workspace_of(target).resolve()):
        raise ConvertError(f"{source} is where {target} is written")
    headers = read_headers(directory)
    jobs = plan_fusion(headers, stored, dequantize, bits)
    try:
        with staged(target) as stage:
            files = Source(jobs, None, stage.source)
            check_free(target.parent, files.room(0))
            for event in write_shards(stage, split(jobs), files, {}):
                if isinstance(event, Written):  # nothing is fetched
                    yield event
            copy_files(directory, stage.fresh)
            card = model_card(
                directory, str(source), target.name, f"fine-tuned with mlx-diffgemma: {stored.kind}"
            )
            (stage.fresh / "README.md").write_text(card, encoding="utf-8")
            write_json(stage.fresh / "config.json", _config(headers, jobs))
    except OSError as error:
        raise ConvertError(f"writing {target} failed: {error.strerror or error}") from None
    yield Fused(
        directory=target,
        changed=sum(job.change is not None or job.sources[0].file == stored.file for job in jobs),
        packed=sum(job.change is not None and job.wanted is not None for job in jobs),
        bytes=sum(path.stat().st_size for path in target.glob("*.safetensors")),
        shards=len(split(jobs)),
        seconds=time.perf_counter() - started,
    )


def _check_bits(bits: int, dequantize: bool) -> None:
    known = sorted(MODES["affine"][1])
    if bits not in known:
        raise ConvertError(f"bits is one of {', '.join(map(str, known))}, not {bits}")
    if dequantize:
        raise ConvertError("dequantize goes with no bits: nothing stays packed")


def plan_fusion(
    headers: Headers, stored: Stored, dequantize: bool = False, bits: int | None = None
) -> list[Job]:
    """Plan every tensor that is written, once source and adapter are known to go together.

    Raises:
        CheckpointError, ConvertError: as `stream_fuse`.
    """
    model = _adapted(headers, stored)
    changes = dict(_changes(model))
    whole = stored.tensors if stored.config.fine_tune_type == "full" else {}
    jobs = []
    for name, tensor in headers.tensors.items():
        if not is_text(name) and not is_vision(name):
            continue  # a copy of what is tied would keep the old numbers
        module, _, leaf = name.rpartition(".")
        if f"{module}.scales" in headers.tensors and leaf in ("weight", "scales", "biases"):
            if leaf == "scales":  # the others are read with them
                change = changes.get(module)
                if dequantize:
                    plain = unpacking(headers.tensors, headers.config, module, None)
                    jobs.append(replace(plain, change=change))
                else:
                    jobs.append(_packed_job(headers, module, change, bits))
            continue
        if tensor.dtype not in FLOATS:
            raise CheckpointError(f"{name} has the type {tensor.dtype}, which is not written")
        parameter = parameter_name(name)
        change = changes.get(parameter.removesuffix(".weight"))
        parts = ((name, tensor.dtype, tensor.shape),)
        if not prod(tensor.shape):
            raise CheckpointError(f"{name} has no numbers: its shape is {list(tensor.shape)}")
        jobs.append(Job((whole.get(parameter, tensor),), None, None, parts, change))
    return jobs


def _packed_job(headers: Headers, module: str, change: LowRank | None, bits: int | None) -> Job:
    """Plan a quantized matrix that stays so, perhaps in other bits where it changes."""
    packed = quantization_of(headers.config, module)
    sources, shape = packed_of(headers.tensors, module, packed)
    wanted = packed
    if change is not None and bits is not None:
        wanted = fitting(Quantization(EIGHT.group_size, bits), shape[-1]) or packed
    if wanted == packed:
        parts = tuple((each.name, each.dtype, each.shape) for each in sources)
        return Job(sources, packed, packed, parts, change)
    scales = headers.tensors[f"{module}.scales"].dtype
    stored = "BF16" if scales == "U8" else scales
    return Job(sources, packed, wanted, packed_parts(module, shape, wanted, stored), change)


def _adapted(headers: Headers, stored: Stored) -> DiffusionGemma:
    """The model with its adapter, of which only the adapter's numbers are read.

    Raises:
        CheckpointError, ConvertError: as `stream_fuse`.
    """
    quantization_settings(headers.config)
    text = {name: tensor for name, tensor in headers.tensors.items() if is_text(name)}
    model = build_model(headers.config, read_generation(headers.directory, headers.config), {*text})
    check_tensors(model, text)
    put_adapter(model, stored)
    if stored.sided is not None:
        two = peft.differing(stored.sided, read_weights(stored.tensors, None))
        if two is not None:
            raise ConvertError(
                f"{stored.directory} changes {two} in two ways, one for the encoder and one for "
                "the decoder, which share one matrix: it can be loaded, not fused"
            )
    return model


def _changes(model: DiffusionGemma) -> Iterator[tuple[str, LowRank]]:
    """The adapted modules of a model, by their names."""
    from mlx_lm.tuner.dora import DoRALinear
    from mlx_lm.tuner.lora import LoRALinear

    for name, module in model.named_modules():
        if isinstance(module, LoRAExperts):
            yield name, LowRank(module.lora_a, module.lora_b, module.scale)
        elif isinstance(module, (LoRALinear, DoRALinear)):
            lengths = module.m if isinstance(module, DoRALinear) else None
            yield name, LowRank(module.lora_a.T[None], module.lora_b.T[None], module.scale, lengths)


def _config(headers: Headers, jobs: list[Job]) -> dict[str, Any]:
    """The source's config.json, with what is packed in other bits, or without its quantization."""
    names = ("quantization", "quantization_config")
    if not any(job.wanted for job in jobs):
        return {key: value for key, value in headers.config.items() if key not in names}
    others = {
        job.parts[0][0].removesuffix(".weight"): {
            "group_size": job.wanted.group_size,
            "bits": job.wanted.bits,  # without a mode it is affine
        }
        for job in jobs
        if job.wanted is not None and job.wanted != job.packed
    }
    settings = {**quantization_settings(headers.config), **others}
    return {**headers.config, **(dict.fromkeys(names, settings) if others else {})}


# Text of the sample: its first part is the prompt, the rest begins the canvas.
_SAMPLE = (
    "A fused model should write what the model with its adapter beside it writes. Whether it does "
    "is seen where the likeliest token of a position is another one than before. "
)


def argmax_of(
    path: str | Path, adapter: str | Path | None = None, revision: str | None = None
) -> np.ndarray:
    """The likeliest tokens of a model at each position of a canvas half of which is noise.

    Raises:
        TooLarge: the model does not fit into memory.
        CheckpointError: as `load`.
    """
    model, tokenizer = load(path, adapter=adapter, revision=revision)
    length = model.config.canvas_length
    ids = (tokenizer.encode(_SAMPLE) * (2 * length))[: 2 * length]
    rng = np.random.default_rng(0)
    noise = rng.integers(0, model.config.vocab_size, length)
    canvas = np.where(rng.random(length) < 0.5, noise, ids[length:])
    cache = model.make_cache()
    model.encode(mx.array([ids[:length]]), cache, evaluate=mx.eval)
    mx.eval([layer.state for layer in cache])
    logits = model(mx.array(canvas)[None].astype(mx.int32), cache)
    return np.array(mx.argmax(logits[0], axis=-1))


def changed_argmax(
    source: str | Path,
    adapter: str | Path,
    fused: Path,
    *,
    revision: str | None = None,
) -> float:
    """The share of a sample's positions at which the fused model prefers another token.

    The models are loaded one after the other; errors as in `argmax_of`.
    """
    before = argmax_of(source, adapter, revision)
    mx.clear_cache()
    return float(np.mean(before != argmax_of(fused)))
