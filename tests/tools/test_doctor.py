"""`mlx-diffgemma doctor`: a right machine passes, a wrong number is found and named."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import command
import mlx.core as mx
import pytest
from typer.testing import CliRunner

from mlx_diffgemma.checkpoint.quantization import Quantization
from mlx_diffgemma.cli.main import app
from mlx_diffgemma.convert.recipes import MODES, RECIPES
from mlx_diffgemma.diffusion import head as readout
from mlx_diffgemma.measure.doctor import checks, plan
from mlx_diffgemma.measure.doctor.comparison import Comparison
from mlx_diffgemma.measure.doctor.results import NO_COST, Result
from mlx_diffgemma.measure.doctor.sides import Side, Weights, packed, random_weights, widened
from mlx_diffgemma.measure.doctor.taps import Tape
from mlx_diffgemma.model.cache import LayerCache
from mlx_diffgemma.model.config import Config, LayerConfig
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.model.settings import GenerationConfig

CPU = mx.Device(mx.cpu)


def test_the_quick_run_passes_and_its_json_is_fit_to_paste() -> None:
    """All values are there, and nothing of who asked: no path, no traceback."""
    done = command.run("doctor", "--quick", "--json", "-")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(name))
    assert report["counts"]["passed"] == len(report["results"]) > 50
    assert {"mlx", "mlx_diffgemma", "system", "device_info", "free_memory", "gpu"} <= set(report)
    first, *rest = report["results"]
    assert {"check", "model", "dtype", "device", "status", "value", "tolerance"} <= set(first)
    assert {"reference_seconds", "tested_seconds", "peak_memory"} == set(first["cost"])
    assert {found["dtype"] for found in rest} == {"float32", "bfloat16", "float16"}
    layers = next(found for found in rest if found["check"] == "decoder by layer")
    assert [part["name"] for part in layers["parts"]] == [f"layer {i}" for i in range(6)]
    assert not re.search(r"[/\\]\w", done.stdout)
    shown = done.stderr.splitlines()
    assert shown[-1].startswith(f"{len(report['results'])} passed, in ")
    assert ("There is no GPU here" in done.stderr) is not report["gpu"]


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Of the quick run, these checks of the small model in float32."""
    whole = plan.plan

    def some(given: Comparison, quick: bool) -> Iterator[plan.Planned]:
        for each in whole(given, quick=True):
            if each.dtype == "float32" and each.name in names:
                yield each

    monkeypatch.setattr(plan, "plan", some)


def run(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON."""
    done = CliRunner().invoke(app, ["doctor", "--device", "cpu", "--json", "-", *arguments])
    return done.exit_code, json.loads(done.stdout)


def another_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the tested side is made ready, layer 2 gets a scalar that is off by a thousandth."""
    merge = DiffusionGemma.merge

    def wrong(model: DiffusionGemma) -> None:
        merge(model)
        model.model.decoder.layers[2].layer_scalar *= 1.001

    monkeypatch.setattr(DiffusionGemma, "merge", wrong)


def another_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    right = readout._entropy
    monkeypatch.setattr(readout, "_entropy", lambda *given: right(*given) * 1.01)


def one_offset_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    right = DiffusionGemma.rotations

    def wrong(model: DiffusionGemma, positions: mx.array) -> Any:
        length = model.config.canvas_length
        rows, ragged = divmod(positions.shape[1], length)
        if rows > 1 and not ragged and positions[0, length] != positions[0, length - 1] + 1:
            positions = mx.tile(positions[:, :length], (1, rows))
        return right(model, positions)

    monkeypatch.setattr(DiffusionGemma, "rotations", wrong)


def one_token_more_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 512 that moves what `tiny` computes by less than the tolerance, and was not noticed."""
    append = LayerCache.append

    def wrong(cache: LayerCache, new: mx.array) -> mx.array:
        seen = append(cache, new)
        if cache.window is not None and cache.size == cache.window - 1:
            held = cache.state
            assert held is not None
            cache.set_state(cache.length, mx.contiguous(held[:, :, 1:]))
        return seen

    monkeypatch.setattr(LayerCache, "append", wrong)


# What depends on a wrong layer is wrong too, and rightly fails: it is not among these.
@pytest.mark.parametrize(
    ("spoil", "among", "failing", "worst"),
    [
        (another_scale, ("layers", "readout"), "decoder by layer", "worst: layer 2"),
        (another_entropy, ("layers", "readout", "pins", "chunks"), "readout: entropy", ""),
        (one_offset_for_all, ("layers", "readout", "rows", "chunks"), "batch rows", "worst: row"),
        (
            one_token_more_is_forgotten,
            ("layers", "windows"),
            "beyond a narrow window",
            "worst: ",
        ),
    ],
)
def test_a_wrong_number_fails_its_check_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[pytest.MonkeyPatch], None],
    among: tuple[str, ...],
    failing: str,
    worst: str,
) -> None:
    plan._subject.cache_clear()
    only(monkeypatch, *among)
    spoil(monkeypatch)
    code, report = run()
    plan._subject.cache_clear()
    bad = [found for found in report["results"] if found["status"] == "failed"]
    assert [found["check"] for found in bad] == [failing]
    assert bad[0]["detail"].startswith(worst)
    assert code == 1


def test_a_check_that_raises_has_failed_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def chunks(compare: Comparison, on: object) -> Iterator[Result]:
        raise RuntimeError("no kernel in /Users/somebody/x.metal\nand more")
        yield

    monkeypatch.setattr(checks, "chunks", chunks)
    only(monkeypatch, "chunks", "readout")
    code, report = run()
    states = {found["check"]: found["status"] for found in report["results"]}
    assert states.pop("chunks") == "failed"
    assert code == 1
    assert set(states.values()) == {"passed"}
    (bad,) = (found for found in report["results"] if found["status"] == "failed")
    assert bad["detail"] == "RuntimeError: no kernel in (path)"


def test_numbers_that_are_not_finite_fail() -> None:
    """NaN is no larger than any tolerance; it must not pass for that."""
    found = Comparison(CPU, CPU).result("x", None, "canvases", float("nan"), NO_COST)
    assert (found.status, found.value) == ("failed", None)


def test_a_device_that_rounds_products_is_judged_as_such() -> None:
    """Apple's M5 rounds float32 products to about ten bits unless MLX_ENABLE_TF32=0 is set."""
    given = Comparison(CPU, CPU)
    assert given.result("x", None, "layer", 1e-3, NO_COST).status == "failed"
    given.exact = False
    assert given.result("x", None, "layer", 1e-3, NO_COST).status == "passed"
    assert given.result("x", None, "canvases", 1e-3, NO_COST).status == "reported"


def test_short_of_memory_the_real_width_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "free_memory", lambda: 10**9)
    (found,) = checks.real_width(Comparison(CPU, CPU))
    assert (found.status, found.detail) == ("skipped", "needs 4.0 GB, 1.0 GB are free")


