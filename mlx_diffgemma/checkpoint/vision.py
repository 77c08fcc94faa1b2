"""The vision tower of a checkpoint, loaded when the first picture comes and not before."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import CheckpointError
from ..model.sight import Sight
from ..model.vision import Vision, is_vision, vision_name
from ..model.vision_config import VisionConfig
from .files import Headers, Tensor, read_headers
from .quantization import quantization_of
from .weights import DType, check_parameters, read_weights


def sight_of(headers: Headers, dtype: DType | None, context: Callable[[], int]) -> Sight | None:
    """A checkpoint's way to see, which loads the tower late; None where the files have none.

    `context` tells how many tokens there is memory for beside the tower.
    """
    if not any(map(is_vision, headers.tensors)):
        return None
    return Sight(headers.config, lambda: vision_of(headers, dtype), context)


def load_vision(directory: Path, *, dtype: DType | None = None) -> Vision:
    """Load the tower of a checkpoint directory; `dtype` None keeps the stored type.

    Raises:
        CheckpointError: the checkpoint has none, or as `load`.
    """
    return vision_of(read_headers(directory), dtype)


def vision_of(headers: Headers, dtype: DType | None) -> Vision:
    """Load it by its headers; nothing of the text model is read."""
    tensors = vision_tensors(headers)
    vision = build_vision(headers.config, tensors)
    check_parameters(vision, {vision_name(name): each for name, each in tensors.items()})
    weights = {vision_name(name): array for name, array in read_weights(tensors, dtype).items()}
    vision.load_weights(list(weights.items()))
    del weights
    mx.eval(vision.parameters())
    vision.eval()
    return vision


def vision_tensors(headers: Headers) -> dict[str, Tensor]:
    """The tower's tensors.

    Raises:
        CheckpointError: there are none.
    """
    tensors = {name: tensor for name, tensor in headers.tensors.items() if is_vision(name)}
    if not tensors:
        raise CheckpointError(f"{headers.directory} has no vision tower: it reads text alone")
    return tensors


def build_vision(config: dict[str, Any], tensors: dict[str, Tensor]) -> Vision:
    """Build the tower without its weights, quantized where the tensors' names say so.

    Raises:
        CheckpointError: the config does not describe it.
    """
    numbers = VisionConfig.from_dict(config)
    if numbers is None:
        raise CheckpointError("config.json has no vision_config for the tower in the files")
    vision = Vision(numbers)
    packed = {
        vision_name(name).removesuffix(".scales"): name.removesuffix(".scales")
        for name in tensors
        if name.endswith(".scales")
    }

    def quantization(path: str, module: nn.Module) -> bool | dict[str, Any]:
        return vars(quantization_of(config, packed[path])) if path in packed else False

    try:
        nn.quantize(vision, class_predicate=quantization)
    except ValueError as error:
        raise CheckpointError(f"config.json: {' '.join(str(error).split())[:300]}") from None
    return vision
