"""Hugging Face weights -> quantized MLX weights, one slice of one tensor at a time.

This folder is installed as `mlx_diffgemma.convert`.
"""

from .pipeline import Report, Written, convert, stream_convert, upload
from .recipes import DEFAULT_RECIPE, RECIPES, Recipe, uniform
from .staging import ConvertError

__all__ = [
    "DEFAULT_RECIPE",
    "RECIPES",
    "ConvertError",
    "Recipe",
    "Report",
    "Written",
    "convert",
    "stream_convert",
    "uniform",
    "upload",
]
