"""A checkpoint directory or hub name -> model and tokenizer."""

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, get_args

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..arguments import SettingError, shown
from ..diffusion.cache_file import fingerprint
from ..diffusion.draws import sub_block
from ..distributed.share import ALONE, Share
from ..errors import CheckpointError
from ..model.config import Config
from ..model.diffusion_gemma import DiffusionGemma, is_text, parameter_name, sanitize
from ..model.part import ModelPart, cut_model
from ..model.settings import GenerationConfig, Speed
from ..text.tokenizer import Tokenizer, TokenizerError
from .adapter import Stored, find_adapter, put_adapter, read_adapter, with_adapter
from .files import (
    DEFAULT,
    SHIPPED,
    Headers,
    Tensor,
    read_headers,
    read_json,
    resolve,
    size_of_file,
)
from .fit import Fit, TooLarge, fit, free_memory, read_size
from .info import config_of, info_of
from .quantization import quantization_of
from .slices import cut_of, cut_of_parameter, read_part
from .vision import sight_of
from .weights import DType, check_parameters, read_weights, sentence

# Columns that stay together where weights are not packed: as many as packed ones mostly have.
FLOAT_GROUP = 1

EMBEDDED = SHIPPED[DEFAULT]


def load(
    path_or_repo: str | Path | None = None,
    *,
    revision: str | None = None,
    dtype: DType | None = None,
    max_memory: int | str | None = None,
    speed: Speed = "faithful",
    adapter: str | Path | None = None,
    share: Share = ALONE,
) -> tuple[DiffusionGemma, Tokenizer]:
    """Load a checkpoint: Hugging Face layout or an MLX conversion, quantized or not.

    Text alone is loaded; a vision tower is, from the same files, when the first picture comes.

    On a Mac this raises the process's limit of wired memory, so that weights are not paged out.

    Args:
        path_or_repo: a directory, or a hub name, of which only the needed files are fetched; None
            is "tiny", the small demonstration model that ships with the package. "tiny-puzzles" is
            another, which solves Sudokus, as "tiny" does not.
        revision: branch, tag or commit of a hub name.
        dtype: what to compute in. None is the checkpoint's own type, except on MLX's CPU backend,
            where it is float32: half-precision products are less exact there.
        max_memory: bytes that the model may take, its context included, or a text such as "12GB";
            None is what is free. The longest context follows from it, see `DiffusionGemma.context`.
        speed: fewer denoising steps for some loss, see `GenerationConfig.with_speed`.
        adapter: what fine-tuning has written, see docs/finetune.md: a directory with
            `adapters.safetensors` and `adapter_config.json`, or a name on the hub. Its terms are
            computed beside the weights, in the type that they are stored in.
        share: which of several ranks this is, each of which has a part of the model.

    Raises:
        CutError: there are more ranks than the model can be cut for.
        TooLarge: it would not fit, before anything is loaded.
        SettingError: a setting is none of those that there are.
        CheckpointError: it cannot be found or fetched, or a file or tensor is missing, damaged or
            not what the config says; the message is one sentence.
    """
    for name, value, known in (("speed", speed, Speed), ("dtype", dtype, DType)):
        if value is not None and value not in get_args(known):
            raise SettingError(f"{name} is one of {', '.join(get_args(known))}; not {shown(value)}")
    keep_in_memory()
    memory = free_memory() if max_memory is None else read_size(max_memory)
    stored = None if adapter is None else read_adapter(find_adapter(str(adapter)))
    directory = directory_of(path_or_repo, revision)
    dtype = computed_in(dtype)
    headers = read_headers(directory)
    part = part_of(headers, share)
    found = info_of(headers, dtype, part)
    if stored is not None:
        found = with_adapter(found, stored, stored.cuts(part, config_of(headers)))
    decided = fit(found, memory)
    model = model_of(headers, dtype, stored, part)
    decided = _in_all(share, decided)
    model.context = decided.context
    table = found.table_bytes if decided.keep_table else 0

    _let_see(model, headers, dtype, lambda: fit(found, memory - table, pictures=True).context)
    if share.size > 1:
        model.identity = fingerprint(model)
    model.generation = model.generation.with_speed(speed)
    if decided.keep_table:
        model.keep_table(mx.eval)
    tokenizer = read_tokenizer(directory)
    check_ids(model, tokenizer)
    return model, tokenizer


