"""Which of the processes that `mlx.launch` has started this one is; nothing of MLX is imported."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Error


class LaunchError(Error):
    """Processes that cannot work together, or one of them that is lost."""


@dataclass(frozen=True)
class Place:
    """Rank `rank` of `size`; `host` is the address at which the others reach rank 0."""

    rank: int = 0
    size: int = 1
    host: str = "127.0.0.1"

    @property
    def leads(self) -> bool:
        """Whether it owns the terminal and all files."""
        return self.rank == 0


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """Read what `mlx.launch` has set; a process that was started alone is rank 0 of 1.

    Raises:
        LaunchError: it was set by something else, or is damaged.
    """
    if "OMPI_COMM_WORLD_SIZE" in environment and environment["OMPI_COMM_WORLD_SIZE"] != "1":
        raise LaunchError("mpi is not supported; mlx.launch has --backend ring and jaccl")
    if "MLX_RANK" not in environment:
        return Place()
    try:
        rank = int(environment["MLX_RANK"])
        if "MLX_IBV_DEVICES" in environment:
            size = len(_listed(environment["MLX_IBV_DEVICES"]))
            first = environment["MLX_JACCL_COORDINATOR"]
        elif "MLX_HOSTFILE" in environment:
            nodes = _listed(environment["MLX_HOSTFILE"])
            if not nodes:  # one process, which needs no ring
                return Place()
            size, first = len(nodes), nodes[0][0]
        else:
            raise LaunchError("mlx.launch --backend ring or jaccl is supported, and no other")
        host = first.rpartition(":")[0].strip("[]")
        if not host or not 0 <= rank < size:
            raise ValueError(first)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise LaunchError(f"what mlx.launch has set cannot be read: {error!r}"[:300]) from None
    return Place(rank, size, host)


def _listed(path: str) -> list[Any]:
    """The JSON list of a file; an empty file is an empty list."""
    text = Path(path).read_text(encoding="utf-8").strip()
    found = json.loads(text) if text else []
    if not isinstance(found, list):
        raise ValueError("no list")
    return found
