"""Adapters: low-rank terms, or whole parameters, that fine-tuning has put beside a model.

Files are laid out as mlx-lm's: `adapters.safetensors` and `adapter_config.json`. Linear layers are
adapted by mlx-lm's modules, which are imported where an adapter is put in place and not before:
that takes seconds. Those of PEFT are read too, see `peft`.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import file_digest, sha256
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..arguments import SettingError, is_number, shown, whole_number
from ..errors import CheckpointError
from ..files import replacing
from ..model.config import LAYERS_LIMIT, Config
from ..model.diffusion_gemma import DiffusionGemma
from ..model.feed_forward import ExpertLinear
from ..model.part import ModelPart
from . import peft
from .files import (
    FLOATS,
    NAME_LIMIT,
    Tensor,
    check_type,
    hub_failure,
    read_header,
    read_json,
    shown_name,
)
from .hub import Unreachable, look_up
from .info import Info
from .magnitudes import over_ranks
from .peft import RANK_LIMIT, SCALE_LIMIT, Sided
from .slices import Cut, cut_of_term, read_part
from .weights import sentence

Kind = Literal["lora", "dora", "full"]

WEIGHTS_FILE = "adapters.safetensors"
CONFIG_FILE = "adapter_config.json"

# Maps of a block that are adapted where nothing else is said, as all public recipes do: experts,
# router and self-conditioning stay as they are.
KEYS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)

KEYS_LIMIT = 1000  # names in a config; a model has some ten kinds of maps

# What is fetched of an adapter on the hub, and most bytes of it. Of the model that ships, terms of
# rank 16 beside all dense maps take 75 MB, of rank 8 beside all experts 1 GB.
FILES = (CONFIG_FILE, WEIGHTS_FILE, peft.WEIGHTS_FILE)
FETCHED_LIMIT = 8_000_000_000


@dataclass(frozen=True)
class AdapterConfig:
    """What is adapted, and how; as mlx-lm's `adapter_config.json` says it.

    Attributes:
        fine_tune_type: low-rank terms, those with a magnitude of each row, or all parameters.
        num_layers: so many of the last blocks; -1 is all.
        rank, dropout, scale: of low-rank terms, which are added times `scale`.
        keys: names of the maps, within a block or in the whole model; None is all of a block.

    Raises:
        SettingError: a value is none of these.
    """

    fine_tune_type: Kind = "lora"
    num_layers: int = -1
    rank: int = 16
    dropout: float = 0.0
    scale: float = 2.0
    keys: tuple[str, ...] | None = KEYS

    def __post_init__(self) -> None:
        kind = self.fine_tune_type
        if kind not in get_args(Kind):
            raise SettingError(
                f"fine_tune_type is one of {', '.join(get_args(Kind))}; not {shown(kind)}"
            )
        if whole_number("num_layers", self.num_layers, -1, LAYERS_LIMIT) == 0:
            raise SettingError("num_layers is 0: no layer would be adapted")
        whole_number("rank", self.rank, 1, RANK_LIMIT)
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise SettingError(f"dropout must be from 0 to below 1, not {shown(self.dropout)}")
        if not is_number(self.scale) or abs(self.scale) > SCALE_LIMIT:
            raise SettingError(f"scale must be a number, not {shown(self.scale)}")
        if self.keys is not None:
            if not self.keys or len(self.keys) > KEYS_LIMIT:
                raise SettingError(f"keys must be 1 to {KEYS_LIMIT} names, not {len(self.keys)}")
            wrong = [k for k in self.keys if not isinstance(k, str) or len(k) > NAME_LIMIT]
            if wrong:
                raise SettingError(f"{shown(wrong[0])} is no name of a module")

    def __str__(self) -> str:
        layers = "all layers" if self.num_layers == -1 else f"the last {self.num_layers} layers"
        if self.fine_tune_type == "full":
            return f"all parameters of {layers}"
        terms = "LoRA" if self.fine_tune_type == "lora" else "DoRA"
        return f"{terms} of rank {self.rank}, scale {self.scale:g}, {layers}"


@dataclass(frozen=True)
class Stored:
    """An adapter as its files describe it; its numbers are not read yet."""

    directory: Path
    config: AdapterConfig
    tensors: dict[str, Tensor]
    trained_on: str | None = None  # the model that it says it was trained on
    sided: Sided | None = None  # of one that PEFT has written

    def __str__(self) -> str:
        count = sum(prod(tensor.shape) for tensor in self.tensors.values())
        return f"{self.kind}, {count / 1e6:,.2f} M parameters{_trained_on(self)}"

    @property
    def kind(self) -> str:
        """What it is, in a few words."""
        if self.sided is None:
            return str(self.config)
        return f"PEFT's LoRA of rank {self.sided.rank}, scale {self.sided.scale:g}"

    @property
    def file(self) -> Path:
        """The file of its tensors."""
        return self.directory / (WEIGHTS_FILE if self.sided is None else peft.WEIGHTS_FILE)

    def cuts(self, part: ModelPart, config: Config) -> dict[str, Cut]:
        """What a rank keeps of its tensors, by their names; of the others all, and alone all."""
        if part.share.size == 1:
            return {}
        if self.sided is not None:
            return self.sided.cuts(part, config)
        found = {name: cut_of_term(name, part, config) for name in self.tensors}
        return {name: cut for name, cut in found.items() if cut is not None}

    def loaded_bytes(self, cuts: Mapping[str, Cut]) -> int:
        """Bytes beside those of the model once it is in place; whole parameters take others'."""
        if self.config.fine_tune_type == "full":
            return 0
        sizes = {name: tensor.end - tensor.start for name, tensor in self.tensors.items()}
        for name, cut in cuts.items():
            sizes[name] = sizes[name] * cut.kept // cut.whole
        return sum(sizes.values())


