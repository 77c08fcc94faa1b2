"""Make Sudokus to fine-tune on: 9x9 for the real model, or smaller ones.

    python scripts/sudoku_data.py DIR --bases 200

writes DIR/train.jsonl, valid.jsonl and test.jsonl. The prompt is the puzzle, with dots for what is
to be found, the answer the solved grid. A puzzle is on the side of its solution's class, up to the
names of the digits; the grids that a side's puzzles are made of are its own, too. Each base is a
grid whose clues were taken away until none can go; many puzzles are made of it.
"""

import argparse
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import tiny_sudoku
from splits import Example, example, side, write

INSTRUCTION = "Solve this Sudoku. Answer with the solved grid only.\n"


def sudokus(
    rng: random.Random, wanted: str, size: int, bases: int, most: int, letters: bool, told: str
) -> Iterator[Example]:
    """Sudokus of one side with at most so many blanks; `letters` stand for digits if asked for."""
    names = str.maketrans("123456789", "ABCDEFGHI" if letters else "123456789")
    made = [tiny_sudoku.base(rng, size) for _ in range(bases)]
    while True:
        solved, order = rng.choice(made)
        blanks = rng.randint(min(most, len(order)) // 2, min(most, len(order)))
        shown = tiny_sudoku.shown((solved, order), blanks)
        puzzle, solution = tiny_sudoku.moved((shown, solved), rng)
        if side(tiny_sudoku.relabelled(solution)) == wanted:
            prompt, answer = (tiny_sudoku.lines(grid) for grid in (puzzle, solution))
            yield example(told + prompt.translate(names), answer.translate(names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", type=int, choices=[6, 9], default=9)
    parser.add_argument("--bases", type=int, default=200, help="grids to train on")
    parser.add_argument("--blanks", type=int, default=81, help="most cells to be found")
    parser.add_argument("--letters", action="store_true", help="letters instead of digits")
    parser.add_argument("--bare", action="store_true", help="the grid alone, without instruction")
    parser.add_argument("--train", type=int, default=16_000, help="examples to train on")
    parser.add_argument("--test", type=int, default=200, help="examples of each other side")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    told = "" if given.bare else INSTRUCTION
    rng = random.Random(given.seed)

    def of(wanted: str, count: int, bases: int) -> Iterator[Example]:
        found = sudokus(rng, wanted, given.size, bases, given.blanks, given.letters, told)
        return islice(found, count)

    fewer = max(given.bases // 10, 1)
    write(
        given.directory,
        {
            "train": of("train", given.train, given.bases),
            "valid": of("valid", given.test, fewer),
            "test": of("test", given.test, fewer),
        },
    )


if __name__ == "__main__":
    main()
