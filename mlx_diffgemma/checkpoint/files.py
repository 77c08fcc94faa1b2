"""Checkpoint files: where they are, what their headers say. Nothing of MLX, nothing loaded.

Weights come from safetensors files only; nothing in a repository is executed.
"""

import json
import os
import re
import stat
from collections.abc import Callable, Collection
from dataclasses import dataclass
from difflib import get_close_matches
from math import prod
from pathlib import Path
from typing import Any

from ..arguments import shown
from ..errors import CheckpointError

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

FLOATS = ("F32", "BF16", "F16")  # what weights that are not packed are stored in

# Bytes of a JSON file or header. The published checkpoint's largest has 0.2 MB; so many, all of
# them of empty tensors, are still read within a second or two.
JSON_LIMIT = 5_000_000

DIMENSIONS_LIMIT = 8  # of a tensor; its size is a product, and of a million factors that takes long

NAME_LIMIT = 500  # characters of a tensor's name, which errors repeat

# What is fetched from the hub. Pickles, code and other formats are not.
NEEDED = ("*.json", "*.jinja", "tokenizer.model", "README.md", "LICENSE*", "NOTICE*")

WEIGHTS = ("model*.safetensors",)

# Small trained models that ship inside the package. The first is the default; the second knows
# Sudokus, which the first does not, and nothing else.
SHIPPED = {
    name: Path(__file__).parent.parent / "data" / name.replace("-", "_")
    for name in ("tiny", "tiny-puzzles")
}

DEFAULT = "tiny"

# A repository's folder in the hub's cache; two levels below it are its files, by commit.
_CACHED = re.compile(r"models--([\w.-]+)")


@dataclass(frozen=True)
class Tensor:
    """One tensor as a header describes it; its bytes are `file[start:end]`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int


def name_of(path_or_repo: str | None) -> str:
    """Call a model as it was asked for: a directory by its own name, all else as it is.

    None is the model that `load` takes then. Bytes that are no text become U+FFFD.
    """
    if path_or_repo is None:
        return DEFAULT
    try:
        path = Path(path_or_repo).expanduser()
        name = path.absolute().resolve().name if path.name in ("", "..") else path.name
        name = name if path.is_dir() else path_or_repo
    except (OSError, RuntimeError):  # ~nobody: `resolve` says so
        name = path_or_repo
    return os.fsencode(name or path_or_repo).decode("utf-8", "replace")


def aliases_of(path_or_repo: str | None) -> tuple[str, ...]:
    """Give further names of a model: of a hub name what stands behind its owner, of a directory in
    the hub's cache the hub name, and of a model that ships its name, wherever it lies.
    """
    name, found = name_of(path_or_repo), list[str]()
    try:
        directory = Path(path_or_repo or DEFAULT).expanduser().absolute().resolve()
        found += [shipped for shipped, where in SHIPPED.items() if directory == where.resolve()]
        if cached := _CACHED.fullmatch(directory.parent.parent.name):
            found.append(cached[1].replace("--", "/"))
        is_there = directory.is_dir()
    except (OSError, RuntimeError):  # as in `name_of`
        is_there = False
    if not is_there or found:
        found += [each.partition("/")[2] for each in (name, *found) if each.count("/") == 1]
    return tuple(dict.fromkeys(each for each in found if each and each != name))


def resolve(
    path_or_repo: str, *, revision: str | None = None, weights: bool = True, fetch: bool = True
) -> Path:
    """Find the directory of a checkpoint: as given, of `SHIPPED`, or fetched from the hub.

    Without a network the hub's cache serves alone, with `fetch` False always. `weights` False
    leaves out the weights.

    Raises:
        CheckpointError: there is no such directory or repository, or it cannot be fetched.
    """
    directory = on_this_machine(path_or_repo)
    if directory is not None:
        return directory
    from huggingface_hub import snapshot_download

    patterns = [*NEEDED, *(WEIGHTS if weights else ())]
    try:
        return Path(
            snapshot_download(
                path_or_repo,
                revision=revision,
                allow_patterns=patterns,
                local_files_only=not fetch,
            )
        )
    except Exception as error:  # whatever the HTTP library of the day raises, and bad names
        raise hub_failure(path_or_repo, revision, error) from error


def on_this_machine(path_or_repo: str) -> Path | None:
    """Find the directory of a checkpoint that need not be fetched; None is a name on the hub.

    Raises:
        CheckpointError: it is neither.
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
        raise CheckpointError(_no_checkpoint(path_or_repo, is_file=is_file))
    return None


