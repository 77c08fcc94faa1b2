"""mlx-diffgemma: a local-first runtime for DiffusionGemma on Apple silicon.

from mlx_diffgemma import load, generate

model, tokenizer = load("path/or/hub-name")
print(generate(model, tokenizer, "Why is the sky blue?"))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__: str

if TYPE_CHECKING:  # an alias says to type checkers that a name is exported
    from .arguments import SettingError as SettingError
    from .checkpoint.load import load as load
    from .diffusion.cache_file import SessionError as SessionError
    from .diffusion.draws import Draws as Draws
    from .diffusion.draws import SeededDraws as SeededDraws
    from .diffusion.guards import Guards as Guards
    from .diffusion.prompt_cache import ContextError as ContextError
    from .diffusion.prompt_cache import PromptCache as PromptCache
    from .diffusion.prompt_cache import Reading as Reading
    from .errors import CheckpointError as CheckpointError
    from .errors import Error as Error
    from .model.diffusion_gemma import DiffusionGemma as DiffusionGemma
    from .model.settings import ConfidenceThreshold as ConfidenceThreshold
    from .model.settings import EntropyBound as EntropyBound
    from .model.settings import GenerationConfig as GenerationConfig
    from .tasks.asynchronous import abatch_generate as abatch_generate
    from .tasks.asynchronous import achoose as achoose
    from .tasks.asynchronous import aedit as aedit
    from .tasks.asynchronous import afill as afill
    from .tasks.asynchronous import agenerate as agenerate
    from .tasks.asynchronous import astream as astream
    from .tasks.asynchronous import astream_batch as astream_batch
    from .tasks.asynchronous import astream_edit as astream_edit
    from .tasks.asynchronous import astream_fill as astream_fill
    from .tasks.asynchronous import astream_generate as astream_generate
    from .tasks.asynchronous import in_mlx_thread as in_mlx_thread
    from .tasks.batch import batch_generate as batch_generate
    from .tasks.batch import stream_batch as stream_batch
    from .tasks.choose import Choice as Choice
    from .tasks.choose import ChooseError as ChooseError
    from .tasks.choose import ChooseRequest as ChooseRequest
    from .tasks.choose import choose as choose
    from .tasks.edit import EditError as EditError
    from .tasks.edit import EditRequest as EditRequest
    from .tasks.edit import EditResult as EditResult
    from .tasks.edit import edit as edit
    from .tasks.edit import stream_edit as stream_edit
    from .tasks.fill import FillRequest as FillRequest
    from .tasks.fill import FillResult as FillResult
    from .tasks.fill import fill as fill
    from .tasks.fill import stream_fill as stream_fill
    from .tasks.generate import Request as Request
    from .tasks.generate import generate as generate
    from .tasks.generate import stream_generate as stream_generate
    from .tasks.request import Done as Done
    from .tasks.request import Draft as Draft
    from .tasks.request import Event as Event
    from .tasks.request import Notice as Notice
    from .tasks.request import Options as Options
    from .tasks.request import Settings as Settings
    from .tasks.score import ScoreRequest as ScoreRequest
    from .tasks.score import ScoreResult as ScoreResult
    from .tasks.score import score as score
    from .tasks.session import ChatSession as ChatSession
    from .tasks.session import ToolResult as ToolResult
    from .tasks.session import Truncated as Truncated
    from .tasks.starts import CanvasError as CanvasError
    from .tasks.starts import Pieces as Pieces
    from .text.schema import SchemaError as SchemaError
    from .text.template import TemplateError as TemplateError
    from .text.tokenizer import Tokenizer as Tokenizer
    from .text.tokenizer import TokenizerError as TokenizerError
    from .text.turns import BadToolCall as BadToolCall
    from .text.turns import Text as Text
    from .text.turns import Thought as Thought
    from .text.turns import ToolCall as ToolCall
    from .training.run import train as train

# Resolved on first use: the command line imports this package and must answer --help at once.
_EXPORTS = {
    "arguments": "SettingError",
    "checkpoint.load": "load",
    "diffusion.draws": "Draws SeededDraws",
    "diffusion.guards": "Guards",
    "diffusion.prompt_cache": "ContextError PromptCache Reading",
    "diffusion.cache_file": "SessionError",
    "errors": "CheckpointError Error",
    "model.diffusion_gemma": "DiffusionGemma",
    "model.settings": "ConfidenceThreshold EntropyBound GenerationConfig",
    "tasks.asynchronous": "abatch_generate achoose aedit afill agenerate astream astream_batch "
    "astream_edit astream_fill astream_generate in_mlx_thread",
    "tasks.batch": "batch_generate stream_batch",
    "tasks.choose": "Choice ChooseError ChooseRequest choose",
    "tasks.edit": "EditError EditRequest EditResult edit stream_edit",
    "tasks.fill": "FillRequest FillResult fill stream_fill",
    "tasks.generate": "Request generate stream_generate",
    "tasks.request": "Done Draft Event Notice Options Settings",
    "tasks.score": "ScoreRequest ScoreResult score",
    "tasks.session": "ChatSession ToolResult Truncated",
    "tasks.starts": "CanvasError Pieces",
    "text.schema": "SchemaError",
    "text.template": "TemplateError",
    "text.tokenizer": "Tokenizer TokenizerError",
    "text.turns": "BadToolCall Text Thought ToolCall",
    "training.run": "train",
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names.split()}

__all__ = sorted(_HOME)


# What dir() lists, and so what completion offers: not the names that this module needs itself.
_DUNDERS = ["__all__", "__doc__", "__file__", "__name__", "__path__", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = _version()
    elif name in _HOME:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_DUNDERS])


def _version() -> str:
    """The installed version; a checkout that was never installed has none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("mlx-diffgemma")
    except PackageNotFoundError:
        return "unknown"
