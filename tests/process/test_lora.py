"""`lora` as a user types it: from files of examples to an adapter that answers."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import command
import pytest
from command import at_a_terminal, run
from hub import asked_here
from paths import SUDOKU

import mlx_diffgemma
from mlx_diffgemma.checkpoint import load as loading
from mlx_diffgemma.training.events import Finished
from mlx_diffgemma.training.folder import read_log
from mlx_diffgemma.training.lines import DataError
from mlx_diffgemma.training.settings import Settings

COMMAND = [sys.executable, "-m", "mlx_diffgemma", "lora"]

# A few iterations of the smallest kind.
QUICK = ["--batch-size", "2", "--iters", "4", "--steps-per-report", "2", "--steps-per-eval", "2"]
QUICK += ["--save-every", "3", "--val-batches", "1", "--success-cases", "1", "--rank", "2"]


@pytest.fixture(autouse=True)
def _models_are_loaded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training changes the one that this process would keep for other commands."""
    monkeypatch.setattr(command, "_load", loading.load)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sudokus that the small model has seen others of."""
    cells = [line.split() for line in (SUDOKU / "puzzles.txt").read_text().splitlines()]
    lines = [
        json.dumps({"prompt": rows(clues), "completion": rows(solved)})
        for clues, solved in cells[:12]
    ]
    folder = tmp_path_factory.mktemp("data")
    for name, some in (("train", lines[:8]), ("valid", lines[8:10]), ("test", lines[2:4])):
        (folder / f"{name}.jsonl").write_text("\n".join(some) + "\n")
    return folder


def rows(cells: str) -> str:
    return "\n".join(cells[i : i + 6] for i in range(0, 36, 6))


def test_train_go_on_and_test(tmp_path: Path, data: Path) -> None:
    """What is printed is where the adapter is; all else is on stderr, in lines."""
    adapter = tmp_path / "adapters"
    arguments = ["lora", "--train", "--data", data, "--adapter-path", adapter]
    done = run(*arguments, *QUICK, "--dtype", "bfloat16", MLX_DIFFGEMMA_MODEL=str(SUDOKU))
    assert done.returncode == 0, done.stderr
    kept = r"iteration [24] of 4, which answers \d+\.\d% of the validation cases exactly; \d+\.\d%"
    assert re.fullmatch(rf"{adapter}/adapters\.safetensors: {kept} before training\n", done.stdout)
    assert "parameters are trained on 8 examples in 4 iterations" in done.stderr
    assert re.search(r"iteration 4 of 4: loss \d+\.\d+ \(denoising", done.stderr)
    assert re.search(r"iteration 0, validation: [01] of 1 answers are exactly right", done.stderr)
    names = {file.name for file in adapter.iterdir()}
    assert names >= {"0000003_adapters.safetensors", "adapter_config.json", "progress.svg"}
    events = [line["event"] for line in read_log(adapter)]
    assert events[:3] == ["started", "validated", "succeeded"]
    assert events[-1] == "finished"

    again = run(*arguments, *QUICK)
    assert (again.returncode, again.stdout) == (1, "")
    assert "holds another run" in again.stderr
    about = json.loads((adapter / "adapter_config.json").read_text())
    assert (about["model"], about["dtype"]) == (str(SUDOKU), "bfloat16")  # also if it goes on
    longer = run("lora", "--resume", "--adapter-path", adapter, "--iters", "5", "-q")
    assert (longer.returncode, longer.stderr) == (0, "")
    assert "of 5" in longer.stdout
    tested = run("lora", "-m", SUDOKU, "--test", "--data", data, "--adapter-path", adapter, "-q")
    assert re.match(r"test loss \d+\.\d+ \(by noise 25% ", tested.stdout)
    assert re.search(r"test: \d of 2 answers are exactly right\n$", tested.stdout)


def test_a_right_answer_counts(tmp_path: Path, data: Path) -> None:
    """The small model solves this one without training: that is what success means."""
    arguments = ["--test", "--data", data, "--adapter-path", "", "--test-cases", "1", "-q"]
    tested = run("lora", "-m", SUDOKU, *arguments)
    assert "test: 1 of 1 answers are exactly right" in tested.stdout


def test_a_bar_on_a_terminal(tmp_path: Path, data: Path) -> None:
    shown = at_a_terminal(
        *["lora", "-m", SUDOKU, "--train", "--data", data, "--adapter-path", tmp_path / "[b]"],
        *[*QUICK, "--iters", "2"],
    )
    assert "training" in shown
    assert "2/2" in shown
    assert "[b]/adapters.safetensors has iteration 2 now" in shown.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "nothing is asked for: --train, --test or both"),
        (["--train"], 2, "--data names the folder"),
        (["--train", "--report-to", "wandb"], 2, "log.jsonl in the adapter's folder has all"),
        (["--train", "--resume", "--overwrite"], 2, "exclude each other"),
        (["--train", "--data", "DATA", "--adapter-path", ""], 2, "names the folder of the run"),
        (["--train", "--data", "none"], 1, "there is no folder none"),
        (["--train", "--data", "BAD"], 1, "train.jsonl, line 2: the completion is empty"),
        (["--train", "--data", "DATA", "--keys", "q_proj"], 1, "keys"),
        (["--train", "--data", "DATA", "--num-layers", "99"], 1, "num_layers is 99"),
        (["--train", "--data", "DATA", "--max-memory", "2MB"], 1, "and 2.0 MB are free"),
        (["--train", "--data", "DATA", "--learning-rate", "nan"], 1, "learning_rate must be"),
        (["--train", "--data", "DATA", "--iters", "0"], 2, "--iters"),
        (["--train", "--data", "DATA", "--resume-adapter-file", "no"], 1, "no is missing"),
        (
            ["--test", "--data", "DATA", "--adapter-path", "none"],
            1,
            "none is neither a directory with an",
        ),
        (["--resume", "--adapter-path", "none"], 1, "none has no training_state.safetensors"),
        (["--train", "--data", "DATA", "-c", "none.yaml"], 1, "none.yaml cannot be read"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(
    tmp_path: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    said: str,
) -> None:
    def no_model(*given: Any, **more: Any) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(loading, "model_of", no_model)
    bad = tmp_path / "bad"
    bad.mkdir()
    line = '{"prompt": "a", "completion": "%s"}\n'
    (bad / "train.jsonl").write_text(line % "b" + line % "")
    names = {"DATA": str(data), "BAD": str(bad)}
    done = run("lora", "-m", SUDOKU, *(names.get(each, each) for each in arguments), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["bad"]


def test_the_plan_says_what_is_needed(data: Path) -> None:
    told = run("lora", "-m", SUDOKU, "--plan", "--data", data, *QUICK).stdout.splitlines()
    assert told[0].startswith("weights  ")
    assert told[-2].startswith("in all  ")
    assert re.match(r"[\d,]+ parameters are trained, with batches of 2 x \d+ tokens: ", told[-1])


def test_of_a_model_on_the_hub_no_weights_are_fetched_to_refuse(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither to find a mistake in the examples, nor to say what training needs."""
    with asked_here(SUDOKU, tmp_path / "cache", monkeypatch) as hub:
        planned = run("lora", "-m", "org/model", "--plan", "--data", data)
        assert "in all" in planned.stdout, planned.stderr
        arguments = ["--train", "-m", "org/model", "--data", data, "--max-memory", "2MB"]
        refused = run("lora", *arguments, cwd=tmp_path)
        assert "and 2.0 MB are free" in refused.stderr
        assert hub.sent["tokenizer.json"] > 0
        assert hub.sent.get("model.safetensors", 0) < 1_000_000  # of 3; its header


