"""Hugging Face weights -> quantized MLX weights, one slice of one tensor at a time.

This folder is installed as `mlx_diffgemma.convert`.
"""

from .estimate import Estimate, estimates
from .fuse import Fused, changed_argmax, stream_fuse
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
    "Fused",
    "Recipe",
    "Summary",
    "Written",
    "changed_argmax",
    "convert",
    "estimates",
    "stream_convert",
    "stream_fuse",
    "uniform",
    "upload",
    "workspace_of",
]
