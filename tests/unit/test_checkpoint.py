"""Damaged and lying checkpoints are named in one sentence; the hub is asked for little."""

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import mlx.core as mx
import pytest
from huggingface_hub import errors
from paths import SUDOKU

from mlx_diffgemma import CheckpointError, generate, load
from mlx_diffgemma.checkpoint import files
from mlx_diffgemma.checkpoint.files import (
    SHIPPED,
    aliases_of,
    name_of,
    read_header,
    read_json,
    read_tensors,
    resolve,
)
from mlx_diffgemma.checkpoint.load import keep_in_memory, read_generation
from mlx_diffgemma.checkpoint.quantization import Quantization, quantization_of

NORM = "model.decoder.norm.weight"


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (None, "tiny"),
        ("tiny-puzzles", "tiny-puzzles"),
        ("org/name", "org/name"),
        ("sub/model/", "model"),
        ("sub/../sub", "sub"),
        ("sub/model/..", "sub"),
        ("bad\udcff", "bad\ufffd"),
        ("~nobody-here/x", "~nobody-here/x"),
        ("/", "/"),
        ("x" * 9000, "x" * 9000),
    ],
)
def test_a_model_is_called_as_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, name: str
) -> None:
    """The small model was listed as `diffgemma-small`, and a directory with all of its path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub" / "model").mkdir(parents=True)
    assert name_of(given) == name


@pytest.mark.parametrize(
    ("given", "aliases"),
    [
        (None, ()),
        ("tiny", ()),
        (str(SHIPPED["tiny"]), ()),
        ("tiny_copy", ("tiny",)),
        ("org/name", ("name",)),
        ("model", ()),
        ("models--org--a-b/snapshots/0123abc", ("org/a-b", "a-b")),
        ("a/b/c", ()),
        ("~nobody-here/x", ("x",)),
        ("/", ()),
    ],
)
def test_a_model_has_further_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, aliases: tuple[str, ...]
) -> None:
    """A snapshot in the hub's cache was found by its commit alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "models--org--a-b" / "snapshots" / "0123abc").mkdir(parents=True)
    (tmp_path / "tiny_copy").symlink_to(SHIPPED["tiny"])
    assert aliases_of(given) == aliases


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SUDOKU, tmp_path / "model"))


def change_weights(directory: Path, change: Callable[[dict[str, mx.array]], object]) -> None:
    path = directory / "model.safetensors"
    weights = dict(mx.load(str(path)))
    mx.eval(weights)
    change(weights)
    mx.save_safetensors(str(path), weights)


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(directory)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_missing_tensor(checkpoint: Path) -> None:
    change_weights(checkpoint, lambda weights: weights.pop(NORM))
    assert refusal(checkpoint) == f"the checkpoint lacks {NORM}"


def test_extra_tensor(checkpoint: Path) -> None:
    extra = "model.decoder.layers.9.layer_scalar"
    change_weights(checkpoint, lambda weights: weights.update({extra: mx.ones((1,))}))
    assert extra in refusal(checkpoint)


def test_wrong_shape(checkpoint: Path) -> None:
    change_weights(checkpoint, lambda weights: weights.update({NORM: mx.ones((64,))}))
    assert refusal(checkpoint) == f"{NORM}: shape [64], where the config asks for [128]"


def test_truncated_file_names_the_first_lost_tensor(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    by_place = sorted(read_header(path).values(), key=lambda tensor: tensor.start)
    with path.open("r+b") as file:
        file.truncate(by_place[-3].end - 1)
    assert f"cut off: {by_place[-3].name} ends" in refusal(checkpoint)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 7, b"\xff" * 64, (8).to_bytes(8, "little") + b"not json", b"PK\x03\x04" * 99],
)
def test_not_safetensors(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in refusal(checkpoint)


def test_header_that_lies_about_bytes(checkpoint: Path) -> None:
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 15]}
    header = json.dumps({NORM: entry}).encode()
    data = len(header).to_bytes(8, "little") + header + b"\0" * 16
    (checkpoint / "model.safetensors").write_bytes(data)
    assert f"bytes of {NORM} do not fit" in refusal(checkpoint)