def add_adapter(model: DiffusionGemma, config: AdapterConfig) -> None:
    """Freeze a model and put what is to be trained in place: `trained` tells what that is.

    Raises:
        SettingError: the model has an adapter or not so many layers, a name in `keys` fits no map
            of it, or the maps are of a kind that cannot be adapted so.
    """
    _check_bare(model)
    count = len(model.layers)
    if config.num_layers > count:
        raise SettingError(f"num_layers is {config.num_layers}, and the model has {count}")
    model.freeze()
    if config.fine_tune_type == "full":
        _unfreeze(model, config)
    else:
        places = _places(model, config)
        make = _maker(config)
        model.update_modules(
            tree_unflatten([(name, make(name, module)) for name, module in places.items()])
        )
    model.adapter = str(config)


def _check_bare(model: DiffusionGemma) -> None:
    """Refuse a second adapter: its file would not say that it belongs on the first one."""
    if model.adapter is not None:
        raise SettingError(
            f"the model has an adapter in place ({model.adapter}): load it again for another one"
        )


def _unfreeze(model: DiffusionGemma, config: AdapterConfig) -> None:
    """Train whole blocks; with all of them also the embedding and what else stands beside them."""
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    packed = [name for name in parameters if name.endswith(".scales")]
    if packed:
        raise SettingError(
            f"all parameters can be trained only where none is quantized, and "
            f"{packed[0].removesuffix('.scales')} is: train an adapter (lora), or take the "
            "unquantized model"
        )
    whole = config.num_layers == -1
    for module in [model] if whole else model.layers[-config.num_layers :]:
        module.unfreeze()
    for block in model.layers if whole else model.layers[-config.num_layers :]:
        block.unmerge()
    if whole:
        model.model.decoder.self_conditioning.unmerge()


