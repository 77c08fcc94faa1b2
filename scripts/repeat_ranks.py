"""Run a command under `mlx.launch` again and again: none may hang, and all must say the same.

    python scripts/repeat_ranks.py --runs 100 --ranks 2
    python scripts/repeat_ranks.py --runs 20 --typed $'1.2.\\n/undo\\n3.\\n/quit\\n' -- \\
        chat --shard -m tests/data/sudoku6 --seed 3 --steps 2 --max-tokens 60

Each run starts anew: ranks meet, load, answer and take leave. One that takes longer than
`--seconds` is ended and counted as a hang.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAUNCH = [sys.executable, "-c", "from mlx._distributed_utils.launch import main; main()"]


def run(
    ranks: int, port: int, seconds: float, command: list[str], typed: str
) -> tuple[str, str, float]:
    """What a run prints, what goes wrong, and seconds."""
    begun = time.monotonic()
    options = ["-n", str(ranks), "--backend", "ring", "--starting-port", str(port), "--"]
    process = subprocess.Popen(
        [*LAUNCH, *options, sys.executable, "-m", "mlx_diffgemma", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        printed, said = process.communicate(typed, timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return "", "hangs", seconds
    problem = "" if "exited with code" not in said else said[-1000:]
    return printed, problem, time.monotonic() - begun


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--port", type=int, default=41000, help="the first of --ranks a run")
    parser.add_argument("--typed", default="", help="what a chat is told; /quit ends it")
    parser.add_argument("command", nargs="*", help="[generate --shard, of the small Sudoku model]")
    arguments = parser.parse_args()
    puzzle = (ROOT / "tests/data/sudoku6/puzzles.txt").read_text()[:36]
    asked = ["generate", "-m", "tests/data/sudoku6", "--seed", "3", "--steps", "2", "-q", puzzle]
    command = arguments.command or [*asked, "--shard"]
    seen: dict[str, int] = {}
    times, hangs, failures = [], 0, 0
    for number in range(arguments.runs):
        # A port of its own: one that was just closed may still be taken.
        port = arguments.port + number % 100 * arguments.ranks
        printed, problem, took = run(
            arguments.ranks, port, arguments.seconds, command, arguments.typed
        )
        times.append(took)
        hangs += problem == "hangs"
        failures += bool(problem) and problem != "hangs"
        if problem:
            print(f"run {number}: {problem}", file=sys.stderr, flush=True)
        else:
            seen[printed] = seen.get(printed, 0) + 1
    ordered = sorted(times)
    facts = {
        "runs": arguments.runs,
        "ranks": arguments.ranks,
        "hangs": hangs,
        "failures": failures,
        "different answers": len(seen),
        "seconds, median": round(ordered[len(ordered) // 2], 1),
        "seconds, longest": round(ordered[-1], 1),
    }
    print(json.dumps(facts))
    raise SystemExit(hangs + failures > 0 or len(seen) != 1)


if __name__ == "__main__":
    main()
