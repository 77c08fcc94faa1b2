"""Declares the tools of OpenAI's Responses as functions, and tells which one a call is of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..text.tokenizer import Declaration
from .refused import Refused
from .responses_body import Tool

# The one argument of a custom tool, which takes text.
INPUT = "input"


@dataclass(frozen=True)
class Declared:
    """A tool as the model is told of it, and as the client knows it."""

    declaration: Declaration
    name: str
    namespace: str | None
    custom: bool


def full_name(namespace: str | None, name: str) -> str:
    """Give the name by which the model knows a tool, which stands in a namespace or in none."""
    return name if namespace is None else f"{namespace}.{name}"


def declared(tools: Sequence[Tool]) -> dict[str, Declared]:
    """Find the tools that a client runs, by the names that the model knows.

    Tools that run at OpenAI are left out where others are beside them, as coding agents send them
    with every request.

    Raises:
        Refused: there are none but those, or a tool has no name.
    """
    ours = [(i, tool) for i, tool in enumerate(tools) if tool.is_ours]
    if tools and not ours:
        told = f"tools[0]: only functions and custom tools are supported, not {tools[0].type}"
        raise Refused(400, told, param="tools[0]")
    found: dict[str, Declared] = {}
    for i, tool in ours:
        place = f"tools[{i}]"
        if tool.name is None:
            raise Refused(400, f"{place}.name: it is missing", param=f"{place}.name")
        if tool.type != "namespace":
            found[tool.name] = _declared(tool, tool.name, None)
            continue
        for j, inner in enumerate(tool.tools or ()):
            at = f"{place}.tools[{j}]"
            if inner.type not in ("function", "custom") or inner.name is None:
                told = f"{at}: a namespace has functions and custom tools with names"
                raise Refused(400, told, param=at)
            found[full_name(tool.name, inner.name)] = _declared(inner, inner.name, tool.name)
    return found


def _declared(tool: Tool, name: str, namespace: str | None) -> Declared:
    custom = tool.type == "custom"
    description, parameters = tool.description, tool.parameters
    if custom:
        # The grammar is told and not enforced: the client checks what it is given.
        grammar = (tool.format or {}).get("definition")
        description = "\n\n".join(str(each) for each in (description, grammar) if each) or None
        parameters = {"type": "object", "properties": {INPUT: {"type": "string"}}}
        parameters["required"] = [INPUT]
    function: dict[str, Any] = {
        "name": full_name(namespace, name),
        "description": description,
        "parameters": parameters or {"type": "object", "properties": {}},
    }
    known = {key: value for key, value in function.items() if value is not None}
    return Declared({"type": "function", "function": known}, name, namespace, custom)
