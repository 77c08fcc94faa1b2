"""Settings of `lora`: mlx-lm's YAML files work as they are, and flags come before them."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from mlx_diffgemma import SettingError
from mlx_diffgemma.checkpoint.adapter import KEYS, AdapterConfig
from mlx_diffgemma.cli import lora
from mlx_diffgemma.cli.lora_config import KNOWN, Asked, asked_for, read_config
from mlx_diffgemma.training.settings import Settings

# All that mlx-lm's own example of a file sets, and what it leaves commented.
MLX_LM = """
model: "mlx_model"
train: true
fine_tune_type: lora
optimizer: adamw
optimizer_config:
  adamw:
    betas: [0.9, 0.98]
    eps: 1e-6
    weight_decay: 0.05
    bias_correction: true
data: "/path/to/training/data"
seed: 0
num_layers: 16
batch_size: 4
iters: 1_000
val_batches: 25
learning_rate: 1e-5
report_to: wandb
project_name: mine
steps_per_report: 10
steps_per_eval: 200
resume_adapter_file: null
adapter_path: "adapters"
save_every: 100
test: false
test_batches: 100
max_seq_length: 2048
grad_checkpoint: false
clear_cache_threshold: 0
grad_accumulation_steps: 1
mask_prompt: false
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 8
  scale: 20.0
  dropout: 0.0
lr_schedule:
  name: cosine_decay
  warmup: 100
  warmup_init: 1e-7
  arguments: [1e-5, 1000, 1e-7]
hf_dataset: null
prompt_feature: "ask"
"""


def of_file(tmp_path: Path, text: str, **flags: Any) -> Asked:
    path = tmp_path / "lora.yaml"
    path.write_text(text, encoding="utf-8")
    return asked_for(flags, read_config(path)[0], {})


def test_a_file_of_mlx_lm_works_as_it_is(tmp_path: Path) -> None:
    """1e-5 is a number in it, though YAML's own rules make it text."""
    asked = of_file(tmp_path, MLX_LM)
    assert asked.model == "mlx_model"
    assert (asked.train, asked.test, asked.resume_adapter_file) == (True, False, None)
    assert asked.adapter == AdapterConfig(
        num_layers=16, rank=8, scale=20.0, keys=("self_attn.q_proj", "self_attn.v_proj")
    )
    settings = asked.settings
    assert (settings.learning_rate, settings.iters) == (1e-5, 1000)
    assert settings.arguments()["eps"] == 1e-6
    assert settings.schedule["arguments"] == [1e-5, 1000, 1e-7]
    assert asked.keys.prompt == "ask"
    told = read_config(tmp_path / "lora.yaml")[1]
    assert [line.split(":")[0] for line in told] == ["report_to", "project_name", "mask_prompt"]


def test_flags_come_before_the_file_and_that_before_the_run(tmp_path: Path) -> None:
    path = tmp_path / "lora.yaml"
    path.write_text("iters: 5\nlora_parameters: {rank: 3}\nmodel: mine\n")
    before = {"iters": 9, "batch_size": 9, "model": "old", "iteration": 4, "adapter_path": "kept"}
    asked = asked_for({"iters": 1, "rank": None}, read_config(path)[0], before)
    assert (asked.settings.iters, asked.settings.batch_size) == (1, 9)
    assert (asked.adapter.rank, asked.adapter.keys) == (3, KEYS)
    assert (asked.model, asked.adapter_path) == ("mine", Path("kept"))
    assert asked_for({"rank": 2, "keys": ["a"]}, {}, {}).adapter.keys == ("a",)
    assert asked_for({}, {}, {}).settings == Settings()
    assert asked_for({"adapter_path": ""}, {}, {}).adapter_path is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learnig_rate: 1e-5", "'learnig_rate' is not known; there are adapter_path, batch_size"),
        ("- 1", "has no settings"),
        ("a: [", "is not YAML"),
        ("a: !!python/object/apply:os.system [ls]", "is not YAML"),
        ("a: " + "[" * 5000, "is not YAML"),
        ("iters: 1e3", "iters must be a whole number"),
        ("learning_rate: fast", "learning_rate must be a number"),
        ("learning_rate: .nan", "learning_rate must be a number"),
        ("train: 'yes'", "train must be true or false"),
        ("model: 3", "model must be text"),
        ("dtype: int8", "dtype is one of float32, bfloat16, float16"),
        ("lora_parameters: {alpha: 32, rank: 16}", "no alpha: scale is alpha divided by the rank"),
        ("lora_parameters: {ranks: 3}", "have no 'ranks'"),
        ("lora_parameters: 3", "lora_parameters must be names"),
        ("lora_parameters: {keys: q_proj}", "keys must be names"),
        ("lora_parameters: {keys: [1]}", "1 is no name"),
        ("num_layers: 0", "num_layers is 0"),
        ("fine_tune_type: qlora", "fine_tune_type is one of lora, dora, full"),
        ("hf_dataset: {path: a/b}", "hf_dataset is not supported; hf download"),
        ("prompt_feature: 3", "prompt_feature must be text"),
        ("1: 2", "'1' is not known"),
    ],
)
def test_a_file_that_makes_no_sense_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SettingError, match=re.escape(said)) as failed:
        of_file(tmp_path, text)
    assert len(str(failed.value)) < 1000


def test_a_file_that_unfolds_is_refused(tmp_path: Path) -> None:
    """Nine levels of ten references each are a billion values, written as one line."""
    levels = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]\n" for i in range(1, 9))
    for name in ("lr_schedule", "optimizer_config", "batch_size", "model", "lora_parameters"):
        bomb = f"l0: &l0 [x]\n{levels}{name}: *l8\n"
        with pytest.raises(SettingError):
            of_file(tmp_path, bomb)
        only = bomb.replace(": &", "_: &")
        values = "\n".join(re.sub(r"^l\d_: ", "- ", line) for line in only.splitlines()[:-1])
        with pytest.raises(SettingError):
            of_file(tmp_path, f"{name}:\n{values}\n")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="cannot be read: No such file"):
        read_config(tmp_path / "none.yaml")
    (tmp_path / "long.yaml").write_text("#" * 1_000_001)
    with pytest.raises(SettingError, match="has more than 1,000,000 characters"):
        read_config(tmp_path / "long.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert read_config(tmp_path / "empty.yaml") == ({}, [])


def test_help_says_the_defaults() -> None:
    """They have one home, which --help must not import."""
    groups = (lora.Adapting, lora.Learning, lora.Watching, lora.Keeping)
    said = {
        each.name: each.type.__metadata__[0].help  # type: ignore[union-attr]
        for group in groups
        for each in fields(group)
    }
    own = {**vars(AdapterConfig()), **vars(Settings())}
    for name in said.keys() & own.keys() - {"keys", "grad_checkpoint", "success_steps", "distill"}:
        assert f"[{own[name]}]" in said[name], name
    unsaid = {"lr_schedule", "optimizer_config", "max_grad_norm"}  # which only files can say
    assert {each.name for each in fields(Settings)} - said.keys() == unsaid
    assert said.keys() - KNOWN == {"resume", "overwrite", "rank", "scale", "dropout", "keys"}
