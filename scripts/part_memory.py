"""Measure what loading a rank's part of a checkpoint takes: python scripts/part_memory.py DIR 0 2

Prints bytes of the part's weights, MLX's peak while they are loaded, and the process's beside what
it took before.
"""

import resource
import sys
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_diffgemma.checkpoint.files import read_headers
from mlx_diffgemma.checkpoint.load import model_of, part_of
from mlx_diffgemma.distributed.share import Share


def peak() -> float:
    """The process's, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main() -> None:
    directory, rank, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    headers = read_headers(directory)
    before = peak()
    model = model_of(headers, None, part_of(headers, Share(rank, size)))
    held = sum(array.nbytes for _, array in tree_flatten(model.parameters())) / 1e9
    print(
        f"rank {rank} of {size}: weights {held:.3f} GB, peak of MLX "
        f"{mx.get_peak_memory() / 1e9:.3f} GB, of the process {peak() - before:.3f} GB"
    )


if __name__ == "__main__":
    main()