@pytest.mark.parametrize(
    ("offsets", "said"),
    [
        ([(0, 8), (0, 8)], "leaves a gap or overlaps"),
        ([(0, 8), (12, 20)], "leaves a gap or overlaps"),
        ([(0, 8), (8, 16)], "8 bytes after the last tensor"),
        ([(0, 8), (8.0, 16.0)], "entry of b is damaged"),
        ([(0, 8), (-8, 0)], "entry of b is damaged"),
    ],
)
def test_tensors_fill_the_file_exactly(
    tmp_path: Path, offsets: list[tuple[float, float]], said: str
) -> None:
    """Gaps, overlaps and trailing bytes used to pass; each is a file that another tool broke."""
    entries = [{"dtype": "F32", "shape": [2], "data_offsets": pair} for pair in offsets]
    header = json.dumps(dict(zip("ab", entries, strict=True))).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 24)
    with pytest.raises(CheckpointError, match=said):
        read_header(path)


def test_json_nested_without_end_is_damaged(tmp_path: Path) -> None:
    """It used to end in a RecursionError."""
    nested = b'{"a":' + b"[" * 200_000
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(nested).to_bytes(8, "little") + nested)
    with pytest.raises(CheckpointError, match="header is damaged"):
        read_header(path)
    (tmp_path / "config.json").write_bytes(nested)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(tmp_path, "config.json")


def index(directory: Path, weight_map: dict[str, str]) -> None:
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))


def test_index_that_lies(checkpoint: Path) -> None:
    index(checkpoint, {NORM: "model-00001-of-00002.safetensors"})
    assert "model-00001-of-00002.safetensors is missing" in refusal(checkpoint)
    index(checkpoint, {"model.decoder.nothing": "model.safetensors"})
    assert "lacks model.decoder.nothing" in refusal(checkpoint)
    index(checkpoint, {NORM: "../other/model.safetensors"})
    assert "outside the checkpoint" in refusal(checkpoint)


def test_missing_and_damaged_side_files(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text("{")
    assert "tokenizer.json is not a tokenizer" in refusal(checkpoint)
    (checkpoint / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in refusal(checkpoint)
    (checkpoint / "generation_config.json").write_text('{"t_min": "warm"}')
    assert "generation config" in refusal(checkpoint)
    (checkpoint / "config.json").write_text("[]")
    assert "config.json is not a JSON object" in refusal(checkpoint)


SIDE_FILES = ["config.json", "generation_config.json", "model.safetensors.index.json"]
SIDE_FILES += ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]


@pytest.mark.parametrize("name", [*SIDE_FILES, "model.safetensors"])
def test_what_is_no_file_is_not_waited_for(checkpoint: Path, name: str) -> None:
    """A pipe in the place of a file used to be waited for without end."""
    path = checkpoint / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    assert refusal(checkpoint) == f"{path} is not a file"
    path.unlink()
    path.mkdir()
    assert refusal(checkpoint) == f"{path} is not a file"
    path.rmdir()
    path.symlink_to(name)
    assert refusal(checkpoint) == f"{path} cannot be read: {os.strerror(errno.ELOOP)}"


@pytest.mark.parametrize("name", SIDE_FILES)
def test_files_of_other_contents(checkpoint: Path, name: str) -> None:
    """Bytes that are no UTF-8, lists and numbers used to be tracebacks in some of them."""
    path = checkpoint / name
    path.write_bytes(b'{"a": "\xff"}')
    assert str(path) in refusal(checkpoint)
    if name.endswith(".jinja"):
        return
    for text in ("[]", "5", "null", '{"a":' + "[" * 100_000, '{"a": ' + "9" * 5000 + "}", ""):
        path.write_text(text)
        assert str(path) in refusal(checkpoint)


@pytest.mark.parametrize(
    ("placed", "said"),
    [
        (None, "has no weight_map"),
        ([NORM], "has no weight_map"),
        ({NORM: 5}, "has no weight_map"),
        ({}, "has no model*.safetensors"),
        ({NORM: "../../etc/passwd"}, "outside the checkpoint"),
        ({NORM: "/etc/passwd"}, "outside the checkpoint"),
        ({NORM: ""}, "names '', no safetensors file"),
        ({NORM: "a\0b.safetensors"}, "outside the checkpoint"),
        ({NORM: "a\nb.safetensors"}, "outside the checkpoint"),
        ({NORM: ".."}, "names '..', no safetensors file"),
        ({NORM: "config.json"}, "names 'config.json', no safetensors file"),
        ({NORM: "x" * 999 + ".safetensors"}, "cannot be read"),
        ({"\x1b[31m": "model.safetensors"}, r"lacks '\x1b[31m'"),
    ],
)
def test_index_of_anything(checkpoint: Path, placed: Any, said: str) -> None:
    index(checkpoint, placed)
    assert said in refusal(checkpoint)


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (json.dumps({"a": {**GOOD, "shape": [2] * 300_000}}), "entry of a is damaged"),
        (json.dumps({"a": {**GOOD, "shape": [10**4000] * 8}}), "bytes of a do not fit"),
        (json.dumps({"a": {**GOOD, "data_offsets": [10**4000, 10**4000 + 8]}}), "a ends at byte"),
        (json.dumps({"a": {**GOOD, "shape": [True, 2]}}), "entry of a is damaged"),
        (json.dumps({"a": {**GOOD, "dtype": ["F32"]}}), "a has the unknown type"),
        (json.dumps({"a": [GOOD]}), "entry of a is damaged"),
        (json.dumps({"a\x1b[2J": GOOD}), r"'a\x1b[2J' is not a name"),
        (json.dumps({"": GOOD}), "'' is not a name"),
        (json.dumps({"a" * 1000: GOOD}), "is not a name of a tensor"),
        (json.dumps({"__metadata__": {"format": 1}, "a": GOOD}), "header is damaged"),
        (f'{{"a": {json.dumps(GOOD)}, "a": {json.dumps(GOOD)}}}', "header is damaged"),
        (json.dumps({"a": GOOD}).encode("utf-16"), "header is damaged"),
        (b'{"\xff": 1}', "header is damaged"),
    ],
)
def test_headers_of_anything(tmp_path: Path, header: str | bytes, said: str) -> None:
    """Some took minutes (a product of 300,000 factors), some were read otherwise by MLX."""
    text = header if isinstance(header, bytes) else header.encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 8)
    with pytest.raises(CheckpointError, match=re.escape(said)) as caught:
        read_header(path)
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