def _places(model: DiffusionGemma, config: AdapterConfig) -> dict[str, nn.Module]:
    """Modules that are adapted, by their names in the model.

    Raises:
        SettingError: a name fits none, or one that is no linear map.
    """
    count = len(model.layers)
    first = 0 if config.num_layers == -1 else count - config.num_layers
    found: dict[str, nn.Module] = {}
    met: set[str] = set()
    for number, block in enumerate(model.layers):
        for key, module in block.named_modules():
            fits = _is_linear(module) if config.keys is None else key in config.keys
            if fits:
                met.add(key)  # full layers have no v_proj, and may be the only ones adapted
            if fits and number >= first:
                found[f"model.decoder.layers.{number}.{key}"] = module
    for name, module in model.named_modules():
        if config.keys is not None and name and name in config.keys:
            found[name] = module
            met.add(name)
    if unknown := sorted(set(config.keys or ()) - met):
        raise SettingError(f"keys: the layers have no {shown(unknown[0])}")
    if not found:
        raise SettingError(f"keys: none of them is in the last {config.num_layers} layers")
    for name, module in found.items():
        if not _is_linear(module):
            raise SettingError(f"keys: {name} is a {type(module).__name__}, no linear map")
    return found


def _is_linear(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, nn.QuantizedLinear, ExpertLinear)


def _maker(config: AdapterConfig) -> Callable[[str, nn.Module], nn.Module]:
    """Makes of a module and its name the one that stands in its place."""
    from mlx_lm.tuner.dora import DoRALinear
    from mlx_lm.tuner.lora import LoRALinear

    r, dropout, scale = config.rank, config.dropout, config.scale

    def lora(name: str, module: nn.Module) -> nn.Module:
        if isinstance(module, ExpertLinear):
            return module.to_lora(r, scale, dropout)
        return LoRALinear.from_base(module, r, dropout, scale)

    def dora(name: str, module: nn.Module) -> nn.Module:
        if isinstance(module, ExpertLinear):
            raise SettingError(f"DoRA does not adapt experts, and {name} is one: leave it out")
        outputs, inputs = module.weight.shape
        if isinstance(module, nn.QuantizedLinear):
            inputs = inputs * 32 // module.bits  # `from_base` is wrong for 3, 5 and 6 bits
        made: Any = DoRALinear(inputs, outputs, r, dropout, scale)
        made.set_linear(module)
        return made

    return lora if config.fine_tune_type == "lora" else dora


def trained(model: DiffusionGemma) -> dict[str, mx.array]:
    """The parameters that are trained, which are those that an adapter's file holds."""
    return dict(tree_flatten(model.trainable_parameters()))


def save_adapter(
    directory: Path, weights: dict[str, mx.array], config: AdapterConfig, **about: Any
) -> None:
    """Write an adapter; each file takes the place of an older one at once.

    `about` is what else the config tells: the model it was trained on, all arguments.

    Raises:
        OSError, RuntimeError: the disk refuses.
    """
    directory.mkdir(parents=True, exist_ok=True)
    terms = {name: value for name, value in asdict(config).items() if name in _TERMS}
    full = config.fine_tune_type == "full"
    values = {
        **about,
        "fine_tune_type": config.fine_tune_type,
        "num_layers": config.num_layers,
        "lora_parameters": None if full else terms,
    }
    with replacing(directory / CONFIG_FILE) as fresh:
        fresh.write_text(json.dumps(values, indent=4, sort_keys=True) + "\n", encoding="utf-8")
    with replacing(directory / WEIGHTS_FILE, suffix=".safetensors") as fresh:
        mx.save_safetensors(str(fresh), weights, {"format": "mlx"})


_TERMS = ("rank", "dropout", "scale", "keys")


def find_adapter(path_or_repo: str) -> Path:
    """Find the directory of an adapter: as given, or fetched from the hub, its files alone.

    Without a network the hub's cache serves.

    Raises:
        CheckpointError: there is no such directory or repository, it has no adapter, or one of
            more than `FETCHED_LIMIT` bytes.
    """
    try:
        path = Path(path_or_repo).expanduser()
        if path.is_dir():
            return path
        is_file = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no permission, ~nobody
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path_or_repo[:100]} cannot be read: {reason}") from None
    if is_file:
        raise CheckpointError(
            f"{shown_name(path_or_repo)} is a file; an adapter is the directory of "
            f"{WEIGHTS_FILE} and {CONFIG_FILE}"
        )
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path_or_repo):
        raise CheckpointError(
            f"{shown_name(path_or_repo)} is neither a directory with an adapter nor a name on the "
            "hub (owner/name)"
        )
    return _fetched(path_or_repo)


