"""Models in the hub's cache: which there are, which of them are ours, and how they are removed."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError, Error
from ..model.config import MODEL_TYPE
from .files import read_headers, read_json
from .info import Info, info_of

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo, HFCacheInfo


class CacheError(Error):
    """Something of the hub's cache that cannot be found or is not ours to touch."""


@dataclass(frozen=True)
class CachedModel:
    """One commit of a model in the hub's cache.

    `bytes` are on the disk. `info` is what its headers say; None if they cannot be read, of which
    `lacks` tells the reason: often the weights were never fetched.
    """

    name: str
    commit: str
    refs: tuple[str, ...]
    bytes: int
    used: float  # seconds since 1970
    directory: Path
    info: Info | None
    lacks: str | None


@dataclass(frozen=True)
class Cache:
    """What lies in the hub's cache: our models, and names of everything else."""

    models: tuple[CachedModel, ...]
    others: tuple[str, ...]


def scan(dtype: str | None = None) -> Cache:
    """Look through the hub's cache; `dtype` is what would be computed in, as in `info_of`."""
    models: list[CachedModel] = []
    others: list[str] = []
    for repo in sorted(_repos(), key=lambda repo: repo.repo_id):
        ours = _ours(repo, dtype)
        models += ours
        if not ours:
            others.append(repo.repo_id)
    return Cache(tuple(models), tuple(others))


def remove(name: str) -> int:
    """Remove all commits of a model from the hub's cache; returns the bytes that are free now.

    Raises:
        CacheError: it is not in the cache, is not ours to remove, or the disk refuses.
    """
    found, repo = _cache(), removable(name)
    assert found is not None  # as something was found in it
    plan = found.delete_revisions(*(revision.commit_hash for revision in repo.revisions))
    with suppress(OSError):  # older versions of the library raise it, newer ones log a warning
        plan.execute()
    if repo.repo_path.exists():
        raise CacheError(f"{repo.repo_path} could not be removed")
    return plan.expected_freed_size


def removable(name: str) -> "CachedRepoInfo":
    """Find a model of ours in the hub's cache.

    Raises:
        CacheError: it is not there, or is something else.
    """
    for repo in _repos():
        if repo.repo_id == name and repo.repo_type == "model":
            if not _ours(repo, None):
                raise CacheError(
                    f"{name} is in the hub's cache, but is no model of this package; `hf cache rm` "
                    "removes it"
                )
            return repo
    raise CacheError(f"{name} is not in the hub's cache")


def _cache() -> "HFCacheInfo | None":
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        return scan_cache_dir(constants.HF_HUB_CACHE)
    except (CacheNotFound, ValueError):  # a file in its place is a ValueError
        return None


def _repos() -> "list[CachedRepoInfo]":
    found = _cache()
    return list(found.repos) if found is not None else []


def _ours(repo: "CachedRepoInfo", dtype: str | None) -> list[CachedModel]:
    """Return the commits of a repository whose config is one of ours."""
    if repo.repo_type != "model":
        return []
    made = []
    for revision in repo.revisions:
        directory = revision.snapshot_path
        try:
            if read_json(directory, "config.json").get("model_type") != MODEL_TYPE:
                continue
        except CheckpointError:
            continue
        info = lacks = None
        try:
            info = info_of(read_headers(directory), dtype)
        except CheckpointError as error:
            weights = list(directory.glob("*.safetensors"))
            lacks = str(error) if weights else "its weights were not fetched"
        made.append(
            CachedModel(
                repo.repo_id,
                revision.commit_hash,
                tuple(sorted(revision.refs)),
                revision.size_on_disk,
                revision.last_modified,
                directory,
                info,
                lacks,
            )
        )
    return sorted(made, key=lambda model: model.used, reverse=True)
