"""mlx-diffgemma: a local-first runtime for DiffusionGemma on Apple silicon.

from mlx_diffgemma import load, generate

model, tokenizer = load("path/or/hub-name")
print(generate(model, tokenizer, "Why is the sky blue?"))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arguments import SettingError
    from .batch import batch_generate, stream_batch
    from .checkpoint import CheckpointError
    from .choosing import ChooseError, choose
    from .config import GenerationConfig
    from .context import ContextError, PromptCache, Reading, SessionError
    from .editing import EditError, EditResult, edit, stream_edit
    from .errors import Error
    from .filling import FillResult, TemplateError, fill, stream_fill
    from .generation import Request, generate, stream_generate
    from .guards import Guards
    from .loading import load
    from .model import DiffusionGemma
    from .request import Done, Draft, Event, Notice
    from .sampler import ConfidenceThreshold, Draws, EntropyBound, SeededDraws
    from .schema import SchemaError
    from .session import ChatSession, ToolResult, Truncated
    from .starts import CanvasError
    from .tokenizer import Tokenizer, TokenizerError
    from .turns import BadToolCall, Text, Thought, ToolCall

# Resolved on first use: the command line imports this package and must answer --help at once.
_HOME = {
    "BadToolCall": "turns",
    "CanvasError": "starts",
    "ChatSession": "session",
    "CheckpointError": "checkpoint",
    "ChooseError": "choosing",
    "ConfidenceThreshold": "sampler",
    "PromptCache": "context",
    "ContextError": "context",
    "DiffusionGemma": "model",
    "Done": "request",
    "Draft": "request",
    "Draws": "sampler",
    "EditError": "editing",
    "EditResult": "editing",
    "EntropyBound": "sampler",
    "Error": "errors",
    "Event": "request",
    "FillResult": "filling",
    "GenerationConfig": "config",
    "Guards": "guards",
    "Notice": "request",
    "Reading": "context",
    "Request": "generation",
    "SchemaError": "schema",
    "SeededDraws": "sampler",
    "SessionError": "context",
    "SettingError": "arguments",
    "TemplateError": "filling",
    "Text": "turns",
    "Thought": "turns",
    "Tokenizer": "tokenizer",
    "TokenizerError": "tokenizer",
    "ToolCall": "turns",
    "ToolResult": "session",
    "Truncated": "session",
    "batch_generate": "batch",
    "choose": "choosing",
    "edit": "editing",
    "fill": "filling",
    "generate": "generation",
    "load": "loading",
    "stream_batch": "batch",
    "stream_edit": "editing",
    "stream_fill": "filling",
    "stream_generate": "generation",
}

__all__ = [
    "BadToolCall",
    "CanvasError",
    "ChatSession",
    "CheckpointError",
    "ChooseError",
    "ConfidenceThreshold",
    "ContextError",
    "DiffusionGemma",
    "Done",
    "Draft",
    "Draws",
    "EditError",
    "EditResult",
    "EntropyBound",
    "Error",
    "Event",
    "FillResult",
    "GenerationConfig",
    "Guards",
    "Notice",
    "PromptCache",
    "Reading",
    "Request",
    "SchemaError",
    "SeededDraws",
    "SessionError",
    "SettingError",
    "TemplateError",
    "Text",
    "Thought",
    "Tokenizer",
    "TokenizerError",
    "ToolCall",
    "ToolResult",
    "Truncated",
    "batch_generate",
    "choose",
    "edit",
    "fill",
    "generate",
    "load",
    "stream_batch",
    "stream_edit",
    "stream_fill",
    "stream_generate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
