"""`vision_config` of config.json, as the numbers that the vision tower needs."""

from dataclasses import dataclass
from typing import Any

from ..arguments import SIZE_LIMIT, is_size, shown
from .config import LAYERS_LIMIT, MATRIX_LIMIT, ConfigError, positive, size

# Most soft tokens of one picture, as the model was trained; the third is the default.
BUDGETS = (70, 140, 280, 560, 1120)

DEFAULT_BUDGET = 280

# Bytes that the scores of one block of queries may take, and one block inside an MLP.
SCORE_BYTES = 1 << 27


@dataclass(frozen=True)
class VisionConfig:
    """The numbers of a vision tower: `pool` x `pool` patches of `patch_size` pixels are a token."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    head_dim: int
    patch_size: int
    pool: int
    position_embedding_size: int  # patches in a row or column
    rms_norm_eps: float
    rope_theta: float
    standardize: bool
    text_size: int  # width of the text model's embeddings

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "VisionConfig | None":
        """Read it from a whole config.json whose text model has been accepted.

        None is a checkpoint that says nothing of a tower.

        Raises:
            ConfigError: a value is missing, or asks for something this tower does not do.
        """
        vision = config.get("vision_config")
        if vision is None:
            return None
        if not isinstance(vision, dict):
            raise ConfigError(f"vision_config = {shown(vision)} is not a JSON object")
        for key, only in _ONLY.items():
            value = vision.get(key, only)
            if type(value) is not type(only) or value != only:
                raise ConfigError(f"vision_config.{key} = {shown(value)} is not supported")
        standardize = vision.get("standardize", False)
        if not isinstance(standardize, bool):
            raise ConfigError(f"vision_config.standardize = {shown(standardize)} is not supported")
        try:
            made = cls(
                hidden_size=size(vision, "hidden_size"),
                intermediate_size=size(vision, "intermediate_size"),
                layers=size(vision, "num_hidden_layers"),
                heads=size(vision, "num_attention_heads"),
                head_dim=size(vision, "head_dim"),
                patch_size=size(vision, "patch_size", 16),
                pool=size(vision, "pooling_kernel_size", 3),
                position_embedding_size=size(vision, "position_embedding_size", 10240),
                rms_norm_eps=positive(vision, "rms_norm_eps", 1e-6),
                rope_theta=_theta(vision.get("rope_parameters")),
                standardize=standardize,
                text_size=size(config["text_config"], "hidden_size"),
            )
        except KeyError as missing:
            raise ConfigError(f"vision_config: there is no {missing.args[0]}") from None
        except ConfigError as error:
            said = str(error).removeprefix("config.json: ").removeprefix("vision_config.")
            raise ConfigError(f"vision_config: {said}") from None
        made._check(vision.get("num_key_value_heads", made.heads))
        return made

    def working_bytes(self, tokens: int, item: int) -> int:
        """Return what reading a picture takes beside the weights, where numbers have `item` bytes.

        As measured on MLX's CPU backend: a block of scores beside seven arrays as wide as the
        tower, or eleven of these before it. Scores of one block are not waited for, so that what an
        MLP holds stands beside them. Where attention is fused there are no scores.
        """
        patches = tokens * self.pool**2
        scores = 4 * self.heads * patches**2
        array = patches * item * self.hidden_size
        if scores <= SCORE_BYTES:
            within = item * 8 * self.intermediate_size * min(self.rows, patches)
            return scores + within + 5 * array
        return max(SCORE_BYTES + 7 * array, 11 * array)

    @property
    def rows(self) -> int:
        """Patches that go through an MLP at once: eight arrays of its width exist then."""
        return max(1, SCORE_BYTES // (4 * 8 * self.intermediate_size))

    def _check(self, key_heads: Any) -> None:
        """Refuse numbers that do not go together, and matrices that cannot exist."""
        if not is_size(key_heads) or key_heads != self.heads:
            raise ConfigError(
                f"vision_config: {shown(key_heads)} key-value heads do not go with {self.heads}"
            )
        if self.head_dim % 4:
            raise ConfigError(
                f"vision_config.head_dim = {self.head_dim} has no two halves of pairs"
            )
        if self.layers > LAYERS_LIMIT:
            raise ConfigError(
                f"vision_config.num_hidden_layers = {self.layers} is more than {LAYERS_LIMIT}"
            )
        pixels = 3 * self.patch_size**2
        inner = max(self.heads * self.head_dim, self.intermediate_size, pixels)
        rows = max(inner, 2 * self.position_embedding_size, self.text_size)
        if inner > SIZE_LIMIT or rows * self.hidden_size > MATRIX_LIMIT:
            raise ConfigError("vision_config: its sizes ask for a matrix larger than any there is")


def _theta(rope: Any) -> float:
    """Read the base of the rotary embedding; the published config calls the axial one default."""
    if rope is None:
        return 100.0
    if not isinstance(rope, dict) or rope.get("rope_type", "axial") not in ("default", "axial"):
        raise ConfigError(f"vision_config.rope_parameters = {shown(rope)} is not supported")
    return positive(rope, "rope_theta", 100.0)


# What the reference leaves open and this tower has one answer for.
_ONLY: dict[str, Any] = {
    "model_type": "gemma4_vision",
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "use_clipped_linears": False,
}
