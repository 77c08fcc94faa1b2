"""Sudokus for the small models: solved grids, the order in which clues can go, and the split.

6x6 grids are held out by class: all that equal, up to the names of the digits, a solution in
tests/data/sudoku6/puzzles.txt. 4x4 grids, of which there are 12 classes, by a hash.
"""

import hashlib
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SEEN_BY_NOBODY = Path(__file__).parents[1] / "tests" / "data" / "sudoku6" / "puzzles.txt"

# A solved grid, and its cells in an order in which they can be emptied: each puzzle on the way has
# one solution, and after the last no further clue can go.
Base = tuple[str, tuple[int, ...]]


def box_of(size: int) -> tuple[int, int]:
    """Rows and columns of a box."""
    height = 3 if size == 9 else 2
    return height, size // height


@cache
def peers(size: int) -> tuple[tuple[int, ...], ...]:
    """For each cell, those of its row, column and box."""
    height, width = box_of(size)

    def box(cell: int) -> tuple[int, int]:
        return cell // size // height, cell % size // width

    cells = range(size * size)
    return tuple(
        tuple(
            other
            for other in cells
            if other != cell
            and (
                other // size == cell // size
                or other % size == cell % size
                or box(other) == box(cell)
            )
        )
        for cell in cells
    )


def solutions(grid: list[int], size: int, limit: int, rng: random.Random | None = None) -> int:
    """Count the solutions of a grid (0 is empty) up to `limit`, and leave the last in `grid`.

    Digits are tried in a random order where `rng` is given.
    """
    around = peers(size)
    best, fewest = -1, 0
    fewest_count = size + 1
    for cell, digit in enumerate(grid):
        if digit:
            continue
        taken = 0
        for other in around[cell]:
            taken |= 1 << grid[other]
        open_digits = ~taken & ((2 << size) - 2)
        count = open_digits.bit_count()
        if count < fewest_count:
            best, fewest, fewest_count = cell, open_digits, count
            if count < 2:
                break
    if best < 0:
        return 1
    digits = [digit for digit in range(1, size + 1) if fewest >> digit & 1]
    if rng:
        rng.shuffle(digits)
    found = 0
    for digit in digits:
        trial = grid.copy()
        trial[best] = digit
        count = solutions(trial, size, limit - found, rng)
        if count:
            solved = trial
        found += count
        if found >= limit:
            break
    if found:
        grid[:] = solved
    return found


def base(rng: random.Random, size: int, solution: str | None = None) -> Base:
    """A random solved grid, or this one, with clues taken away until none can go."""
    grid = [0] * size * size if solution is None else [int(digit) for digit in solution]
    solutions(grid, size, 1, rng)
    solved = "".join(map(str, grid))
    order = []
    for cell in rng.sample(range(size * size), size * size):
        kept, grid[cell] = grid[cell], 0
        if solutions(grid.copy(), size, 2) > 1:
            grid[cell] = kept
        else:
            order.append(cell)
    return solved, tuple(order)


def relabelled(solution: str) -> str:
    """Digits renamed in order of first appearance: the class of a solution under relabelling."""
    names: dict[str, str] = {}
    return "".join(names.setdefault(digit, str(len(names) + 1)) for digit in solution)


@cache
def held_out_classes() -> frozenset[str]:
    """Classes of the 6x6 grids that training does not see."""
    lines = SEEN_BY_NOBODY.read_text().splitlines()
    return frozenset(relabelled(line.split()[1]) for line in lines)


def is_held_out_grid(solution: str) -> bool:
    """The split of Sudokus: by list for 6x6, by hash for 4x4."""
    kind = relabelled(solution)
    if len(kind) == 36:
        return kind in held_out_classes()
    return int.from_bytes(hashlib.sha256(kind.encode()).digest()[:4]) % 4 == 0


def lines(cells: str) -> str:
    """A grid as rows."""
    size = round(len(cells) ** 0.5)
    return "\n".join(cells[i : i + size] for i in range(0, len(cells), size))


def shown(base: Base, blanks: int) -> str:
    """The puzzle with this many blanks, or as many as can be."""
    empty = set(base[1][:blanks])
    return "".join("." if i in empty else digit for i, digit in enumerate(base[0]))


def moved(grids: tuple[str, str], rng: random.Random) -> tuple[str, str]:
    """Puzzle and solution under one permutation of digits, rows, columns, bands and stacks."""
    size = round(len(grids[0]) ** 0.5)
    height, width = box_of(size)

    def shuffled(count: int) -> list[int]:
        return rng.sample(range(count), count)

    rows = [b * height + r for b in shuffled(size // height) for r in shuffled(height)]
    columns = [s * width + c for s in shuffled(size // width) for c in shuffled(width)]
    digits = "123456789"[:size]
    names = str.maketrans(digits, "".join(rng.sample(digits, size)))
    cells = [r * size + c for r in rows for c in columns]
    puzzle, solution = ("".join([grid[i] for i in cells]).translate(names) for grid in grids)
    return puzzle, solution


def puzzles(rng: random.Random, bases: list[Base]) -> Iterator[tuple[str, str]]:
    """Puzzles and solutions that training may see, two thirds of them with few clues."""
    while True:
        chosen = rng.choice(bases)
        most = len(chosen[1])
        blanks = rng.randint(most // 3 if rng.random() < 0.35 else most * 3 // 4, most)
        puzzle, solution = moved((shown(chosen, blanks), chosen[0]), rng)
        if not is_held_out_grid(solution):
            yield puzzle, solution


def hard_held_out(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Puzzles of held-out classes from which no clue can go: the best of three for each grid."""
    for line in SEEN_BY_NOBODY.read_text().splitlines():
        tried = [base(rng, 6, line.split()[1]) for _ in range(3)]
        hardest = max(tried, key=lambda b: len(b[1]))
        yield shown(hardest, 36), hardest[0]