def hub_failure(name: str, revision: str | None, error: Exception) -> CheckpointError:
    """Return the sentence for what the hub's library raised."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        said = f"{name} is gated: accept its terms on the hub, then run `hf auth login`"
    elif isinstance(error, errors.RevisionNotFoundError):
        said = f"{name} has no revision {revision}"
    elif isinstance(error, errors.RepositoryNotFoundError):
        said = f"there is no directory and no repository {name} that you can read"
    elif isinstance(error, errors.LocalEntryNotFoundError):
        at = f" at revision {revision}" if revision else ""
        said = f"{name}{at} is not in the local cache and the hub cannot be reached"
    else:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        said = f"{name} could not be fetched: {reason}"
    return CheckpointError(said)


def _no_checkpoint(given: str, *, is_file: bool) -> str:
    """What is wrong with a name that is no checkpoint's, and the way on."""
    suffix = given.rpartition(".")[2].lower()
    if suffix == "gguf":
        return (
            f"{shown_name(given)} is a GGUF file, which llama.cpp runs; this needs a directory "
            "with safetensors, such as `mlx-diffgemma convert` writes"
        )
    if is_file:
        where = str(Path(given).parent)
        rest = f"; its directory is {where}" if suffix in ("safetensors", "json") else ""
        return f"{shown_name(given)} is neither a directory nor a name on the hub, but a file{rest}"
    close = get_close_matches(given, SHIPPED, n=1)
    meant = f"; did you mean {close[0]}?" if close else ""
    return (
        f"{shown_name(given)} is neither a directory nor a name on the hub (owner/name), nor one "
        f"of the models that ship, {' and '.join(SHIPPED)}{meant}"
    )


def shown_name(given: str) -> str:
    """A path or name as a sentence repeats it."""
    return given if len(given) <= NAME_LIMIT else f"{given[:NAME_LIMIT]}..."


