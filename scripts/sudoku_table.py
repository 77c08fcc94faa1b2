"""How many held-out 6x6 Sudokus the trained test checkpoint solves, by steps and recipe.

    python scripts/sudoku_table.py [--puzzles N] [--steps N,N,...] [--recipes NAME,NAME,...]
        [--pinned]

Each recipe goes through the real converter first.
"""

import argparse
import tempfile
from pathlib import Path

from mlx_diffgemma import Done, Text, load, stream_generate
from mlx_diffgemma.convert import RECIPES, convert
from mlx_diffgemma.tasks.fill import fill

SUDOKU = Path(__file__).parents[1] / "tests" / "data" / "sudoku6"


def template(puzzle: str) -> str:
    """The puzzle with a hole for a digit in the place of each dot."""
    return "".join(f"{{{{c{i}:1|2|3|4|5|6}}}}" if c == "." else c for i, c in enumerate(puzzle))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--puzzles", type=int, default=400)
    parser.add_argument("--steps", default="1,2,4,8,48")
    parser.add_argument("--recipes", default="none,8bit,mixed-4-8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pinned", action="store_true", help="pin the clues, with fill")
    arguments = parser.parse_args()
    lines = (SUDOKU / "puzzles.txt").read_text().splitlines()[: arguments.puzzles]
    grids = [
        ["\n".join(cells[i : i + 6] for i in range(0, 36, 6)) for cells in line.split()]
        for line in lines
    ]
    print(f"{len(grids)} puzzles: % solved (mean steps, mean tokens per forward pass)")
    print("recipe      " + "".join(f"{'N=' + n:>20}" for n in arguments.steps.split(",")))
    for recipe in arguments.recipes.split(","):
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / recipe
            convert(SUDOKU, out, recipe=RECIPES[recipe])
            model, tokenizer = load(out)
        row = f"{recipe:<12}"
        for steps in map(int, arguments.steps.split(",")):
            solved = passes = changed = 0
            rate = 0.0
            for number, (puzzle, solution) in enumerate(grids):
                text = ""
                # One seed for all would give all the same noise: luck would not average.
                seed = 1000 * arguments.seed + number
                if arguments.pinned:
                    filled = fill(
                        model, tokenizer, template(puzzle), prompt=puzzle, steps=steps, seed=seed
                    )
                    changed += any(
                        a not in (b, ".") for a, b in zip(puzzle, filled.text, strict=True)
                    )
                    solved += filled.text == solution
                    passes += filled.steps
                    continue
                for event in stream_generate(model, tokenizer, puzzle, steps=steps, seed=seed):
                    if isinstance(event, Text):
                        text += event.text
                    elif isinstance(event, Done):
                        passes += event.denoising_steps
                        rate += event.tokens_per_forward
                solved += text == solution
            count = len(grids)
            row += f"{100 * solved / count:>8.1f} ({passes / count:.1f}, {rate / count:.1f})"
        print(row, flush=True)
        if arguments.pinned:
            print(f"puzzles in which a clue was changed: {changed}")


if __name__ == "__main__":
    main()
