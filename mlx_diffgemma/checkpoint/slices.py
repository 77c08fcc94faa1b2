"""Reads a rank's part of a checkpoint: of each tensor its rows or columns, and no other bytes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from errno import EIO
from io import FileIO
from math import prod

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError
from ..model.config import Config
from ..model.part import ModelPart
from .files import ITEM_BYTES, Tensor
from .weights import DType, as_type, read_weights

Bytes = NDArray[np.uint8]

# Bytes read at once where only some columns of rows are wanted.
BLOCK = 1 << 24

_LAYER = re.compile(r"model\.decoder\.layers\.(\d+)\.(.+?)(?:\.(?:weight|scales|biases))?$")
_CONDITIONING = re.compile(r"model\.decoder\.self_conditioning\.(.+?)\.(?:weight|scales|biases)$")

# What of a matrix (..., rows, columns) is kept.
ROWS, COLUMNS = -2, -1

# Where an adapter has a map's rows and columns: in A (in, r), B (r, out) and magnitudes (out,), or
# beside experts in A (experts, r, in) and B (experts, out, r).
_TERM = re.compile(r"(.+)\.(lora_a|lora_b|m)")
_TERMS = {("lora_a", COLUMNS): -2, ("lora_b", ROWS): -1, ("m", ROWS): -1}
_EXPERT_TERMS = {("lora_a", COLUMNS): -1, ("lora_b", ROWS): -2}

# What adapters put around a map: one module, or one for each side of the model.
_AROUND = re.compile(r"(?<=_proj)(?:\.linear|\.encoder|\.decoder)+(?=\.)")


@dataclass(frozen=True)
class Cut:
    """Of `whole` rows or columns, as the model counts them, those in the ranges, in a row."""

    axis: int
    ranges: tuple[range, ...]
    whole: int

    def stored(self, length: int) -> list[range]:
        """The same of an axis that stores them in `length` numbers: packed, or one a group.

        Raises:
            CheckpointError: they do not begin or end between two numbers.
        """
        found = []
        for each in self.ranges:
            ends = [each.start * length, each.stop * length]
            if any(end % self.whole for end in ends):
                raise CheckpointError(f"{self.whole} columns cannot be cut at {each.start}")
            found.append(range(*(end // self.whole for end in ends)))
        return found

    @property
    def kept(self) -> int:
        """How many that are."""
        return sum(map(len, self.ranges))

    def before(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a whole tensor, of which one of this shape is kept."""
        found = list(shape)
        found[self.axis] = self.whole
        return tuple(found)


def cut_of(name: str, part: ModelPart, config: Config) -> Cut | None:
    """What a rank keeps of a tensor or parameter; None is all of it."""
    if found := _CONDITIONING.fullmatch(name):
        return _gated(found[1], part.conditioning, config.intermediate_size)
    found = _LAYER.fullmatch(name)
    if not found:
        return None
    number, module = int(found[1]), found[2]
    if number >= len(part.layers):
        return None
    own, layer = part.layers[number], config.layers[number]
    place, _, leaf = module.rpartition(".")
    if place == "mlp":
        return _gated(leaf, own.inner, config.intermediate_size)
    if place == "experts":
        width = config.moe_intermediate_size
        if leaf == "down_proj":
            return Cut(COLUMNS, (own.expert,), width)
        up = range(width + own.expert.start, width + own.expert.stop)
        return Cut(ROWS, (own.expert, up), 2 * width)
    heads = {"q_proj": own.heads, "k_proj": own.keys, "v_proj": own.keys, "o_proj": own.heads}
    if place != "self_attn" or leaf not in heads:
        return None
    size, mine = layer.head_dim, heads[leaf]
    count = (
        layer.num_key_value_heads if leaf in ("k_proj", "v_proj") else config.num_attention_heads
    )
    numbers = range(mine.start * size, mine.stop * size)
    return Cut(COLUMNS if leaf == "o_proj" else ROWS, (numbers,), count * size)


def cut_of_term(name: str, part: ModelPart, config: Config) -> Cut | None:
    """The same of a parameter that an adapter has: a term beside a map, or what takes its place.

    Where the map's rows are cut, so are those of B and the magnitudes; where its columns are, those
    of A. What reads them is then a sum over ranks, which is there without an adapter, too.
    """
    found = _TERM.fullmatch(name)
    if not found:
        return cut_of(name, part, config)
    cut = cut_of(f"{found[1]}.weight", part, config)
    if cut is None:
        return None
    axis = (_EXPERT_TERMS if ".experts." in name else _TERMS).get((found[2], cut.axis))
    return None if axis is None else replace(cut, axis=axis)


