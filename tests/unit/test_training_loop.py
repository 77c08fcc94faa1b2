"""A run of fine-tuning: its steps, what is measured and kept, and that going on changes nothing."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from random_model import scripted, untrained

from mlx_diffgemma import CheckpointError, DiffusionGemma
from mlx_diffgemma.checkpoint.adapter import AdapterConfig, add_adapter, trained
from mlx_diffgemma.checkpoint.files import SHIPPED
from mlx_diffgemma.checkpoint.load import read_tokenizer
from mlx_diffgemma.training import folder as folders
from mlx_diffgemma.training import loop, step, teaching
from mlx_diffgemma.training.data import Data, Example
from mlx_diffgemma.training.events import Event, Finished, Stopped, Succeeded, Trained, Validated
from mlx_diffgemma.training.folder import RunError, read_log
from mlx_diffgemma.training.measuring import answer_cases, answerable
from mlx_diffgemma.training.objective import Losses, Objective, Sample, noised
from mlx_diffgemma.training.run import train_in
from mlx_diffgemma.training.settings import Settings
from mlx_diffgemma.training.step import Diverged, Trainer

TOKENIZER = read_tokenizer(SHIPPED["tiny"])

# Times differ from run to run.
TIMES = {"iterations_per_second", "tokens_per_second", "seconds", "peak_memory"}


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes half a second."""
    monkeypatch.setattr(folders, "can_plot", lambda: False)


def small() -> DiffusionGemma:
    model: DiffusionGemma = untrained(768, 16, eos=(1, 6), windows=(8,))
    mx.eval(model.parameters())
    return model


def examples(count: int, first: int = 0) -> tuple[Example, ...]:
    """Of several lengths; responses of one canvas and of more."""
    rng = np.random.default_rng(first)
    made = []
    for line in range(count):
        prompt, response = rng.integers(10, 700, 5 + line % 4), rng.integers(10, 700, 7 * line + 3)
        made.append(Example(line + 1, Sample((2, *prompt.tolist()), (*response.tolist(), 6))))
    return tuple(made)


DATA = Data(examples(5), examples(2, first=9))

QUICK = {"steps_per_eval": 4, "steps_per_report": 2, "save_every": 3, "success_cases": 0}


def train(
    model: DiffusionGemma,
    data: Data,
    path: Path,
    settings: Settings,
    adapter: AdapterConfig,
    mode: Any = "new",
    stopped: Any = lambda: False,
) -> Iterator[Event]:
    """As `mlx_diffgemma.train`, of a model that no checkpoint holds."""
    with folders.locked(path, mode):
        yield from train_in(
            path, model, TOKENIZER, data, settings, adapter, mode=mode, stopped=stopped
        )


def run(path: Path, mode: Any = "new", stop_at: int | None = None, **given: Any) -> list[Event]:
    """A run on the small model, asked to stop behind an iteration."""
    dropout, kind = given.pop("dropout", 0.0), given.pop("fine_tune_type", "lora")
    settings = Settings(**{"iters": 7, "batch_size": 2, **QUICK, **given})
    seen: list[Event] = []
    events = train(
        small(),
        DATA,
        path,
        settings=settings,
        adapter=AdapterConfig(fine_tune_type=kind, rank=2, dropout=dropout),
        mode=mode,
        stopped=lambda: stop_at is not None and bool(seen) and at(seen[-1]) >= stop_at,
    )
    for event in events:
        seen.append(event)
    return seen


def at(event: Event) -> int:
    return getattr(event, "iteration", 0)


def log(path: Path) -> list[dict[str, Any]]:
    """What was logged, without times and without what says that a run was stopped."""
    lines = [{k: v for k, v in each.items() if k not in TIMES} for each in read_log(path)]
    return [each for each in lines if each["event"] in ("trained", "validated", "succeeded")]


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd", "adafactor"])
def test_a_run_that_goes_on_comes_to_the_same_numbers(tmp_path: Path, optimizer: str) -> None:
    """It was stopped between two sums of gradients and two reports, and dropout draws numbers."""
    given = {"optimizer": optimizer, "dropout": 0.2, "grad_accumulation_steps": 2}
    given |= {"learning_rate": 0.01}
    assert isinstance(run(tmp_path / "whole", **given)[-1], Finished)
    assert isinstance(run(tmp_path / "parts", stop_at=3, **given)[-1], Stopped)
    again = run(tmp_path / "parts", "resume", stop_at=5, **given)
    assert (at(again[0]), at(again[-1])) == (3, 5)
    run(tmp_path / "parts", "resume", **given)
    assert log(tmp_path / "whole") == log(tmp_path / "parts")
    for name in ("adapters.safetensors", "0000006_adapters.safetensors"):
        whole, parts = ((tmp_path / each / name).read_bytes() for each in ("whole", "parts"))
        assert whole == parts, name