def change_json(directory: Path, name: str, **values: Any) -> None:
    path = directory / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "values",
    [
        {"max_new_tokens": 1.5},
        {"max_new_tokens": True},
        {"max_denoising_steps": 10**15},
        {"max_denoising_steps": "many"},
        {"stability_threshold": -1},
        {"t_min": math.nan},
        {"t_max": math.inf},
        {"t_min": 0, "t_max": 0},
        {"confidence_threshold": [1]},
        {"sampler_config": 5},
        {"sampler_config": {}},
        {"sampler_config": {"entropy_bound": math.nan}},
        {"sampler_config": {"entropy_bound": 0.1, "_cls_name": ["x"]}},
        {"eos_token_id": []},
        {"eos_token_id": True},
        {"eos_token_id": [1, None]},
        {"eos_token_id": [-1]},
        {"eos_token_id": {"a": 1}},
        {"eos_token_id": list(range(1000))},
    ],
)
def test_generation_config_of_anything(checkpoint: Path, values: dict[str, Any]) -> None:
    """Many of these used to load, to end in a traceback later or in an endless answer."""
    change_json(checkpoint, "generation_config.json", **values)
    assert "generation config" in refusal(checkpoint)


def test_temperature_may_end_at_zero(checkpoint: Path) -> None:
    """It used to be refused, though the reference takes it: no step gets there."""
    change_json(checkpoint, "generation_config.json", t_min=0.0)
    model, tokenizer = load(checkpoint)
    assert model.generation.t_min == 0
    assert generate(model, tokenizer, "12", seed=0, steps=3)


def test_null_says_nothing_of_end_tokens(checkpoint: Path) -> None:
    """It used to hide what config.json says."""
    change_json(checkpoint, "generation_config.json", eos_token_id=None)
    change_json(checkpoint, "config.json", eos_token_id=[6, 9])
    config = read_json(checkpoint, "config.json")
    assert read_generation(checkpoint, config).eos_token_ids == (6, 9)
    del config["eos_token_id"]
    assert read_generation(checkpoint, config).eos_token_ids == (1, 6)  # of text_config
    config["generation_config"] = [1]
    (checkpoint / "generation_config.json").unlink()
    with pytest.raises(CheckpointError, match="generation_config is not a JSON object"):
        read_generation(checkpoint, config)


