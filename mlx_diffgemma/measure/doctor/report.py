"""Results as lines of a table and as JSON."""

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import mlx.core as mx
from rich.filesize import decimal

from ...checkpoint.fit import free_memory
from ..bench import machine
from .comparison import kind_of
from .results import LIMITS, Result


def sentence(text: str) -> str:
    """Return the first line of a message, without paths: reports are pasted into issues."""
    line = (text.strip().splitlines() or [""])[0]
    return re.sub(r"(?:~|\b[A-Za-z]:)?[/\\][^\s'\",:;)]*", "(path)", line)[:300]


def about(reference: mx.Device, tested: mx.Device) -> dict[str, Any]:
    """Return versions, chip, memory and devices; nothing of who asks."""
    known = {key: value for key, value in machine().items() if key != "device"}
    return {
        **known,
        "reference": kind_of(reference),
        "tested": kind_of(tested),
        "gpu": mx.is_available(mx.gpu),
        "free_memory": free_memory(),
    }


def introduction(known: dict[str, Any]) -> list[str]:
    """Return lines before the table."""
    chip = known["device_info"].get("device_name", "unknown chip")
    lines = [
        f"mlx-diffgemma {known['mlx_diffgemma']}, MLX {known['mlx']}, Python {known['python']}",
        f"{known['system']}, {chip}, {decimal(known['free_memory'])} free",
    ]
    if not known["gpu"]:
        lines.append("There is no GPU here: what is tested is the CPU.")
    lines.append(
        f"The {known['tested'].upper()} as it is used, against plain float32 on the "
        f"{known['reference'].upper()}: nothing compiled, merged, packed or in blocks."
    )
    heads = ("check", "model", "type", "value", "tolerance", "tested", "plain", "peak")
    return [*lines, "", _columns(*heads)]


def _columns(*cells: str) -> str:
    widths = (27, 41, 8, 9, 9, 9, 9, 9)
    left = "".join(cell.ljust(width + 1) for cell, width in zip(cells[:3], widths, strict=False))
    return left + " ".join(c.rjust(w) for c, w in zip(cells[3:8], widths[3:], strict=True))


def line(found: Result) -> str:
    """Return a row of the table."""
    cost = found.cost
    row = _columns(
        found.check,
        found.model,
        found.dtype,
        "" if found.value is None else f"{found.value:.1e}",
        "" if found.tolerance is None else f"{found.tolerance:.0e}",
        f"{cost.tested_seconds:.3f} s",
        f"{cost.reference_seconds:.3f} s",
        decimal(cost.peak_memory),
    )
    return f"{row}  {found.status}{': ' if found.detail else ''}{found.detail}"


def conclusion(results: Sequence[Result], seconds: float) -> str:
    """Return the last line."""
    said = [f"{count} {status}" for status, count in counted(results).items() if count]
    return f"{', '.join(said)}, in {seconds:.0f} s"


def counted(results: Sequence[Result]) -> dict[str, int]:
    """Return how many results there are of each status."""
    states = ("passed", "failed", "skipped", "reported")
    return {state: sum(found.status == state for found in results) for state in states}


def as_json(known: dict[str, Any], results: Sequence[Result], seconds: float) -> dict[str, Any]:
    """Return everything as JSON, tolerances and their reasons included."""
    return {
        **known,
        "seconds": seconds,
        "counts": counted(results),
        "limits": {name: asdict(limit) for name, limit in LIMITS.items()},
        "results": [asdict(found) for found in results],
    }
