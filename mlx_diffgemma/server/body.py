"""Holds what the bodies of all routes share: types of fields, and the report of ignored names."""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from .refused import shortened

Entry = TypeVar("Entry")

# A list that is read up to its first mistake: tens of thousands of them take seconds to write down.
Many = Annotated[list[Entry], Field(fail_fast=True)]

NonNegative = Annotated[int, Field(ge=0, lt=1 << 63)]

Positive = Annotated[int, Field(ge=1, le=1 << 20)]

Steps = Annotated[int, Field(ge=1, le=1000)]


# Most tokens of an answer that nothing but the context limits: more than any context has.
UNLIMITED = 1 << 20


def _no_limit(given: object) -> object:
    return UNLIMITED if given == -1 else given


# Most tokens of an answer; -1, which some clients send, sets no limit.
Budget = Annotated[Positive | None, BeforeValidator(_no_limit)]

NotBlank = Annotated[str, StringConstraints(min_length=1)]

# Names that are reported at most, and characters of each: they travel in a header.
MOST_NAMES = 50

MOST_NAME_CHARACTERS = 60

# Values that say nothing: clients send them without meaning anything by it.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "temperature": (1,),
    "top_p": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "user": ("",),
    "parallel_tool_calls": (True,),
    "strict": (False,),
}


class Body(BaseModel):
    """Reports a name that it does not know as ignored, and drops none in silence."""

    model_config = ConfigDict(extra="allow", strict=True)

    def unused(self) -> set[str]:
        """Name the fields that mean nothing beside what else was sent."""
        return set()


def ignored(body: Body) -> list[str]:
    """Name parameters that were sent and mean nothing here, those of a body's parts with a dot.

    They fit into a header: printable ASCII, and not too long.
    """
    names = sorted(_ignored(body))[:MOST_NAMES]
    return [shortened(ascii(name)[1:-1], MOST_NAME_CHARACTERS) for name in names]


def _ignored(body: Body) -> set[str]:
    found = {
        name
        for name, value in (body.model_extra or {}).items()
        if value is not None and value not in _NEUTRAL.get(name, ())
    }
    for name, value in vars(body).items():
        if not isinstance(value, list | Body):
            continue
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, Body):
                found |= {f"{name}.{inner}" for inner in _ignored(part)}
    return found | body.unused()