def change_tokenizer(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "tokenizer.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_ids_beyond_the_vocabulary_are_refused(checkpoint: Path) -> None:
    """The embedding used to be read out of bounds, which gave noise or ended the process."""
    change_json(checkpoint, "generation_config.json", eos_token_id=[1, 128])
    assert refusal(checkpoint) == "eos_token_id 128 is beyond the vocabulary of 128"
    change_json(checkpoint, "generation_config.json", eos_token_id=[1, 127])
    change_tokenizer(checkpoint, lambda values: values["model"]["vocab"].update(x=4_000_000_000))
    assert "the tokenizer has the id 4000000000, beyond the vocabulary" in refusal(checkpoint)


def test_a_tokenizer_neither_pads_nor_cuts(checkpoint: Path) -> None:
    """Padding to 1e6 tokens of an id beyond the vocabulary used to be done, prompts were cut."""
    padding = {"strategy": {"Fixed": 1_000_000}, "direction": "Right", "pad_to_multiple_of": None,
               "pad_id": 99_999, "pad_type_id": 0, "pad_token": "<pad>"}  # fmt: skip
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    plain = load(checkpoint)[1].encode("123456")
    change_tokenizer(checkpoint, lambda values: values.update(padding=padding, truncation=cut))
    assert load(checkpoint)[1].encode("123456") == plain


@pytest.mark.parametrize("key", ["bos_token", "eos_token", "pad_token"])
@pytest.mark.parametrize("value", [5, ["<bos>"], {"a": 1}, True, "\ud800", "\x1b"])
def test_special_tokens_that_are_no_text(checkpoint: Path, key: str, value: object) -> None:
    """They used to be accepted, and were a traceback at the first answer."""
    change_json(checkpoint, "tokenizer_config.json", **{key: value})
    assert refusal(checkpoint).startswith(f"tokenizer_config.json: '{key}' is no text: ")


def test_a_tokenizer_that_can_encode_nothing(checkpoint: Path) -> None:
    """It used to load, and be a traceback at the first unknown character."""
    change_tokenizer(checkpoint, lambda values: values["model"].update(unk_token="x" * 9000))
    sentence = refusal(checkpoint)
    assert "cannot encode any text: Unk token" in sentence
    assert len(sentence) < 600


def test_pickles_are_not_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    assert "no model*.safetensors" in refusal(checkpoint)


def test_override_without_a_mode_is_affine() -> None:
    config = {
        "quantization": {
            "group_size": 32,
            "bits": 4,
            "mode": "mxfp4",
            "model.decoder.embed_tokens": {"group_size": 64, "bits": 8},
        }
    }
    assert quantization_of(config, "model.decoder.embed_tokens") == Quantization(64, 8, "affine")
    assert quantization_of(config, "any.other") == Quantization(32, 4, "mxfp4")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes quantization"),
        # bits and group_size are there: it used to be read as MLX's affine format.
        ({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}, "awq"),
        ({"quantization": {"bits": 4, "group_size": 64, "x": False}}, "x is not quantized, but"),
        ({"quantization": {"bits": "4", "group_size": 64}}, "does not say how x"),
        ({"quantization": {"bits": 0, "group_size": 64}}, "does not say how x"),
        ({"quantization": [4]}, "not a JSON object"),
        ({"quantization": []}, "not a JSON object"),
        ({"quantization": False, "quantization_config": {}}, "not a JSON object"),
        ({"quantization": {"bits": True, "group_size": 64}}, "does not say how x"),
        ({"quantization": {"bits": 4, "group_size": 2**70}}, "does not say how x"),
        ({"quantization": {"bits": 7, "group_size": 64}}, "x is packed as 'affine' of 7 bits"),
        ({"quantization": {"bits": 4, "group_size": 64, "mode": ["affine"]}}, "which MLX has not"),
        ({"quantization": {"bits": 4, "group_size": 64, "mode": None}}, "packed as None"),
        ({"quantization": {"quant_method": ["awq"]}}, "quantization is not supported"),
        ({}, "does not say how x"),
    ],
)
def test_quantization_that_is_not_ours_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        quantization_of(config, "x")


# The hub ------------------------------------------------------------------------------------------


