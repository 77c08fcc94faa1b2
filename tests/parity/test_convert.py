"""Conversion: the published layout, the right numbers, and nothing half-written."""

import fcntl
import hashlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import pytest
from command import Done, run
from paths import ROOT, SUDOKU
from reference import random_checkpoint
from slow import soft_embedding

from mlx_diffgemma import CheckpointError, generate, load
from mlx_diffgemma.checkpoint.files import Tensor, read_header, read_tensors
from mlx_diffgemma.checkpoint.load import load_model
from mlx_diffgemma.checkpoint.quantization import MODES
from mlx_diffgemma.convert import (
    RECIPES,
    ConvertError,
    Summary,
    convert,
    plan,
    stream_convert,
    uniform,
    upload,
    write,
)
from mlx_diffgemma.convert.recipes import RecipeError
from mlx_diffgemma.convert.staging import check_vacant, staged
from mlx_diffgemma.model.diffusion_gemma import Pass

REAL = ROOT.parent / "shared" / "reference"
MAKE = runpy.run_path(str(ROOT / "scripts" / "make_checkpoint.py"))
# Of the published 4-bit conversion: its 1,647 lines "name type shape", and its 236 overrides.
PUBLISHED = "18c423ed9955d05f"


def arrays(directory: Path) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for path in directory.glob("*.safetensors"):
        found.update(mx.load(str(path)))
    return found


