"""Has a model begin with a call of a tool, as every API can ask for."""

from collections.abc import Sequence

from ..text.tokenizer import Declaration
from .refused import Refused

_BEGINS = "<|tool_call>call:"


def forced_call(tools: Sequence[Declaration], name: str | None = None) -> str:
    """Write the beginning of a call that has to be made, of any tool or the one of this name.

    Raises:
        Refused: there is no such tool.
    """
    names = [tool["function"]["name"] for tool in tools]
    if not names:
        told = "tool_choice asks for a call, and there are no tools"
        raise Refused(400, told, param="tool_choice")
    if name is None:
        return f"{_BEGINS}{names[0]}{{" if len(names) == 1 else _BEGINS
    if name not in names:
        told = f"tool_choice asks for {name}, which is not among the tools"
        raise Refused(400, told, param="tool_choice")
    return f"{_BEGINS}{name}{{"
