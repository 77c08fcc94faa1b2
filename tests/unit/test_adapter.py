"""Adapters: mlx-lm reads ours, each kind beside each base; what is no adapter is one sentence."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
import pytest
from held import active_memory, exact_memory
from hub import asked_here
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import load_adapters
from random_model import untrained

from mlx_diffgemma import DiffusionGemma, PromptCache, generate, load
from mlx_diffgemma.arguments import SettingError
from mlx_diffgemma.checkpoint import adapter as adapters
from mlx_diffgemma.checkpoint import hub as asking
from mlx_diffgemma.checkpoint.adapter import (
    KEYS,
    AdapterConfig,
    add_adapter,
    find_adapter,
    load_adapter,
    read_adapter,
    save_adapter,
    trained,
    with_adapter,
)
from mlx_diffgemma.checkpoint.info import inspect
from mlx_diffgemma.checkpoint.load import EMBEDDED, load_model
from mlx_diffgemma.diffusion.cache_file import SessionError
from mlx_diffgemma.errors import CheckpointError

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
OUTSIDE = "model.decoder.self_conditioning.up_proj"


def random_model(packed: dict[str, Any] | None = None) -> DiffusionGemma:
    model: DiffusionGemma = untrained(64, 8, windows=(8, None, 8), width=64)

    def wide(path: str, module: nn.Module) -> bool:
        return hasattr(module, "to_quantized") and not path.endswith("experts.down_proj")

    if packed:
        nn.quantize(model, class_predicate=wide, **packed)
    model.merge()
    return model


def logits(model: DiffusionGemma) -> mx.array:
    """Of a canvas behind a prompt, with what a last step may have believed."""
    cache = model.make_cache()
    model.encode(mx.array([[3, 4, 5, 6, 7]]), cache)
    mx.eval([layer.state for layer in cache])
    believed = mx.random.normal((1, 8, 64), key=mx.random.key(9))
    found = model(mx.array([[8, 9, 10, 11, 12, 13, 14, 15]]), cache, believed)
    mx.eval(found)
    return found


def distance(a: mx.array, b: mx.array) -> float:
    return float(mx.abs(a - b).max())


def random_terms(model: DiffusionGemma, seed: int = 1) -> dict[str, mx.array]:
    keys = iter(mx.random.split(mx.random.key(seed), 999))
    return {
        # What lora_a begins with is another draw each time.
        name: array * (not name.endswith("lora_a"))
        + 0.1 * mx.random.normal(array.shape, key=next(keys))
        for name, array in trained(model).items()
    }


def written(
    directory: Path, config: AdapterConfig, make: Callable[[], DiffusionGemma] = random_model
) -> DiffusionGemma:
    """An adapter of random numbers, and the model that has it in place."""
    model = make()
    add_adapter(model, config)
    weights = random_terms(model)
    save_adapter(directory, weights, config, model="somebody/model", seed=0)
    model.load_weights(list(weights.items()), strict=False)
    model.eval()
    return model


FORMATS: list[dict[str, Any] | None] = [
    None,
    *({"group_size": 32, "bits": bits} for bits in (2, 3, 4, 5, 6, 8)),
    {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    {"group_size": 16, "bits": 4, "mode": "nvfp4"},
    {"group_size": 32, "bits": 8, "mode": "mxfp8"},
]


@pytest.mark.parametrize("packed", FORMATS, ids=str)
@pytest.mark.parametrize(
    "config",
    [
        AdapterConfig(rank=3),
        AdapterConfig(num_layers=2, keys=(*EXPERTS, "router.proj", OUTSIDE)),
        AdapterConfig(keys=None, dropout=0.1),
        AdapterConfig("dora", rank=2, scale=0.5),
        AdapterConfig("full", num_layers=1),
        AdapterConfig("full"),
    ],
    ids=str,
)
def test_mlx_lm_reads_ours(
    tmp_path: Path, config: AdapterConfig, packed: dict[str, Any] | None
) -> None:
    if packed and config.fine_tune_type == "full":
        with pytest.raises(SettingError, match="only where none is quantized"):
            written(tmp_path, config, lambda: random_model(packed))
        return
    model = written(tmp_path, config, lambda: random_model(packed))
    expected = logits(model)
    ours = random_model(packed)
    load_adapter(ours, tmp_path)
    assert distance(logits(ours), expected) == 0
    assert distance(logits(ours), logits(random_model(packed))) > 0.1
    if config.fine_tune_type == "dora" and packed and packed["bits"] in (3, 5, 6):
        return  # mlx-lm takes such matrices for narrower ones than they are
    theirs = random_model(packed)
    load_adapters(theirs, str(tmp_path))
    theirs.eval()
    assert distance(logits(theirs), expected) == 0


def test_terms_that_are_new_change_nothing() -> None:
    model = random_model()
    expected = logits(model)
    add_adapter(model, AdapterConfig(keys=None))
    model.eval()
    assert distance(logits(model), expected) < 1e-5  # each product by itself
    names = trained(model)
    assert all(name.endswith(("lora_a", "lora_b")) for name in names)
    assert len(names) == 2 * (2 * 10 + 9)  # the full layer has no values of its own


def test_some_layers_have_no_map_that_others_have() -> None:
    """Adapting the last layer alone, a full one, once failed as it has no v_proj."""
    model = untrained(64, 8, windows=(8, None), width=64)
    add_adapter(model, AdapterConfig(num_layers=1))
    assert len(trained(model)) == 2 * 6
    with pytest.raises(SettingError, match="none of them is in the last 1 layers"):
        add_adapter(
            untrained(64, 8, windows=(8, None), width=64),
            AdapterConfig(num_layers=1, keys=("self_attn.v_proj",)),
        )


def test_a_second_adapter_is_refused(tmp_path: Path) -> None:
    """It was said that the layers have no map of that name: each was an adapted one by then."""
    model = written(tmp_path, AdapterConfig())
    for add in (
        lambda: add_adapter(model, AdapterConfig()),
        lambda: load_adapter(model, tmp_path),
    ):
        with pytest.raises(SettingError, match=r"has an adapter in place \(LoRA .* load it"):
            add()


def test_full_training_takes_all_or_the_last_blocks() -> None:
    model = random_model()
    add_adapter(model, AdapterConfig("full"))
    assert trained(model).keys() == dict(tree_flatten(model.parameters())).keys()
    model = random_model()
    add_adapter(model, AdapterConfig("full", num_layers=1))
    assert all(name.startswith("model.decoder.layers.2.") for name in trained(model))


def test_full_training_holds_each_weight_once() -> None:
    """The merged products once kept the first weights, beside those that had replaced them."""
    model = random_model()
    mx.eval(model.parameters(), model.constants)
    add_adapter(model, AdapterConfig("full", -1))
    before = active_memory()
    with exact_memory():
        new = {name: array + 1 for name, array in trained(model).items()}
        mx.eval(new)  # while the first ones are held: a sum may take over a buffer of several
        model.update(tree_unflatten(list(new.items())))
    assert active_memory() < before + 50_000


@pytest.mark.parametrize("keys", [("self_attn.k_proj", "mlp.up_proj"), KEYS])
def test_merged_products_do_without_adapted_maps(tmp_path: Path, keys: tuple[str, ...]) -> None:
    """Whether some of what is merged is adapted or all, before or afterwards."""
    config = AdapterConfig(keys=keys)
    expected = logits(written(tmp_path, config))
    late, early = random_model(), untrained(64, 8, windows=(8, None, 8), width=64)
    load_adapter(late, tmp_path)
    load_adapter(early, tmp_path)
    early.merge()
    assert distance(logits(late), expected) == 0
    assert distance(logits(early), expected) < 1e-5


@pytest.mark.parametrize("config", [AdapterConfig(keys=None), AdapterConfig("dora")], ids=str)
def test_float32_terms_leave_a_bfloat16_model_so(tmp_path: Path, config: AdapterConfig) -> None:
    """They would make everything behind them float32, twice the memory and time."""
    written(tmp_path, config)
    model = random_model()
    model.set_dtype(mx.bfloat16)
    load_adapter(model, tmp_path)
    cache = model.make_cache()
    assert model.encode(mx.array([[3, 4, 5]]), cache).dtype == mx.bfloat16
    assert {layer.state.dtype for layer in cache if layer.state is not None} == {mx.bfloat16}
    assert {array.dtype for array in trained(model).values()} == {mx.float32}


# What is asked of a config, and of the model; what is said then.
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"rank": 0}, "rank must be from 1 to 4096, not 0"),
    ({"rank": 10**30}, "rank must be from 1 to 4096"),
    ({"rank": 2.5}, "rank must be a whole number"),
    ({"dropout": 1.0}, "dropout must be from 0 to below 1"),
    ({"scale": float("nan")}, "scale must be a number, not nan"),
    ({"scale": 1e30}, "scale must be a number"),
    ({"num_layers": 0}, "no layer would be adapted"),
    ({"num_layers": 4}, "num_layers is 4, and the model has 3"),
    ({"num_layers": -2}, "num_layers must be from -1 to 1000"),
    ({"num_layers": 10**99}, "num_layers must be from -1 to 1000"),
    ({"keys": ()}, "keys must be 1 to 1000 names, not 0"),
    ({"keys": ("q_proj",)}, "the layers have no 'q_proj'"),
    ({"keys": (3,)}, "3 is no name of a module"),
    ({"keys": ("mlp",)}, "mlp is a GatedMLP, no linear map"),
    ({"keys": ("model.decoder.embed_tokens",)}, "is a Embedding, no linear map"),
    ({"fine_tune_type": "qlora"}, "one of lora, dora, full; not 'qlora'"),
    ({"fine_tune_type": "dora", "keys": EXPERTS}, "DoRA does not adapt experts"),
]


@pytest.mark.parametrize(("changes", "said"), MISTAKES)
def test_mistakes_of_a_config(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        add_adapter(random_model(), AdapterConfig(**changes))


def rewritten(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def with_weights(
    change: Callable[[dict[str, mx.array]], dict[str, mx.array]],
) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        path = directory / "adapters.safetensors"
        found = mx.load(str(path))
        assert isinstance(found, dict)
        mx.eval(found)
        mx.save_safetensors(str(path), change(found))

    return spoil


FIRST = "model.decoder.layers.0.mlp.up_proj.lora_a"
TERMS = {"rank": 16, "dropout": 0.0, "scale": 2.0, "keys": ["mlp.up_proj"]}

SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda d: (d / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "no weights": (lambda d: (d / "adapters.safetensors").unlink(), "safetensors is missing"),
    "a list": (lambda d: (d / "adapter_config.json").write_text("[]"), "not a JSON object"),
    "half": (lambda d: (d / "adapters.safetensors").write_bytes(b"\1" * 9), "cut off or not"),
    "alpha": (
        lambda d: rewritten(d, lora_parameters={"rank": 8, "alpha": 16}),
        "lora_parameters lack scale",
    ),
    "no terms": (lambda d: rewritten(d, lora_parameters=3), "must be an object, not 3"),
    "keys": (
        lambda d: rewritten(d, lora_parameters={**TERMS, "keys": "mlp.up_proj"}),
        "keys must be names, not 'mlp.up_proj'",
    ),
    "kind": (lambda d: rewritten(d, fine_tune_type=["lora"]), "fine_tune_type is one of"),
    "layers": (lambda d: rewritten(d, num_layers="all"), "num_layers must be a whole number"),
    "no layers": (lambda d: rewritten(d, num_layers=None), "num_layers is missing"),
    "missing": (
        with_weights(lambda w: {k: v for k, v in w.items() if k != FIRST}),
        f"lacks {FIRST}",
    ),
    "unknown": (with_weights(lambda w: {**w, "a.b": w[FIRST]}), "a.b is no adapted parameter"),
    "shape": (
        with_weights(lambda w: {**w, FIRST: w[FIRST][:-1]}),
        r"has the shape \[63, 16\], where this model has \[64, 16\]; it says that it was trained "
        "on 'somebody/model'",
    ),
    "ints": (with_weights(lambda w: {**w, FIRST: w[FIRST].astype(mx.int32)}), "has the type I32"),
    "NaN": (with_weights(lambda w: {**w, FIRST: w[FIRST] * mx.nan}), "not finite"),
    "infinite": (with_weights(lambda w: {**w, FIRST: w[FIRST] + mx.inf}), "not finite"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_no_adapter_is_one_sentence(tmp_path: Path, name: str) -> None:
    spoil, said = SPOILT[name]
    written(tmp_path, AdapterConfig(keys=("mlp.up_proj",)))
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=said) as caught:
        load_adapter(random_model(), tmp_path)
    assert "\n" not in str(caught.value)


def test_where_an_adapter_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_adapter(str(tmp_path)) == tmp_path
    (tmp_path / "file").touch()
    for given, said in [
        (str(tmp_path / "file"), "is a file; an adapter is the directory of"),
        (str(tmp_path / "nope"), "neither a directory with an adapter nor a name on the hub"),
        ("../../nowhere/adapter", "neither a directory"),
        ("x" * 10_000, "cannot be read"),
        ("~nobody-here/adapter", "cannot be read"),
        ("a\0b", "neither a directory"),
    ]:
        with pytest.raises(CheckpointError, match=said):
            find_adapter(given)


# In a model that is loaded --------------------------------------------------------------------


def beside_tiny(directory: Path, seed: int = 1, **settings: Any) -> Path:
    """An adapter of the small model that ships."""
    config = AdapterConfig(rank=2, **settings)
    model = load_model(EMBEDDED, dtype="float32")
    add_adapter(model, config)
    save_adapter(directory, random_terms(model, seed), config)
    return directory


def test_an_adapter_is_loaded_beside_a_model(tmp_path: Path) -> None:
    model, tokenizer = load(adapter=beside_tiny(tmp_path / "a", scale=20.0))
    assert model.adapter == "LoRA of rank 2, scale 20, all layers"
    assert repr(model).endswith(f"context {model.context:,}, {model.adapter})")
    # In another thread: what is lazy then belongs to the one that loaded it, and fails.
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(generate, model, tokenizer, "Hello", seed=1, steps=2, max_tokens=8)
        assert answer.result() != generate(*load(), "Hello", seed=1, steps=2, max_tokens=8)


def test_what_another_adapter_has_read_is_not_resumed(tmp_path: Path) -> None:
    names = [beside_tiny(tmp_path / "a"), beside_tiny(tmp_path / "b", seed=2), None]
    names.append(Path(shutil.copytree(tmp_path / "a", tmp_path / "c")))
    rewritten(tmp_path / "c", lora_parameters={**TERMS, "rank": 2, "scale": 3.0, "keys": [*KEYS]})
    models = [load(adapter=name)[0] for name in names]
    file = tmp_path / "context.safetensors"
    for mine in models:
        file.unlink(missing_ok=True)
        cache = PromptCache(mine)
        cache.read([5, 6, 7])
        cache.save(file)
        for other in models:
            if other is mine:
                PromptCache.load(file, other)
                continue
            with pytest.raises(SessionError, match="another model"):
                PromptCache.load(file, other)


def test_the_memory_of_an_adapter_counts(tmp_path: Path) -> None:
    stored = read_adapter(beside_tiny(tmp_path))
    found = inspect(EMBEDDED, "float32")
    size = (tmp_path / "adapters.safetensors").stat().st_size
    more = with_adapter(found, stored).memory_needed(100) - found.memory_needed(100)
    assert 0.9 * size < more < size
    whole = replace(stored, config=AdapterConfig("full"))
    assert with_adapter(found, whole) == found


def test_without_an_adapter_mlx_lm_is_not_imported() -> None:
    """It brings transformers, which takes seconds."""
    code = (
        "import sys, mlx_diffgemma; mlx_diffgemma.load(); import mlx_diffgemma.cli.main;"
        "print([name for name in ('mlx_lm', 'transformers', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_of_the_hub_only_an_adapter_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = beside_tiny(tmp_path / "remote")
    for name in ("model.safetensors", "adapter_model.bin", "modeling.py", "config.json"):
        (remote / name).write_text("{}")
    with asked_here(remote, tmp_path / "cache", monkeypatch) as hub:
        with monkeypatch.context() as patched:
            patched.setattr(adapters, "FETCHED_LIMIT", 10_000)
            with pytest.raises(CheckpointError, match="org/model has an adapter of"):
                find_adapter("org/model")
        assert not hub.sent
        model, _ = load(adapter="org/model")
        assert hub.sent.keys() == {"adapters.safetensors", "adapter_config.json"}
        assert model.adapter is not None
        monkeypatch.setattr(asking, "FIRST_PATIENCE", 0.1)
        hub.fault = lambda *_: 503
        read_adapter(find_adapter("org/model"))  # which the cache has
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
        with pytest.raises(CheckpointError, match="not in the local cache and the hub cannot be"):
            find_adapter("org/model")
