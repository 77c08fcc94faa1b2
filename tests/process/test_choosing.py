"""choose --batch: items in, labels and probabilities out, gone on with."""

import json
from pathlib import Path

import pytest
from command import Done, run

LABELS = ("--labels", "Oslo,Rome", "--template", "The capital of Norway is {label}.")
ASK = "What is the capital of Norway?"


def choose(file: Path, *arguments: str | Path) -> Done:
    return run("choose", "--batch", file, *LABELS, *arguments)


def test_items_are_weighed_as_alone_and_only_once(tmp_path: Path) -> None:
    table, lines, out = (tmp_path / name for name in ("items.csv", "items.jsonl", "out.jsonl"))
    table.write_text(f'\ufeffnote,prompt,id\r\nx,"{ASK}",a\r\ny,"so,\n""so""",\r\n')
    items = [{"prompt": ASK, "id": "a"}, {"prompt": 'so,\n"so"'}]
    lines.write_text("\n".join(map(json.dumps, items)))
    done = choose(table, "--output", out, "--draws", "2", "--seed", "3")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "2 answered, 0 failed" in done.stderr
    found = {each["index"]: each for each in map(json.loads, out.read_text().splitlines())}
    assert found[0]["id"] == "a"
    assert "id" not in found[1]
    printed = choose(lines, "-q", "--draws", "2", "--seed", "3").stdout.splitlines()
    assert {each["index"]: each for each in map(json.loads, printed)} == found
    for i, item in enumerate(items):
        alone = run(
            "choose", item["prompt"], *LABELS, "--draws", "2", "--seed", str(3 + i), "--json", "-q"
        )
        wanted = json.loads(alone.stdout)["probabilities"]["label"]
        assert found[i]["probabilities"]["label"] == pytest.approx(wanted, rel=1e-3)
        assert found[i]["labels"]["label"] == max(wanted, key=wanted.__getitem__)
    kept = out.read_text()
    out.write_text(kept.splitlines()[0] + '\n{"index": 1, "lab')  # as a killed run leaves it
    again = choose(table, "--output", out, "--draws", "2", "--seed", "3")
    assert "1 of 2 are answered already" in again.stderr
    # Alone, the second is computed in another product: not to the last digit the same.
    first, second = (list(map(json.loads, text.splitlines())) for text in (kept, out.read_text()))
    assert second[0] == first[0]
    assert {**second[1], "probabilities": 0, "errors": 0} == {
        **first[1],
        "probabilities": 0,
        "errors": 0,
    }
    wanted = first[1]["probabilities"]["label"]
    assert second[1]["probabilities"]["label"] == pytest.approx(wanted, rel=1e-3)


def test_a_bad_item_gets_its_error_and_the_others_go_on(tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    file.write_text(f'{{"prompt": " "}}\n{{"text": 1}}\n{{"prompt": "{ASK}"}}\n[]')
    done = choose(file)
    assert done.returncode == 1
    found = {each["index"]: each for each in map(json.loads, done.stdout.splitlines())}
    assert found[0]["error"] == "line 1: the prompt is no text"
    assert found[1]["error"] == "line 2: 'text' is not known"
    assert found[2]["labels"] == {"label": "Oslo"}
    assert "not an object" in found[3]["error"]
    assert "1 answered, 3 failed" in done.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"text\nx\n", "has no column prompt"),
        (b"", "has no column prompt"),
        (b'prompt\n"x', "is no CSV"),
        (b"prompt\n\xff\n", "is not UTF-8"),
        (b"prompt\n" + b"x" * 200_000, "is no CSV: field larger"),
    ],
)
def test_a_table_that_is_none_is_one_sentence(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "items.csv"
    file.write_bytes(content)
    done = choose(file, "--output", tmp_path / "out")
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
