"""How a checkpoint's config says that weights are packed."""

from dataclasses import dataclass
from typing import Any

from ..arguments import is_size, shown
from ..errors import CheckpointError
from .files import NAME_LIMIT

# What `mlx.core.quantize` takes: mode -> (group sizes, bits). The first pair is the mode's default.
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((64, 32, 128), (4, 2, 3, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "nvfp4": ((16,), (4,)),
    "mxfp8": ((32,), (8,)),
}


@dataclass(frozen=True)
class Quantization:
    """How a module's weights are packed; the names are those of `mlx.core.quantize`."""

    group_size: int
    bits: int
    mode: str = "affine"


def quantization_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Read MLX's quantization settings of a config, {} if it has none.

    Raises:
        CheckpointError: they are another tool's (fp8, bitsandbytes, awq, gptq, ...).
    """
    given = [config.get(key) for key in ("quantization", "quantization_config")]
    settings: Any = next((value for value in given if value not in (None, {})), {})
    if not isinstance(settings, dict):
        raise CheckpointError("config.json: quantization is not a JSON object")
    # awq and gptq settings have `bits` and `group_size` too: the method tells them apart.
    if "quant_method" in settings:
        method = settings["quant_method"]
        known = isinstance(method, str) and method.isidentifier() and len(method) <= NAME_LIMIT
        raise CheckpointError(f"{method if known else shown(method)} quantization is not supported")
    return settings


def quantization_of(config: dict[str, Any], module: str) -> Quantization:
    """Read what the config says of a module that has `.scales`.

    An override without a mode is affine, also where the default is another: published mxfp4, nvfp4
    and mxfp8 conversions rely on that.

    Raises:
        CheckpointError: the config says nothing of it, says that it is not quantized, or names a
            format that is not MLX's.
    """
    settings = quantization_settings(config)
    override = settings.get(module)
    if override is False:
        raise CheckpointError(f"config.json says {module} is not quantized, but it has scales")
    chosen = override if isinstance(override, dict) else settings
    size, bits, mode = chosen.get("group_size"), chosen.get("bits"), chosen.get("mode", "affine")
    if not (is_size(size) and is_size(bits)):
        raise CheckpointError(f"config.json does not say how {module} is quantized")
    sizes, widths = MODES.get(mode, ((), ())) if isinstance(mode, str) else ((), ())
    if size not in sizes or bits not in widths:
        raise CheckpointError(
            f"config.json: {module} is packed as {shown(mode)} of {bits} bits in groups of {size}, "
            "which MLX has not"
        )
    return Quantization(size, bits, mode)
