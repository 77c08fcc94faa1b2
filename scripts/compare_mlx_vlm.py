"""mlx-vlm and mlx-diffgemma on the same random weights, one process each, in turns.

    python scripts/compare_mlx_vlm.py --vlm-python /opt/v/vlm/bin/python --repeats 3

Vocabulary and canvas are the real ones, width and layers are cut; the sampler is the reference's in
both, the number of steps is fixed (random weights never converge). Prints a Markdown table for
`docs/performance.md`: medians, and the ratio of ours to theirs. The last row counts one step, see
`count_kernels.py`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from small_checkpoint import write_small

HERE = Path(__file__).parent
CONVERSATION = 1024  # tokens of a first turn


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vlm-python", required=True, help="Python of an environment with mlx-vlm")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=262144)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kinds", default="float32,bfloat16,quantized")
    parser.add_argument("--no-count", action="store_true", help="leave out kernels and bytes")
    arguments = parser.parse_args()
    own = f"compare_mlx_vlm.py --layers {arguments.layers} --hidden {arguments.hidden}"
    print("| | ours | mlx-vlm | ratio | made by |\n|---|---|---|---|---|", flush=True)

    def row(name: str, ours: float, theirs: float, unit: str, command: str) -> None:
        shown = [f"{value:.3g} {unit}".strip() for value in (ours, theirs)]
        print(f"| {name} | {' | '.join(shown)} | {ours / theirs:.2f} | `{command}` |", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for kind in arguments.kinds.split(","):
            directory = write_small(
                Path(folder) / kind, arguments.layers, arguments.hidden, arguments.vocabulary, kind
            )
            # Reading needs no vocabulary; with a small one the steps in between are short.
            reader = write_small(
                Path(folder) / f"{kind}-reader", arguments.layers, arguments.hidden, 4096, kind
            )
            found: dict[str, list[dict[str, Any]]] = {"our": [], "vlm": []}
            turns: dict[str, list[dict[str, Any]]] = {"our": [], "vlm": []}
            pythons = {"our": sys.executable, "vlm": arguments.vlm_python}
            for _ in range(arguments.repeats):
                for name, python in pythons.items():
                    worker = [python, str(HERE / f"{name}_worker.py")]
                    sizes = ["--steps", str(arguments.steps), "--prompt", str(arguments.prompt)]
                    found[name].append(run([*worker, str(directory), *sizes]))
                    if kind == "float32":
                        turn = ["--turns", str(CONVERSATION)]
                        turns[name].append(run([*worker, str(reader), *sizes, *turn]))
            command = f"{own} --kinds {kind} --steps {arguments.steps}"

            def compare(
                what: str,
                key: str,
                unit: str,
                scale: float = 1,
                runs: dict[str, list[dict[str, Any]]] = found,
                kind: str = kind,
                command: str = command,
            ) -> None:
                values = [middle([r[key] for r in runs[name]]) / scale for name in ("our", "vlm")]
                row(f"{what}, {kind}", *values, unit, command)

            compare("peak of a step above the weights", "above", "GB", 1e9)
            compare("peak of a generation", "peak", "GB", 1e9)
            compare("peak of loading", "load_peak", "GB", 1e9)
            compare("loading", "load_seconds", "s")
            if kind == "float32":
                compare("a step", "step_seconds", "s")
                compare("processor time of a step", "step_cpu", "s")
                compare(f"a canvas of {arguments.steps} steps", "seconds", "s")
                compare("first draft", "first", "s")
                compare("reading a second turn, everything anew", "second_turn_cold", "s", 1, turns)
                compare("reading a second turn, with a cache", "second_turn", "s", 1, turns)
    if not arguments.no_count:
        count(arguments.vlm_python, row)


def count(python: str, row: Any) -> None:
    """The rows of `count_kernels.py`."""
    command = [sys.executable, str(HERE / "count_kernels.py"), "--vlm-python", python, "--json"]
    made = run(command)
    kernels = [sum(made[name]["kernels"].values()) for name in ("ours", "vlm")]
    moved = [
        (made[name]["vocabulary_read"] + made[name]["vocabulary_written"]) / 1e9
        for name in ("ours", "vlm")
    ]
    arrays = [made[name]["vocabulary_arrays"] for name in ("ours", "vlm")]
    row("kernels of a step, 30 layers, counted", *kernels, "", "count_kernels.py")
    row("vocabulary bytes of a step, counted", *moved, "GB", "count_kernels.py")
    row("vocabulary arrays of a step, counted", *arrays, "", "count_kernels.py")


def run(command: list[str]) -> dict[str, Any]:
    """The JSON object that a script prints last."""
    made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    values: dict[str, Any] = json.loads(made.stdout.splitlines()[-1])
    return values


def middle(values: list[Any]) -> float:
    """The median of numbers, or of all numbers of lists."""
    flat = [x for value in values for x in (value if isinstance(value, list) else [value])]
    return float(median(flat))


if __name__ == "__main__":
    main()
