"""Adapters that PEFT has written, as TRL trains them: what their config and names mean here.

The reference has an encoder and a decoder over one set of weights, and PEFT adapts each by itself.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..arguments import SettingError, is_number, shown, whole_number
from ..errors import CheckpointError
from ..model.adapters import SidedLinear
from ..model.config import Config
from ..model.diffusion_gemma import DiffusionGemma
from ..model.part import ModelPart
from .files import Tensor
from .slices import COLUMNS, Cut, cut_of

CONFIG_KEY = "peft_type"

WEIGHTS_FILE = "adapter_model.safetensors"

# How the names of its tensors begin: the wrapper's and the model's own.
_BEGIN = "base_model.model."

# Where the two sides keep a block, and where we do.
_SIDES = {
    "encoder": re.compile(r"model\.encoder\.language_model\.(layers\.\d+\..+)"),
    "decoder": re.compile(r"model\.decoder\.(layers\.\d+\..+)"),
}

# Settings that say how it was made, not what it means. All others must be off; each version of PEFT
# has more of them.
_MEANINGLESS = {
    CONFIG_KEY,
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "target_modules",
    "exclude_modules",
    "lora_dropout",
    "layers_to_transform",
    "layers_pattern",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "qalora_group_size",
    "ensure_weight_tying",
    "runtime_config",
}

# Those that are read here.
_READ = {"r", "lora_alpha", "use_rslora", "init_lora_weights", "bias"}

# How terms may have begun. Other ways change the weights that they are added to.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")

# A rank above the width of a model is no low rank; the widest there is has 4096.
RANK_LIMIT = 4096

# The largest factor that a config may put before a low-rank term.
SCALE_LIMIT = 1e6


@dataclass(frozen=True)
class Terms:
    """The low-rank terms of one map on one side: A (r, in) and B (out, r)."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class Sided:
    """Terms of each adapted map, by its name in our model, for the encoder and the decoder.

    `scale` stands before them. A map outside of the blocks is the decoder's alone, in the reference
    and here: its terms are under "decoder".
    """

    rank: int
    scale: float
    maps: dict[str, dict[str, Terms]]

    def cuts(self, part: ModelPart, config: Config) -> dict[str, Cut]:
        """What a rank keeps of A or B, by the name of the tensor; of others it keeps all."""
        found: dict[str, Cut] = {}
        for module, sides in self.maps.items():
            cut = cut_of(f"{module}.weight", part, config)
            if cut is not None:
                for terms in sides.values():
                    found[(terms.a if cut.axis == COLUMNS else terms.b).name] = cut
        return found


