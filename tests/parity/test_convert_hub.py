"""A conversion from the hub: what a hub on loopback sends, and what becomes of it when it fails."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from command import run
from hub import COMMIT, Hub, asked_here
from paths import SUDOKU

from mlx_diffgemma import CheckpointError
from mlx_diffgemma.checkpoint import hub as asking
from mlx_diffgemma.checkpoint.hub import Unreachable, headers_of
from mlx_diffgemma.checkpoint.info import info_of
from mlx_diffgemma.convert import (
    RECIPES,
    ConvertError,
    Fetched,
    Summary,
    Written,
    convert,
    plan,
    stream_convert,
)

SHARDS = [f"model-{number:05}-of-00004.safetensors" for number in range(1, 5)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in four shards, and what it becomes."""
    made = tmp_path_factory.mktemp("source")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SHARD_BYTES", 850_000)
        convert(SUDOKU, made / "sharded", recipe=RECIPES["none"])
    assert sorted(path.name for path in (made / "sharded").glob("*.safetensors")) == SHARDS
    convert(made / "sharded", made / "converted")
    return made


@pytest.fixture
def hub(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(asking, "SMALLEST_PIECE", 100_000)
    with asked_here(directory / "sharded", tmp_path / "cache", monkeypatch) as hub:
        yield hub


def assert_equal(made: Path, directory: Path) -> None:
    """All is as from a directory, but for the name in the card."""
    expected = {path.name: path.read_bytes() for path in (directory / "converted").iterdir()}
    found = {path.name: path.read_bytes() for path in made.iterdir()}
    assert b"base_model: org/model" in found.pop("README.md")
    expected.pop("README.md")
    assert found == expected
    assert not list(made.parent.glob(".out*"))


def weights_in(cache: Path) -> list[Path]:
    return list(cache.rglob("*.safetensors"))


def only_once(
    fault: str | int, *where: tuple[str, str], headers: bool = False
) -> Callable[[str, str, int], Any]:
    """Fail in one way the first time that each (method, file) is asked for, beyond its header."""
    left = set(where)

    def answer(method: str, file: str, first: int) -> str | int | None:
        if (method, file) in left and (headers or first or "model-" not in file):
            left.remove((method, file))
            return fault
        return None

    return answer


def test_a_file_at_a_time(hub: Hub, directory: Path, tmp_path: Path) -> None:
    """It used to need room for the whole source, and to say 0 of ? bytes until all was there."""
    source = tmp_path / ".out.incomplete" / "source"
    seen: list[list[str]] = []
    hub.fault = lambda *_: seen.append(os.listdir(source) if source.exists() else [])
    events = list(stream_convert("org/model", tmp_path / "out"))
    assert_equal(tmp_path / "out", directory)
    assert [each for each in seen if len(each) > 1] == []
    assert {each[0] for each in seen if each} == set(SHARDS)
    assert weights_in(tmp_path / "cache") == []
    sizes = {name: (directory / "sharded" / name).stat().st_size for name in SHARDS}
    for name in SHARDS:  # a header, and the file
        assert sizes[name] < hub.sent[name] <= sizes[name] + asking._HEAD
    fetched = [each for each in events if isinstance(each, Fetched)]
    written = [each for each in events if isinstance(each, Written)]
    assert {each.bytes_total for each in fetched} == {sum(sizes.values())}
    for several in (fetched, written):
        done = [each.bytes_done for each in several]  # type: ignore[attr-defined]
        assert done == sorted(done)
        assert done[-1] == several[-1].bytes_total  # type: ignore[attr-defined]
    assert events.index(fetched[0]) == 0 == fetched[0].bytes_done
    assert isinstance(events[-1], Summary)


@pytest.mark.parametrize("fault", ["drop", "reset", "wrong", 429, 503])
def test_a_hub_that_fails_once(fault: str | int, hub: Hub, directory: Path, tmp_path: Path) -> None:
    asked = [("GET", SHARDS[0]), ("GET", SHARDS[2])]
    asked += [("GET", "about"), ("GET", "config.json")] if isinstance(fault, int) else []
    hub.fault = only_once(fault, *asked)
    convert("org/model", tmp_path / "out")
    assert_equal(tmp_path / "out", directory)


def test_a_hub_that_is_gone_for_good(hub: Hub, directory: Path, tmp_path: Path) -> None:
    """What was done is kept, and the next run asks for the rest of the same commit alone."""
    hub.fault = lambda _, file, first: "reset" if file == SHARDS[2] and first else None
    with pytest.raises(Unreachable, match="same command goes on where this one stopped"):
        convert("org/model", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    left = tmp_path / ".out.incomplete" / "source"
    assert [path.name for path in left.iterdir()] == [SHARDS[2]]
    there = (left / SHARDS[2]).stat().st_size
    assert there >= 100_000
    hub.fault, hub.commit = (lambda *_: None), "d" * 40
    hub.sent.clear()
    hub.asked.clear()
    convert("org/model", tmp_path / "out")
    assert_equal(tmp_path / "out", directory)
    assert hub.asked[0] == COMMIT
    for name in SHARDS[:2]:
        assert hub.sent[name] <= asking._HEAD
    size = (directory / "sharded" / SHARDS[2]).stat().st_size
    assert hub.sent[SHARDS[2]] <= asking._HEAD + size - there


def test_bytes_that_are_wrong_each_time(hub: Hub, directory: Path, tmp_path: Path) -> None:
    hub.fault = lambda _, file, first: "wrong" if file == SHARDS[1] and first else None
    with pytest.raises(Unreachable, match=f"bytes of {SHARDS[1]} are not those whose checksum"):
        convert("org/model", tmp_path / "out")
    shutil.rmtree(tmp_path / "cache")
    hub.fault = lambda _, file, first: "wrong" if file == "config.json" else None
    with pytest.raises(CheckpointError, match=r"bytes of config\.json are not those"):
        convert("org/model", tmp_path / "other")
    assert os.listdir(tmp_path / ".out.incomplete" / "source") == []
    assert not (tmp_path / ".other.incomplete").exists()


def test_what_another_run_left_is_not_gone_on_with(
    hub: Hub, directory: Path, tmp_path: Path
) -> None:
    """Another recipe, and files that somebody has cut or removed."""
    room = tmp_path / ".out.incomplete"

    def cut_off(recipe: str | None) -> None:
        hub.fault = lambda _, file, first: "reset" if file == SHARDS[2] and first else None
        with pytest.raises(Unreachable):
            convert("org/model", tmp_path / "out", recipe=RECIPES[recipe] if recipe else None)
        hub.fault = lambda *_: None

    cut_off("8bit")
    hub.sent.clear()
    convert("org/model", tmp_path / "out")
    assert_equal(tmp_path / "out", directory)
    assert min(hub.sent[name] for name in SHARDS) > 200_000
    for spoil in (
        lambda: os.truncate(room / "checkpoint" / "model.safetensors", 1000),
        lambda: os.unlink(room / "checkpoint" / "model.safetensors"),
    ):
        shutil.rmtree(tmp_path / "out")
        cut_off(None)
        spoil()
        with pytest.raises(ConvertError, match="is not what a former run has left"):
            convert("org/model", tmp_path / "out")
        convert("org/model", tmp_path / "out")
        assert_equal(tmp_path / "out", directory)
    for record in ("", "[]", '{"done": -1}', '{"done": 1, "key": 3, "asked": [], "commit": 7}'):
        shutil.rmtree(tmp_path / "out")
        room.mkdir()
        (room / "run.json").write_text(record)
        convert("org/model", tmp_path / "out")
        assert_equal(tmp_path / "out", directory)


def test_a_damaged_part_of_a_file_is_fetched_again(
    hub: Hub, directory: Path, tmp_path: Path
) -> None:
    """After a power cut the end of a file may be zeros."""
    hub.fault = lambda _, file, first: "reset" if file == SHARDS[1] and first > 150_000 else None
    with pytest.raises(Unreachable):
        convert("org/model", tmp_path / "out")
    part = tmp_path / ".out.incomplete" / "source" / SHARDS[1]
    data = part.read_bytes()
    part.write_bytes(data[:-5000] + bytes(5000))
    hub.fault = lambda *_: None
    convert("org/model", tmp_path / "out")
    assert_equal(tmp_path / "out", directory)


def test_too_little_room_is_seen_before_anything_is_fetched(
    hub: Hub, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result and one shard have to fit, no more; what a former run has done is kept."""
    sizes = [(directory / "sharded" / name).stat().st_size for name in SHARDS]
    result = (directory / "converted" / "model.safetensors").stat().st_size
    usage = shutil.disk_usage(tmp_path)
    free = 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    free = max(sizes) + result // 2
    with pytest.raises(ConvertError, match="too little room"):
        convert("org/model", tmp_path / "out")
    assert max(hub.sent[name] for name in SHARDS) <= asking._HEAD
    assert not (tmp_path / ".out.incomplete").exists()
    free = max(sizes) + result
    hub.fault = lambda _, file, first: "reset" if file == SHARDS[3] and first else None
    with pytest.raises(Unreachable):
        convert("org/model", tmp_path / "out")
    hub.fault = lambda *_: None
    free = 1000
    with pytest.raises(ConvertError, match="too little room"):
        convert("org/model", tmp_path / "out")
    free = max(sizes) + result // 2  # which is enough for the rest
    hub.sent.clear()
    convert("org/model", tmp_path / "out")
    assert_equal(tmp_path / "out", directory)
    assert hub.sent[SHARDS[0]] <= asking._HEAD


def test_headers_that_are_not_those_of_the_file(hub: Hub, tmp_path: Path) -> None:
    """A hub that tells of other tensors than it sends would have other bytes converted."""
    hub.fault = only_once("relabel", ("GET", SHARDS[1]), headers=True)
    with pytest.raises(CheckpointError, match=f"{SHARDS[1]} is not the file whose header"):
        convert("org/model", tmp_path / "out")
    assert os.listdir(tmp_path) == ["cache"]


def test_weights_that_are_no_numbers_leave_nothing(hub: Hub, tmp_path: Path) -> None:
    """To go on would end at the same weights again."""
    bad = Path(shutil.copytree(hub.directory, tmp_path / "bad"))
    data = bytearray((bad / SHARDS[3]).read_bytes())
    data[-2:] = b"\xc0\x7f"  # NaN in bfloat16
    (bad / SHARDS[3]).write_bytes(data)
    hub.directory = bad
    with pytest.raises(CheckpointError, match="are NaN or infinite"):
        convert("org/model", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["bad", "cache"]


def test_downloads_that_are_kept_and_used(hub: Hub, directory: Path, tmp_path: Path) -> None:
    """What the hub's cache has is neither fetched again nor removed."""
    convert("org/model", tmp_path / "out", keep_download=True)
    assert_equal(tmp_path / "out", directory)
    assert len(weights_in(tmp_path / "cache")) == len(SHARDS)
    hub.sent.clear()
    convert("org/model", tmp_path / "second" / "out")
    assert_equal(tmp_path / "second" / "out", directory)
    assert set(hub.sent) & set(SHARDS) == set()
    next(iter(weights_in(tmp_path / "cache"))).unlink()  # one of them, by hand
    convert("org/model", tmp_path / "third" / "out")
    assert sum(name in SHARDS for name in hub.sent) == 1
    assert len(weights_in(tmp_path / "cache")) == len(SHARDS) - 1


def test_without_a_network(
    hub: Hub, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert("org/model", tmp_path / "out", keep_download=True)
    constants: Any = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(asking, "FIRST_PATIENCE", 0.0)
    convert("org/model", tmp_path / "second" / "out")
    assert_equal(tmp_path / "second" / "out", directory)
    with pytest.raises(CheckpointError, match="not in the local cache and the hub cannot be reach"):
        convert("org/other", tmp_path / "third")


def test_info_fetches_no_weights(hub: Hub, directory: Path, tmp_path: Path) -> None:
    """It used to fetch all of them, 52 GB, to say how many there are."""
    assert info_of(headers_of("org/model")) == info_of(headers_of(str(directory / "sharded")))
    assert weights_in(tmp_path / "cache") == []
    assert all(hub.sent[name] <= asking._HEAD for name in SHARDS)
    assert json.loads(run("info", "org/model", "--json").stdout)["layers"] == 4
    with pytest.raises(CheckpointError, match="no repository org/none"):
        headers_of("org/none")


def test_long_headers_are_read_whole(hub: Hub, directory: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asking, "_HEAD", 100)
        assert info_of(headers_of("org/model")) == info_of(headers_of(str(directory / "sharded")))


def test_packed_matrices_over_two_files(hub: Hub, directory: Path, tmp_path: Path) -> None:
    """Scales in one shard, weights in the next: both stay until the matrix is unpacked."""
    packed = tmp_path / "packed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SHARD_BYTES", 150_000)
        convert(SUDOKU, packed, recipe=RECIPES["8bit"])
    index = json.loads((packed / "model.safetensors.index.json").read_text())
    # Move all scales into one file of their own.
    import mlx.core as mx

    arrays: dict[str, mx.array] = {}
    for path in sorted(packed.glob("*.safetensors")):
        arrays |= mx.load(str(path))  # type: ignore[arg-type]
    mx.eval(arrays)
    for path in packed.glob("*.safetensors"):
        path.unlink()
    scales = {name: array for name, array in arrays.items() if name.endswith(".scales")}
    others = {name: array for name, array in arrays.items() if name not in scales}
    mx.save_safetensors(str(packed / "model-1.safetensors"), scales)
    mx.save_safetensors(str(packed / "model-2.safetensors"), others)
    index["weight_map"] = {
        name: f"model-{1 if name in scales else 2}.safetensors" for name in arrays
    }
    (packed / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.directory = packed
    local = convert(packed, tmp_path / "local", dequantize=True).directory
    made = convert("org/model", tmp_path / "out", dequantize=True).directory
    for path in local.glob("*.safetensors"):
        assert path.read_bytes() == (made / path.name).read_bytes()


def process(hub: Hub, home: Path, out: Path, before: str = "pass") -> subprocess.Popen[str]:
    """`mlx-diffgemma convert org/model OUT`, killed or interrupted by the caller."""
    script = (
        "from mlx_diffgemma.checkpoint import hub; hub.SMALLEST_PIECE = 100_000;"
        f"{before}; from mlx_diffgemma.cli.main import main; main()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script, "convert", "org/model", str(out)],
        env=hub.environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_and_interrupted_runs_go_on(hub: Hub, directory: Path, tmp_path: Path) -> None:
    out, home = tmp_path / "out", tmp_path / "home"
    for number, ended in enumerate((signal.SIGKILL, signal.SIGINT), 1):
        stalled = SHARDS[number]
        hub.fault = lambda _, file, first, at=stalled: (  # type: ignore[misc]
            "stall" if file == at and first > 150_000 else None
        )
        working = process(hub, home, out)
        part = tmp_path / ".out.incomplete" / "source" / stalled
        until = time.monotonic() + 60
        while not (part.exists() and part.stat().st_size > 150_000):
            assert time.monotonic() < until
            assert working.poll() is None, working.communicate()
            time.sleep(0.5)  # a hundredth of a second, see `asked_here`
        working.send_signal(ended)
        _, said = working.communicate(timeout=30)
        hub.release.set()
        assert working.returncode == (130 if ended == signal.SIGINT else -ended)
        assert ("the same command goes on" in said) == (ended == signal.SIGINT)
        assert "Traceback" not in said
        assert not out.exists()
        hub.release.clear()
    hub.fault = lambda *_: None
    hub.sent.clear()
    done = process(hub, home, out)
    said = done.communicate(timeout=60)[1]
    assert done.returncode == 0, said
    assert_equal(out, directory)
    assert max(hub.sent[name] for name in SHARDS[:2]) <= asking._HEAD


def test_a_disk_that_fills_is_gone_on_with(hub: Hub, directory: Path, tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))"
    full = process(hub, tmp_path / "home", tmp_path / "out", limit)
    said = full.communicate(timeout=60)[1]
    assert full.returncode == 1
    assert "File too large; what is done is kept for the same command" in said
    assert not (tmp_path / "out").exists()
    again = process(hub, tmp_path / "home", tmp_path / "out")
    said = again.communicate(timeout=60)[1]
    assert again.returncode == 0, said
    assert_equal(tmp_path / "out", directory)


def test_names_of_files_that_would_lie_elsewhere() -> None:
    """The hub's list is foreign: no name of it leads out of the folder, or ends in a traceback."""
    names = ["model/../../x.safetensors", "../model.safetensors", "model\0.safetensors"]
    names += ["model\n.safetensors", "model\\x.safetensors", "/model.safetensors"]
    names += ["model-1.safetensors", "x.safetensors", "model.bin"]
    files = {name: asking.RemoteFile(name, 1, None, "0") for name in names}
    assert asking.Repository("org/model", COMMIT, files).weights == ["model-1.safetensors"]


def test_checksums_are_those_that_git_and_the_hub_state() -> None:
    data = b"hello\n"
    file = asking.RemoteFile("x", len(data), None, "ce013625030ba8dba906f756967f9e9ca394464a")
    digest = asking._digest(file)
    digest.update(data)
    assert digest.hexdigest() == file.blob
    large = asking.RemoteFile("x", len(data), hashlib.sha256(data).hexdigest(), file.blob)
    assert asking._digest(large).name == "sha256"
