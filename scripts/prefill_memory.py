"""Peak memory of reading a long prompt in chunks, above weights and cache, at reduced width.

    python scripts/prefill_memory.py --tokens 4096,32768 --chunks 512,2048

Heads keep the real proportions (two key-value heads for each of four where attention slides, one in
full layers), so that attention scores grow as they do in the real model. A process a row.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from small_checkpoint import write_small


def measure(directory: str, tokens: int, chunk: int) -> dict[str, float]:
    """Read a prompt of so many tokens."""
    import mlx.core as mx

    from mlx_diffgemma import PromptCache, load

    model, _ = load(directory)
    prompt_cache = PromptCache(model)
    weights = mx.get_active_memory()
    mx.reset_peak_memory()
    started = perf_counter()
    prompt_cache.read([100 + i % 600 for i in range(tokens)], chunk)
    cache = sum(layer.state.nbytes for layer in prompt_cache.cache if layer.state is not None)
    return {
        "cache": cache,
        "above": mx.get_peak_memory() - weights - cache,
        "seconds": perf_counter() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default="4096,32768")
    parser.add_argument("--chunks", default="512,2048")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        directory, tokens, chunk = arguments.run
        print(json.dumps(measure(directory, int(tokens), int(chunk))))
        return
    print("| tokens | chunk | cache MB | peak above weights and cache MB | tokens/s |")
    print("|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        directory = write_small(
            Path(folder) / "c", arguments.layers, arguments.hidden, 4096, "float32"
        )
        for tokens in arguments.tokens.split(","):
            for chunk in arguments.chunks.split(","):
                command = [sys.executable, __file__, "--run", str(directory), tokens, chunk]
                made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                row = json.loads(made.stdout)
                print(
                    f"| {tokens} | {chunk} | {row['cache'] / 1e6:.1f} | "
                    f"{row['above'] / 1e6:.1f} | {int(tokens) / row['seconds']:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
