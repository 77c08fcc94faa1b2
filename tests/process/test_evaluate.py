"""Scores by hand, task files as users write them, and the command."""

import json
from pathlib import Path

import pytest
from command import run

from mlx_diffgemma.measure.calibration import Bin, calibration_error, reliability
from mlx_diffgemma.measure.evaluate import (
    HELD_OUT,
    Case,
    Outcome,
    Repair,
    TaskError,
    is_right,
    pinned_sudokus,
    read_cases,
    repair,
    score,
)


def test_repair_by_hand() -> None:
    clean, noisy = "the cat sat on a mat", "the cta sat on a mst"
    # Two typos: two swapped letters (an insertion and a deletion around one) and one wrong letter.
    assert repair(noisy, clean, clean).fixed == repair(noisy, clean, clean).typos
    assert repair(noisy, clean, clean).damaged == 0
    assert repair(noisy, clean, noisy).fixed == 0
    assert repair(noisy, clean, noisy).damaged == 0
    broken = repair(noisy, clean, "tXe cat sat on a mat")
    assert broken.damaged == 1
    assert repair("abc", "abc", "abc") == Repair(typos=0, fixed=0, clean=3, damaged=0)


def test_exact_and_pattern() -> None:
    assert is_right(Case("t", "p", answer="4"), " 4\n")
    assert not is_right(Case("t", "p", answer="4"), "44")
    assert is_right(Case("t", "p", regex="(?i)^red|blue$"), "Red")
    assert not is_right(Case("t", "p", regex="^red$"), "redder")


def test_score_by_hand() -> None:
    case = Case("t", "p", answer="x")
    runs = [
        (case, Outcome("x", 4, 1, 10.0, 6.0, 3.0)),
        (case, Outcome("y", 2, 1, 20.0, 2.0, 1.0)),
    ] * 2
    row = score("t", 8, runs, seeds=2)
    assert (row.runs, row.success, row.steps_per_canvas, row.tokens_per_forward) == (4, 0.5, 3, 15)
    assert (row.decoded_per_canvas, row.positions_per_token) == (2, 4)
    assert row.error == pytest.approx((0.25 / 2) ** 0.5)  # two cases; their seeds are not new ones
    assert row.typos_fixed is None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2"),
        ('{"answer": "4"}', "prompt"),
        ('{"prompt": "x"}', "either answer or regex"),
        ('{"prompt": "x", "answer": "4", "regex": "4"}', "either answer or regex"),
        ('{"prompt": "x", "regex": "("}', "line 2"),
        ('{"prompt": "x", "answer": "4", "points": 3}', "points"),
        ('{"prompt": "x", "answer": "4", "labels": ["5", "6"]}', "none of the labels"),
        ('{"prompt": "x", "answer": "4", "labels": 4}', "line 2"),
    ],
)
def test_task_files_that_cannot_be_used(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "1", "answer": "1"}\n' + line)
    with pytest.raises(TaskError, match=said):
        read_cases(path)


def test_held_out_data_covers_every_task() -> None:
    tasks = {case.task for case in read_cases(HELD_OUT)}
    assert {"sudoku", "json", "json-pinned", "json-pinned-sum", "typo", "gap", "chat"} <= tasks
    assert {"sudoku-hard", "chat-system", "chat-turns"} <= tasks


def test_clues_of_sudokus_are_pinned() -> None:
    solved, open_ = "1234\n3412\n2143\n4321", "12.4\n3412\n2143\n432."
    puzzle, other = Case("mine", open_, answer=solved), Case("mine", "Fix: 1.", answer="1.")
    [case] = pinned_sudokus([other, puzzle])
    assert case.template == "12{{c2:1|2|3|4}}4\n3412\n2143\n432{{c18:1|2|3|4}}"
    with pytest.raises(TaskError, match="no Sudoku"):
        pinned_sudokus([other])
    done = run("eval", "--pinned", "--limit", "2", "--steps", "4", "--seeds", "1", "--json")
    row, hard = map(json.loads, done.stdout.splitlines())
    assert (row["task"], row["runs"], row["success"]) == ("sudoku", 2, 1.0)
    assert hard["task"] == "sudoku-hard"
    assert row["steps_per_canvas"] <= 12  # what is doubted is tried twice more
    done = run("eval", "--limit", "1", "--tasks", "none")
    assert done.stderr.startswith("error: none cannot be read")


def test_command_with_own_tasks_and_recipes(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    solved, open_ = "1234\n3412\n2143\n4321", "12.4\n.412\n2.43\n43.1"
    lines = [{"prompt": open_, "answer": solved}, {"prompt": open_, "regex": "^1234"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    flags = ["--steps", "2,6", "--seeds", "2", "--recipes", "none,8bit", "--json"]
    done = run("eval", "--tasks", path, *flags)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["recipe"], row["task"], row["steps"], row["runs"]) for row in rows] == [
        ("none", "mine", 2, 4),
        ("none", "mine", 6, 4),
        ("8bit", "mine", 2, 4),
        ("8bit", "mine", 6, 4),
    ]
    assert rows[1]["steps_per_canvas"] <= 6


def test_reliability_by_hand() -> None:
    answers = [(0.95, True), (0.95, True), (0.95, False), (1.0, True), (0.5, False), (0.59, True)]
    least, low, high = reliability([*answers, (0.05, True)])
    assert least == Bin(0.0, 0.1, 1, 0.05, 1.0)
    assert low == Bin(0.5, 0.6, 2, pytest.approx(0.545), 0.5)
    assert high == Bin(0.9, 1.0, 4, pytest.approx(0.9625), 0.75)
    # One answer is 0.95 less sure than it should be, two are 0.045 too sure, four 0.2125.
    wanted = (0.95 + 2 * 0.045 + 4 * 0.2125) / 7
    assert calibration_error([least, low, high]) == pytest.approx(wanted)


def test_labels_are_chosen_and_their_confidence_is_judged(tmp_path: Path) -> None:
    ask, template = "What is the capital of Norway?", "The capital of Norway is {label}."
    case = {"prompt": ask, "labels": ["Rome", "Oslo"], "template": template}
    path = tmp_path / "mine.jsonl"
    lines = [{**case, "answer": "Oslo"}, {**case, "answer": "Rome"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    flags = ["--tasks", path, "--steps", "1", "--seeds", "1"]
    done = run("eval", *flags, "--json")
    row = json.loads(done.stdout)
    assert (row["runs"], row["success"], row["steps_per_canvas"]) == (2, 0.5, 1)
    assert row["calibration_error"] == pytest.approx(0.5, abs=0.01)  # always sure, half right
    assert [(each["count"], each["right"]) for each in row["reliability"]] == [(2, 0.5)]
    shown = run("eval", *flags, "-q").stdout
    assert "calibration error 50.0 %" in shown
    assert "90 to 100 % sure:     2 answers, 100.0 % sure,  50.0 % right" in shown
    done = run("eval", *flags, "--mode", "causal")
    assert (done.returncode, "not by mode causal" in done.stderr) == (1, True)
