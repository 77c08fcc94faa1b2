"""What a model needs of the memory there is, decided before anything is loaded."""

import os
import re
from dataclasses import dataclass

import mlx.core as mx
from rich.filesize import decimal

from ..arguments import SettingError, shown, whole_number
from ..errors import Error
from .info import Info

# Of what a model leaves free, the share that a dequantized embedding table may take.
TABLE_SHARE = 0.25


def usable(size: int) -> int:
    """Return the bytes that Metal recommends the GPU to use of a Mac's gigabytes: 2/3 of up to 32,
    3/4 of more, as logs of others state; `free_memory` asks the Mac itself."""
    return (size << 30) * (8 if size <= 32 else 9) // 12


# Gigabytes of a Mac, and how much of them a model can use.
MACS = {size: usable(size) for size in (16, 24, 32, 36, 48, 64)}

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
# Bytes in which not even the model that ships runs: what is less lacks its unit.
LEAST_MEMORY = 1_000_000


class TooLarge(Error):
    """A model that does not fit into memory."""


@dataclass(frozen=True)
class Fit:
    """How a model is run: most tokens of context, and whether the table is kept dequantized."""

    context: int
    keep_table: bool


def free_memory() -> int:
    """Return how many bytes MLX can use without swapping: of the GPU's working set, or of all."""
    if mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"]) - mx.get_active_memory()
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def fit(found: Info, memory: int | None, *, pictures: bool = False) -> Fit:
    """Run a model in so many bytes; None is what is free. `pictures` need the vision tower, too.

    Raises:
        TooLarge: not even one canvas behind a short prompt fits; says what would.
    """
    if memory is None:
        memory = free_memory()
    fixed = found.memory_needed(0, pictures=pictures)
    context = found.context
    if found.cache_bytes_per_token:
        context = min(context, max(memory - fixed, 0) // found.cache_bytes_per_token)
    if memory < fixed or context < 2 * found.canvas_length:
        needed = found.memory_needed(2 * found.canvas_length, pictures=pictures)
        weights = found.loaded_bytes + pictures * found.vision_bytes
        raise TooLarge(
            f"the model needs {decimal(needed)} with a short prompt{' and pictures' * pictures} "
            f"({decimal(weights)} of it weights), and {decimal(memory)} are free: "
            f"{_advice(found, memory, needed)}; --max-memory overrules what is free"
        )
    left = memory - found.memory_needed(min(context, 8192), pictures=pictures)
    return Fit(context, 0 < found.table_bytes <= TABLE_SHARE * left)


def _advice(found: Info, memory: int, needed: int) -> str:
    for bits in (8, 6, 5, 4, 3, 2):
        # Scales and biases of groups of 64 add half a bit.
        weights = found.text_parameters * (bits + 0.5) / 8
        rest = needed - found.loaded_bytes
        if weights < found.loaded_bytes and weights + rest <= memory:
            return (
                f"converted to {bits} bits it would fit (mlx-diffgemma convert -q --q-bits {bits})"
            )
    return "no number of bits would make it fit"


def read_size(given: int | str) -> int:
    """The bytes of a memory: a number of them, or a text such as "12GB", "12 GiB", "900MB".

    Raises:
        SettingError: it is none of these, or so few that a unit must be missing.
    """
    if not isinstance(given, str):
        number = whole_number("max_memory", given, 0)
        text = str(number)
    else:
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", given, re.IGNORECASE)
        if not found or (found[3] and not found[2]):
            raise SettingError(f"{shown(given)} is not a size; write for instance 12GB")
        power = "KMGT".find(found[2].upper()) + 1 if found[2] else 0
        number = int(float(found[1]) * (1024 if found[3] else 1000) ** power)
        text = given.strip()
    if number < LEAST_MEMORY:
        meant = f"; {number}GB was probably meant" if number and text.isdecimal() else ""
        raise SettingError(f"{text} are {number:,} bytes, in which no model runs{meant}")
    return number