def layout(lines: list[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Of a table of name, type, shape and shard."""
    cells = [line.split("\t") for line in lines if not line.startswith("name\t")]
    return {name: (dtype, tuple(json.loads(shape))) for name, dtype, shape, _ in cells}


def test_plan_of_the_real_shapes_is_the_published_conversion() -> None:
    """As the test below, from the shapes that scripts/make_checkpoint.py knows."""
    config = MAKE["config"](30, vision=True)
    shapes = MAKE["shapes"](config)
    tensors = {n: Tensor(n, "BF16", shape, Path(), 0, 0) for n, shape in shapes.items()}
    jobs, _ = plan.plan_jobs(tensors, config, RECIPES["mixed-4-8"], None)
    planned = sorted((n, dtype, list(shape)) for job in jobs for n, dtype, shape in job.parts)
    assert len(planned) == 1647
    assert digest(planned) == PUBLISHED
    settings = plan.config_of(config, None, jobs, RECIPES["mixed-4-8"], None)["quantization"]
    dense = "self_attn.q self_attn.k self_attn.v self_attn.o mlp.gate mlp.up mlp.down".split()
    eight = {f"model.decoder.layers.{i}.{m}_proj" for i in range(30) for m in dense}
    eight -= {f"model.decoder.layers.{i}.self_attn.v_proj" for i in (5, 11, 17, 23, 29)}
    eight |= {f"model.decoder.layers.{i}.router.proj" for i in range(30)}
    eight.add("model.decoder.embed_tokens")
    expected = {module: {"group_size": 64, "bits": 8} for module in eight}
    assert settings == {"group_size": 64, "bits": 4, "mode": "affine", **expected}


def digest(lines: object) -> str:
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:16]


@pytest.mark.skipif(not REAL.exists(), reason="the published tables lie beside the repository")
def test_plan_of_the_real_checkpoint_is_the_published_conversion() -> None:
    """1,047 tensors -> the 4-bit conversion that is on the hub: names, types, shapes, overrides."""
    source = layout((REAL / "hf_tensors.tsv").read_text().splitlines())
    published = layout((REAL / "mlx4bit_tensors.tsv").read_text().splitlines())
    config = json.loads((REAL / "config.json").read_text())
    tensors = {n: Tensor(n, dtype, shape, Path(), 0, 0) for n, (dtype, shape) in source.items()}
    jobs, unpacked = plan.plan_jobs(tensors, config, RECIPES["mixed-4-8"], None)
    planned = {name: (dtype, shape) for job in jobs for name, dtype, shape in job.parts}
    assert planned == published
    assert MAKE["shapes"](MAKE["config"](30, vision=True)) == {n: s for n, (_, s) in source.items()}
    assert digest(sorted((n, dtype, list(s)) for n, (dtype, s) in published.items())) == PUBLISHED
    assert unpacked == []
    generation = json.loads((REAL / "generation_config.json").read_text())
    ours = plan.config_of(config, generation, jobs, RECIPES["mixed-4-8"], None)
    theirs = json.loads((REAL / "mlx4bit.config.json").read_text())
    for key in ("quantization", "quantization_config", "generation_config", "eos_token_id"):
        assert ours[key] == theirs[key]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_keep_the_weights_close_and_the_model_working(name: str, tmp_path: Path) -> None:
    report = convert(SUDOKU, tmp_path / "out", recipe=RECIPES[name])
    found = read_tensors(tmp_path / "out")
    assert sum(t.end - t.start for t in found.values()) == report.bytes
    back = (
        convert(tmp_path / "out", tmp_path / "back", dequantize=True) if name != "none" else report
    )
    original, restored = arrays(SUDOKU), arrays(back.directory)
    assert original.keys() == restored.keys()
    # Largest error of a weight over the largest weight of its matrix.
    tolerance = {"none": 0, "8bit": 0.02, "6bit": 0.04}.get(name, 0.2)
    for tensor, array in original.items():
        scale = mx.abs(array.astype(mx.float32)).max().item() or 1.0
        error = mx.abs(array.astype(mx.float32) - restored[tensor].astype(mx.float32)).max().item()
        assert error <= tolerance * scale, tensor
    puzzle = (SUDOKU / "puzzles.txt").read_text().split()[:2]
    rows = ["\n".join(cells[i : i + 6] for i in range(0, 36, 6)) for cells in puzzle]
    solved = generate(*load(tmp_path / "out"), rows[0], seed=0) == rows[1]
    assert solved or name == "4bit"  # too few bits for so narrow a model


@pytest.mark.parametrize("mode", MODES)
def test_every_format_computes_in_what_is_asked_for(mode: str, tmp_path: Path) -> None:
    """Packed and unpacked are one model, and all of it computes in one type.

    mxfp4, nvfp4 and mxfp8 used to embed in bfloat16: logits in float32 were off by up to 0.76, and
    caches in float16 became float32.
    """
    convert(SUDOKU, tmp_path / "packed", recipe=uniform(None, None, mode), dtype="float32")
    convert(tmp_path / "packed", tmp_path / "plain", dequantize=True, dtype="float32")
    canvas = mx.array([[(7 * i) % 128 for i in range(9)]])
    found = []
    for name in ("packed", "plain"):
        model = load_model(tmp_path / name, dtype="float32")
        cache = model.make_cache()
        model.encode(canvas, cache)
        self_conditioning = soft_embedding(model, model(canvas, cache))
        found.append(model(canvas, cache, self_conditioning))
    assert mx.abs(found[0] - found[1]).max() < 1e-4
    half = load_model(tmp_path / "packed", dtype="float16")
    half.keep_table(mx.eval)
    cache = half.make_cache()
    hidden = half.encode(canvas, cache)
    held = [layer.state.dtype for layer in cache if layer.state is not None]
    assert held == [mx.float16] * 4
    assert hidden.dtype == half.decode([Pass(canvas, cache)])[0].dtype == mx.float16
    assert {rows.dtype for _, rows in half.vocabulary(50)} == {mx.float16}


def test_unpacking_rounds_once(tmp_path: Path) -> None:
    """It used to compute in the scales' bfloat16: off by up to 0.98 steps of 8 bits."""
    convert(SUDOKU, tmp_path / "packed", recipe=uniform(8, 32, "affine"))
    packed = arrays(tmp_path / "packed")
    modules = [name.removesuffix(".scales") for name in packed if name.endswith(".scales")]
    assert len(modules) > 30
    for dtype, rounding in (("float32", 1e-6), ("bfloat16", 1.001 * 2**-8)):
        out = convert(tmp_path / "packed", tmp_path / dtype, dequantize=True, dtype=dtype)
        made = arrays(out.directory)
        for module in modules:
            array = made[module if module in made else f"{module}.weight"].astype(mx.float32)
            steps = packed[f"{module}.weight"].view(mx.uint8).astype(mx.float32)
            group = array.shape[-1] // packed[f"{module}.scales"].shape[-1]
            scales, biases = (
                mx.repeat(packed[f"{module}.{part}"].astype(mx.float32), group, axis=-1)
                for part in ("scales", "biases")
            )
            exact = steps * scales + biases
            # Of the product too, where it nearly cancels the bias.
            error = mx.abs(array - exact) - 1e-6 * mx.abs(biases)
            assert (error <= rounding * mx.abs(exact)).all(), module


def test_layout_of_a_conversion(tmp_path: Path) -> None:
    convert(SUDOKU, tmp_path / "out")
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    settings = config["quantization"]
    assert settings == config["quantization_config"]
    assert {k: settings[k] for k in ("group_size", "bits", "mode")} == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
    }
    assert settings["model.decoder.layers.0.router.proj"] == {"group_size": 64, "bits": 8}
    assert "model.decoder.layers.0.experts.gate_up_proj" not in settings
    assert config["generation_config"]["max_denoising_steps"] == 48
    header = read_header(out / "model.safetensors")
    assert header["model.decoder.layers.0.experts.gate_up_proj.weight"].dtype == "U32"
    assert "model.decoder.layers.0.experts.gate_up_proj" not in header
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == header.keys()
    copied = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"}
    assert copied <= {path.name for path in out.iterdir()}
    assert not list(tmp_path.glob(".*"))


def test_other_types_and_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A float32 checkpoint in several shards; dtype reaches every tensor that is not packed."""
    random_checkpoint(tmp_path / "source", "ssf")
    monkeypatch.setattr(plan, "SHARD_BYTES", 100_000)
    monkeypatch.setattr(write, "SLICE_BYTES", 5_000)
    report = convert(
        tmp_path / "source", tmp_path / "half", recipe=RECIPES["none"], dtype="float16"
    )
    assert report.shards > 2
    found = read_tensors(tmp_path / "half")
    assert {tensor.dtype for tensor in found.values()} == {"F16"}
    original, half = arrays(tmp_path / "source"), arrays(tmp_path / "half")
    assert original.keys() == half.keys()
    for name, array in original.items():
        assert mx.array_equal(array.astype(mx.float16), half[name]), name
    load_error = "tokenizer.json is missing"  # the random checkpoint has none; its weights load
    with pytest.raises(CheckpointError, match=load_error):
        load(tmp_path / "half")


def test_matrices_that_no_group_divides_are_left_and_named(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "source", "sf", text={"moe_intermediate_size": 40})
    report = convert(tmp_path / "source", tmp_path / "out", recipe=uniform(8, 32, "affine"))
    assert "model.decoder.layers.0.experts.down_proj" in report.unpacked
    assert "model.decoder.layers.0.self_attn.o_proj" not in report.unpacked


@pytest.mark.parametrize(
    ("mode", "bits", "group"), [("affine", 7, None), ("affine", 4, 48), ("nvfp4", 4, 32)]
)
def test_formats_that_mlx_lacks_are_refused(mode: str, bits: int, group: int | None) -> None:
    with pytest.raises(RecipeError, match=mode):
        uniform(bits, group, mode)


def test_refusals_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(ConvertError, match="exists already"):
        convert(SUDOKU, tmp_path / "taken")
    with pytest.raises(ConvertError, match="is not quantized"):
        convert(SUDOKU, tmp_path / "out", dequantize=True)
    convert(SUDOKU, tmp_path / "packed")
    with pytest.raises(ConvertError, match="quantized already"):
        convert(tmp_path / "packed", tmp_path / "out")
    broken = Path(shutil.copytree(SUDOKU, tmp_path / "broken"))
    weights = arrays(SUDOKU)
    weights.pop("model.decoder.norm.weight")
    mx.save_safetensors(str(broken / "model.safetensors"), weights)
    with pytest.raises(CheckpointError, match=r"lacks model\.decoder\.norm\.weight"):
        convert(broken, tmp_path / "out")
    with pytest.raises(ConvertError, match="no dtype bf16"):  # used to be ignored
        convert(SUDOKU, tmp_path / "out", dtype="bf16")
    with pytest.raises(ConvertError, match="goes with no recipe"):
        convert(tmp_path / "packed", tmp_path / "out", dequantize=True, recipe=RECIPES["8bit"])
    foreign = json.loads((broken / "config.json").read_text())
    foreign["quantization_config"] = {"quant_method": "fp8"}
    (broken / "config.json").write_text(json.dumps(foreign))
    with pytest.raises(CheckpointError, match="fp8 quantization is not supported"):
        convert(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # The hub used to be asked for 50 GB before the destination was looked at.
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(ConvertError, match="exists already"):
        convert("org/model", tmp_path / "taken")


def test_destinations_that_cannot_be_written(tmp_path: Path) -> None:
    """Each used to be a traceback, the link only after all the work."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ConvertError, match="cannot be written: Not a directory"):
        convert(SUDOKU, tmp_path / "file" / "out")
    with pytest.raises(ConvertError, match="exists already"):
        convert(SUDOKU, tmp_path / "link")
    with pytest.raises(ConvertError, match="not a name"):
        convert(SUDOKU, ".")


def test_a_damaged_model_card_costs_only_its_licence(tmp_path: Path) -> None:
    """It used to fail the conversion when all weights were written."""
    source = Path(shutil.copytree(SUDOKU, tmp_path / "source"))
    for number, front in enumerate([b"license: [a\nb: : c", b"license: \xff", b"- a\n- b"]):
        (source / "README.md").write_bytes(b"---\n" + front + b"\n---\n")
        convert(source, tmp_path / str(number))
        assert "library_name: mlx" in (tmp_path / str(number) / "README.md").read_text()
    (source / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: org/base\n---\n")
    convert(source, tmp_path / "sound")
    card = (tmp_path / "sound" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "base_model: org/base" in card


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = write._read
    calls = 0

    def failing(*args: Any) -> mx.array:
        nonlocal calls
        calls += 1
        if calls == 30:
            raise OSError(28, "No space left on device")
        return read(*args)

    monkeypatch.setattr(write, "_read", failing)
    with pytest.raises(ConvertError, match="No space left"):
        convert(SUDOKU, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setattr(write, "_read", read)
    usage = shutil.disk_usage(tmp_path)
    stale = tmp_path / ".out.incomplete" / "checkpoint" / "model.safetensors"
    stale.parent.mkdir(parents=True)
    stale.touch()

    def nearly_full(_: Path) -> Any:
        return usage._replace(free=1000 if stale.exists() else 10**9)

    monkeypatch.setattr(shutil, "disk_usage", nearly_full)
    convert(SUDOKU, tmp_path / "out")  # what a killed run had filled counts as room
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ConvertError, match="too little room"):
        convert(SUDOKU, tmp_path / "other")
    assert os.listdir(tmp_path) == ["out"]


def test_a_killed_run_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    slowed = (
        "import sys, time; from pathlib import Path;"
        "from mlx_diffgemma.convert import convert, write;"
        "read = write._read;"
        "write._read = lambda *a: (time.sleep(0.05), read(*a))[1];"
        "convert(sys.argv[1], sys.argv[2])"
    )
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", slowed, str(SUDOKU), str(out)])
    partial = tmp_path / ".out.incomplete" / "checkpoint"
    for _ in range(600):
        if partial.exists() and any(partial.iterdir()):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    assert partial.exists()
    assert not (partial / "config.json").exists()
    report = convert(SUDOKU, out)
    assert report.directory == out
    assert os.listdir(tmp_path) == ["out"]


def assert_refused(done: Done | subprocess.CompletedProcess[str], said: str) -> None:
    """Exit code 1 and one sentence."""
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr


def test_two_runs_into_one_directory(tmp_path: Path) -> None:
    """The second used to remove what the first was writing: 193 of 198 tensors were zero in a
    checkpoint that looked complete."""
    out = tmp_path / "out"
    events = stream_convert(SUDOKU, out)
    for _ in range(5):
        next(events)
    assert_refused(run("convert", SUDOKU, out), f"another conversion is writing {out}")
    with pytest.raises(ConvertError, match="another conversion is writing"):
        convert(SUDOKU, out)
    *_, report = events
    assert isinstance(report, Summary)
    alone = arrays(convert(SUDOKU, tmp_path / "alone").directory)
    made = arrays(out)
    assert made.keys() == alone.keys()
    assert all(mx.array_equal(array, made[name]) for name, array in alone.items())
    with pytest.raises(ConvertError, match="exists already"):
        convert(SUDOKU, out)
    assert sorted(os.listdir(tmp_path)) == ["alone", "out"]


def test_a_run_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    events = stream_convert(SUDOKU, tmp_path / "out")
    next(events)
    assert os.listdir(tmp_path) == [".out.incomplete"]
    events.close()  # type: ignore[attr-defined]
    assert os.listdir(tmp_path) == []


def test_one_at_a_time_whoever_comes(tmp_path: Path) -> None:
    """A lock whose file is removed as it is taken must not be held twice."""
    target, inside, most = tmp_path / "out", [], []
    said: set[str] = set()

    def work() -> None:
        for _ in range(60):
            try:
                with staged(target) as stage:
                    fresh = stage.fresh
                    inside.append(fresh)
                    most.append(len(inside))
                    (fresh / "file").touch()
                    assert os.listdir(fresh) == ["file"]
                    time.sleep(0.0005)
                    inside.pop()
                    raise KeyError
            except KeyError:
                continue
            except ConvertError as error:
                said.add(str(error))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
    assert said == {f"another conversion is writing {target}"}
    assert os.listdir(tmp_path) == []


def test_a_lock_on_a_file_that_is_gone_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the file and locking it, its holder may finish and a third may begin."""
    room, flock, third = tmp_path / ".out.incomplete", fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        if not third:
            (room / "lock").rename(tmp_path / "gone")
            third.append((room / "lock").open("w"))
            flock(third[0], how)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(ConvertError, match="another conversion"), staged(tmp_path / "out"):
        pytest.fail("two are inside")
    assert os.listdir(room) == ["lock"]
    third[0].close()
    with staged(tmp_path / "out"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["gone", "out"]


def test_what_stands_in_the_way_is_left_alone(tmp_path: Path) -> None:
    """A link in the place of the working directory must not be followed and emptied."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    room = tmp_path / ".out.incomplete"
    room.symlink_to(tmp_path / "precious")
    with pytest.raises(ConvertError, match="is in the way"):
        convert(SUDOKU, tmp_path / "out")
    room.unlink()
    room.touch()
    with pytest.raises(ConvertError, match="is in the way"):
        convert(SUDOKU, tmp_path / "out")
    room.unlink()
    shutil.copytree(SUDOKU, room / "checkpoint")
    with pytest.raises(ConvertError, match="is where a conversion to"):
        convert(room / "checkpoint", tmp_path / "out")  # would be cleared before it is read
    assert (room / "checkpoint" / "model.safetensors").exists()
    assert (tmp_path / "precious" / "file").exists()


def test_destinations_that_are_something_else(tmp_path: Path) -> None:
    source = Path(shutil.copytree(SUDOKU, tmp_path / "source"))
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    for taken in (source, tmp_path / "file", tmp_path / "dangling", source / "." / "config.json"):
        with pytest.raises(ConvertError, match="exists already"):
            convert(source, taken)
    for name in ("x" * 300, "a\0b"):
        with pytest.raises(ConvertError, match="cannot be written"):
            convert(source, tmp_path / name)
    with pytest.raises(ConvertError, match="a disk is mounted"):
        check_vacant(Mounted(tmp_path / "empty"))
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert convert(source, tmp_path / "empty").directory == tmp_path / "empty"
    assert (tmp_path / "empty" / "config.json").exists()
    assert convert(source, source / "inside").shards == 1


class Mounted(type(Path())):  # type: ignore[misc]
    """A directory that a disk is mounted at."""

    def is_mount(self) -> bool:
        return True


def test_a_file_that_cannot_grow_leaves_nothing(tmp_path: Path) -> None:
    limited = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000));"
        "from mlx_diffgemma.cli.main import main; main()"
    )
    command = [sys.executable, "-c", limited, "convert", SUDOKU, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert_refused(done, f"writing {tmp_path / 'out'} failed: File too large")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("room", [0, 8192], ids=["weights", "index"])
def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path, room: int) -> None:
    """What is written beside the weights is not known beforehand: the disk fills at the end."""
    made = convert(SUDOKU, tmp_path / "made")
    size = made.bytes + 4096 if not room else (made.directory / "model.safetensors").stat().st_size
    disk = tmp_path / "disk"
    disk.mkdir()
    options = f"size={size // 4096 * 4096 + room}"
    if (
        not shutil.which("mount")
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True
        ).returncode
    ):
        pytest.skip("only root on Linux can make a small disk")
    try:
        done = run("convert", SUDOKU, disk / "out")
        left = os.listdir(disk)
    finally:
        subprocess.run(["umount", disk], check=True)
    assert_refused(done, f"writing {disk / 'out'} failed: No space left on device")
    assert left == []


