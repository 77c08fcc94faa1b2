"""Data to fine-tune on: what each side holds, and what counts as right."""

import itertools
import json
import random
import re
import sys
from itertools import islice
from pathlib import Path

import pytest
from paths import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import graphs_data
import orders_data
import proteins_data
import splits
import sudoku_data
import tiny_sudoku

SIDES = ("train", "valid", "test")


def drawn(make, count: int = 300, **named) -> dict[str, list]:  # type: ignore[no-untyped-def]
    """Some examples of each side."""
    return {side: [*islice(make(random.Random(0), side, **named), count)] for side in SIDES}


def disjoint(sides: dict[str, set[object]]) -> bool:
    """Whether no two sides share anything, and none is empty."""
    pairs = itertools.combinations(sides.values(), 2)
    return all(sides.values()) and not any(a & b for a, b in pairs)


def test_an_order_is_on_one_side() -> None:
    made = drawn(orders_data.orders)
    assert disjoint({side: {e["completion"] for e in found} for side, found in made.items()})
    for line in made["test"]:
        record = json.loads(line["completion"])
        assert list(record) == ["what", "many", "each", "for"]
        assert all(str(value) in line["prompt"] for value in record.values())


def test_a_sudoku_and_its_renamings_are_on_one_side() -> None:
    named = {"size": 6, "bases": 4, "most": 36, "letters": True, "told": ""}
    made = drawn(sudoku_data.sudokus, 60, **named)
    kinds = {
        side: {tiny_sudoku.relabelled(e["completion"].replace("\n", "")) for e in found}
        for side, found in made.items()
    }
    assert disjoint(kinds)
    for line in made["test"][:20]:
        digits = line["prompt"].replace("\n", "").translate(str.maketrans("ABCDEF.", "1234560"))
        grid = [int(digit) for digit in digits]
        assert tiny_sudoku.solutions(grid, 6, 2) == 1
        solved = "".join(" ABCDEF"[digit] for digit in grid)
        assert tiny_sudoku.lines(solved) == line["completion"]


def test_nine_by_nine_has_boxes_of_three() -> None:
    solved, order = tiny_sudoku.base(random.Random(1), 9)
    assert len(order) > 40
    puzzle, solution = tiny_sudoku.moved(
        (tiny_sudoku.shown((solved, order), 45), solved), random.Random(2)
    )
    for cell, others in enumerate(tiny_sudoku.peers(9)):
        assert len(others) == 20
        assert solution[cell] not in {solution[other] for other in others}
    grid = [0 if digit == "." else int(digit) for digit in puzzle]
    assert puzzle.count(".") == 45
    assert tiny_sudoku.solutions(grid, 9, 2) == 1
    assert "".join(map(str, grid)) == solution


def test_a_graph_and_its_renumberings_are_on_one_side() -> None:
    made = {side: [*islice(graphs_data.graphs(random.Random(0), side, 5), 300)] for side in SIDES}
    shapes = {
        side: {graphs_data.classes(5)[edges] for edges in found} for side, found in made.items()
    }
    assert disjoint(shapes)
    assert (
        graphs_data.classes(5)[((1, 2), (1, 3), (1, 4), (1, 5))]
        == (  # a star, renumbered
            graphs_data.classes(5)[((1, 3), (2, 3), (3, 4), (3, 5))]
        )
    )
    whole = set(itertools.combinations(range(1, 5), 2))  # needs four colours
    assert not any(whole <= set(edges) for edges in graphs_data.classes(5))


def test_what_is_a_right_colouring() -> None:
    hole = graphs_data.HOLE
    case = {"template": f"1{hole}.\n{hole}{hole}3\n.{hole}3"}  # a path of three nodes
    assert graphs_data.is_right(case, "12.\n123\n.23")
    assert not graphs_data.is_right(case, "12.\n223\n.23")  # node 1 has two colours
    assert not graphs_data.is_right(case, "11.\n113\n.13")  # an edge joins equal ones
    assert not graphs_data.is_right(case, "22.\n223\n.23")  # not what was given
    assert not graphs_data.is_right(case, "12.\n123")
    for each in islice(graphs_data.cases(random.Random(0), "test", 5, 2), 50):
        assert each["template"].count(hole) > 0
        edges = each["prompt"].count("x")
        assert len(each["prompt"]) == 29
        assert len(re.sub(re.escape(hole), "0", each["template"]).replace(".", "")) == 9 + edges


def test_a_hairpin_pairs_in_register() -> None:
    made = drawn(proteins_data.hairpins)
    assert disjoint({side: set(found) for side, found in made.items()})
    strand, partners = proteins_data.STRAND, proteins_data.PARTNERS
    for sequence in made["test"]:
        assert all(partners[a] == b for a, b in zip(sequence, sequence[strand + 4 :], strict=False))
        assert sequence[strand : strand + 4] == proteins_data.TURN
    parts = [proteins_data.part_of(made["test"][0], i) for i in range(2 * strand + 4)]
    assert [parts.count(each) for each in ("first strand", "turn", "second strand")] == [10, 4, 10]
    assert proteins_data.part_of("GLWSKIKEVGKEAAKAAAKAAGKA", 3) == "peptide"
    assert sorted(partners) == sorted(partners.values()) == list(proteins_data.LETTERS)


def test_peptides_that_share_stretches_are_a_family() -> None:
    """Also by way of others."""
    found = proteins_data.families(["ACDEFGHI", "DEFGHIKL", "FGHIKLMN", "WWWWYYYY"])
    assert found["ACDEFGHI"] == found["DEFGHIKL"] == found["FGHIKLMN"] != found["WWWWYYYY"]


def test_files_are_what_lora_reads(tmp_path: Path) -> None:
    splits.write(tmp_path / "new", {"train": [splits.example("a", "b")]})
    (line,) = (tmp_path / "new" / "train.jsonl").read_text().splitlines()
    assert json.loads(line) == {"prompt": "a", "completion": "b"}
    counts = [sum(splits.side(str(i)) == name for i in range(1000)) for name in SIDES]
    assert counts == pytest.approx([600, 200, 200], abs=50)
