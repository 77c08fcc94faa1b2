"""A reference and what is tested against it: results of numbers from both sides."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import mlx.core as mx
import numpy as np

from ...checkpoint.weights import DType
from ...text.tokenizer import Tokenizer
from .results import LIMITS, NO_COST, Cost, Difference, Result, Status, difference
from .sides import Pair, Side

Value = TypeVar("Value")

# Of the rows of an array, see `LIMITS`.
QUANTILE = 0.75

# The model of results that are about none.
NOTHING = "-"


@dataclass(frozen=True)
class Subject:
    """A model on both sides, in words and numbers."""

    name: str
    dtype: DType
    pair: Pair
    tokenizer: Tokenizer | None = None


class Comparison:
    """Two sides and what is known of the tested one: whether its float32 products are exact."""

    def __init__(self, reference: mx.Device, tested: mx.Device):
        self.reference = Side(reference, plain=True)
        self.tested = Side(tested, plain=False)
        self.exact = True

    def both(
        self, plain: Callable[[], Value], tested: Callable[[], Value]
    ) -> tuple[Value, Value, Cost]:
        """Return what each side computes, and the cost."""
        mx.reset_peak_memory()
        wanted, slow = self.reference.run(plain)
        found, fast = self.tested.run(tested)
        return wanted, found, Cost(slow, fast, mx.get_peak_memory())

    def result(
        self,
        check: str,
        on: Subject | None,
        limit: str,
        value: float,
        cost: Cost,
        detail: str = "",
        parts: Sequence[Difference] = (),
    ) -> Result:
        """Judge a number by its tolerance."""
        dtype: DType = on.dtype if on else "float32"
        rule = LIMITS[limit]
        column = "reduced" if dtype == "float32" and not self.exact else dtype
        tolerance: float | None = getattr(rule, column)
        status: Status = "reported"
        if tolerance is not None:
            status = "passed" if value <= tolerance else "failed"
        if not np.isfinite(value):
            status, detail = "failed", "numbers that are not finite"
        return Result(
            check=check,
            model=on.name if on else NOTHING,
            dtype=dtype,
            device=self.device,
            status=status,
            measure=rule.measure,
            value=value if np.isfinite(value) else None,
            tolerance=tolerance,
            detail=detail,
            parts=tuple(parts),
            cost=cost,
        )

    def without(self, check: str, model: str, dtype: DType, status: Status, why: str) -> Result:
        """Make the result of a check that gave no number."""
        return Result(check, model, dtype, self.device, status, "", None, None, why, (), NO_COST)

    @property
    def device(self) -> str:
        """The tested one's type: "gpu" or "cpu"."""
        return kind_of(self.tested.device)

    def strict(self, on: Subject) -> bool:
        """Return whether numbers are exact, so that every row is near and every router decided."""
        return on.dtype == "float32" and self.exact

    def difference(
        self, name: str, found: mx.array, wanted: mx.array, share: float = 1.0
    ) -> Difference:
        """Do as `results.difference` does, computed on the reference's device."""
        with self.reference.in_use():
            return difference(name, found, wanted, share)

    def worst(
        self,
        check: str,
        on: Subject,
        limit: str,
        arrays: dict[str, tuple[mx.array, mx.array]],
        cost: Cost,
        every: bool = False,
    ) -> Result:
        """Judge parts (what was found, what is right) by the worst of them and, where `every`
        row counts or numbers are exact, by its worst row."""
        share = 1.0 if every or self.strict(on) else QUANTILE
        parts = [self.difference(name, *both, share) for name, both in arrays.items()]
        # Numbers that are not finite are worst of all.
        worst = max(parts, key=lambda part: np.nan_to_num(part.relative, nan=np.inf))
        detail = f"worst: {worst.name}" if len(parts) > 1 else ""
        return self.result(check, on, limit, worst.relative, cost, detail, parts)


def kind_of(device: mx.Device) -> str:
    """Return "cpu" or "gpu"."""
    return "cpu" if device == mx.Device(mx.cpu) else "gpu"