def test_the_real_width_in_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary of several blocks of the reference's rows, of which the last is not full."""

    def small(positions: int, dtype: str) -> Weights:
        layers = (LayerConfig(64, 2, 8, 1e4, 32), LayerConfig(128, 1, None, 1e6, 16))
        config = Config(40_000, 128, 128, 64, 4, 4, 2, 1e-6, 30.0, 4096, positions, layers)
        weights = random_weights(config, GenerationConfig(), RECIPES["4bit"])
        return packed(weights, getattr(mx, dtype), None)

    monkeypatch.setattr(checks, "_real", small)
    found = list(checks.real_width(Comparison(CPU, CPU)))
    assert {each.status for each in found} == {"passed"}
    assert len(found) == 8


def test_every_format_of_mlx_is_planned() -> None:
    planned = {(each.model, each.dtype) for each in plan.plan(Comparison(CPU, CPU), quick=False)}
    for mode, (sizes, widths) in MODES.items():
        for size in sizes:
            for bits in widths:
                assert (f"tiny, {bits} bits {mode}, group {size}", "float32") in planned
        assert (f"tiny, {widths[0]} bits {mode}, group {sizes[0]}", "bfloat16") in planned


def test_only_the_plain_side_compiles_nothing() -> None:
    traced: list[int] = []

    @mx.compile
    def twice(x: mx.array) -> mx.array:
        traced.append(1)
        return x * 2

    x = mx.array([1.0])
    for plain, most in ((True, 3), (False, 1), (True, 3)):
        traced.clear()
        for _ in range(3):
            Side(CPU, plain).run(lambda: twice(x))
        assert len(traced) <= most
        assert (len(traced) == 3) is plain


def test_a_tape_gives_the_same_numbers_again() -> None:
    tape = Tape(3, 1000)
    first = [tape.tokens((2, 4)), tape.gumbel((2, 4))]
    tape.rewind()
    again = [tape.tokens((2, 4)), tape.gumbel((2, 4)), tape.tokens((2, 4))]
    assert first[0] is again[0]
    assert first[1] is again[1]
    assert again[2].tolist() != again[0].tolist()


def test_a_report_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    """Not after all checks have run, and no file is left."""
    done = CliRunner().invoke(app, ["doctor", "--json", str(tmp_path / "none" / "x.json")])
    assert done.exit_code == 1
    assert "cannot be written" in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_both_sides_hold_the_same_numbers() -> None:
    """Packed as `convert` would, where no group of 64 divides the rows as well."""
    config = Config(
        64, 64, 64, 32, 2, 2, 1, 1e-6, 30.0, 64, 8, (LayerConfig(32, 1, None, 1e4, 16),)
    )
    weights = random_weights(config, GenerationConfig(), RECIPES["8bit"])
    narrow = "model.decoder.layers.0.experts.down_proj"
    assert weights.formats["model.decoder.embed_tokens"] == Quantization(64, 8)
    assert weights.formats[narrow] == Quantization(32, 8)
    wide = widened(weights)
    again = packed(wide, mx.float32, RECIPES["8bit"])
    assert again.formats == weights.formats
    for name, array in widened(again).arrays.items():
        assert mx.allclose(array, wide.arrays[name], atol=0.01), name