def test_distillation_goes_on_with_the_answers_it_was_begun_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher is asked once: what it says to the last example is kept in the folder."""

    def taught(*given: Any, **more: Any) -> Iterator[tuple[int, Sample]]:
        yield from enumerate(replace(each.sample, response=(50, 6)) for each in DATA.train)

    monkeypatch.setattr(teaching, "taught", taught)
    stopped = run(tmp_path / "early", stop_at=-1, distill=3)
    assert stopped[-1] == Stopped(0)
    assert not (tmp_path / "early").exists()
    run(tmp_path / "whole", distill=3)
    run(tmp_path / "parts", stop_at=4, distill=3)
    monkeypatch.undo()
    monkeypatch.setattr(folders, "can_plot", lambda: False)
    started = next(e for e in run(tmp_path / "parts", "resume", distill=3) if at(e))
    assert at(started) == 4
    assert log(tmp_path / "whole") == log(tmp_path / "parts")
    (tmp_path / "parts" / "taught.jsonl").write_text('{"prompt": [2], "response": [99999]}\n')
    with pytest.raises(RunError, match=r"taught\.jsonl cannot be gone on from"):
        run(tmp_path / "parts", "resume", distill=3)


def test_what_was_logged_behind_the_state_is_forgotten(tmp_path: Path) -> None:
    """After a kill, the iterations behind the last state used to stand in the log twice."""
    run(tmp_path / "whole")
    seen = train(small(), DATA, tmp_path / "killed", settings=settings_of(), adapter=TWO)
    for event in seen:
        if isinstance(event, Trained) and event.iteration == 4:
            seen.close()  # type: ignore[attr-defined]
            break
    with (tmp_path / "killed" / "log.jsonl").open("a") as file:
        file.write('{"event": "trai')  # half a line
    (tmp_path / "killed" / "tmpab12cd_4.safetensors").write_bytes(b"half")
    assert at(run(tmp_path / "killed", "resume")[0]) == 3
    assert not (tmp_path / "killed" / "tmpab12cd_4.safetensors").exists()
    assert log(tmp_path / "killed") == log(tmp_path / "whole")


TWO = AdapterConfig(rank=2)


def settings_of(**given: Any) -> Settings:
    return Settings(**{"iters": 7, "batch_size": 2, **QUICK, **given})


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_frozen_weights_stay_as_they_are(tmp_path: Path, kind: str) -> None:
    model = small()
    before = dict(tree_flatten(model.parameters()))
    config = AdapterConfig(fine_tune_type=kind, rank=2)  # type: ignore[arg-type]
    for _ in train(model, DATA, tmp_path, settings=settings_of(iters=3), adapter=config):
        pass
    learnt = trained(model)
    assert any(mx.any(value != 0).item() for n, value in learnt.items() if n.endswith("lora_b"))
    after = dict(tree_flatten(model.parameters()))
    frozen = {name.replace(".linear.", "."): a for name, a in after.items() if name not in learnt}
    assert frozen.keys() == before.keys()
    assert all(mx.array_equal(frozen[name], before[name]).item() for name in before)


def test_all_parameters_can_be_trained(tmp_path: Path) -> None:
    before = dict(tree_flatten(small().parameters()))
    run(tmp_path, fine_tune_type="full", learning_rate=0.01, iters=3)
    written = mx.load(str(tmp_path / "adapters.safetensors"))
    assert isinstance(written, dict)
    changed = [n for n, each in written.items() if not mx.array_equal(each, before[n]).item()]
    assert "model.decoder.layers.0.mlp.gate_proj.weight" in changed


@pytest.mark.parametrize("checkpointed", [False, True])
def test_summed_gradients_are_those_of_the_larger_batch(checkpointed: bool) -> None:
    """Where examples are of one length; those of other lengths weigh by their batch."""
    rng = np.random.default_rng(0)
    samples = [Sample((2, *rng.integers(10, 700, 6)), (*rng.integers(10, 700, 9), 6))] * 2
    found = []
    for size, steps in ((2, 1), (1, 2)):
        model = small()
        mx.random.seed(1)
        add_adapter(model, TWO)
        trainer = Trainer(
            model,
            settings_of(
                grad_accumulation_steps=steps,
                optimizer="sgd",
                max_grad_norm=0.0,
                learning_rate=0.1,
                grad_checkpoint=checkpointed,
            ),
            1,
        )
        generator = np.random.default_rng(5)  # the same noise for the same sample
        for i in range(0, 2, size):
            batch = noised(samples[i : i + size], generator, model.config, 1, Objective())
            trainer.batch = lambda *_, batch=batch: batch  # type: ignore[method-assign,misc]
            trainer.step(samples[i : i + size], i + 1 if size == 1 else 1)
        found.append(trainer.weights)
    moved = 0.0
    for name, one in found[0].items():
        assert mx.allclose(one, found[1][name], rtol=1e-4, atol=1e-6).item(), name
        moved = max(moved, mx.abs(one).max().item()) if name.endswith("lora_b") else moved
    assert moved > 1e-3


def test_a_gradient_is_shortened_to_its_limit() -> None:
    moved = []
    for limit in (0.0, 1e-3):
        model = small()
        mx.random.seed(1)
        add_adapter(model, TWO)
        trainer = Trainer(model, settings_of(optimizer="sgd", max_grad_norm=limit), 1)
        told = trainer.step([DATA.train[0].sample], 1)
        assert told.norm is not None
        rate = trainer.learning_rate
        square = sum((v**2).sum().item() for n, v in trainer.weights.items() if "lora_b" in n)
        moved.append(math.sqrt(square) / rate)
    assert moved[0] == pytest.approx(told.norm, rel=1e-3)
    assert moved[1] == pytest.approx(1e-3, rel=1e-3)


def test_a_loss_that_is_not_finite_ends_it_and_keeps_what_was_saved(tmp_path: Path) -> None:
    """All files hold finite numbers, and the run can go on with nothing changed."""
    events = train(
        small(),
        DATA,
        tmp_path,
        settings=settings_of(
            learning_rate=1e25, optimizer="sgd", max_grad_norm=0.0, save_every=1, iters=40
        ),
        adapter=TWO,
    )
    with pytest.raises(Diverged, match=r"of iteration \d+ is not a finite number"):
        list(events)
    for file in tmp_path.glob("*.safetensors"):
        arrays = mx.load(str(file))
        assert isinstance(arrays, dict)
        assert all(mx.isfinite(each).all().item() for each in arrays.values()), file


def test_a_run_that_diverged_goes_on_with_a_lower_rate(tmp_path: Path) -> None:
    """It met the same loss again, and another rate was refused as that of another run."""
    given: dict[str, Any] = {"optimizer": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.01}
    run(tmp_path, stop_at=3, **given)
    high = {**given, "learning_rate": 1e25}
    for _ in range(2):
        with pytest.raises(Diverged, match="with a lower --learning-rate, --resume goes on"):
            run(tmp_path, "resume", **high)
    assert at(run(tmp_path, "resume", **given)[0]) == 3
    assert isinstance(run(tmp_path, "resume", **given)[-1], Finished)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_either_may_not_be_finite_alone(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The weights and the sums of gradients are then what they were."""
    model = small()
    add_adapter(model, TWO)
    trainer = Trainer(model, settings_of(), 1)
    one = mx.array(1.0)
    loss = mx.array(math.inf) if what == "loss" else one
    gradients = {n: mx.full(a.shape, math.nan) for n, a in trainer.weights.items()}
    if what == "loss":
        gradients = {name: mx.ones_like(array) for name, array in trainer.weights.items()}
    monkeypatch.setattr(step, "gradients_of", lambda *_, **__: (Losses(one, one, loss), gradients))
    before = dict(trainer.weights)
    with pytest.raises(Diverged, match=f"the {what} of iteration 1 is not a finite number"):
        trainer.step([DATA.train[0].sample], 1)
    assert trainer.weights == before
    assert trainer.gradients is None


