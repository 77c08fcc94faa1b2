"""Says which tools Anthropic's clients offer: some are declared only once a message names them."""

from collections.abc import Iterator
from typing import Any

from ..text.tokenizer import Declaration
from .anthropic_body import CountBody, Given, Tool
from .refused import Refused

# Blocks that bring a tool or take one away: the first stands in the result of a search for tools,
# the others in messages of the system.
MOVES = ("tool_reference", "tool_addition", "tool_removal")


def offered(body: CountBody) -> list[Declaration]:
    """Declare the tools that are there at the end of a chat, in the order in which they came.

    So the declarations of an earlier request begin those of a later one, and need not be read
    again.

    Raises:
        Refused: a tool is one of those that run at Anthropic, or a block names one that is not
            among them.
    """
    tools = body.tools or ()
    known = {tool.name: _declaration(tool, f"tools[{i}]") for i, tool in enumerate(tools)}
    there = {tool.name: known[tool.name] for tool in tools if not tool.defer_loading}
    for block, place in _moves(body):
        name = named_by(block)
        definition = None if block.tool is None else block.tool.definition
        if block.type == "tool_addition" and definition is not None:
            known[definition.name] = _declaration(definition, f"{place}.tool.definition")
        if name not in known:
            told = f"{place}: {name or 'a tool without a name'} is not among the tools"
            raise Refused(400, told, param=place)
        if block.type == "tool_removal":
            there.pop(name, None)
        else:
            there.setdefault(name, known[name])
    return [*there.values()]


def _moves(body: CountBody) -> Iterator[tuple[Given, str]]:
    """Give the blocks that bring or take away a tool, and where each stands."""
    for i, message in enumerate(body.messages):
        for j, block in enumerate(message.blocks):
            place = f"messages[{i}].content[{j}]"
            if block.type in MOVES:
                yield block, place
            for k, inner in enumerate(block.content if isinstance(block.content, list) else ()):
                if inner.type in MOVES:
                    yield inner, f"{place}.content[{k}]"


def named_by(block: Given) -> str | None:
    """Give the name of the tool that a block brings or takes away."""
    if block.tool is None:
        return block.tool_name
    return block.tool.name if block.tool.definition is None else block.tool.definition.name


def told_of(block: Given) -> str:
    """Say to the model what a block does: the declaration itself stands before the chat."""
    now = "not there any more" if block.type == "tool_removal" else "declared now"
    return f"The tool {named_by(block)} is {now}."


def _declaration(tool: Tool, place: str) -> dict[str, Any]:
    """A tool as templates want it.

    Raises:
        Refused: it is one of those that run at Anthropic.
    """
    if tool.type not in (None, "custom"):
        told = f"{place}: only tools with an input_schema are supported, not {tool.type}"
        raise Refused(400, told, param=place)
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema or {"type": "object", "properties": {}},
    }
    known = {name: value for name, value in function.items() if value is not None}
    return {"type": "function", "function": known}