def directory_of(path_or_repo: str | Path | None, revision: str | None = None) -> Path:
    """Find the directory of what `load` takes; a name on the hub is fetched.

    Raises:
        CheckpointError: as `load`.
    """
    if path_or_repo is None:
        return EMBEDDED
    return resolve(str(path_or_repo), revision=revision)


def read_tokenizer(directory: Path) -> Tokenizer:
    """Read the tokenizer and chat template of a checkpoint directory.

    Raises:
        CheckpointError: a file is missing, damaged, no file or not what belongs there.
    """
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja"):
        try:
            size_of_file(directory / name)
            if name != "tokenizer.model":
                (directory / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            continue  # of the first, the tokenizer says so
        except OSError as error:
            raise CheckpointError(f"{directory / name} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise CheckpointError(f"{directory / name} is not UTF-8 text") from None
    if os.path.lexists(directory / "tokenizer_config.json"):
        _check_special(read_json(directory, "tokenizer_config.json"))
    try:
        tokenizer = Tokenizer.from_directory(directory)
    except TokenizerError as error:
        raise CheckpointError(sentence(error)) from None
    try:
        tokenizer.encode("\U0010fffd")  # which no vocabulary has
    except Exception as error:  # the library raises bare Exception
        message = f"{directory / 'tokenizer.json'} cannot encode any text: {sentence(error)}"
        raise CheckpointError(message) from None
    return tokenizer


def _check_special(settings: dict[str, Any]) -> None:
    """Refuse special tokens of a tokenizer_config.json that are no text."""
    for key, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        frames = key in ("pad_token", "bos_token", "eos_token")
        if not key.endswith("_token") or not value or not (frames or isinstance(value, dict)):
            continue  # add_bos_token and its like are true or false
        if not isinstance(text, str) or not text.isprintable():
            raise CheckpointError(f"tokenizer_config.json: {shown(key)} is no text: {shown(value)}")


def computed_in(dtype: DType | None) -> DType | None:
    """Return the type that `load` computes in if this one is asked for; None is the stored one."""
    return "float32" if dtype is None and mx.default_device() == mx.Device(mx.cpu) else dtype


def keep_in_memory() -> None:
    """Let Metal wire as much memory as it recommends; elsewhere there is nothing to do."""
    if mx.metal.is_available():
        mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))


def load_model(directory: Path, *, dtype: DType | None = None) -> DiffusionGemma:
    """Load the model of a checkpoint directory; `dtype` None keeps the stored type.

    Raises:
        CheckpointError: as `load`.
    """
    return model_of(read_headers(directory), dtype)


def part_of(headers: Headers, share: Share) -> ModelPart:
    """Which part of a model a rank has, cut between the groups that its weights are packed in.

    Raises:
        CutError: it cannot be cut for so many.
        CheckpointError: the config is not one of ours.
    """
    config = config_of(headers)

    def group(path: str) -> int:
        packed = f"{path}.scales" in headers.tensors
        return quantization_of(headers.config, path).group_size if packed else FLOAT_GROUP

    return cut_model(config, share, group, sub_block(config.vocab_size))


def _in_all(share: Share, decided: Fit) -> Fit:
    """What fits in the memory of each rank."""
    mine = mx.array([[[decided.context, decided.keep_table]]], dtype=mx.int32)
    told = np.array(mx.concatenate([each for (each,) in share.gather([mine])]))
    context, keep_table = told.min(axis=(0, 1)).tolist()
    return Fit(context, bool(keep_table))


def _let_see(
    model: DiffusionGemma, headers: Headers, dtype: DType | None, context: Callable[[], int]
) -> None:
    """Give a model its way to see, if it has one; ranks that share it leave room from the start."""
    model.sight = sight_of(headers, dtype, context)
    if model.sight is None or model.part.share.size == 1:
        return
    agreed = _beside_tower(model.part.share, context)
    model.sight = sight_of(headers, dtype, agreed)
    with suppress(TooLarge):
        model.context = min(model.context, agreed())


