"""Writes what has been done and what is going on as Prometheus reads it."""

from collections.abc import Sequence
from dataclasses import asdict

import mlx.core as mx

from .worker import Worker


def metrics_of(workers: Sequence[Worker]) -> str:
    """Write counters and gauges of each model, and of the memory that they share."""
    lines: list[str] = []

    def add(key: str, kind: str, values: dict[str, int]) -> None:
        lines.append(f"# TYPE diffgemma_{key} {kind}")
        lines.extend(f"diffgemma_{key}{labels} {value}" for labels, value in values.items())

    labels = [f'{{model="{_escaped(worker.name)}"}}' for worker in workers]
    counted = [asdict(worker.counters) for worker in workers]
    for key in counted[0]:
        values = [each[key] for each in counted]
        add(f"{key}_total", "counter", dict(zip(labels, values, strict=True)))
    gauges = {
        "requests_waiting": [each.waiting for each in workers],
        "requests_running": [each.running for each in workers],
        "model_loaded": [int(each.loaded) for each in workers],
    }
    for key, values in gauges.items():
        add(key, "gauge", dict(zip(labels, values, strict=True)))
    add("memory_active_bytes", "gauge", {"": mx.get_active_memory()})
    add("memory_peak_bytes", "gauge", {"": mx.get_peak_memory()})
    return "\n".join(lines) + "\n"


def _escaped(name: str) -> str:
    """Write a name within quotes."""
    return name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