def spoiled(directory: Path, name: str, numbers: list[float]) -> Path:
    """A copy of the small checkpoint, the first numbers of one tensor replaced."""
    copy = Path(shutil.copytree(SUDOKU, directory))
    weights = arrays(SUDOKU)
    flat = weights[name].reshape(-1)
    flat[: len(numbers)] = mx.array(numbers, flat.dtype)
    weights[name] = flat.reshape(weights[name].shape)
    mx.save_safetensors(str(copy / "model.safetensors"), weights)
    return copy


def test_numbers_that_are_none_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN and infinities used to be converted silently; packed, they spoil their whole group."""
    monkeypatch.setattr(write, "SLICE_BYTES", 10_000)  # the count goes over slices
    experts = "model.decoder.layers.1.experts.down_proj"
    norm = "model.decoder.norm.weight"
    nan, inf = float("nan"), float("inf")
    for i, (name, numbers) in enumerate({experts: [nan] * 9000, norm: [inf, 1, -inf]}.items()):
        source = spoiled(tmp_path / f"source{i}", name, numbers)
        count = len(numbers) - numbers.count(1)
        for recipe in ("mixed-4-8", "none"):
            with pytest.raises(CheckpointError, match=f"^{count} numbers of {name} are NaN or inf"):
                convert(source, tmp_path / "out", recipe=RECIPES[recipe])
    large = spoiled(tmp_path / "large", norm, [70_000.0, -1e5, 1.0])
    with pytest.raises(ConvertError, match=f"^2 numbers of {norm} are too large for F16"):
        convert(large, tmp_path / "out", recipe=RECIPES["none"], dtype="float16")
    # nvfp4 has no scale for more: 1e5 used to come back as 2688.
    large = spoiled(tmp_path / "large2", experts, [1e5, 2600.0])
    with pytest.raises(ConvertError, match=f"^1 numbers of {experts} are too large for nvfp4"):
        convert(large, tmp_path / "out", recipe=RECIPES["nvfp4"])
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.incomplete").exists()
    convert(large, tmp_path / "out", recipe=RECIPES["mxfp4"])


def test_packed_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    packed = convert(SUDOKU, tmp_path / "packed").directory
    weights = arrays(packed)
    name = "model.decoder.embed_tokens.scales"
    weights[name][5, 1] = float("nan")
    mx.save_safetensors(str(packed / "model.safetensors"), weights)
    with pytest.raises(CheckpointError, match=r"^64 numbers of model\.decoder\.embed_tokens\.weig"):
        convert(packed, tmp_path / "out", dequantize=True)


def relabel(directory: Path, name: str, dtype: str) -> None:
    """Say in the header that a tensor's numbers are of another type of the same size."""
    path = directory / "model.safetensors"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header[name]["dtype"] = dtype
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