def _fetched(repo: str) -> Path:
    """Fetch an adapter from the hub; arguments and errors as in `find_adapter`."""
    from huggingface_hub import snapshot_download

    offline = False
    try:
        repository = look_up(repo, None)
    except Unreachable:  # the cache may have it
        offline = True
    else:
        size = sum(file.size for name, file in repository.files.items() if name in FILES)
        if size > FETCHED_LIMIT:
            raise CheckpointError(
                f"{repo} has an adapter of {size / 1e9:.1f} GB, and {FETCHED_LIMIT / 1e9:.0f} GB "
                "are fetched at most"
            )
    try:
        # By no commit: the cache would not know it for the newest where there is no network.
        return Path(snapshot_download(repo, allow_patterns=list(FILES), local_files_only=offline))
    except Exception as error:  # whatever the HTTP library of the day raises
        raise hub_failure(repo, None, error) from error


def load_adapter(model: DiffusionGemma, directory: Path) -> None:
    """Put an adapter in place, with its numbers, which are not evaluated.

    Raises:
        CheckpointError: a file is missing, damaged or not what an adapter of this model is.
    """
    put_adapter(model, read_adapter(directory))


def read_adapter(directory: Path) -> Stored:
    """Read what an adapter's files say of it.

    Raises:
        CheckpointError: one is missing or damaged, or says what no adapter is.
    """
    if not directory.is_dir():
        raise CheckpointError(f"there is no directory {directory} with an adapter")
    values = read_json(directory, CONFIG_FILE)
    if peft.CONFIG_KEY in values:
        return _read_peft(directory, values)
    try:
        config = _config_of(values)
    except SettingError as error:
        raise CheckpointError(f"{directory / CONFIG_FILE}: {error}") from None
    tensors = read_header(directory / WEIGHTS_FILE)
    for tensor in tensors.values():
        check_type(tensor, FLOATS)
    model = values.get("model")
    return Stored(directory, config, tensors, model if isinstance(model, str) else None)


def _read_peft(directory: Path, values: dict[str, Any]) -> Stored:
    """Read the same of an adapter that PEFT has written."""
    if not (directory / peft.WEIGHTS_FILE).exists() and (directory / "adapter_model.bin").exists():
        raise CheckpointError(
            f"{directory} has its adapter as a pickle, which is not read: save it as safetensors"
        )
    tensors = read_header(directory / peft.WEIGHTS_FILE)
    for tensor in tensors.values():
        check_type(tensor, FLOATS)
    try:
        found = peft.sided(tensors, values)
    except SettingError as error:
        raise CheckpointError(f"{directory / CONFIG_FILE}: {error}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{directory / peft.WEIGHTS_FILE}: {error}") from None
    model = values.get("base_model_name_or_path")
    model = model if isinstance(model, str) and model else None
    return Stored(directory, AdapterConfig(), tensors, model, found)


def fingerprint(directory: Path) -> str:
    """Tells an adapter from others: of two runs, even the names and shapes are mostly the same.

    Raises:
        CheckpointError: as `read_adapter`.
    """
    stored = read_adapter(directory)
    found = sha256()
    for path in (directory / CONFIG_FILE, stored.file):
        try:
            with path.open("rb") as file:
                found.update(file_digest(file, "sha256").digest())
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    return found.hexdigest()[:16]


def _config_of(values: dict[str, Any]) -> AdapterConfig:
    """Read the values of an `adapter_config.json`.

    Raises:
        SettingError: one is missing or no such value.
    """
    layers = values.get("num_layers")
    kind = values.get("fine_tune_type", "lora")
    if layers is None:
        raise SettingError("num_layers is missing")
    config = AdapterConfig(kind, layers)
    if kind == "full":
        return config
    terms = values.get("lora_parameters")
    if not isinstance(terms, dict):
        raise SettingError(f"lora_parameters must be an object, not {shown(terms)}")
    if lacking := [name for name in ("rank", "scale") if name not in terms]:
        raise SettingError(f"lora_parameters lack {lacking[0]}")
    keys = terms.get("keys")
    if keys is not None and not isinstance(keys, list):
        raise SettingError(f"keys must be names, not {shown(keys)}")
    return replace(
        config,
        rank=terms["rank"],
        dropout=terms.get("dropout", 0.0),
        scale=terms["scale"],
        keys=None if keys is None else tuple(keys),
    )


