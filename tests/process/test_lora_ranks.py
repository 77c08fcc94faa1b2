"""`lora` under `mlx.launch`: several processes learn what one learns, and end together."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from command import run
from paths import SUDOKU
from ranks import started

import mlx_diffgemma
from mlx_diffgemma.checkpoint.adapter import AdapterConfig
from mlx_diffgemma.cli import learning
from mlx_diffgemma.cli.options import LoadFaithful
from mlx_diffgemma.distributed.launch import LaunchError
from mlx_diffgemma.training.folder import read_log
from mlx_diffgemma.training.ranks import Work
from mlx_diffgemma.training.settings import Settings

SECONDS = 10  # in which all have ended once one has

# Without torch, which users need not have, and which takes seconds to import.
MAIN = "import sys; sys.modules['torch'] = None; from mlx_diffgemma.cli.main import main; main()"
COMMAND = [sys.executable, "-c", MAIN]

FULL = ["--fine-tune-type", "full", "--num-layers", "1"]

# Long enough to be interrupted; measured once, before the first iteration.
SETTINGS = Settings(
    iters=100000,
    save_every=100000,
    steps_per_eval=100000,
    steps_per_report=1,
    batch_size=2,
    learning_rate=1e-2,
    optimizer="sgd",  # Adam makes much of a gradient that is almost none
    val_batches=1,
    success_cases=0,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three examples the second batch of an epoch has one."""
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"prompt": "1" * i, "completion": "2" * 4 * i}) for i in range(1, 5)]
    (folder / "train.jsonl").write_text("\n".join(lines[:3]) + "\n")
    (folder / "valid.jsonl").write_text(lines[3] + "\n")
    return folder


def under_way(folder: Path, data: Path, count: int) -> "list[subprocess.Popen[str]]":
    """So many ranks in the midst of training."""
    given = {**vars(SETTINGS), "batch_size": count}
    names = ("iters", "save_every", "steps_per_eval", "steps_per_report", "batch_size")
    more = [
        f"--{name.replace('_', '-')}={given[name]}"
        for name in (*names, "learning_rate", "optimizer", "val_batches", "success_cases")
    ]
    asked = ["lora", "-m", SUDOKU, "--train", "--data", data, "--adapter-path", folder / "a"]
    ranks = started(count, folder, *COMMAND, *asked, *FULL, *more)
    said = ranks[0].stderr
    assert said is not None
    next(line for line in said if line.startswith("iteration 3 of"))
    return ranks


def told(folder: Path) -> list[dict[str, Any]]:
    """Numbers of a log that do not say how long it took."""
    names = ("iteration", "loss", "denoising", "reading", "gradient_norm", "trained_tokens")
    events = [each for each in read_log(folder) if each["event"] == "trained"]
    return [{name: each[name] for name in names} for each in events]


def test_interrupted_two_have_learnt_what_one_learns(tmp_path: Path, data: Path) -> None:
    """Ctrl-C and the launcher tell all; one that ended by itself would lose the step.

    Only rank 0 speaks and writes. The run goes on alone.
    """
    ranks = under_way(tmp_path, data, 2)
    for each in ranks:
        each.send_signal(signal.SIGINT)
    ranks[1].send_signal(signal.SIGTERM)
    begun = time.monotonic()
    said = [each.communicate(timeout=60)[1] for each in ranks]
    assert time.monotonic() - begun < SECONDS
    assert ranks[0].returncode == 130
    ended = r"stopped after iteration (\d+); it goes on with: mlx-diffgemma (.*)\n"
    found = re.search(ended, said[0])
    assert found is not None, said
    assert not any("error: " in each or "Traceback" in each for each in said), said
    done = int(found[1])

    seen = [0]
    events = mlx_diffgemma.train(
        SUDOKU,
        data,
        tmp_path / "alone",
        settings=SETTINGS,
        adapter=AdapterConfig("full", num_layers=1),
        stopped=lambda: seen[0] == done,
    )
    for event in events:
        seen[0] = getattr(event, "iteration", 0)
    mine, its = told(tmp_path / "a"), told(tmp_path / "alone")
    assert len(mine) == len(its) == done
    assert all(a == pytest.approx(b, rel=1e-5, abs=1e-5) for a, b in zip(mine, its, strict=True))
    weights: list[Any] = [
        mx.load(str(tmp_path / each / "adapters.safetensors")) for each in ("a", "alone")
    ]
    for name, array in weights[0].items():
        np.testing.assert_allclose(array, weights[1][name], rtol=1e-5, atol=1e-5, err_msg=name)

    again = run(*found[2].split(), "--iters", str(done + 1), "-q")
    assert f"iteration {done + 1} of {done + 1}" in again.stdout, again.stderr


def test_all_end_with_one_that_is_killed(tmp_path: Path, data: Path) -> None:
    """An exchange of theirs may wait for ever; the third hears of it by rank 0's end."""
    first, second, third = under_way(tmp_path, data, 3)
    second.kill()
    begun = time.monotonic()
    said = [each.communicate(timeout=60)[1] for each in (first, third)]
    assert time.monotonic() - begun < SECONDS
    assert (first.returncode, third.returncode) == (1, 1)
    assert "error: rank 1 is lost, and with it a part of each batch; what was saved" in said[0]
    assert "error: rank 2 ends, as rank 0 is lost" in said[1]
    assert not any("Traceback" in each for each in said)


def test_another_version_is_not_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work((), SETTINGS, AdapterConfig())
    message = learning._packed(LoadFaithful("m"), work)
    assert learning._unpacked(message) == (LoadFaithful("m"), work)
    monkeypatch.setattr(learning, "__version__", "9.9")
    with pytest.raises(LaunchError, match=r"of rank 0 is 0\..*, and 9\.9 here"):
        learning._unpacked(message)


def test_what_one_rank_would_do_is_refused(tmp_path: Path, data: Path) -> None:
    ranks = started(2, tmp_path, *COMMAND, "lora", "-m", SUDOKU, "--data", data, "--plan")
    said = [each.communicate(timeout=60)[1] for each in ranks]
    assert "--plan is for one process; under mlx.launch, lora goes with --train" in said[0]
    assert said[1] == ""