def factors_of(config: dict[str, Any]) -> tuple[int, float]:
    """Rank and scale of a config.

    Raises:
        SettingError: the adapter is no LoRA, or one with more than plain low-rank terms.
    """
    kind = config.get(CONFIG_KEY)
    if kind != "LORA":
        raise SettingError(f"peft_type is {shown(kind)}, and only LORA is read")
    more = sorted(n for n in config.keys() - _MEANINGLESS - _READ if config[n])
    if config.get("bias") not in ("none", None):
        more.append("bias")
    if config.get("init_lora_weights") not in _BEGINNINGS:
        more.append("init_lora_weights")
    if more:
        raise SettingError(
            f"{shown(more[0])} is {shown(config[more[0]])}, and only plain low-rank terms are read"
        )
    rank = whole_number("r", config.get("r"), 1, RANK_LIMIT)
    alpha = config.get("lora_alpha")
    if not is_number(alpha) or abs(alpha) > SCALE_LIMIT:
        raise SettingError(f"lora_alpha must be a number, not {shown(alpha)}")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def sided(tensors: dict[str, Tensor], config: dict[str, Any]) -> Sided:
    """Say which terms belong where.

    Raises:
        SettingError: as `factors_of`.
        CheckpointError: a tensor is none of such terms, or stands alone.
    """
    rank, scale = factors_of(config)
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        parts = re.fullmatch(re.escape(_BEGIN) + r"(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if parts is None:
            raise CheckpointError(f"{name} is no low-rank term of a linear map")
        side, module = _place(parts[1], name)
        found.setdefault(module, {}).setdefault(side, {})[parts[2]] = tensor
    maps: dict[str, dict[str, Terms]] = {}
    for module, sides in found.items():
        for side, both in sides.items():
            if len(both) != 2:
                lone = next(iter(both.values())).name
                raise CheckpointError(f"{lone} has no counterpart: A and B go together")
            terms = Terms(both["A"], both["B"])
            if (terms.a.shape or (0,))[0] != rank:
                raise CheckpointError(
                    f"{terms.a.name} has the shape {shown(list(terms.a.shape))}, and the rank is "
                    f"{rank}"
                )
            maps.setdefault(module, {})[side] = terms
    if not maps:
        raise CheckpointError("it has no terms")
    return Sided(rank, scale, maps)


def _place(module: str, name: str) -> tuple[str, str]:
    """The side and, in our model, the name of a module of the reference."""
    for side, pattern in _SIDES.items():
        if inner := pattern.fullmatch(module):
            return side, f"model.decoder.{inner[1]}"
    if module.startswith("model.decoder.self_conditioning."):
        return "decoder", module
    raise CheckpointError(f"{name} adapts what is not adapted here: blocks and self-conditioning")


def check_sided(model: DiffusionGemma, found: Sided, cuts: Mapping[str, Cut]) -> None:
    """Compare terms with the maps that they are for; of some a rank keeps what `cuts` say.

    Raises:
        CheckpointError: the model has no such map, or one of another shape.
    """
    modules = dict(model.named_modules())
    for name, sides in found.maps.items():
        module = modules.get(name)
        if module is None or type(module) not in (nn.Linear, nn.QuantizedLinear):
            raise CheckpointError(
                f"{next(iter(sides.values())).a.name}: this model has no such map"
            )
        outputs, inputs = module.weight.shape
        if isinstance(module, nn.QuantizedLinear):
            inputs = inputs * 32 // module.bits
        for terms in sides.values():
            _check_shape(terms.a, (found.rank, inputs), cuts)
            _check_shape(terms.b, (outputs, found.rank), cuts)


def _check_shape(tensor: Tensor, expected: tuple[int, ...], cuts: Mapping[str, Cut]) -> None:
    if tensor.name in cuts:
        expected = cuts[tensor.name].before(expected)
    if tensor.shape != expected:
        raise CheckpointError(
            f"{tensor.name} has the shape {shown(list(tensor.shape))}, where this model has "
            f"{list(expected)}"
        )


def put_sided(model: DiffusionGemma, found: Sided, weights: dict[str, mx.array]) -> None:
    """Put terms that were checked in place, once where the encoder's and the decoder's agree."""
    from mlx_lm.tuner.lora import LoRALinear

    modules = dict(model.named_modules())

    def made(module: nn.Module, terms: Terms | None) -> nn.Module:
        if terms is None:
            return module
        adapted: nn.Module = LoRALinear.from_base(module, found.rank, 0.0, found.scale)
        adapted.lora_a, adapted.lora_b = (weights[each.name].T for each in (terms.a, terms.b))
        return adapted

    places: list[tuple[str, nn.Module]] = []
    for name, sides in found.maps.items():
        module = modules[name]
        encoder, decoder = (made(module, sides.get(side)) for side in ("encoder", "decoder"))
        one = ".layers." not in name or _agree(sides, weights)
        places.append((name, decoder if one else SidedLinear(encoder, decoder, model.side)))
    model.update_modules(tree_unflatten(places))


def differing(found: Sided, weights: dict[str, mx.array]) -> str | None:
    """A map of a block that encoder and decoder apply in two ways; None where there is none."""
    blocks = ((name, sides) for name, sides in found.maps.items() if ".layers." in name)
    return next((name for name, sides in blocks if not _agree(sides, weights)), None)


def _agree(sides: dict[str, Terms], weights: dict[str, mx.array]) -> bool:
    """Whether the terms of both sides are the same numbers."""
    if len(sides) < 2:
        return False
    one, other = sides.values()
    pairs = ((one.a, other.a), (one.b, other.b))
    return all(bool(mx.array_equal(weights[a.name], weights[b.name])) for a, b in pairs)
