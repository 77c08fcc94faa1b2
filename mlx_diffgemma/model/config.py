"""`config.json`, in either dialect, as the numbers that the text model needs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..arguments import NUMBER_LIMITS, SIZE_LIMIT, is_number, is_size, shown
from ..errors import CheckpointError

# Of a config: no model has as many layers, nor as many numbers in one matrix.
LAYERS_LIMIT = 1000

MATRIX_LIMIT = 1 << 44

MODEL_TYPE = "diffusion_gemma"


class ConfigError(CheckpointError):
    """A `config.json` that this model cannot run as written."""

    def __init__(self, message: str):
        super().__init__(f"config.json: {message}")


@dataclass(frozen=True)
class LayerConfig:
    """One layer's attention: `window` is None where attention is full."""

    head_dim: int
    num_key_value_heads: int
    window: int | None
    rope_theta: float
    rotated_pairs: int  # of head_dim / 2 pairs; the others carry no position


@dataclass(frozen=True)
class Config:
    """The numbers of `config.json` that the text model needs, one dialect."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_attention_heads: int
    num_experts: int
    top_k_experts: int
    rms_norm_eps: float
    final_logit_softcapping: float
    max_position_embeddings: int
    canvas_length: int
    layers: tuple[LayerConfig, ...]

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "Config":
        """Read either dialect: `global_head_dim` as shipped, or `per_layer_config` as re-saved.

        Raises:
            ConfigError: a value is missing, or asks for something this model does not do.
        """
        if config.get("model_type") != MODEL_TYPE:
            found = shown(config.get("model_type"))
            raise ConfigError(f"model_type is {found}, not {MODEL_TYPE!r}")
        text = config.get("text_config")
        if not isinstance(text, dict):
            raise ConfigError("there is no text_config")
        for key, supported in _ONLY.items():
            value = text.get(key, supported[0])
            # 0 == False, so types are compared too.
            if not any(type(value) is type(one) and value == one for one in supported):
                raise ConfigError(f"text_config.{key} = {shown(value)} is not supported")
        if config.get("tie_word_embeddings", True) is not True:
            found = shown(config["tie_word_embeddings"])
            raise ConfigError(f"tie_word_embeddings = {found} is not supported")
        try:
            made = cls(
                vocab_size=size(text, "vocab_size"),
                hidden_size=size(text, "hidden_size"),
                intermediate_size=size(text, "intermediate_size"),
                moe_intermediate_size=size(text, "moe_intermediate_size"),
                num_attention_heads=size(text, "num_attention_heads"),
                num_experts=size(text, "num_experts"),
                top_k_experts=size(text, "top_k_experts"),
                rms_norm_eps=positive(text, "rms_norm_eps", 1e-6),
                final_logit_softcapping=positive(text, "final_logit_softcapping", 30.0),
                max_position_embeddings=size(text, "max_position_embeddings"),
                canvas_length=size(config, "canvas_length", 256),
                layers=tuple(_layers(text)),
            )
        except KeyError as missing:
            raise ConfigError(f"there is no {missing.args[0]}") from None
        made._check()
        return made

    def _check(self) -> None:
        """Refuse numbers that do not go together, and matrices that cannot exist."""
        if self.top_k_experts > self.num_experts:
            raise ConfigError(f"top_k_experts = {self.top_k_experts} of {self.num_experts} experts")
        if self.canvas_length > self.max_position_embeddings:
            raise ConfigError(
                f"canvas_length = {self.canvas_length} is more than max_position_embeddings = "
                f"{self.max_position_embeddings}"
            )
        for i, layer in enumerate(self.layers):
            if layer.window is not None and layer.window < 2:
                # The reference's cache keeps everything here, against its own mask.
                raise ConfigError(f"sliding_window = {layer.window} is not supported")
            if layer.head_dim % 2 or self.num_attention_heads % layer.num_key_value_heads:
                raise ConfigError(
                    f"layer {i}: {self.num_attention_heads} heads of {layer.head_dim} do not go "
                    f"with {layer.num_key_value_heads} key-value heads"
                )
        widest = self.num_attention_heads * max(layer.head_dim for layer in self.layers)
        rows = max(
            self.vocab_size,
            self.intermediate_size,
            widest,
            self.num_experts * 2 * self.moe_intermediate_size,
        )
        if widest > SIZE_LIMIT or rows * self.hidden_size > MATRIX_LIMIT:
            raise ConfigError("its sizes ask for a matrix larger than any there is")


def size(values: dict[str, Any], key: str, default: int | None = None) -> int:
    """A whole number by its name; without a default, KeyError says that it is missing."""
    value = values[key] if default is None else values.get(key, default)
    if not is_size(value):
        raise ConfigError(f"{key} = {shown(value)} is not a whole number from 1 to {SIZE_LIMIT}")
    return value


def positive(values: dict[str, Any], key: str, default: float | None = None) -> float:
    """Read a positive number that float32 holds, as `size` reads a whole one."""
    value = values[key] if default is None else values.get(key, default)
    if not is_number(value) or value < NUMBER_LIMITS[0]:
        raise ConfigError(f"{key} = {shown(value)} is not a positive number")
    return float(value)


# What the reference leaves open and this model has one answer for; the first is the default.
_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("diffusion_gemma_text",),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "tie_word_embeddings": (True,),
    "use_bidirectional_attention": (None, "vision"),
    # Gemma 4 has these, DiffusionGemma does not
    "attention_k_eq_v": (None, True),
    "enable_moe_block": (None, True),
    "use_double_wide_mlp": (None, False),
    "num_kv_shared_layers": (None, 0),
    "hidden_size_per_layer_input": (None, 0),
}

_ROPE_DEFAULTS: dict[str, dict[str, Any]] = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {
        "rope_type": "proportional",
        "rope_theta": 1e6,
        "partial_rotary_factor": 0.25,
    },
}


def _layers(text: dict[str, Any]) -> Iterator[LayerConfig]:
    kinds = _kinds(text)
    overrides = _overrides(text, kinds)
    ropes = text.get("rope_parameters")
    if ropes is None:
        ropes = _ROPE_DEFAULTS
    if not isinstance(ropes, dict):
        raise ConfigError(f"rope_parameters = {shown(ropes)} is not a JSON object")
    for i, kind in enumerate(kinds):
        own = overrides.get(i, {})
        head_dim = size({**text, **own}, "head_dim")
        theta, fraction = _rope(kind, ropes.get(kind))
        yield LayerConfig(
            head_dim=head_dim,
            num_key_value_heads=size({**text, **own}, "num_key_value_heads"),
            window=size(text, "sliding_window") if kind == "sliding_attention" else None,
            rope_theta=theta,
            rotated_pairs=int(fraction * head_dim // 2),
        )


def _kinds(text: dict[str, Any]) -> list[str]:
    """The kind of attention of each layer."""
    count = size(text, "num_hidden_layers")
    if count > LAYERS_LIMIT:
        raise ConfigError(f"num_hidden_layers = {count} is more than {LAYERS_LIMIT}")
    kinds = text.get("layer_types")
    if kinds is None:
        kinds = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(count)]
    if not isinstance(kinds, list):
        raise ConfigError(f"layer_types = {shown(kinds)} is not a list")
    if len(kinds) != count:
        raise ConfigError(f"layer_types has {len(kinds)} entries for {count} layers")
    for i, kind in enumerate(kinds):
        if not isinstance(kind, str) or kind not in _ROPE_DEFAULTS:
            raise ConfigError(f"layer_types[{i}] = {shown(kind)} is not supported")
    # The reference forces the last layer to full attention, whatever the list says.
    return [*kinds[:-1], "full_attention"]


def _overrides(text: dict[str, Any], kinds: list[str]) -> dict[int, dict[str, Any]]:
    """Read what single layers have in place of `head_dim` and `num_key_value_heads`."""
    given = text.get("per_layer_config")
    if given is None:  # the dialect as shipped: full layers have other heads
        wide = {"head_dim": text.get("global_head_dim", 512)}
        if text.get("num_global_key_value_heads") is not None:
            wide["num_key_value_heads"] = text["num_global_key_value_heads"]
        return {i: wide for i, kind in enumerate(kinds) if kind == "full_attention"}
    if not isinstance(given, dict):
        raise ConfigError(f"per_layer_config = {shown(given)} is not a JSON object")
    layers = {str(i): i for i in range(len(kinds))}
    for key, own in given.items():
        if key not in layers or not isinstance(own, dict):
            raise ConfigError(f"per_layer_config[{shown(key)}] is no layer's")
        if unknown := own.keys() - {"head_dim", "num_key_value_heads"}:
            raise ConfigError(f"per_layer_config[{key}] overrides {shown(min(unknown))}")
    return {layers[key]: own for key, own in given.items()}


def _rope(kind: str, rope: Any) -> tuple[float, float]:
    """Base and rotated share of a kind of layer."""
    if not isinstance(rope, dict):
        raise ConfigError(f"rope_parameters.{kind} = {shown(rope)} is not a JSON object")
    fraction = rope.get("partial_rotary_factor", 1.0)
    supported = (
        is_number(fraction)
        and 0 <= fraction <= 1
        and is_number(rope.get("factor", 1.0))
        and rope.get("factor", 1.0) == 1.0
        and (
            rope.get("rope_type") == "proportional"
            or (rope.get("rope_type") == "default" and fraction == 1.0)
        )
    )
    if not supported:
        raise ConfigError(f"rope_parameters.{kind} = {shown(rope)} is not supported")
    return positive(rope, "rope_theta"), float(fraction)
