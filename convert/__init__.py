"""Hugging Face weights -> quantized MLX weights, one slice of one tensor at a time.

This folder is installed as `mlx_diffgemma.convert`.
"""

from .estimate import Estimate, estimates
from .pipeline import Summary, convert, stream_convert, upload
from .recipes import DEFAULT_RECIPE, RECIPES, Recipe, uniform
from .source import Fetched
from .staging import ConvertError, workspace_of
from .write import Written

__all__ = [
    "DEFAULT_RECIPE",
    "RECIPES",
    "ConvertError",
    "Estimate",
    "Fetched",
    "Recipe",
    "Summary",
    "Written",
    "convert",
    "estimates",
    "stream_convert",
    "uniform",
    "upload",
    "workspace_of",
]
