"""Describes the tools that agents are offered over MCP: what each takes, and what it gives."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from ..diffusion.prompt_cache import Reading
from ..tasks.choose import Choice, ChooseRequest
from ..tasks.edit import STRENGTH, EditRequest, EditResult
from ..tasks.fill import FillRequest, FillResult
from ..tasks.generate import Request
from ..tasks.request import Done, Draft, Task
from ..text.turns import Text

# Characters of a text that is given to a tool. The context bounds it too, by the model's tokens.
MOST_TEXT = 1 << 20

# The largest seed: a whole number that JavaScript, in which agents are written, can hold.
MOST_SEED = (1 << 53) - 1

# Slots of one choice, and labels of a slot.
MOST_SLOTS, MOST_LABELS = 64, 4096

Long = Annotated[str, Field(max_length=MOST_TEXT)]

LongNotBlank = Annotated[str, Field(min_length=1, max_length=MOST_TEXT)]

Labels = Annotated[list[str], Field(min_length=2, max_length=MOST_LABELS)]

Given = TypeVar("Given", bound="Arguments")


class Arguments(BaseModel):
    """Refuses a name that it does not know: an agent that misspells one is told so."""

    model_config = ConfigDict(extra="forbid")

    seed: Annotated[
        int, Field(ge=0, le=MOST_SEED, description="The same seed gives the same result.")
    ] = 0


class FillArguments(Arguments):
    template: Annotated[
        LongNotBlank,
        Field(
            description="Text with holes: {{}} or {{name}} (text of any length), {{name:12}} (12 "
            "tokens), {{name:int}} (a whole number), {{name:a|b|c}} (one of these)."
        ),
    ]
    prompt: Annotated[
        Long | None, Field(description="What the text is about, or what it is to say.")
    ] = None
    verify: Annotated[
        bool, Field(description="Read what was filled in once more, and correct it: slower.")
    ] = False


class EditArguments(Arguments):
    text: Annotated[LongNotBlank, Field(description="The whole text.")]
    instruction: Annotated[LongNotBlank, Field(description="What to do, such as: Fix the typos")]
    first_line: Annotated[
        int | None, Field(ge=1, description="First line to rewrite, counted from 1.")
    ] = None
    last_line: Annotated[
        int | None, Field(ge=1, description="Last line to rewrite. [the first]")
    ] = None
    strength: Annotated[
        float, Field(gt=0, le=1, description="How much may change: 0.2 is little, 1 is all.")
    ] = STRENGTH
    verify: Annotated[
        bool, Field(description="Read what was rewritten once more, and correct it: slower.")
    ] = False


class ChooseArguments(Arguments):
    prompt: Annotated[LongNotBlank, Field(description="The question, with all that it is about.")]
    labels: Annotated[
        Labels | Annotated[dict[str, Labels], Field(min_length=1, max_length=MOST_SLOTS)],
        Field(description="The labels to weigh; of several slots an object of such lists by name."),
    ]
    template: Annotated[
        Long | None,
        Field(description="The answer, with {label}, or {name} for each slot, where one stands."),
    ] = None
    draws: Annotated[
        int, Field(ge=1, le=64, description="Noises to average over: more are surer and slower.")
    ] = 1


class ExtractArguments(Arguments):
    text: Annotated[LongNotBlank, Field(description="The text to read.")]
    json_schema: Annotated[
        dict[str, Any],
        Field(alias="schema", description="JSON Schema that the value is guaranteed to follow."),
    ]
    instruction: Annotated[
        Long | None, Field(description="What to take from the text, said before it.")
    ] = None


def _fill(given: FillArguments) -> Task[object]:
    return FillRequest(given.template, given.prompt, seed=given.seed, verify=given.verify)


def _edit(given: EditArguments) -> Task[object]:
    first, last = given.first_line, given.last_line
    lines = (first or 1, last or first or 1) if first or last else None
    return EditRequest(
        given.text,
        given.instruction,
        lines,
        given.strength,
        seed=given.seed,
        verify=given.verify,
    )


def _choose(given: ChooseArguments) -> Task[object]:
    slots = given.labels if isinstance(given.labels, dict) else {"label": given.labels}
    return ChooseRequest(given.prompt, slots, given.template, False, given.seed, given.draws)


def _extract(given: ExtractArguments) -> Task[object]:
    asked = f"{given.instruction}\n\n{given.text}" if given.instruction else given.text
    return Request(asked, seed=given.seed, schema=given.json_schema)


def _written(events: Sequence[object]) -> dict[str, Any]:
    """Give what `fill` or `edit` made of a text."""
    (found,) = (each for each in events if isinstance(each, FillResult | EditResult))
    values = {"values": found.values} if isinstance(found, FillResult) else {}
    notes = list(found.notes)
    return {"text": found.text, **values, "converged": found.converged, "notes": notes}


def _weighed(events: Sequence[object]) -> dict[str, Any]:
    (found,) = (each for each in events if isinstance(each, Choice))
    return found.facts()


def _read(events: Sequence[object]) -> dict[str, Any]:
    text = "".join(each.text for each in events if isinstance(each, Text))
    (done,) = (each for each in events if isinstance(each, Done))
    return {"value": json.loads(text), "converged": done.finish_reason != "not_converged"}


@dataclass(frozen=True)
class Tool(Generic[Given]):
    """Says what a tool is for, what it takes, how that becomes a task, and what its events are.

    Attributes:
        output: a JSON Schema of what `facts` gives.
        slow: whether preparing may take seconds for few characters.
    """

    name: str
    title: str
    description: str
    arguments: type[Given]
    task: Callable[[Given], Task[object]]
    facts: Callable[[Sequence[object]], dict[str, Any]]
    output: dict[str, Any]
    slow: bool = False


def kept(event: object) -> bool:
    """Whether an event says something of the result; others tell how far it has come."""
    return not isinstance(event, Draft | Reading)


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


_TEXT, _YES_OR_NO = {"type": "string"}, {"type": "boolean"}

_SENTENCES = {"type": "array", "items": _TEXT}

_CHANCES = {"type": "object", "additionalProperties": {"type": "number"}}

TOOLS: tuple[Tool[Any], ...] = (
    Tool(
        "fill",
        "Fill holes in a text",
        "Fill the holes of a text, all else in it staying as it is. What stands on both sides of a "
        "hole is seen; a hole can be bound to a number, to a list of choices or to a length.",
        FillArguments,
        _fill,
        _written,
        _object(
            text=_TEXT,
            values={"type": "object", "additionalProperties": {"type": ["string", "integer"]}},
            converged=_YES_OR_NO,
            notes=_SENTENCES,
        ),
    ),
    Tool(
        "edit",
        "Rewrite a text",
        "Rewrite a text, or some lines of it, starting from the text itself, so that what is right "
        "stays. Gives the whole text.",
        EditArguments,
        _edit,
        _written,
        _object(text=_TEXT, converged=_YES_OR_NO, notes=_SENTENCES),
    ),
    Tool(
        "choose",
        "Weigh labels",
        "Say how likely each of several labels is as the answer to a question, as probabilities, "
        "in one pass and without writing: to classify, to judge, to decide between options.",
        ChooseArguments,
        _choose,
        _weighed,
        _object(probabilities={"type": "object", "additionalProperties": _CHANCES}),
    ),
    Tool(
        "extract",
        "Take JSON from a text",
        "Read a text and give what it says as JSON that is guaranteed to follow a JSON Schema.",
        ExtractArguments,
        _extract,
        _read,
        _object(value={}, converged=_YES_OR_NO),
        slow=True,
    ),
)