def size_of_file(path: Path) -> int:
    """Return the bytes of a regular file.

    Raises:
        CheckpointError: it is a directory, or a pipe, which would be waited for.
        OSError: it is missing or cannot be looked at.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a file")
    return status.st_size


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """Read a JSON object from a file of the checkpoint."""
    path = directory / name
    try:
        if size_of_file(path) > JSON_LIMIT:
            raise CheckpointError(f"{path} is larger than {JSON_LIMIT // 10**6} MB")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing{_instead(directory, name)}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise CheckpointError(f"{path} cannot be read: it is nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value


def _instead(directory: Path, name: str) -> str:
    """What a directory without config.json holds in its place."""
    if name != "config.json":
        return ""
    if any(directory.glob("*.gguf")):
        return "; the directory holds a GGUF file, which llama.cpp runs"
    inner = sorted(path.parent for path in directory.glob("*/config.json"))[:3]
    if inner:
        return f"; there is one in {', '.join(map(str, inner))}"
    return "; a checkpoint has it, model*.safetensors and tokenizer.json in one directory"


def read_header(path: Path) -> dict[str, Tensor]:
    """Read which tensors one safetensors file holds.

    Raises:
        CheckpointError: the file is missing, not safetensors or cut off, or its tensors do not
            fill it exactly, one after the other.
    """
    try:
        size = size_of_file(path)
        with path.open("rb") as file:
            return header_of(path, size, file.read)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def header_of(path: Path, size: int, read: Callable[[int], bytes]) -> dict[str, Tensor]:
    """Read the same of a file of `size` bytes that need not lie at `path` yet.

    `read` returns its next so many bytes, from the beginning on.

    Raises:
        CheckpointError: as `read_header`.
    """
    length = int.from_bytes(read(8), "little")
    if size < 8 or length > min(size - 8, JSON_LIMIT):
        raise CheckpointError(f"{path} is cut off or not a safetensors file")
    try:
        header = json.loads(read(length).decode(), object_pairs_hook=_named_once)
        if not isinstance(header, dict):
            raise ValueError("no JSON object")
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is not a safetensors file: its header is damaged") from None
    about = header.pop("__metadata__", None) or {}
    if not isinstance(about, dict) or not all(isinstance(v, str) for v in about.values()):
        raise CheckpointError(f"{path} is not a safetensors file: its header is damaged")
    tensors = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_filled(path, tensors, 8 + length, size)
    return tensors


def check_type(tensor: Tensor, types: tuple[str, ...]) -> None:
    """Refuse a tensor whose numbers would be read as something else than they are."""
    if tensor.dtype not in types:
        raise CheckpointError(
            f"{tensor.name} has the type {tensor.dtype}, where {' or '.join(types)} belongs"
        )


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name stands twice")  # readers differ in which of them they take
    return made


def _entry(path: Path, name: str, entry: Any, base: int) -> Tensor:
    """Read what a header says of one tensor, whose offsets count from byte `base`."""
    if not name or not name.isprintable() or len(name) > NAME_LIMIT:
        raise CheckpointError(f"{path}: {shown(name)} is not a name of a tensor")
    try:
        dtype, shape = str(entry["dtype"]), tuple(entry["shape"])
        first, last = entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, first, last)):
            raise ValueError("no sizes")
        if len(shape) > DIMENSIONS_LIMIT:
            raise ValueError("too many")
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}: the entry of {name} is damaged") from None
    if dtype not in ITEM_BYTES:
        raise CheckpointError(f"{path}: {name} has the unknown type {shown(dtype)}")
    if last - first != prod(shape) * ITEM_BYTES[dtype]:
        raise CheckpointError(f"{path}: the bytes of {name} do not fit its shape {shown(shape)}")
    return Tensor(name, dtype, shape, path, base + first, base + last)


def _check_filled(path: Path, tensors: dict[str, Tensor], start: int, size: int) -> None:
    """Refuse gaps and overlaps between bytes `start` and `size` of a file."""
    at = start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.end)):
        if tensor.end > size:
            raise CheckpointError(
                f"{path} is cut off: {tensor.name} ends at byte {shown(tensor.end)}, the file at "
                f"{size}"
            )
        if tensor.start != at:
            raise CheckpointError(f"{path}: {tensor.name} leaves a gap or overlaps another tensor")
        at = tensor.end
    if at != size:
        raise CheckpointError(f"{path}: {size - at} bytes after the last tensor belong to none")


@dataclass(frozen=True)
class Headers:
    """What a checkpoint says of itself before its weights are read: `config.json` and tensors."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def read_headers(directory: Path) -> Headers:
    """Read the config and the headers of a checkpoint directory.

    Raises:
        CheckpointError: a file is missing or damaged, or does not hold what the index says.
    """
    return Headers(directory, read_json(directory, "config.json"), read_tensors(directory))


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Read which tensors a checkpoint holds.

    They are in the files that the index names, without one in `model.safetensors`, without that in
    all `model*.safetensors`.

    Raises:
        CheckpointError: a file is missing or damaged, or does not hold what the index says.
    """
    files = {path.name for pattern in WEIGHTS for path in directory.glob(pattern)}
    return joined(directory, files, lambda name: read_header(directory / name))


def joined(
    directory: Path, files: Collection[str], read: Callable[[str], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Join the tensors of several files; arguments and errors as in `read_tensors`.

    `files` are those that there are, of which only the index has to lie in `directory`; `read`
    reads the header of one.
    """
    index = directory / "model.safetensors.index.json"
    placed: dict[str, str] = {}
    if os.path.lexists(index):
        placed = _placed(directory, index.name)
        files = set(placed.values())
    elif "model.safetensors" in files:
        files = ["model.safetensors"]
    if not files:
        raise CheckpointError(f"{directory} has no model*.safetensors")
    tensors: dict[str, Tensor] = {}
    for name in sorted(files):
        found = read(name)
        if twice := sorted(tensors.keys() & found.keys()):
            raise CheckpointError(f"{twice[0]} is in {tensors[twice[0]].file.name} and in {name}")
        tensors.update(found)
    for tensor, name in placed.items():
        if tensor not in tensors or tensors[tensor].file.name != name:
            called = tensor if tensor.isprintable() and len(tensor) <= NAME_LIMIT else shown(tensor)
            raise CheckpointError(
                f"{directory / name} lacks {called}, which the index places there"
            )
    return tensors


def _placed(directory: Path, name: str) -> dict[str, str]:
    """Read the file name, within the directory, that an index gives for each tensor."""
    placed = read_json(directory, name).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(v, str) for v in placed.values()):
        raise CheckpointError(f"{directory / name} has no weight_map")
    for file in set(placed.values()):
        if Path(file).name != file or not file.isprintable():
            raise CheckpointError(
                f"{directory / name} names a file outside the checkpoint: {shown(file)}"
            )
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{directory / name} names {shown(file)}, no safetensors file")
    return placed
