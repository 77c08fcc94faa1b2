"""mlx-diffgemma: a local-first runtime for DiffusionGemma on Apple silicon.

from mlx_diffgemma import load, generate

model, tokenizer = load("path/or/hub-name")
print(generate(model, tokenizer, "Why is the sky blue?"))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arguments import SettingError
    from .checkpoint.files import CheckpointError
    from .checkpoint.load import load
    from .diffusion.draws import Draws, SeededDraws
    from .diffusion.guards import Guards
    from .diffusion.prompt_cache import ContextError, PromptCache, Reading, SessionError
    from .errors import Error
    from .model.diffusion_gemma import DiffusionGemma
    from .model.settings import ConfidenceThreshold, EntropyBound, GenerationConfig
    from .tasks.batch import batch_generate, stream_batch
    from .tasks.choose import ChooseError, choose
    from .tasks.edit import EditError, EditResult, edit, stream_edit
    from .tasks.fill import FillResult, fill, stream_fill
    from .tasks.generate import Request, generate, stream_generate
    from .tasks.request import Done, Draft, Event, Notice
    from .tasks.session import ChatSession, ToolResult, Truncated
    from .tasks.starts import CanvasError
    from .text.schema import SchemaError
    from .text.template import TemplateError
    from .text.tokenizer import Tokenizer, TokenizerError
    from .text.turns import BadToolCall, Text, Thought, ToolCall

# Resolved on first use: the command line imports this package and must answer --help at once.
_HOME = {
    "BadToolCall": "text.turns",
    "CanvasError": "tasks.starts",
    "ChatSession": "tasks.session",
    "CheckpointError": "checkpoint.files",
    "ChooseError": "tasks.choose",
    "ConfidenceThreshold": "model.settings",
    "PromptCache": "diffusion.prompt_cache",
    "ContextError": "diffusion.prompt_cache",
    "DiffusionGemma": "model.diffusion_gemma",
    "Done": "tasks.request",
    "Draft": "tasks.request",
    "Draws": "diffusion.draws",
    "EditError": "tasks.edit",
    "EditResult": "tasks.edit",
    "EntropyBound": "model.settings",
    "Error": "errors",
    "Event": "tasks.request",
    "FillResult": "tasks.fill",
    "GenerationConfig": "model.settings",
    "Guards": "diffusion.guards",
    "Notice": "tasks.request",
    "Reading": "diffusion.prompt_cache",
    "Request": "tasks.generate",
    "SchemaError": "text.schema",
    "SeededDraws": "diffusion.draws",
    "SessionError": "diffusion.prompt_cache",
    "SettingError": "arguments",
    "TemplateError": "text.template",
    "Text": "text.turns",
    "Thought": "text.turns",
    "Tokenizer": "text.tokenizer",
    "TokenizerError": "text.tokenizer",
    "ToolCall": "text.turns",
    "ToolResult": "tasks.session",
    "Truncated": "tasks.session",
    "batch_generate": "tasks.batch",
    "choose": "tasks.choose",
    "edit": "tasks.edit",
    "fill": "tasks.fill",
    "generate": "tasks.generate",
    "load": "checkpoint.load",
    "stream_batch": "tasks.batch",
    "stream_edit": "tasks.edit",
    "stream_fill": "tasks.fill",
    "stream_generate": "tasks.generate",
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
