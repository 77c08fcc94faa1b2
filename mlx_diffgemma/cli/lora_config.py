"""What `lora` is asked for: flags, over a YAML file of mlx-lm's form, over what a run was begun
with, over the defaults."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from ..arguments import SettingError, shown
from ..checkpoint.adapter import AdapterConfig
from ..checkpoint.weights import DType
from ..files import read_text
from ..training.lines import Keys
from ..training.settings import Settings

# Characters of a file of settings: mlx-lm's longest example has three thousand.
MOST_CONFIG = 1_000_000

# Numbers that PyYAML takes for text, as it knows them with a dot and a signed exponent alone.
_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+$")

# Keys that change nothing here, and what is said of them.
_NOTHING = {
    "trust_remote_code": "nothing that a repository holds is ever executed",
    "report_to": "log.jsonl in the adapter's folder has all events",
    "project_name": "log.jsonl in the adapter's folder has all events",
}

_FEATURES = {
    "prompt_feature": "prompt",
    "completion_feature": "completion",
    "chat_feature": "messages",
    "text_feature": "text",
}

_TERMS = ("rank", "dropout", "scale", "keys")

_TEXTS = (
    "model",
    "revision",
    "dtype",
    "data",
    "adapter_path",
    "resume_adapter_file",
    "fine_tune_type",
    "optimizer",
)
_SWITCHES = ("train", "test", "mask_prompt", "grad_checkpoint")

_SETTINGS = tuple(each.name for each in fields(Settings))

KNOWN = frozenset(
    (*_SETTINGS, *_TEXTS, *_SWITCHES, *_FEATURES, *_NOTHING, "num_layers", "lora_parameters")
)

ADAPTER_PATH = "adapters"  # as mlx-lm's


@dataclass(frozen=True)
class Asked:
    """All that `lora` is asked for. `values` are those that a run is begun with again; without
    an `adapter_path` the model is tested as it is."""

    model: str | None
    revision: str | None
    dtype: DType | None
    train: bool
    test: bool
    data: Path | None
    adapter_path: Path | None
    resume_adapter_file: Path | None
    settings: Settings
    adapter: AdapterConfig
    keys: Keys
    values: dict[str, Any]


def read_config(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The values of a YAML file, and sentences about those that change nothing here.

    Raises:
        SettingError: it cannot be read, or has keys that are not known.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads 1e-5 as a number, as mlx-lm does."""

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    text = read_text(path, SettingError)
    if len(text) > MOST_CONFIG:
        raise SettingError(f"{path} has more than {MOST_CONFIG:,} characters")
    try:
        values = yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise SettingError(f"{path} is not YAML: {reason}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise SettingError(f"{path} has no settings: {shown(values)}")
    if values.pop("hf_dataset", None):
        raise SettingError(
            f"{path}: hf_dataset is not supported; hf download --repo-type dataset fetches one, "
            "and data names its folder"
        )
    values.pop("config", None)
    if unknown := sorted(map(str, values.keys() - KNOWN)):
        raise SettingError(f"{path}: {shown(unknown[0])} is not known; there are {_listed()}")
    told = [f"{name}: {said}" for name, said in _NOTHING.items() if values.get(name)]
    if values.get("mask_prompt") is False:
        told.append("mask_prompt: answers alone are denoised, as this model learns")
    return {name: value for name, value in values.items() if name not in _NOTHING}, told


def _listed() -> str:
    return ", ".join(sorted(KNOWN - _NOTHING.keys()))


def asked_for(
    flags: Mapping[str, Any], config: Mapping[str, Any], before: Mapping[str, Any]
) -> Asked:
    """Put together what flags, a file and an earlier run say; of each the first that says it.

    Raises:
        SettingError: a value is out of range, or none of its kind.
    """
    values = {name: value for name, value in before.items() if name in KNOWN}
    values |= {name: value for name, value in config.items() if value is not None}
    values |= {name: flags[name] for name in KNOWN & flags.keys() if flags[name] is not None}
    for name in (*_TEXTS, *_FEATURES):
        if not isinstance(values.get(name, ""), str | None):
            raise SettingError(f"{name} must be text, not {shown(values[name])}")
    for name in _SWITCHES:
        if not isinstance(values.get(name, False), bool):
            raise SettingError(f"{name} must be true or false, not {shown(values[name])}")
    if (dtype := values.get("dtype")) is not None and dtype not in get_args(DType):
        raise SettingError(f"dtype is one of {', '.join(get_args(DType))}; not {shown(dtype)}")
    values["lora_parameters"] = terms = _terms(values.get("lora_parameters"), flags)
    adapter = AdapterConfig(
        **{name: values[name] for name in ("fine_tune_type", "num_layers") if name in values},
        **terms,
    )
    return Asked(
        model=values.get("model"),
        revision=values.get("revision"),
        dtype=dtype,
        train=values.get("train", False),
        test=values.get("test", False),
        data=Path(values["data"]) if values.get("data") else None,
        adapter_path=_path(values.get("adapter_path", ADAPTER_PATH)),
        resume_adapter_file=_path(values.get("resume_adapter_file")),
        settings=Settings(**{name: values[name] for name in _SETTINGS if name in values}),
        adapter=adapter,
        keys=Keys(**{own: values[name] for name, own in _FEATURES.items() if values.get(name)}),
        values=values,
    )


def _terms(given: object, flags: Mapping[str, Any]) -> dict[str, Any]:
    """What low-rank terms are like: of the file, with flags over it."""
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        raise SettingError(f"lora_parameters must be names with values, not {shown(given)}")
    if "alpha" in given:
        raise SettingError("lora_parameters have no alpha: scale is alpha divided by the rank")
    if unknown := sorted(map(str, given.keys() - set(_TERMS))):
        raise SettingError(
            f"lora_parameters have no {shown(unknown[0])}; they have {', '.join(_TERMS)}"
        )
    found = {name: value for name, value in given.items() if value is not None}
    found |= {name: flags[name] for name in _TERMS if flags.get(name) is not None}
    if isinstance(keys := found.get("keys"), list | tuple):
        found["keys"] = tuple(keys)
    elif keys is not None:
        raise SettingError(f"lora_parameters: keys must be names, not {shown(keys)}")
    return found


def _path(given: str | None) -> Path | None:
    return Path(given) if given else None
