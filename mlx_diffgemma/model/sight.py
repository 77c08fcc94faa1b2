"""How a model sees: ids that stand for pictures, who sees whom, and a tower that is loaded late."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx

from ..arguments import shown
from .config import ConfigError
from .placeholders import RULES, PictureRule, Pixels
from .vision import Vision
from .vision_config import BUDGETS, DEFAULT_BUDGET, VisionConfig


@dataclass(frozen=True)
class SightConfig:
    """What config.json says of pictures in a prompt.

    Attributes:
        vision: the tower's numbers.
        image: the id that stands for each token of a picture; `begin` and `end` stand around them.
        budget: most tokens of a picture, unless its part of the message says another number.
        rule: who sees whom within a picture, `picture_mask` in config.json; its one home.
    """

    vision: VisionConfig
    image: int
    begin: int
    end: int
    budget: int = DEFAULT_BUDGET
    rule: PictureRule = "reference"

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "SightConfig":
        """Read it from a whole config.json whose text model has been accepted.

        Raises:
            ConfigError: a value is missing or none that there is.
        """
        vision = VisionConfig.from_dict(config)
        if vision is None:
            raise ConfigError("there is no vision_config for the tower in the files")
        image, begin, end = (_token(config, name) for name in ("image", "boi", "eoi"))
        if len({image, begin, end}) < 3:
            raise ConfigError("image_token_id, boi_token_id and eoi_token_id are not three ids")
        budget = config.get("vision_soft_tokens_per_image", DEFAULT_BUDGET)
        if type(budget) is not int or budget not in BUDGETS:
            known = ", ".join(map(str, BUDGETS))
            raise ConfigError(f"vision_soft_tokens_per_image is {shown(budget)}, none of {known}")
        # Without that, transformers reads pictures as it reads text.
        mutual = config["text_config"].get("use_bidirectional_attention") == "vision"
        rule = config.get("picture_mask", "reference" if mutual else "causal")
        if rule not in RULES:
            raise ConfigError(f"picture_mask is {shown(rule)}, none of {', '.join(RULES)}")
        return cls(vision, image, begin, end, budget, rule)


def _token(config: dict[str, Any], name: str) -> int:
    """An id that the vocabulary has, by its name in config.json."""
    token = config.get(f"{name}_token_id")
    if type(token) is not int or not 0 <= token < config["text_config"]["vocab_size"]:
        raise ConfigError(f"{name}_token_id = {shown(token)} is no id of the vocabulary")
    return token


class Sight:
    """A model's way to see. Nothing of the tower is read before the first picture.

    Args:
        values: config.json; what is wrong in it is told to who shows a picture, and to nobody else.
        load: loads the tower, on the thread that owns MLX.
        context: tokens of context that there is memory for beside the tower.
    """

    def __init__(
        self, values: dict[str, Any], load: Callable[[], Vision], context: Callable[[], int]
    ):
        self._values, self._load, self._context = values, load, context
        self._vision: Vision | None = None

    @cached_property
    def config(self) -> SightConfig:
        """What config.json says.

        Raises:
            ConfigError: it is wrong.
        """
        return SightConfig.from_dict(self._values)

    @cached_property
    def context(self) -> int:
        """Tokens of context that a prompt with pictures may have.

        Raises:
            TooLarge: the tower does not fit into memory beside the model.
        """
        return self._context()

    @property
    def rule(self) -> str:
        """Who sees whom within a picture, as config.json says it, or nothing of a wrong one."""
        try:
            return self.config.rule
        except ConfigError:
            return ""

    @property
    def loaded(self) -> bool:
        """Tell whether the tower is in memory."""
        return self._vision is not None

    def unload(self) -> None:
        """Free the tower; the next picture loads it again."""
        self._vision = None

    def __call__(self, picture: Pixels) -> mx.array:
        """Embeddings (tokens, hidden) of a picture, computed; the first one loads the tower.

        Raises:
            LostPicture: its pixels were not kept.
            CheckpointError: the tower cannot be loaded.
        """
        patches = picture.patches
        if self._vision is None:
            self._vision = self._load()
        seen = self._vision(mx.array(patches), picture.rows, picture.columns, mx.eval)
        mx.eval(seen)
        return seen