def _beside_tower(share: Share, context: Callable[[], int]) -> Callable[[], int]:
    """Tokens of context beside the tower in the memory of each rank, found at once: later it might
    change, or be refused, while the other ranks are elsewhere."""
    problem = "another rank has no memory to see pictures"
    try:
        mine = context()
    except TooLarge as error:
        mine, problem = 0, str(error)
    told = share.gather([mx.array([[[mine]]], dtype=mx.int32)])
    least: int = min(np.array(each).max() for (each,) in told)

    def agreed() -> int:
        if not least:
            raise TooLarge(problem)
        return least

    return agreed


def model_of(
    headers: Headers,
    dtype: DType | None,
    adapter: Stored | None = None,
    part: ModelPart | None = None,
) -> DiffusionGemma:
    """Load a model, or a part of it, by its headers; other arguments and errors as `load_model`."""
    model = lazy_model(headers, dtype, adapter, part)
    mx.eval(model.parameters(), model.constants)
    return model


def lazy_model(
    headers: Headers,
    dtype: DType | None,
    adapter: Stored | None = None,
    part: ModelPart | None = None,
) -> DiffusionGemma:
    """Make what `model_of` does of arrays that are read when they are evaluated.

    Parameters and `constants` are to be evaluated, by the thread that has called this.
    """
    tensors = {name: tensor for name, tensor in headers.tensors.items() if is_text(name)}
    generation = read_generation(headers.directory, headers.config)
    model = build_model(headers.config, generation, set(tensors))
    check_tensors(model, tensors)
    if part is None or part.share.size == 1:
        weights = sanitize(read_weights(tensors, dtype))
    else:
        model = build_model(headers.config, generation, set(tensors), part)
        cuts = {name: cut_of(name, part, model.config) for name in tensors}
        weights = sanitize(read_part(tensors, cuts, dtype))
        model.cut = partial(cut_of_parameter, part=part, config=model.config)
    model.load_weights(list(weights.items()))
    del weights
    if adapter is not None:
        put_adapter(model, adapter)
    model.merge()
    model.sight = sight_of(headers, dtype, lambda: model.context)
    model.eval()
    return model


def read_generation(directory: Path, config: dict[str, Any]) -> GenerationConfig:
    """Read `generation_config.json`, or what MLX conversions embed in the config in its place."""
    values = config.get("generation_config")
    if os.path.lexists(directory / "generation_config.json"):
        values = read_json(directory, "generation_config.json")
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise CheckpointError("config.json: generation_config is not a JSON object")
    if values.get("eos_token_id") is None:  # null says no more than nothing does
        text = config.get("text_config")
        places = [config, text if isinstance(text, dict) else {}]
        found = (place.get("eos_token_id") for place in places)
        values = {**values, "eos_token_id": next((i for i in found if i is not None), None)}
    try:
        return GenerationConfig.from_dict(values)
    except SettingError as error:
        raise CheckpointError(f"{directory}: generation config: {error}") from None


def build_model(
    config: dict[str, Any],
    generation: GenerationConfig,
    tensors: set[str],
    part: ModelPart | None = None,
) -> DiffusionGemma:
    """Build the model without its weights, quantized where the tensors' names say so; or a part.

    Nothing is allocated: initial values are lazy and never computed.
    """
    model = DiffusionGemma(Config.from_dict(config), generation, part)

    def quantization(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if f"{path}.scales" not in tensors:
            return False
        return vars(quantization_of(config, path))

    try:
        nn.quantize(model, class_predicate=quantization)
    except ValueError as error:
        raise CheckpointError(f"config.json: {sentence(error)}") from None
    return model


def check_ids(model: DiffusionGemma, tokenizer: Tokenizer) -> None:
    """Refuse ids that the embedding has no row for: it would be read beyond its end.

    Raises:
        CheckpointError: an end token or an id of the tokenizer is one.
    """
    count = model.config.vocab_size
    beyond = [i for i in model.generation.eos_token_ids if i >= count]
    if beyond:
        raise CheckpointError(f"eos_token_id {beyond[0]} is beyond the vocabulary of {count}")
    if tokenizer.largest_id >= count:
        raise CheckpointError(
            f"the tokenizer has the id {tokenizer.largest_id}, beyond the vocabulary of {count}"
        )


def check_tensors(model: DiffusionGemma, tensors: dict[str, Tensor]) -> None:
    """Compare names, shapes and types of a file with the text model's, as `check_parameters`."""
    check_parameters(model, {parameter_name(name): tensor for name, tensor in tensors.items()})
