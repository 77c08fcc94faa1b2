"""Functions that a model may call: declared from a Python file, or in JSON."""

import inspect
import json
import re
import sys
import types
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import Error
from ..files import parse_json, read_text

# Characters of a result that the model is given; more would not fit into its context.
MOST_RESULT = 100_000

_JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", dict: "object"}


class ToolError(Error):
    """A file of tools that cannot be used."""


@dataclass(frozen=True)
class Tool:
    """A declaration in JSON Schema, and the function; None where somebody else has to answer."""

    declaration: dict[str, Any]
    function: Callable[..., object] | None

    @property
    def name(self) -> str:
        return str(self.declaration["function"]["name"])

    def call(self, arguments: dict[str, Any]) -> str:
        """The result as text: strings as they are, the rest as JSON.

        What goes wrong inside the function is told to the model, which may do better next time;
        only Ctrl-C passes through. What the function prints goes to stderr, as stdout is for
        answers.
        """
        assert self.function is not None
        try:
            inspect.signature(self.function).bind(**arguments)
            with redirect_stdout(sys.stderr):
                result = self.function(**arguments)
            told = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit included
            told = f"error: {described(error)}"
        if len(told) > MOST_RESULT:
            told = f"{told[:MOST_RESULT]} (and {len(told) - MOST_RESULT} more characters)"
        return told.encode(errors="replace").decode()  # names of files may hold half characters


def described(error: BaseException) -> str:
    """Type and message of what a user's code has raised."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # its own __str__ fails
        return type(error).__name__


def read_tools(path: Path) -> list[Tool]:
    """Tools of a file: public functions of a `.py`, or declarations in a `.json`.

    A Python file is executed. Types and the docstring of a function become its declaration.

    Raises:
        ToolError: the file cannot be read or declares nothing that could be called.
    """
    source = read_text(path, ToolError)
    found = _from_json(path, source) if path.suffix == ".json" else _from_python(path, source)
    if not found:
        raise ToolError(f"{path} declares no function")
    return found


def _from_json(path: Path, source: str) -> list[Tool]:
    try:
        values = parse_json(source)
    except ValueError as error:
        raise ToolError(f"{path} is not JSON: {error}") from None
    found = []
    for value in values if isinstance(values, list) else [values]:
        function = value.get("function", value) if isinstance(value, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ToolError(f"{path}: a declaration needs a name")
        found.append(Tool({"type": "function", "function": function}, None))
    return found


def _from_python(path: Path, source: str) -> list[Tool]:
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a user's file may raise, sys.exit included
        raise ToolError(f"{path} fails: {described(error)}") from None
    return [
        Tool(declare(function), function)
        for name, function in vars(module).items()
        if inspect.isfunction(function)
        and function.__module__ == module.__name__
        and not name.startswith("_")
    ]


def declare(function: Callable[..., object]) -> dict[str, Any]:
    """The declaration of a function: its signature, and what its docstring says of arguments.

    Raises:
        ToolError: a parameter has no type that JSON knows.
    """
    try:
        hints = get_type_hints(function)
    except Exception as error:  # an annotation that names nothing
        raise ToolError(f"{function.__name__}: {described(error)}") from None
    summary, said = _docstring(inspect.getdoc(function) or "")
    properties: dict[str, Any] = {}
    required = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ToolError(f"{function.__name__}: *{name} cannot be declared")
        properties[name] = _type(function.__name__, name, hints.get(name, str))
        if name in said:
            properties[name]["description"] = said[name]
        if parameter.default is parameter.empty:
            required.append(name)
    parameters = {"type": "object", "properties": properties, "required": required}
    return {
        "type": "function",
        "function": {
            "name": function.__name__,
            "description": summary,
            "parameters": parameters,
        },
    }


def _type(function: str, name: str, hint: Any) -> dict[str, Any]:
    if isinstance(hint, type) and hint in _JSON_TYPES:
        return {"type": _JSON_TYPES[hint]}
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal and all(isinstance(value, str) for value in inner):
        return {"type": "string", "enum": list(inner)}
    if hint is list or origin is list:
        return {"type": "array", "items": _type(function, name, inner[0] if inner else str)}
    if origin is dict:
        return {"type": "object"}
    if origin in (Union, types.UnionType):
        given = [part for part in inner if part is not type(None)]
        if len(given) == 1:
            return {**_type(function, name, given[0]), "nullable": True}
    raise ToolError(f"{function}: the type of {name} cannot be declared")


_ARGUMENT = re.compile(r"\s+(\w+)(?:\s*\([^)]*\))?:\s+(.*)")


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """The first paragraph, and what an `Args:` section says of each argument."""
    summary = " ".join(text.split("\n\n")[0].split())
    _, _, section = text.partition("Args:\n")
    said: dict[str, str] = {}
    for line in section.split("\n\n")[0].splitlines():
        if found := _ARGUMENT.match(line):
            said[found[1]] = found[2].strip()
    return summary, said


def by_name(tools: Sequence[Tool]) -> dict[str, Tool]:
    """Tools by their names.

    Raises:
        ToolError: two have the same.
    """
    found = {tool.name: tool for tool in tools}
    if len(found) < len(tools):
        raise ToolError("two tools have the same name")
    return found
