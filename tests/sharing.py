"""Ranks that are threads of this process: each has its part of a model, and its end of a group."""

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from paths import SUDOKU

from mlx_diffgemma import GenerationConfig
from mlx_diffgemma.checkpoint.load import build_model
from mlx_diffgemma.distributed.share import ALONE, Share

Result = TypeVar("Result")

# Widths of seven and five groups of 64; eight heads, which look at four of keys or, wide, at two.
TEXT: dict[str, Any] = {
    "model_type": "diffusion_gemma_text",
    "vocab_size": 500,
    "hidden_size": 128,
    "intermediate_size": 448,
    "moe_intermediate_size": 320,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_global_key_value_heads": 2,
    "global_head_dim": 64,
    "num_experts": 8,
    "top_k_experts": 2,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "sliding_window": 24,
    "max_position_embeddings": 512,
}
CONFIG: dict[str, Any] = {
    "model_type": "diffusion_gemma",
    "canvas_length": 32,
    "text_config": TEXT,
}


def write_model(
    directory: Path, packed: tuple[int, int, str] | None = None, vocabulary: int = 500
) -> Path:
    """A random model, its weights packed in groups of so many, so many bits and in this mode."""
    config = {**CONFIG, "text_config": {**TEXT, "vocab_size": vocabulary}}
    model = build_model(config, GenerationConfig(), set())
    keys = iter(mx.random.split(mx.random.key(5), 999))
    model.update(
        tree_map(lambda p: mx.random.normal(p.shape, key=next(keys)) * 0.3, model.parameters())
    )
    if packed is not None:
        size, bits, mode = packed
        nn.quantize(model, size, bits, mode=mode)
        config["quantization"] = {"group_size": size, "bits": bits, "mode": mode}
    named: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    raw = {f"{name}.weight": name for name in (n.removesuffix(".weight") for n in named)}
    if packed is None:
        named = {raw[n] if ".experts." in n else n: array for n, array in named.items()}
    directory.mkdir()
    mx.save_safetensors(str(directory / "model.safetensors"), named)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_checkpoint(directory: Path) -> Path:
    """A random model with the tokenizer of another: programs can be asked something of it."""
    known = json.loads((SUDOKU / "config.json").read_text())["text_config"]["vocab_size"]
    write_model(directory, vocabulary=known)
    for file in SUDOKU.glob("*_config.json"):
        shutil.copy(file, directory)
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(SUDOKU / name, directory)
    return directory


class Threads:
    """What all ranks have put down is read by each, once all are there."""

    def __init__(self, size: int):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=100)
        self._down: list[mx.array] = [mx.array(0)] * size
        self.bytes: list[int] = []  # of each exchange, that one rank has put down

    def put(self, rank: int, x: mx.array) -> list[mx.array]:
        """All ranks' arrays."""
        mx.eval(x)
        self._down[rank] = x
        self.barrier.wait()
        found = list(self._down)
        if not rank:
            self.bytes.append(x.nbytes)
        assert all(each.shape == x.shape and each.dtype == x.dtype for each in found)
        self.barrier.wait()
        return found


class End:
    """One rank's end of the group."""

    def __init__(self, rank: int, threads: Threads):
        self._rank, self._threads = rank, threads

    def sum(self, x: mx.array) -> mx.array:
        first, *others = self._threads.put(self._rank, x)
        for each in others:
            first = first + each
        return first

    def gather(self, x: mx.array) -> mx.array:
        return mx.stack(self._threads.put(self._rank, x))


def on_all(size: int, work: Callable[[Share], Result]) -> tuple[list[Result], Threads]:
    """What each of so many ranks makes of its share; one alone is this thread."""
    threads = Threads(size)
    if size == 1:
        return [work(ALONE)], threads

    def run(rank: int) -> Result:
        try:
            return work(Share(rank, size, End(rank, threads)))
        except BaseException:
            threads.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size))), threads
