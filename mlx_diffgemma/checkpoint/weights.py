"""Tensors of a checkpoint's files, compared with the modules that they are for."""

from typing import Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import CheckpointError
from .files import FLOATS, Tensor, check_type

DType = Literal["float32", "bfloat16", "float16"]

SENTENCE_LIMIT = 300  # characters of a library's message, which may quote a whole file


def sentence(error: Exception) -> str:
    """Put what a library says on one line, not longer than a few."""
    words = " ".join(str(error).split())
    return "".join(c if c.isprintable() else "?" for c in words)[:SENTENCE_LIMIT]


def read_weights(tensors: dict[str, Tensor], dtype: DType | None) -> dict[str, mx.array]:
    """Read these tensors and no others, floating-point numbers as `dtype`; None keeps their type.

    Raises:
        CheckpointError: a file cannot be loaded.
    """
    weights: dict[str, mx.array] = {}
    for file in sorted({tensor.file for tensor in tensors.values()}):
        try:
            stored = mx.load(str(file))
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be loaded: {sentence(error)}") from None
        assert isinstance(stored, dict)  # a safetensors file is
        weights.update((name, array) for name, array in stored.items() if name in tensors)
    return {name: as_type(array, dtype) for name, array in weights.items()}


def as_type(array: mx.array, dtype: DType | None) -> mx.array:
    """Floating-point numbers as `dtype`, whatever else as it is; None keeps their type."""
    if dtype is None or not mx.issubdtype(array.dtype, mx.floating):
        return array
    return array.astype(getattr(mx, dtype))


def check_parameters(model: nn.Module, found: dict[str, Tensor]) -> None:
    """Compare a module with the tensors of its parameters, by their names in the module.

    Raises:
        CheckpointError: naming what is missing, unknown, of another shape or of another type.
    """
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    expected = {name: tuple(array.shape) for name, array in parameters.items()}
    if missing := sorted(expected.keys() - found.keys()):
        raise CheckpointError(f"the checkpoint lacks {_first(missing)}")
    if extra := sorted(found.keys() - expected.keys()):
        raise CheckpointError(
            f"the checkpoint has tensors that the config does not ask for: {_first(extra)}"
        )
    wrong = sorted(name for name, shape in expected.items() if found[name].shape != shape)
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{_first(wrong)}: shape {list(found[name].shape)}, where the config asks for "
            f"{list(expected[name])}"
        )
    packed = {mx.uint32: ("U32",), mx.uint8: ("U8",)}  # weights, and scales that are no floats
    for name, tensor in found.items():
        check_type(tensor, packed.get(parameters[name].dtype, FLOATS))


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
