"""The training tasks: right answers, and a split that cannot leak."""

import json
import random
import sys
from functools import partial
from itertools import islice

import pytest
from paths import ROOT

from mlx_diffgemma.measure.evaluate import HELD_OUT, read_cases

sys.path.insert(0, str(ROOT / "scripts"))
import tiny_data as data
import tiny_sudoku

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


def some(task: str, held_out: bool, count: int = 60) -> list[data.Example]:
    make = data.held_out_streams if held_out else partial(data.streams, bases=20)
    return list(islice(make(random.Random(1), SOURCES)[task], count))


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


@pytest.mark.parametrize("task", ["sudoku4", "sudoku6"])
def test_sudokus_have_one_solution_and_shuffling_keeps_it(task: str) -> None:
    for example in some(task, held_out=False, count=20):
        assert is_solution(example.answer)
        pairs = list(zip(example.prompt, example.answer, strict=True))
        assert all(given in (".", solved) for given, solved in pairs)
        cells = [int(c) if c.isdigit() else 0 for c in example.prompt.replace("\n", "")]
        assert tiny_sudoku.solutions(cells, round(len(cells) ** 0.5), 2) == 1
        assert example.pieces in (None, tuple((solved, given != ".") for given, solved in pairs))


def test_hard_sudokus_have_no_clue_to_spare() -> None:
    for example in some("sudoku-hard", held_out=True, count=3):
        cells = [int(c) if c.isdigit() else 0 for c in example.prompt.replace("\n", "")]
        assert tiny_sudoku.solutions(cells.copy(), 6, 2) == 1
        for clue in (i for i, digit in enumerate(cells) if digit):
            fewer = [0 if i == clue else digit for i, digit in enumerate(cells)]
            assert tiny_sudoku.solutions(fewer, 6, 2) == 2


def test_relabelled_puzzles_stay_on_their_side() -> None:
    """Any renaming of the digits of a held-out grid is held out: none can be in training."""
    for task in ("sudoku", "sudoku-hard"):
        for example in some(task, held_out=True, count=20):
            digits = "".join(random.Random(example.answer).sample("123456", 6))
            renamed = example.answer.translate(str.maketrans("123456", digits))
            assert tiny_sudoku.is_held_out_grid(renamed.replace("\n", ""))
    made = some("sudoku6", held_out=False, count=400)
    trained = {tiny_sudoku.relabelled(e.answer.replace("\n", "")) for e in made}
    assert not trained & tiny_sudoku.held_out_classes()


@pytest.mark.parametrize("task", ["json", "json-pinned", "typo", "gap"])
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
        assert example.prompt.endswith(f": {example.start}")
        assert (example.start == example.answer) == (example.kind == "0")


def test_shipped_held_out_cases_are_held_out() -> None:
    cases = read_cases(HELD_OUT)
    answers = [(case.task, case.answer) for case in cases]
    systems = [text for case in cases for role, text in case.history if role == "system"]
    grids = [answer for task, answer in answers if task.startswith("sudoku")]
    # Small talk and facts are memory: the same on both sides.
    texts = [answer for task, answer in answers if not task.startswith(("sudoku", "chat"))]
    assert grids
    assert texts
    assert all(tiny_sudoku.is_held_out_grid((grid or "").replace("\n", "")) for grid in grids)
    assert all(answer and data.is_held_out(answer) for answer in texts)
    assert systems
    assert all(data.is_held_out(text) for text in systems)


def test_talks_carry_what_was_said_and_system_messages_are_held_out() -> None:
    """The first checkpoint saw neither: a system message turned its answers into noise."""
    trained, held = some("talk", held_out=False, count=200), some("chat-turns", held_out=True)
    systems = [
        {text for e in side for role, text in e.history if role == "system"}
        for side in (trained, held)
    ]
    assert all(e.history for e in trained)
    assert {role for e in held for role, _ in e.history} == {"system", "user", "assistant"}
    assert all(data.is_held_out(text) for text in systems[1])
    assert not systems[0] & systems[1]