@pytest.mark.parametrize(
    ("recipe", "name", "dtype"),
    [
        ("8bit", "model.decoder.layers.0.experts.down_proj.weight", "F32"),
        ("8bit", "model.decoder.embed_tokens.scales", "U16"),
        ("8bit", "model.decoder.embed_tokens.biases", "I16"),
        ("mxfp8", "model.decoder.layers.0.experts.down_proj.scales", "I8"),
        ("none", "model.decoder.norm.weight", "U16"),
    ],
)
def test_tensors_of_another_type_are_refused(
    tmp_path: Path, recipe: str, name: str, dtype: str
) -> None:
    """Packed weights labelled float32, weights labelled int16: both were converted and loaded."""
    directory = convert(SUDOKU, tmp_path / "packed", recipe=RECIPES[recipe]).directory
    relabel(directory, name, dtype)
    said = f"{name} has the type {dtype}, where"
    with pytest.raises(CheckpointError, match=said):
        load(directory)
    with pytest.raises(CheckpointError, match=said):
        convert(directory, tmp_path / "out", dequantize=recipe != "none")


def test_parts_of_the_image_encoder_are_looked_at_too(tmp_path: Path) -> None:
    """Nothing compared them with the config: odd ones were a traceback when unpacked."""
    packed = convert(SUDOKU, tmp_path / "packed", recipe=RECIPES["8bit"]).directory
    name = "model.encoder.embed_vision.embedding_projection"
    sound = arrays(packed)
    mx.eval(sound)
    for change, said in (
        ({f"{name}.weight": None}, f"lacks {name}.weight"),
        ({f"{name}.biases": None}, f"lacks {name}.biases"),
        ({f"{name}.scales": mx.ones((3, 1), mx.bfloat16)}, "does not go with"),
        ({f"{name}.weight": sound[f"{name}.weight"].view(mx.int32)}, "has the type I32"),
        ({"model.encoder.vision_tower.x.weight": mx.zeros((0, 64))}, "has no numbers"),
    ):
        weights = {**sound, **change}
        kept = {key: array for key, array in weights.items() if array is not None}
        mx.save_safetensors(str(packed / "model.safetensors"), kept)
        (packed / "model.safetensors.index.json").unlink(missing_ok=True)
        with pytest.raises(CheckpointError, match=said):
            convert(packed, tmp_path / "out", dequantize=True)
    bound = "model.encoder.vision_tower.x.input_min"
    mx.save_safetensors(
        str(packed / "model.safetensors"), {**sound, bound: mx.array(-float("inf"))}
    )
    back = convert(packed, tmp_path / "back", dequantize=True)  # no bound is a bound too
    assert arrays(back.directory)[bound].item() == -float("inf")