def test_hub_fetches_only_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(repo: str, **flags: Any) -> str:
        asked.update(flags, repo=repo)
        return str(SUDOKU)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve("google/diffusiongemma", revision="abc123") == SUDOKU
    assert (asked["repo"], asked["revision"]) == ("google/diffusiongemma", "abc123")
    listed = ["config.json", "model-00001-of-00002.safetensors", "chat_template.jinja"]
    listed += ["model.bin", "modeling.py", "model.gguf", "pytorch_model.bin", "consolidated.pth"]
    fetched = huggingface_hub.utils.filter_repo_objects(
        listed, allow_patterns=asked["allow_patterns"]
    )
    assert list(fetched) == listed[:3]


def test_hub_serves_from_its_cache_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real huggingface_hub, offline, with a cache folder as it lays one out."""
    commit = "0" * 40
    root = tmp_path / "models--org--sudoku"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    shutil.copytree(SUDOKU, root / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def cached(*args: Any, **flags: Any) -> str:
        return download(*args, cache_dir=tmp_path, **flags)

    download = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    model, _ = load("org/sudoku")
    assert model.config.canvas_length == 48
    with pytest.raises(CheckpointError, match="not in the local cache"):
        load("org/other")


def test_hub_failures_are_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    response: Any = SimpleNamespace(headers={}, request=None, status_code=404)
    for failure, said in [
        (errors.RepositoryNotFoundError("x", response=response), "no repository org/name"),
        (errors.RevisionNotFoundError("x", response=response), "no revision v9"),
        (errors.GatedRepoError("x", response=response), "gated"),
        (errors.LocalEntryNotFoundError("x"), "not in the local cache"),
        (OSError("disk\nfull"), "could not be fetched: disk"),
        # Neither is an OSError: a bad name, and what HTTP libraries raise when a peer hangs up.
        (errors.HFValidationError("cannot end by '.git'"), "could not be fetched: cannot end"),
        (Exception("peer closed connection"), "could not be fetched: peer closed"),
    ]:

        def fail(*_: Any, failure: Exception = failure, **__: Any) -> str:
            raise failure

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(CheckpointError, match=said):
            resolve("org/name", revision="v9")


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "a/b/c", "/tmp/none/x", "tests/x y"])
def test_what_is_no_hub_name_is_not_looked_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(CheckpointError, match="neither a directory nor a name"):
        resolve(name)


@pytest.mark.parametrize("name", ["x" * 5000, "org/" + "x" * 5000, "~nobody-of-that-name/x"])
def test_names_that_the_file_system_refuses(name: str) -> None:
    """A prompt in the place of a model used to end in "OSError: File name too long"."""
    with pytest.raises(CheckpointError, match="cannot be read"):
        resolve(name)


def test_headers_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """`load` read each header twice: to see what fits, and again to load it."""
    read: list[Path] = []
    read_header = files.read_header
    monkeypatch.setattr(
        files, "read_header", lambda path: (read.append(path), read_header(path))[1]
    )
    load()
    assert len(read) == len(set(read)) == 1


def test_read_tensors_joins_shards(tmp_path: Path) -> None:
    mx.save_safetensors(str(tmp_path / "model-00001-of-00002.safetensors"), {"a": mx.ones((2, 3))})
    mx.save_safetensors(str(tmp_path / "model-00002-of-00002.safetensors"), {"b": mx.ones((4,))})
    assert {n: t.shape for n, t in read_tensors(tmp_path).items()} == {"a": (2, 3), "b": (4,)}
    mx.save_safetensors(str(tmp_path / "model-00002-of-00002.safetensors"), {"a": mx.ones((4,))})
    with pytest.raises(CheckpointError, match="a is in model-00001-of-00002"):
        read_tensors(tmp_path)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"a": mx.ones((5,))})
    assert {n: t.shape for n, t in read_tensors(tmp_path).items()} == {"a": (5,)}


def test_weights_are_wired_where_metal_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Metal is asked, on machines with and without it."""
    asked: list[int] = []
    monkeypatch.setattr(mx, "set_wired_limit", asked.append)
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    keep_in_memory()
    assert asked == []
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 7 << 30})
    keep_in_memory()
    assert asked == [7 << 30]


def test_shipped_models_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory of the same name comes first: it is what the user made."""
    monkeypatch.chdir(tmp_path)
    for name, directory in SHIPPED.items():
        assert resolve(name) == directory
        assert (directory / "model.safetensors").exists()
    data = SHIPPED["tiny"].parent
    assert sum(f.stat().st_size for f in data.rglob("*") if f.is_file()) <= 12e6
    (tmp_path / "tiny").mkdir()
    assert resolve("tiny") == Path("tiny")
