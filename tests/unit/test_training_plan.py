"""What training needs of memory, from headers alone, and what a refusal advises."""

import re
import runpy
from dataclasses import replace
from math import prod
from pathlib import Path

import mlx.core as mx
import pytest
from held import active_memory
from paths import FIRST, ROOT

from mlx_diffgemma.checkpoint.adapter import AdapterConfig, add_adapter
from mlx_diffgemma.checkpoint.files import Headers, Tensor, read_headers
from mlx_diffgemma.checkpoint.fit import TooLarge, usable
from mlx_diffgemma.checkpoint.load import load_model
from mlx_diffgemma.training.objective import Objective, Sample
from mlx_diffgemma.training.plan import fitting, plan
from mlx_diffgemma.training.settings import Settings
from mlx_diffgemma.training.step import Trainer


@pytest.fixture(scope="module")
def real() -> Headers:
    """The real model's, of which there is no file."""
    make = runpy.run_path(str(ROOT / "scripts" / "make_checkpoint.py"))
    config = make["config"](30, vision=True)
    file = Path("model.safetensors")
    tensors = {
        n: Tensor(n, "BF16", s, file, 0, 2 * prod(s)) for n, s in make["shapes"](config).items()
    }
    return Headers(Path("real"), config, tensors)


def test_the_real_model_is_planned_without_its_weights(real: Headers) -> None:
    before = active_memory()
    settings = Settings(batch_size=1, grad_checkpoint=True)
    made = plan(real, settings, AdapterConfig(), tokens=1024)
    assert mx.get_active_memory() - before < 1e6
    assert made.trained == pytest.approx(18.6e6, rel=0.01)
    weights, trained, held, working = (part.bytes for part in made.parts)
    assert weights == pytest.approx(50.5e9, rel=0.01)
    assert trained == made.trained * 5 * 4
    assert 0.2e9 < held < 2e9
    assert 0.2e9 < working < 2e9
    assert made.total <= usable(made.macs[0])
    longer = plan(real, replace(settings, max_seq_length=512), AdapterConfig(), tokens=9999)
    assert longer.tokens == 512
    assert longer.total < made.total
    held_all = plan(real, Settings(batch_size=1), AdapterConfig(), tokens=1024).parts[2].bytes
    assert held_all > 8 * held
    full = plan(real, settings, AdapterConfig("full"), tokens=1024)
    assert full.total > 4 * weights


@pytest.mark.parametrize("gigabytes", [100, 65, 58, 53.3, 52.2])
def test_a_refusal_says_what_would_fit(real: Headers, gigabytes: float) -> None:
    settings, memory = Settings(batch_size=8), int(gigabytes * 1e9)
    with pytest.raises(TooLarge) as refusal:
        fitting(real, settings, AdapterConfig(), tokens=2048, memory=memory)
    told = str(refusal.value)
    advice = re.search(r"with (--.*) it needs", told)
    assert advice, told
    for flag in re.findall(r"--[a-z-]+(?: \d+)?", advice[1]):
        name, _, value = flag[2:].replace("-", "_").partition(" ")
        settings = replace(settings, **{name: int(value) if value else True})
    assert fitting(real, settings, AdapterConfig(), tokens=2048, memory=memory)
    assert "\n" not in told


def test_what_nothing_can_help_is_refused(real: Headers) -> None:
    for kind, told in (("lora", "fewer bits"), ("full", "--fine-tune-type lora")):
        with pytest.raises(TooLarge, match=told):
            fitting(real, Settings(), AdapterConfig(kind), tokens=99, memory=10**9)  # type: ignore[arg-type]


@pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="factors of the CPU backend")
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_plan_is_near_what_is_measured(checkpointed: bool) -> None:
    directory = FIRST / "tiny"
    settings = Settings(batch_size=2, grad_checkpoint=checkpointed)
    made = plan(read_headers(directory), settings, AdapterConfig(), tokens=200, dtype="float32")
    model = load_model(directory, dtype="float32")
    add_adapter(model, AdapterConfig())
    before = active_memory()
    trainer = Trainer(model, settings, 1)
    trainer.objective = Objective(self_conditioned=1.0)
    sample = Sample(tuple(range(9, 149)), tuple(range(100, 160)))
    mx.reset_peak_memory()
    for iteration in (1, 2):
        trainer.step([sample] * 2, iteration)
    measured = mx.get_peak_memory() - before
    print(measured, made)
    assert 0.5 <= measured / (made.total - made.parts[0].bytes) <= 1.1
