"""mlx-diffgemma: a local-first runtime for DiffusionGemma on Apple silicon.

from mlx_diffgemma import load, generate

model, tokenizer = load("path/or/hub-name")
print(generate(model, tokenizer, "Why is the sky blue?"))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import CheckpointError
    from .config import GenerationConfig, SettingError
    from .errors import Error
    from .generation import ContextError, Done, Draft, Event, Text, generate, stream_generate
    from .loading import load
    from .model import DiffusionGemma
    from .sampler import ConfidenceThreshold, Draws, EntropyBound, SeededDraws
    from .tokenizer import Tokenizer, TokenizerError

# Resolved on first use: the command line imports this package and must answer --help at once.
_HOME = {
    "CheckpointError": "checkpoint",
    "ConfidenceThreshold": "sampler",
    "ContextError": "generation",
    "DiffusionGemma": "model",
    "Done": "generation",
    "Draft": "generation",
    "Draws": "sampler",
    "EntropyBound": "sampler",
    "Error": "errors",
    "Event": "generation",
    "GenerationConfig": "config",
    "SeededDraws": "sampler",
    "SettingError": "config",
    "Text": "generation",
    "Tokenizer": "tokenizer",
    "TokenizerError": "tokenizer",
    "generate": "generation",
    "load": "loading",
    "stream_generate": "generation",
}

__all__ = [
    "CheckpointError",
    "ConfidenceThreshold",
    "ContextError",
    "DiffusionGemma",
    "Done",
    "Draft",
    "Draws",
    "EntropyBound",
    "Error",
    "Event",
    "GenerationConfig",
    "SeededDraws",
    "SettingError",
    "Text",
    "Tokenizer",
    "TokenizerError",
    "generate",
    "load",
    "stream_generate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