def with_adapter(found: Info, stored: Stored, cuts: Mapping[str, Cut] | None = None) -> Info:
    """What a model's headers say of it, with the memory that an adapter takes, or what a rank keeps
    of it."""
    return replace(found, loaded_bytes=found.loaded_bytes + stored.loaded_bytes(cuts or {}))


def put_adapter(model: DiffusionGemma, stored: Stored) -> None:
    """Put an adapter whose files were read in place, in each rank what belongs to its part of the
    model; arguments and errors as in `load_adapter`.

    Raises:
        SettingError: the model has one already.
    """
    _check_bare(model)
    if stored.sided is not None:
        _put_peft(model, stored, stored.sided)
        return
    try:
        add_adapter(model, stored.config)
    except SettingError as error:
        raise CheckpointError(f"{stored.directory / CONFIG_FILE}: {error}") from None
    expected, cuts = trained(model), stored.cuts(model.part, model.config)
    shapes = {name: tuple(array.shape) for name, array in expected.items()}
    _check(stored, {n: cuts[n].before(s) if n in cuts else s for n, s in shapes.items()})
    weights = read_part(stored.tensors, cuts, None)
    if stored.config.fine_tune_type == "full":
        weights = {name: array.astype(expected[name].dtype) for name, array in weights.items()}
    _check_finite(stored, weights)
    model.load_weights(list(weights.items()), strict=False)
    if stored.config.fine_tune_type == "dora" and cuts:
        over_ranks(model, [n.removesuffix(".lora_a") for n in cuts if n.endswith(".lora_a")])
    model.eval()  # dropout is for training


def _put_peft(model: DiffusionGemma, stored: Stored, found: Sided) -> None:
    """Put an adapter that PEFT has written in place."""
    cuts = stored.cuts(model.part, model.config)
    try:
        peft.check_sided(model, found, cuts)
    except CheckpointError as error:
        raise CheckpointError(f"{stored.file}: {error}{_trained_on(stored)}") from None
    weights = read_part(stored.tensors, cuts, None)
    _check_finite(stored, weights)
    model.freeze()
    peft.put_sided(model, found, weights)
    model.adapter = stored.kind
    model.eval()


def _check(stored: Stored, expected: dict[str, tuple[int, ...]]) -> None:
    """Compare names and shapes of a file with those that the model has places for."""
    file, found = stored.file, stored.tensors
    if extra := sorted(found.keys() - expected.keys()):
        raise CheckpointError(
            f"{file}: {extra[0]} is no adapted parameter of this model{_trained_on(stored)}"
        )
    if missing := sorted(expected.keys() - found.keys()):
        raise CheckpointError(f"{file} lacks {missing[0]}")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise CheckpointError(
                f"{file}: {name} has the shape {shown(list(found[name].shape))}, where this model "
                f"has {list(shape)}{_trained_on(stored)}"
            )


def _trained_on(stored: Stored) -> str:
    """A hint for who has taken another model."""
    if stored.trained_on is None:
        return ""
    return f"; it says that it was trained on {shown(stored.trained_on)}"


def _check_finite(stored: Stored, weights: dict[str, mx.array]) -> None:
    """Refuse numbers that would make every answer NaN."""
    finite = {name: mx.isfinite(array).all() for name, array in weights.items()}
    try:
        mx.eval(finite)
    except RuntimeError as error:
        raise CheckpointError(f"{stored.file} cannot be loaded: {sentence(error)}") from None
    if wrong := sorted(name for name, each in finite.items() if not each.item()):
        raise CheckpointError(f"{stored.file}: {wrong[0]} has numbers that are not finite")
