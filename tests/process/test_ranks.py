"""Several processes that share the work: `generate --batch` and `eval` under `mlx.launch`."""

import json
import signal
import time
from pathlib import Path

from command import run
from paths import SUDOKU
from ranks import COMMAND, launched, started

from mlx_diffgemma.distributed.launch import Place, place

PUZZLES = [line.split()[0] for line in (SUDOKU / "puzzles.txt").read_text().splitlines()[1:]]
GENERATE = ["generate", "-m", SUDOKU, "--seed", "3", "--steps", "12"]


def prompts(path: Path, count: int) -> Path:
    """Sudokus, among them a line that cannot be read."""
    rows = ["\n".join(puzzle[i : i + 6] for i in range(0, 36, 6)) for puzzle in PUZZLES[:count]]
    lines = [json.dumps({"prompt": row}) for row in rows]
    lines[3] = '{"prompt": 3}'
    path.write_text("\n".join(lines))
    return path


def alone(file: Path) -> dict[int, str]:
    """Lines of answers by their number, as one process gives them."""
    answers = file.with_name("alone.jsonl")
    run(*GENERATE, "--batch", file, "--output", answers, "-q")
    return {json.loads(line)["index"]: line for line in answers.read_text().splitlines()}


def test_ranks_answer_what_one_process_does_in_the_files_order(tmp_path: Path) -> None:
    file, out = prompts(tmp_path / "in.jsonl", 8), tmp_path / "out.jsonl"
    done = launched(3, *COMMAND, *GENERATE, "--batch", file, "--output", out)
    wanted = alone(file)
    assert out.read_text().splitlines() == [wanted[i] for i in range(8)], done.stderr
    assert done.stderr.count("7 answered, 1 failed") == 1  # rank 0 alone speaks


def test_a_lost_rank_leaves_prompts_that_the_next_run_answers(tmp_path: Path) -> None:
    file, out = prompts(tmp_path / "in.jsonl", 24), tmp_path / "out.jsonl"
    command = [*COMMAND, *GENERATE, "--max-batch", "1", "--batch", file, "--output", out]
    first, second = started(2, tmp_path, *command)
    while not out.exists() or "\n" not in out.read_text():
        time.sleep(0.05)
    second.kill()
    said = first.communicate(timeout=60)[1]
    assert first.returncode == 1
    assert "warning: rank 1 is lost" in said
    assert ", 22 (counted from 0) got no answer; the same command answers them" in said
    before = [json.loads(line)["index"] for line in out.read_text().splitlines()]
    assert before == sorted(before)
    kept = [i for i in range(24) if i != 3][::2]  # rank 0's part, wholly
    assert {3, *kept} <= set(before) < set(range(24))
    first, second = started(2, tmp_path, *command)
    assert (first.wait(60), second.wait(60)) == (1, 0)
    lines = out.read_text().splitlines()
    wanted = alone(file)
    assert {json.loads(line)["index"]: line for line in lines} == wanted
    assert len(lines) == 25  # an error is asked for again


def test_what_the_launcher_ends_keeps_what_was_answered(tmp_path: Path) -> None:
    """The launcher sends SIGTERM to all once one has ended; rank 0 held lines back then."""
    file, out = prompts(tmp_path / "in.jsonl", 24), tmp_path / "out.jsonl"
    command = [*COMMAND, *GENERATE, "--max-batch", "1", "--batch", file, "--output", out]
    first, second = started(2, tmp_path, *command)
    while not out.exists() or "\n" not in out.read_text():
        time.sleep(0.05)
    second.kill()
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=60)[1]
    assert first.returncode == 1
    assert "(counted from 0) got no answer" in said
    assert 0 < len(out.read_text().splitlines()) < 24


def test_scores_are_those_of_one_process(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.jsonl"
    cases = [{"task": "a", "prompt": "hello", "regex": "small"}, {"prompt": "x", "answer": "y"}]
    tasks.write_text("".join(json.dumps(each) + "\n" for each in cases * 3))
    command = ["eval", "--tasks", tasks, "--steps", "2,3", "--seeds", "1", "-m", SUDOKU, "--json"]
    done = launched(2, *COMMAND, *command)
    assert done.stdout == run(*command).stdout, done.stderr


def test_what_cannot_be_shared_is_refused_once(tmp_path: Path) -> None:
    done = launched(2, *COMMAND, "demo")
    wanted = "error: demo is for one process; under mlx.launch run one of generate, eval"
    assert done.stderr.count(wanted) == 1
    said = launched(2, *COMMAND, "generate", "hello").stderr
    assert "error: under mlx.launch, generate goes with --batch or --shard" in said


def test_places(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[["10.0.0.1:5"], ["10.0.0.2:5"]]')
    devices = tmp_path / "devices.json"
    devices.write_text('[[null, "rdma_en5"], ["rdma_en5", null]]')
    assert place({}) == Place()
    assert place({"MLX_RANK": "1", "MLX_HOSTFILE": str(hosts)}) == Place(1, 2, "10.0.0.1")
    jaccl = {"MLX_RANK": "0", "MLX_IBV_DEVICES": str(devices), "MLX_JACCL_COORDINATOR": "m:1"}
    assert place(jaccl) == Place(0, 2, "m")
    hosts.write_text("\n")
    assert place({"MLX_RANK": "0", "MLX_HOSTFILE": str(hosts)}) == Place()
