"""`edit --verify` and `fill --verify` as a user asks for them: commands, bodies, `eval`."""

import json
from pathlib import Path

from command import run
from paths import FIRST

from mlx_diffgemma.server.native import EditBody, FillBody, canvas_request

MODEL = ("--model", str(FIRST / "tiny"))  # which leaves more to correct than the one that ships

WRONG = "they were much in eviednce during the fighing\n"
RIGHT = "they were much in evidence during the fighting\n"


def test_edit_of_a_file_is_verified(tmp_path: Path) -> None:
    file = tmp_path / "note.txt"
    file.write_text(WRONG)
    flags = ("-i", "Fix", "--seed", "1", "--verify", "--in-place", "--no-backup")
    done = run("edit", str(file), *flags)
    assert done.returncode == 0, done.stderr
    assert "passes of the encoder" in done.stderr
    assert "evidence" in file.read_text()
    file.write_text("look for a specific person or thing\n")
    done = run("edit", str(file), *flags)
    assert (done.returncode, done.stdout) == (0, "")
    assert "Nothing changes." in done.stderr
    assert file.read_text() == "look for a specific person or thing\n"
    file.write_text("")
    done = run("edit", str(file), *flags)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip() == "error: there is nothing to edit"


def test_fill_is_verified() -> None:
    template = "The capital of Norway is {{city}}."
    asked = (
        "fill",
        template,
        "-p",
        "What is the capital of Norway?",
        "--seed",
        "1",
        "--json",
        *MODEL,
    )
    assert json.loads(run(*asked).stdout) != {"city": "Oslo"}
    done = run(*asked, "--verify")
    assert json.loads(done.stdout) == {"city": "Oslo"}


def test_eval_repairs_as_edit_does_and_fills_templates(tmp_path: Path) -> None:
    tasks = tmp_path / "mine.jsonl"
    typo = {"task": "typo", "start": WRONG.strip(), "answer": RIGHT.strip()}
    hole = {"task": "hole", "template": "The capital of Norway is {{city}}.", "regex": "Oslo\\."}
    cases = [
        {**typo, "prompt": f"Fix: {WRONG.strip()}"},
        {**hole, "prompt": "What is the capital of Norway?"},
    ]
    tasks.write_text("".join(json.dumps(case) + "\n" for case in cases))
    flags = ("--tasks", str(tasks), "--steps", "48", "--seeds", "2", "--json", "--quiet", *MODEL)
    done = run("eval", *flags, "--mode", "denoise,verify")
    assert done.returncode == 0, done.stderr
    rows = {(r["task"], r["mode"]): r for r in map(json.loads, done.stdout.splitlines())}
    typos = [rows["typo", mode] for mode in ("denoise", "verify")]
    assert typos[1]["typos_fixed"] > typos[0]["typos_fixed"]
    assert typos[1]["positions_per_token"] > typos[0]["positions_per_token"]
    assert rows["hole", "verify"]["success"] >= rows["hole", "denoise"]["success"]


def test_bodies_ask_for_it() -> None:
    body = FillBody.model_validate({"canvas": [{"text": "x"}], "verify": True})
    assert canvas_request(body, 8).verify
    edit = EditBody.model_validate({"text": "x", "instruction": "Fix", "verify": True})
    assert edit.verify