def cut_of_parameter(name: str, part: ModelPart, config: Config) -> Cut | None:
    """The same by a parameter's name in a model, where modules of an adapter stand around a map."""
    return cut_of_term(_AROUND.sub("", name), part, config)


def _gated(leaf: str, own: range, width: int) -> Cut | None:
    """Of a gated MLP: what `gate` and `up` write is what `down` reads."""
    axes = {"gate_proj": ROWS, "up_proj": ROWS, "down_proj": COLUMNS}
    return Cut(axes[leaf], (own,), width) if leaf in axes else None


def kept_shape(tensor: Tensor, cut: Cut | None) -> tuple[int, ...]:
    """The shape of what is kept of a tensor."""
    shape = list(tensor.shape)
    if cut is not None:
        shape[cut.axis] = sum(map(len, cut.stored(shape[cut.axis])))
    return tuple(shape)


def read_cut(tensor: Tensor, cut: Cut) -> mx.array:
    """Read what is kept of a tensor.

    Raises:
        CheckpointError: its file cannot be read.
    """
    shape, axis = kept_shape(tensor, cut), len(tensor.shape) + cut.axis
    length, outer = tensor.shape[axis], prod(tensor.shape[:axis])
    inner = prod(tensor.shape[axis + 1 :]) * ITEM_BYTES[tensor.dtype]  # bytes of a row or column
    found = np.empty((outer, shape[axis], inner), np.uint8)
    ranges = cut.stored(length)
    try:
        with tensor.file.open("rb", buffering=0) as file:
            if cut.axis == ROWS:
                _read_rows(file, tensor.start, length, ranges, found)
            else:
                _read_columns(file, tensor.start, length, ranges, found)
    except OSError as error:
        raise CheckpointError(f"{tensor.file} cannot be read: {error.strerror}") from None
    name = _NAMES[tensor.dtype]
    whole = mx.array(found.reshape(-1).view(name))
    return (whole.view(mx.bfloat16) if tensor.dtype == "BF16" else whole).reshape(shape)


# What NumPy calls the types of weights; it has no bfloat16.
_NAMES = {"U32": "uint32", "U8": "uint8", "F32": "float32", "F16": "float16", "BF16": "uint16"}


def _read_rows(
    file: FileIO, start: int, length: int, ranges: Sequence[range], found: Bytes
) -> None:
    """Read rows of (outer, length, bytes) from byte `start`: those of one range are in a row."""
    for number, matrix in enumerate(found):
        at = 0
        for each in ranges:
            file.seek(start + (number * length + each.start) * found.shape[2])
            _fill(file, matrix[at : at + len(each)])
            at += len(each)


def _read_columns(
    file: FileIO, start: int, length: int, ranges: Sequence[range], found: Bytes
) -> None:
    """Read columns of (outer, length, bytes) from byte `start`: of blocks that are read whole."""
    rows = max(1, BLOCK // (length * found.shape[2]))
    block = np.empty((rows, length, found.shape[2]), np.uint8)
    file.seek(start)
    for first in range(0, len(found), rows):
        some = found[first : first + rows]
        _fill(file, block[: len(some)])
        at = 0
        for each in ranges:
            some[:, at : at + len(each)] = block[: len(some), each.start : each.stop]
            at += len(each)


def _fill(file: FileIO, array: Bytes) -> None:
    """Read as many bytes as the array has."""
    left = array.reshape(-1).data  # contiguous, so no copy
    while left:
        count = file.readinto(left)
        if not count:
            raise OSError(EIO, "it is cut off")
        left = left[count:]


def read_part(
    tensors: dict[str, Tensor], cuts: Mapping[str, Cut | None], dtype: DType | None
) -> dict[str, mx.array]:
    """Read what a rank keeps of these tensors, computed; those without a cut, and floating-point
    numbers, as in `read_weights`.

    Raises:
        CheckpointError: a file cannot be read.
    """
    whole = {name: tensor for name, tensor in tensors.items() if cuts.get(name) is None}
    weights = read_weights(whole, dtype)
    for name, tensor in tensors.items():
        if (cut := cuts.get(name)) is not None:
            array = as_type(read_cut(tensor, cut), dtype)
            mx.eval(array)  # or what was read would stay beside what it becomes
            weights[name] = array
    return weights
