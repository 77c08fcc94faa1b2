"""Types of Python and classes of Pydantic as JSON Schemas, through Pydantic.

Only callers within this process can give a type: what comes over the network is JSON.
"""

from collections.abc import Mapping
from typing import Any

from ..arguments import shown
from .schema_keywords import Schema, SchemaError


def schema_of(given: Any) -> Schema:
    """The JSON Schema of a type (`int`, `list[str]`, `Literal["a", "b"]`, a dataclass, ...) or of a
    class of Pydantic; a schema stays as it is. Pydantic is imported for a type alone.

    Raises:
        SchemaError: Pydantic is missing, or makes no schema of this.
    """
    if isinstance(given, Mapping | bool | str | bytes | int | float | list | tuple | None):
        return given  # type: ignore[return-value]  # the reader refuses what is no schema
    try:
        from pydantic import TypeAdapter
        from pydantic.errors import PydanticUserError
    except ImportError:
        raise SchemaError(
            "a type as a schema needs Pydantic: pip install 'mlx-diffgemma[schema]'"
        ) from None
    try:
        return TypeAdapter(given).json_schema()
    except (PydanticUserError, NameError, TypeError, RecursionError) as error:
        said = str(error).partition("\n")[0] or type(error).__name__
        raise SchemaError(f"{shown(given)} is no type with a JSON Schema: {said}") from None