def test_from_python(tmp_path: Path, data: Path) -> None:
    settings = Settings(iters=1, batch_size=2, val_batches=1, success_cases=0)
    *_, last = mlx_diffgemma.train(SUDOKU, data, tmp_path / "a", settings=settings)
    assert last == Finished(1, kept=1, success=None, untrained=None)
    with pytest.raises(DataError, match=r"has no train\.jsonl"):
        next(iter(mlx_diffgemma.train(SUDOKU, tmp_path, tmp_path / "b")))


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path, data: Path) -> None:
    """It used to lose what was learnt since the last checkpoint."""
    adapter = tmp_path / "a"
    arguments = ["-m", SUDOKU, "--train", "--data", data, "--adapter-path", adapter, *QUICK]
    arguments += ["--iters", "100000", "--save-every", "100000", "--steps-per-eval", "100000"]
    with subprocess.Popen(
        [*COMMAND, *map(str, arguments)], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("iteration 4 of"):
                process.send_signal(signal.SIGINT)
                break
        said = process.stderr.read()
    assert process.returncode == 130
    assert "Traceback" not in said
    found = re.search(r"stopped after iteration (\d+); it goes on with: mlx-diffgemma (.*)\n", said)
    assert found is not None, said
    done = int(found[1])
    assert done >= 4
    again = run(*found[2].split(), "--iters", str(done + 1))
    assert f"in {done + 1} iterations, {done} of them done" in again.stderr
    assert again.returncode == 0


def test_a_kill_at_any_time_leaves_what_can_go_on(tmp_path: Path, data: Path) -> None:
    """While files are written, too: each state is whole, and the log fits it."""
    adapter = tmp_path / "a"
    arguments = ["-m", SUDOKU, "--data", data, "--adapter-path", adapter, *QUICK]
    arguments += ["--iters", "100000", "--save-every", "1", "--steps-per-eval", "100000", "-q"]
    process = subprocess.Popen([*COMMAND, *map(str, arguments), "--train"])
    try:
        until = time.monotonic() + 60
        while not (adapter / "0000003_adapters.safetensors").exists():
            assert time.monotonic() < until
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    done = run("lora", "--resume", "--adapter-path", adapter, "--iters", "6")
    assert done.returncode == 0, done.stderr
    logged = [line["iteration"] for line in read_log(adapter) if line["event"] == "trained"]
    assert logged == [2, 4, 6]


def test_a_full_disk_is_one_sentence(tmp_path: Path, data: Path) -> None:
    arguments = ["-m", SUDOKU, "--train", "--data", data, "--adapter-path", tmp_path / "a", *QUICK]
    limited = ["bash", "-c", 'ulimit -f 8; exec "$@"', "bash", *COMMAND, *map(str, arguments)]
    done = subprocess.run(limited, capture_output=True, text=True)
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "cannot be written" in error
    assert "Traceback" not in done.stderr
    assert done.returncode == 1
