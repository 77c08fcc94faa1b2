"""What passes over some positions of a canvas cost, beside one over all of them: measured ratios.

    python scripts/positions.py CONFIG
    python scripts/positions.py CONFIG --positions 256,64 --repeats 1

CONFIG is a config.json. Its first sliding and its first full layer decode a canvas behind a context
(with self-conditioning's MLP and the embeddings), and the readout reads hidden states off, at the
widths of the config, in float32, with random weights: 4 GB for the real one, as a layer has fewer
experts. That changes no time on a CPU, where MLX multiplies each token by its experts by itself.
Parts are measured in processes of their own, one after the other; the numbers of positions in
turns, so that a busy machine slows all of them. Processor seconds say more than the clock's there.
Peaks are above weights, context and what the pass is given.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_diffgemma.diffusion.draws import SeededDraws
from mlx_diffgemma.diffusion.head import read_out
from mlx_diffgemma.model.config import Config
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma, Pass
from mlx_diffgemma.model.settings import GenerationConfig

PARTS = ("sliding", "full", "readout")
SMALL = 1024  # ids, where the vocabulary is not what is measured
EXPERTS = 32  # of a layer
BLOCK = 1 << 24  # weights that are drawn at once

# Computes what a step over some positions (P,) needs of a part.
Work = Callable[[mx.array | None], None]


def random_weights(module: nn.Module) -> None:
    """Uniform weights of the size that keeps a vector's length, in blocks: draws take memory."""

    def drawn(weight: mx.array) -> mx.array:
        made = mx.array(weight) if weight.ndim == 1 else mx.zeros(weight.shape)
        bound = (3 / weight.shape[-1]) ** 0.5
        rows = max(1, BLOCK // weight[0].size)
        for first in range(0, len(made) if weight.ndim > 1 else 0, rows):
            shape = made[first : first + rows].shape
            made[first : first + rows] = mx.random.uniform(-bound, bound, shape)
            mx.eval(made)
        mx.eval(made)
        return made

    module.update(tree_map(drawn, module.parameters()))


def spread(count: int, length: int) -> mx.array | None:
    """So many positions, evenly over a canvas; None is all."""
    return None if count == length else mx.arange(count) * length // count


def of_layer(config: Config, full: bool, context: int) -> Work:
    """One layer behind a context, as the loop asks for it."""
    layer = next(each for each in config.layers if (each.window is None) == full)
    vocabulary, experts = min(config.vocab_size, SMALL), min(config.num_experts, EXPERTS)
    config = replace(config, layers=(layer,), vocab_size=vocabulary, num_experts=experts)
    model = DiffusionGemma(config, GenerationConfig())
    random_weights(model)
    model.merge()
    cache = model.make_cache()
    kept = context if layer.window is None else min(context, layer.window - 1)
    new = mx.random.normal((1, 2 * layer.num_key_value_heads, config.canvas_length, layer.head_dim))
    cache[0].set_state(context, mx.random.normal((*new.shape[:2], kept, layer.head_dim)))
    canvas = mx.random.randint(0, config.vocab_size, (1, config.canvas_length))
    expected = mx.random.normal((1, config.canvas_length, config.hidden_size))
    # As a step over all positions leaves them: keys and values of a whole canvas.
    mx.eval(canvas, expected, cache[0].read(new), model.constants)

    def work(positions: mx.array | None) -> None:
        if positions is None:
            mx.eval(model.decode([Pass(canvas, cache, expected)]))
            return
        some = Pass(canvas[:, positions], cache, expected[:, positions], positions)
        mx.eval(model.decode([some]))

    return work


def of_readout(config: Config) -> Work:
    """Head, sampler and expected embedding, over the whole vocabulary."""
    model = DiffusionGemma(config, GenerationConfig())
    random_weights(model.model.decoder.embed_tokens)
    draws = SeededDraws(0, config.vocab_size)
    hidden = mx.random.normal((1, config.canvas_length, config.hidden_size))
    mx.eval(hidden)

    def work(positions: mx.array | None) -> None:
        some = hidden if positions is None else hidden[:, positions]
        seen = read_out(model, some, 0.6, draws=draws, positions=positions, self_conditioning=True)
        mx.eval(seen.sampled, seen.entropy, seen.self_conditioning)

    return work


def measure(
    config: Config, part: str, counts: list[int], context: int, repeats: int
) -> list[dict[str, float]]:
    """Medians of seconds and processor seconds, and the peak, for each number of positions."""
    work = of_readout(config) if part == "readout" else of_layer(config, part == "full", context)
    found: list[dict[str, list[float]]] = [{"seconds": [], "cpu": [], "peak": []} for _ in counts]
    work(spread(min(counts), config.canvas_length))  # compiles
    for _ in range(repeats):
        for count, each in zip(counts, found, strict=True):
            positions = spread(count, config.canvas_length)
            mx.clear_cache()
            held = mx.get_active_memory()
            mx.reset_peak_memory()
            wall, cpu = perf_counter(), process_time()
            work(positions)
            each["seconds"].append(perf_counter() - wall)
            each["cpu"].append(process_time() - cpu)
            each["peak"].append(mx.get_peak_memory() - held)
    return [{name: median(values) for name, values in each.items()} for each in found]


def report(part: str, counts: list[int], rows: list[dict[str, float]]) -> None:
    """Rows of the table; ratios are to the first number of positions."""
    first = rows[0]
    for count, each in zip(counts, rows, strict=True):
        ratio = {name: each[name] / max(first[name], 1e-12) for name in each}
        print(
            f"| {part} | {count} | {count / counts[0]:.3f} | {each['seconds']:.3g} | "
            f"{ratio['seconds']:.2f} | {each['cpu']:.3g} | {ratio['cpu']:.2f} | "
            f"{each['peak'] / 1e6:.1f} | {ratio['peak']:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("--positions", default="256,128,64,32", help="the first is compared with")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", choices=PARTS, help="measure one part, in this process")
    arguments = parser.parse_args()
    config = Config.from_dict(json.loads(arguments.config.read_text()))
    counts = [int(each) for each in arguments.positions.split(",")]
    if not all(1 <= each <= config.canvas_length for each in counts) or arguments.repeats < 1:
        parser.error(f"positions are 1 to {config.canvas_length}, repeats at least 1")
    if arguments.json:
        mx.random.seed(0)
        context, repeats = arguments.context, arguments.repeats
        print(json.dumps(measure(config, arguments.json, counts, context, repeats)))
        return
    print("| part | positions | ratio | s | ratio | processor s | ratio | peak MB | ratio |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    total = [{"seconds": 0.0, "cpu": 0.0, "peak": 0.0} for _ in counts]
    full = sum(layer.window is None for layer in config.layers)
    times = {"sliding": len(config.layers) - full, "full": full, "readout": 1}
    for part in PARTS:
        if not times[part]:
            continue
        command = [sys.executable, __file__, *sys.argv[1:], "--json", part]
        made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows = json.loads(made.stdout)
        report(part, counts, rows)
        for whole, each in zip(total, rows, strict=True):
            for name in ("seconds", "cpu"):
                whole[name] += times[part] * each[name]
            whole["peak"] = max(whole["peak"], each["peak"])
    report(f"{times['sliding']} sliding, {full} full, readout", counts, total)


if __name__ == "__main__":
    main()