def test_a_source_that_shrinks_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(shutil.copytree(SUDOKU, tmp_path / "source"))
    events = stream_convert(source, tmp_path / "out")
    next(events)
    os.truncate(source / "model.safetensors", 100_000)
    with pytest.raises(CheckpointError, match="has become shorter"):
        list(events)
    assert os.listdir(tmp_path) == ["source"]


def test_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    class Api:
        def create_repo(self, repo: str, exist_ok: bool) -> str:
            calls.append(("create", repo))
            return f"https://hub.invalid/{repo}"

        def upload_folder(self, repo_id: str, folder_path: Path) -> None:
            calls.append(("upload", folder_path))
            if repo_id == "me/full":
                raise OSError("quota exceeded\ndetails")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert upload(tmp_path, "me/model") == "https://hub.invalid/me/model"
    assert calls == [("create", "me/model"), ("upload", tmp_path)]
    with pytest.raises(ConvertError, match="is complete, but uploading it failed: quota"):
        upload(tmp_path, "me/full")


def test_conversions_of_others_load(tmp_path: Path) -> None:
    """Settings only inside config.json, uniform bits with no override, experts named `.weight`."""
    out = convert(SUDOKU, tmp_path / "out", recipe=uniform(8, 64, "affine")).directory
    (out / "generation_config.json").unlink()
    (out / "model.safetensors.index.json").unlink()
    model, _ = load(out)
    assert model.generation == load(SUDOKU)[0].generation
    settings = json.loads((out / "config.json").read_text())["quantization"]
    # No override but for the tiny vision projection, which no group of 64 divides.
    assert [key for key in settings if key.startswith("model.") and "vision" not in key] == []

    plain = Path(shutil.copytree(SUDOKU, tmp_path / "plain"))
    raw = arrays(SUDOKU)
    named = {
        k + ".weight" if k.endswith(("gate_up_proj", "experts.down_proj")) else k: v
        for k, v in raw.items()
    }
    assert named.keys() != raw.keys()
    mx.save_safetensors(str(plain / "model.safetensors"), named)
    prompt = list(range(20, 60))
    assert generate(*load(plain), prompt, seed=0) == generate(*load(SUDOKU), prompt, seed=0)
