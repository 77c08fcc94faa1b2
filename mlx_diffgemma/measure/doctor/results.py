"""What a check finds, how large it may be, and how far two arrays are from each other."""

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import numpy as np

from ...checkpoint.weights import DType

Status = Literal["passed", "failed", "skipped", "reported"]


@dataclass(frozen=True)
class Limit:
    """What is measured, how large it may be by the type that is computed in, and why.

    `reduced` is for float32 on devices that round its products, None is no limit: the number is
    only reported.
    """

    measure: str
    why: str
    float32: float | None
    reduced: float | None
    bfloat16: float | None
    float16: float | None


ROWS = "relative error of rows"

SHARE = "share that differs"

NATS = "largest difference in nats"

ROUNDED = "a dozen roundings of the type; in float32 room for powers and cosines of other libraries"

# The one home of all tolerances. Outside exact float32 a router that is undecided between two
# experts may take the other one and change a whole row. Of a layer such rows do not count; where
# layers follow one another, rows are judged by the 75th percentile.
LIMITS = {
    "products": Limit("relative error", "as float32 or as TF32, see EXACT", *[2e-3] * 4),
    "ids": Limit(SHARE, "bits are bits", *[0.0] * 4),
    "noise": Limit("largest difference", "two logarithms, each within some ulps", *[1e-4] * 4),
    "layer": Limit(ROWS, f"one layer, the same input: {ROUNDED}", 1e-4, 1e-2, 6e-2, 1e-2),
    "stack": Limit(ROWS, "errors of all layers add up", 1e-3, 5e-2, 2e-1, 5e-2),
    "nats": Limit(NATS, "logits of up to 50, rounded", 1e-3, 1e-1, 3e-1, 5e-2),
    "self_conditioning": Limit(
        ROWS, "probabilities and rows of the table, rounded", 1e-4, 1e-2, 6e-2, 1e-2
    ),
    "canvases": Limit(SHARE, "one near tie changes all later steps", 0.0, *[None] * 3),
    "broken": Limit("share that is broken", "a promise, whatever the numbers", *[0.0] * 4),
}


@dataclass(frozen=True)
class Difference:
    """How far one array is from the reference's: the largest absolute difference of its numbers,
    and the relative one of its rows, which is the norm of the difference by that of the row."""

    name: str
    absolute: float
    relative: float


def difference(name: str, found: mx.array, wanted: mx.array, share: float = 1.0) -> Difference:
    """Compare two arrays; `relative` is what this share of the rows stays within, 1 is all."""
    a, b = (np.array(each.astype(mx.float32), dtype=np.float64) for each in (found, wanted))
    if a.shape != b.shape:
        raise ValueError(f"{name} has shape {a.shape}, the reference's {b.shape}")
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    length = np.linalg.norm(b, axis=-1)
    relative = np.linalg.norm(a - b, axis=-1) / np.maximum(length, np.finfo(np.float32).tiny)
    return Difference(name, float(np.abs(a - b).max()), float(np.quantile(relative, share)))


def differing(found: mx.array, wanted: mx.array) -> float:
    """Return the share of the entries that are not equal."""
    return float(np.mean(np.array(found) != np.array(wanted)))


@dataclass(frozen=True)
class Cost:
    """Seconds on both sides, first use included, and the most bytes MLX held meanwhile."""

    reference_seconds: float
    tested_seconds: float
    peak_memory: int


NO_COST = Cost(0.0, 0.0, 0)


@dataclass(frozen=True)
class Result:
    """What one check found. `value` is None where the number is not finite or there is none.

    `reported` is a number without a tolerance; `detail` says why a check failed or was skipped.
    """

    check: str
    model: str
    dtype: DType
    device: str
    status: Status
    measure: str
    value: float | None
    tolerance: float | None
    detail: str
    parts: tuple[Difference, ...]
    cost: Cost
