"""The training tasks: right answers, and a split that cannot leak."""

import json
import random
import sys
from itertools import islice

import pytest
from paths import ROOT

from mlx_diffgemma.measure.evaluate import HELD_OUT, read_cases

sys.path.insert(0, str(ROOT / "scripts"))
import tiny_data as data

# Enough of the sources to run every generator without a download.
SOURCES = data.Sources(
    countries=(
        {
            "country": "Norway",
            "capital": "Oslo",
            "continent": "Europe",
            "currency": "NOK",
            "phone": "47",
        },
    ),
    first_names=("Anna", "Ben"),
    last_names=("Berg", "Lund"),
    sentences=tuple(f"a small house number {'x' * i} by the river" for i in range(1, 80)),
)
TASKS = list(data.streams(random.Random(0), False, SOURCES))


def some(task: str, held_out: bool, count: int = 60) -> list[data.Example]:
    return list(islice(data.streams(random.Random(1), held_out, SOURCES)[task][1], count))


def is_solution(grid: str) -> bool:
    rows = grid.split("\n")
    size = len(rows)
    full = set("123456"[:size])
    width = size // 2
    boxes = [
        {rows[r][c] for r in range(top, top + 2) for c in range(left, left + width)}
        for top in range(0, size, 2)
        for left in range(0, size, width)
    ]
    columns = [set(column) for column in zip(*rows, strict=True)]
    return all(group == full for group in [*map(set, rows), *columns, *boxes])


@pytest.mark.parametrize("size", [4, 6])
def test_sudokus_have_one_solution_and_shuffling_keeps_it(size: int) -> None:
    made = list(islice(data.sudoku(random.Random(0), False, size), 20))
    moved = list(islice(data.shuffled(random.Random(0), False, size), 20)) if size == 4 else []
    for example in made + moved:
        assert is_solution(example.answer)
        cells = [int(c) if c.isdigit() else 0 for c in example.prompt.replace("\n", "")]
        assert data._solve(cells.copy(), size, None, 2) == 1
        pairs = zip(example.prompt, example.answer, strict=True)
        assert all(given in (".", solved) for given, solved in pairs)


def test_relabelled_puzzles_stay_on_their_side() -> None:
    """Any renaming of the digits of a held-out grid is held out: none can be in training."""
    for example in some("sudoku6", held_out=True, count=20):
        digits = "".join(random.Random(example.answer).sample("123456", 6))
        renamed = example.answer.translate(str.maketrans("123456", digits))
        assert data.is_held_out_grid(renamed)
    made = islice(data.sudoku(random.Random(5), False), 40)
    trained = {data.relabelled(e.answer.replace("\n", "")) for e in made}
    assert not trained & data.HELD_OUT_CLASSES


@pytest.mark.parametrize("task", [t for t in TASKS if not t.startswith("sudoku") and t != "chat"])
def test_training_and_held_out_answers_are_disjoint(task: str) -> None:
    trained, held = ({e.answer for e in some(task, side, 150)} for side in (False, True))
    assert trained
    assert held
    assert not trained & held


def test_records_are_json_and_pins_spell_the_answer() -> None:
    examples = some("json-pinned", held_out=False, count=200)
    for example in examples:
        assert example.pieces is not None
        assert "".join(text for text, _ in example.pieces) == example.answer
        assert any(not given for _, given in example.pieces)
    records = [json.loads(example.answer) for example in examples]
    sums = [record for record in records if "sum" in record]
    assert sums
    for record in sums:
        assert record["sum"] == sum(record["items"])
        assert record["count"] == len(record["items"])


def test_typos_are_in_the_prompt_and_in_the_start() -> None:
    for example in some("typo", held_out=False, count=100):
        assert example.prompt == f"Fix: {example.start}"
        assert (example.start == example.answer) == (example.kind == "0")


def test_shipped_held_out_cases_are_held_out() -> None:
    answers = [(case.task, case.answer) for case in read_cases(HELD_OUT)]
    grids = [answer for task, answer in answers if task == "sudoku"]
    # Small talk and facts are memory: the same on both sides.
    texts = [answer for task, answer in answers if task not in ("sudoku", "chat")]
    assert grids
    assert texts
    assert all(answer and data.is_held_out_grid(answer) for answer in grids)
    assert all(answer and data.is_held_out(answer) for answer in texts)