def test_the_weights_that_answer_best_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of those that answer alike, the ones with the lower loss: loss alone misleads."""
    right = {0: 9, 2: 1, 4: 3, 6: 3, 8: 2}
    loss = {0: 0.0, 2: 1.0, 4: 3.0, 6: 2.0, 8: 1.0}

    def answers(*given: Any) -> Iterator[Succeeded]:
        yield Succeeded(given[4], right[given[4]], 10, 0.0)

    def losses(*given: Any) -> Iterator[Validated]:
        yield Validated(given[4], (loss[given[4]],) * 4, 0.0, 0.0)

    monkeypatch.setattr(loop, "answer_cases", answers)
    monkeypatch.setattr(loop, "validate", losses)
    given = {"steps_per_eval": 2, "save_every": 2, "success_cases": 5, "iters": 8}
    end = run(tmp_path, **given)[-1]
    assert end == Finished(8, kept=6, success=0.3, untrained=0.9)
    best = (tmp_path / "adapters.safetensors").read_bytes()
    assert best == (tmp_path / "0000006_adapters.safetensors").read_bytes()
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (about["iteration"], about["success"]) == (6, 0.3)


def test_measuring_leaves_no_trace_in_what_is_learnt(tmp_path: Path) -> None:
    """Answers draw random numbers too, and put the model into another mode."""
    often, never = {"steps_per_eval": 1, "success_cases": 2}, {"steps_per_eval": 100}
    ends = []
    for name, own in (("often", often), ("never", never)):
        run(tmp_path / name, dropout=0.3, iters=4, save_every=4, **own)
        ends.append((tmp_path / name / "0000004_adapters.safetensors").read_bytes())
    assert ends[0] == ends[1]
    found = [each for each in read_log(tmp_path / "often") if each["event"] == "succeeded"]
    assert [each["cases"] for each in found] == [2] * 5


def test_other_weights_to_begin_with(tmp_path: Path) -> None:
    """A run may replace the one whose weights it takes; of another adapter they are refused."""
    run(tmp_path)
    before = log(tmp_path)[-1]
    file = tmp_path / "adapters.safetensors"

    def again(rank: int) -> list[Event]:
        with folders.locked(tmp_path, "overwrite"):
            return list(
                train_in(
                    tmp_path,
                    small(),
                    TOKENIZER,
                    DATA,
                    settings_of(iters=1),
                    AdapterConfig(rank=rank),
                    mode="overwrite",
                    weights=file,
                )
            )

    with pytest.raises(CheckpointError, match="is no adapted parameter of this run"):
        again(3)
    assert log(tmp_path)[-1] == before  # nothing is lost
    again(2)
    first = log(tmp_path)[0]
    assert (first["iteration"], first["denoising"]) == (0, before["denoising"])
    (tmp_path / "wrong.safetensors").write_bytes(b"12345678")
    file = tmp_path / "wrong.safetensors"
    with pytest.raises(CheckpointError, match="cannot be read"):
        again(2)


def test_an_answer_is_right_where_it_says_what_the_example_says() -> None:
    """Over canvases, whatever fills the last; one that goes on behind it is wrong."""
    model = scripted()
    right, end, fill = TOKENIZER.encode("yes, " * 40)[:100], 6, 1
    case = Example(1, Sample((2, 50, 51), (*right, end)))
    short = Example(2, Sample((2, 50, 51), (*TOKENIZER.encode("no"), end)))
    canvases = [right[:64], [*right[64:], end, *[fill] * 64][:64]]
    for script, cases, wanted in (
        (canvases, [case], 1),
        ([[*TOKENIZER.encode("no"), end, *[fill] * 64][:64]], [short], 1),
        ([[*TOKENIZER.encode("no!"), end, *[fill] * 64][:64]], [short], 0),
        ([[*TOKENIZER.encode("no"), *[100] * 64][:64]], [short], 0),
    ):
        model.begin(*script)
        settings = Settings(batch_size=1, success_steps=4)
        *_, told = answer_cases(model, TOKENIZER, cases, settings, 7, lambda: False)
        assert isinstance(told, Succeeded)
        assert (told.right, told.cases, told.iteration) == (wanted, 1, 7)


def test_what_cannot_be_answered_is_not_asked() -> None:
    whole = Example(1, Sample((2,), (5, 6)))
    text, cut = replace(whole, asks=False), replace(whole, sample=Sample((2,), (5,), True))
    assert answerable([text, cut, whole, whole], 1) == [whole]


def test_a_folder_is_one_runs(tmp_path: Path) -> None:
    run(tmp_path / "a", iters=3)
    before = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    with pytest.raises(RunError, match=r"holds another run .*--resume goes on with it"):
        run(tmp_path / "a", iters=3)
    for wrong, said in (
        ({"batch_size": 1}, "has batch_size 2, not 1"),
        ({"optimizer": "sgd"}, "has optimizer adamw, not sgd"),
        ({"iters": 2}, "has done 3 iterations, and iters is 2"),
    ):
        with pytest.raises(RunError, match=said):
            run(tmp_path / "a", "resume", **{"iters": 3, **wrong})
    with pytest.raises(RunError, match=r"has no training_state\.safetensors to go on from"):
        run(tmp_path / "b", "resume")
    assert not (tmp_path / "b").exists()
    assert {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()} == before
    assert at(run(tmp_path / "a", "resume", iters=4)[-1]) == 4
    (tmp_path / "a" / "notes.txt").write_text("mine")
    run(tmp_path / "a", "overwrite", iters=1)
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "a" / "0000003_adapters.safetensors").exists()


def test_other_examples_are_another_run(tmp_path: Path) -> None:
    run(tmp_path, iters=3)
    events = train(
        small(),
        Data(DATA.train[1:], DATA.valid),
        tmp_path,
        settings=settings_of(),
        adapter=TWO,
        mode="resume",
    )
    with pytest.raises(RunError, match="the examples are not those of the run"):
        list(events)


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom mlx_diffgemma.training.folder import locked\n"
        "with locked(Path(sys.argv[1]), 'new'):\n    print('in')\n"
    )
    with folders.locked(tmp_path / "a", "new"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True
        )
        assert "another process is training in" in done.stderr
    assert not (tmp_path / "a").exists()  # nothing was written
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=True)


@pytest.mark.parametrize("name", ["training_state", "adapters", "0000003_adapters", "log"])
def test_a_disk_that_refuses_leaves_what_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """One sentence; and a run that goes on with room comes to the same numbers."""
    run(tmp_path / "whole")
    run(tmp_path / "full", stop_at=2)
    wanted, real, opened = f"/{name}.", mx.save_safetensors, Path.open
    count = iter(range(100))

    def save(file: str, *rest: Any) -> None:
        # States and adapters are written in turn: the disk is full at the first of either.
        kind = "training_state" if "optimizer.step" in rest[0] else "adapters"
        if kind in name and (next(count) > 0 or name != "0000003_adapters"):
            Path(file).write_bytes(b"half")
            raise RuntimeError("[write] Unable to write 1234 bytes to file.")
        real(file, *rest)

    def refuse(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if path.name == "log.jsonl" and mode == "a" and name == "log":
            raise OSError(28, os.strerror(28))
        return opened(path, mode, *rest, **more)

    monkeypatch.setattr(mx, "save_safetensors", save)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(RunError, match=r"cannot be written: .*what was saved before is as it was"):
        run(tmp_path / "full", "resume")
    monkeypatch.undo()
    assert wanted
    assert not [each for each in (tmp_path / "full").iterdir() if each.name.startswith("tmp")]
    run(tmp_path / "full", "resume")
    assert log(tmp_path / "full") == log(tmp_path / "whole")


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 40, b'\x10\x00\x00\x00\x00\x00\x00\x00{"a":[1,2,3,4,5]'], ids=len
)
def test_a_damaged_state_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "training_state.safetensors").write_bytes(content)
    with pytest.raises(RunError, match="cannot be gone on from"):
        run(tmp_path, "resume")


def test_a_state_of_another_adapter_is_refused(tmp_path: Path) -> None:
    run(tmp_path, iters=3)
    events = train(
        small(),
        DATA,
        tmp_path,
        settings=settings_of(iters=3),
        adapter=AdapterConfig(rank=3),
        mode="resume",
    )
    with pytest.raises(RunError, match="the training state is of another run"):
        list(events)
