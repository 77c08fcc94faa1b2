"""Whether a model is as often right as it is sure: reliability by confidence, and its error."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

# Parts into which confidences from 0 to 1 are divided.
BINS = 10


@dataclass(frozen=True)
class Bin:
    """Answers with a confidence from `low` to `high`: how many, their mean confidence, and which
    share of them is right."""

    low: float
    high: float
    count: int
    confidence: float
    right: float


def reliability(answers: Sequence[tuple[float, bool]]) -> tuple[Bin, ...]:
    """Sum up confidences and whether each answer is right, in bins that are not empty.

    A bin has its lower end and not its upper one, but for the last, which has 1.
    """
    found: dict[int, list[tuple[float, bool]]] = defaultdict(list)
    for confidence, right in answers:
        found[min(int(confidence * BINS), BINS - 1)].append((confidence, right))
    return tuple(
        Bin(
            low=number / BINS,
            high=(number + 1) / BINS,
            count=len(members),
            confidence=sum(confidence for confidence, _ in members) / len(members),
            right=sum(right for _, right in members) / len(members),
        )
        for number, members in sorted(found.items())
    )


def calibration_error(bins: Sequence[Bin]) -> float:
    """Give the expected calibration error: how far confidence is from truth, over all answers."""
    total = sum(each.count for each in bins)
    return sum(each.count * abs(each.confidence - each.right) for each in bins) / total
