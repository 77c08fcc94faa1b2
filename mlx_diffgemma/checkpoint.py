"""Checkpoint files: where they are, what their headers say. Nothing of MLX, nothing loaded.

Weights come from safetensors files only; nothing in a repository is executed.
"""

import json
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from .errors import Error

ITEM_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
HEADER_LIMIT = 100_000_000  # bytes; the safetensors library has the same
# What is fetched from the hub. Pickles, code and other formats are not.
NEEDED = ("*.json", "*.jinja", "README.md", "LICENSE*", "NOTICE*")
WEIGHTS = ("model*.safetensors",)


# Small trained models that ship inside the package. The first is the default; the second knows
# nothing but Sudokus, and more of them.
SHIPPED = {
    name: Path(__file__).parent / "data" / name.replace("-", "_")
    for name in ("tiny", "tiny-puzzles")
}


class CheckpointError(Error):
    """A checkpoint that cannot be found, fetched, read or trusted."""


@dataclass(frozen=True)
class Tensor:
    """One tensor as a header describes it; its bytes are `file[start:end]`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int


def resolve(path_or_repo: str, *, revision: str | None = None, weights: bool = True) -> Path:
    """The directory of a checkpoint: as given, of `SHIPPED`, or fetched from the hub.

    Without a network the hub's cache serves alone. `weights` False leaves out the weights.

    Raises:
        CheckpointError: there is no such directory or repository, or it cannot be fetched.
    """
    try:
        directory = Path(path_or_repo).expanduser()
        if directory.is_dir():
            return directory
        is_file = directory.exists()
    except (OSError, RuntimeError) as error:  # too long, no permission, ~nobody
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path_or_repo[:100]} cannot be read: {reason}") from None
    if path_or_repo in SHIPPED:
        return SHIPPED[path_or_repo]
    if is_file or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path_or_repo):
        raise CheckpointError(f"{path_or_repo} is neither a directory nor a name on the hub")

    from huggingface_hub import errors, snapshot_download

    patterns = [*NEEDED, *(WEIGHTS if weights else ())]
    at = f" at revision {revision}" if revision else ""
    try:
        return Path(snapshot_download(path_or_repo, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError:
        sentence = f"{path_or_repo} is gated: accept its terms on the hub, then run `hf auth login`"
        raise CheckpointError(sentence) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{path_or_repo} has no revision {revision}") from None
    except errors.RepositoryNotFoundError:
        sentence = f"there is no directory and no repository {path_or_repo} that you can read"
        raise CheckpointError(sentence) from None
    except errors.LocalEntryNotFoundError:
        sentence = f"{path_or_repo}{at} is not in the local cache and the hub cannot be reached"
        raise CheckpointError(sentence) from None
    except Exception as error:  # whatever the HTTP library of the day raises, and bad names
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(f"{path_or_repo} could not be fetched: {reason}") from error


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """A JSON object out of a file of the checkpoint."""
    path = directory / name
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file.

    Raises:
        CheckpointError: the file is missing, not safetensors or cut off, or its tensors do not
            fill it exactly, one after the other.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, HEADER_LIMIT):
                raise CheckpointError(f"{path} is cut off or not a safetensors file")
            header = json.loads(file.read(length))
            if not isinstance(header, dict):
                raise ValueError("no JSON object")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is not a safetensors file: its header is damaged") from None
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = str(entry["dtype"]), tuple(entry["shape"])
            first, last = entry["data_offsets"]
            if not all(type(number) is int and number >= 0 for number in (*shape, first, last)):
                raise ValueError("no sizes")
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{path}: the entry of {name} is damaged") from None
        if dtype not in ITEM_BYTES:
            raise CheckpointError(f"{path}: {name} has the unknown type {dtype}")
        start, end = 8 + length + first, 8 + length + last
        if end - start != prod(shape) * ITEM_BYTES[dtype]:
            raise CheckpointError(f"{path}: the bytes of {name} do not fit its shape {list(shape)}")
        tensors[name] = Tensor(name, dtype, shape, path, start, end)
    at = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.end)):
        if tensor.end > size:
            raise CheckpointError(
                f"{path} is cut off: {tensor.name} ends at byte {tensor.end}, the file at {size}"
            )
        if tensor.start != at:
            raise CheckpointError(f"{path}: {tensor.name} leaves a gap or overlaps another tensor")
        at = tensor.end
    if at != size:
        raise CheckpointError(f"{path}: {size - at} bytes after the last tensor belong to none")
    return tensors


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint.

    They are in the files that the index names, without one in `model.safetensors`, without that in
    all `model*.safetensors`.

    Raises:
        CheckpointError: a file is missing or damaged, or does not hold what the index says.
    """
    index = directory / "model.safetensors.index.json"
    if index.exists():
        placed = read_json(directory, index.name).get("weight_map")
        if not isinstance(placed, dict) or not all(isinstance(v, str) for v in placed.values()):
            raise CheckpointError(f"{index} has no weight_map")
        files = sorted(set(placed.values()))
        if outside := [name for name in files if Path(name).name != name]:
            raise CheckpointError(f"{index} names a file outside the checkpoint: {outside[0]}")
    else:
        placed = None
        whole = directory / "model.safetensors"
        found_files = [whole] if whole.exists() else directory.glob("model*.safetensors")
        files = sorted(path.name for path in found_files)
        if not files:
            raise CheckpointError(f"{directory} has no model*.safetensors")
    tensors: dict[str, Tensor] = {}
    for name in files:
        found = read_header(directory / name)
        if twice := sorted(tensors.keys() & found.keys()):
            raise CheckpointError(f"{twice[0]} is in {tensors[twice[0]].file.name} and in {name}")
        tensors.update(found)
    for tensor, name in (placed or {}).items():
        if tensor not in tensors or tensors[tensor].file.name != name:
            raise CheckpointError(
                f"{directory / name} lacks {tensor}, which the index places there"
            )
    return tensors


@dataclass(frozen=True)
class Quantization:
    """How a module's weights are packed; the names are those of `mlx.core.quantize`."""

    group_size: int
    bits: int
    mode: str = "affine"


def quantization_settings(config: dict[str, Any]) -> dict[str, Any]:
    """MLX's quantization settings of a config, {} if it has none.

    Raises:
        CheckpointError: they are another tool's (fp8, bitsandbytes, awq, gptq, ...).
    """
    settings = config.get("quantization") or config.get("quantization_config") or {}
    if not isinstance(settings, dict):
        raise CheckpointError("config.json: quantization is not a JSON object")
    # awq and gptq settings have `bits` and `group_size` too: the method tells them apart.
    if "quant_method" in settings:
        raise CheckpointError(f"{settings['quant_method']} quantization is not supported")
    return settings


def quantization_of(config: dict[str, Any], module: str) -> Quantization:
    """What the config says of a module that has `.scales`.

    An override without a mode is affine, also where the default is another: published mxfp4, nvfp4
    and mxfp8 conversions rely on that.

    Raises:
        CheckpointError: the config says nothing of it, says that it is not quantized, or names a
            format that is not MLX's.
    """
    settings = quantization_settings(config)
    override = settings.get(module)
    if override is False:
        raise CheckpointError(f"config.json says {module} is not quantized, but it has scales")
    chosen = override if isinstance(override, dict) else settings
    size, bits, mode = chosen.get("group_size"), chosen.get("bits"), chosen.get("mode", "affine")
    if not (isinstance(size, int) and isinstance(bits, int) and size > 0 and bits > 0):
        raise CheckpointError(f"config.json does not say how {module} is quantized")
    return Quantization(size, bits, mode)
