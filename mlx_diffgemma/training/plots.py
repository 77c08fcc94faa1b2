"""The log of a run as a picture: losses above, exact answers below."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..files import replacing
from .events import LEVELS

# What there is to say where the library is missing.
NO_PLOTS = "progress.svg needs matplotlib: pip install 'mlx-diffgemma[plot]'"


def can_plot() -> bool:
    """Whether the library is installed; it is an extra."""
    return find_spec("matplotlib") is not None


def plot(path: Path, log: Sequence[dict[str, Any]]) -> None:
    """Draw a log (see `folder.read_log`) into an SVG file.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen

    lines = {name: _of(log, name) for name in ("trained", "validated", "succeeded")}
    figure = Figure(figsize=(8, 7))
    losses, success = figure.subplots(2, 1, sharex=True)
    trained = lines["trained"]
    for name in ("denoising", "reading"):
        losses.plot(*_points(trained, [each[name] for each in trained]), label=f"training, {name}")
    valid = lines["validated"]
    for i, level in enumerate(LEVELS):
        values = [each["denoising"][i] for each in valid]
        losses.plot(*_points(valid, values), "o--", label=f"validation, {level:.0%} noise")
    losses.set_ylabel("loss (nats a token)")
    answered = lines["succeeded"]
    values = [100 * each["right"] / each["cases"] for each in answered]
    success.plot(*_points(answered, values), "o-", label="validation, exact answers")
    success.set(xlabel="iteration", ylabel="exact answers (%)", ylim=(-2, 102))
    for axes in (losses, success):
        axes.grid(alpha=0.3)
        axes.legend()
    with replacing(path, suffix=".svg") as fresh:
        figure.savefig(fresh, metadata={"Date": None})


def _of(log: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [each for each in log if each.get("event") == name and each.get("of") != "test"]


def _points(
    lines: Sequence[dict[str, Any]], values: Sequence[float]
) -> tuple[list[int], Sequence[float]]:
    return [each["iteration"] for each in lines], values
