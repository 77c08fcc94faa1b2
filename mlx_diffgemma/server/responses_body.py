"""Holds what clients of OpenAI's Responses send, field by field."""

from typing import Annotated, Any, Literal

from pydantic import Field

from ..tasks.request import MOST_TOP
from .body import Body, Budget, Many, NonNegative, NotBlank, Steps
from .pictures import Detail
from .refused import Refused

# What asks for log-probabilities.
LOGPROBS = "message.output_text.logprobs"


class Part(Body):
    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = None
    detail: Detail | None = None
    annotations: list[Any] | None = None  # this and the next come back from answers
    logprobs: list[Any] | None = None


class Item(Body):
    """What was said, thought, called, or given by a tool."""

    type: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | Many[Part] | None = None
    summary: Many[Part] | None = None
    id: str | None = None
    status: str | None = None
    call_id: str | None = None
    name: NotBlank | None = None
    namespace: NotBlank | None = None
    arguments: str | None = None
    input: str | None = None
    output: str | Many[Part] | None = None
    encrypted_content: str | None = None

    @property
    def has_pictures(self) -> bool:
        """Say whether a part is a picture."""
        given = self.output if isinstance(self.output, list) else self.content
        return isinstance(given, list) and any(part.image_url is not None for part in given)


class Tool(Body):
    type: str
    name: NotBlank | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    format: dict[str, Any] | None = None  # of a custom tool's input
    tools: "Many[Tool] | None" = None  # of a namespace

    @property
    def is_ours(self) -> bool:
        """Say whether the client runs it, or whoever serves the model."""
        return self.type in ("function", "custom", "namespace")


class Format(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None  # it always is


class TextConfig(Body):
    format: Format | None = None


class Reasoning(Body):
    effort: str | None = None


class ResponsesBody(Body):
    model: str | None = None
    input: str | Annotated[Many[Item], Field(min_length=1)]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    max_output_tokens: Budget = None
    text: TextConfig | None = None
    tools: Many[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    include: Many[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    metadata: dict[str, str] | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    background: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    seed: NonNegative | None = None
    steps: Steps | None = None

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """Give the schema of a guaranteed document.

        Raises:
            Refused: there has to be one and is none.
        """
        form = None if self.text is None else self.text.format
        if form is None or form.type == "text":
            return None
        if form.type == "json_object":
            return {"type": "object"}
        if form.schema_ is None:
            raise Refused(400, "text.format json_schema needs a schema", param="text.format.schema")
        return form.schema_

    @property
    def thinks(self) -> bool:
        """Say whether thoughts are asked for."""
        effort = None if self.reasoning is None else self.reasoning.effort
        return effort not in (None, "none", "minimal")

    @property
    def weighs(self) -> bool:
        """Say whether log-probabilities are asked for."""
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    @property
    def slow(self) -> bool:
        """Say whether a few bytes may be long work: a schema, or pictures to decode."""
        items = self.input if isinstance(self.input, list) else ()
        return self.schema_of_answer is not None or any(each.has_pictures for each in items)

    def unused(self) -> set[str]:
        """Name what means nothing here."""
        found = set()
        if self.schema_of_answer is not None and self.thinks:
            found.add("reasoning")
        if self.truncation == "auto":  # what does not fit is refused
            found.add("truncation")
        return found | {f"tools.{tool.type}" for tool in self.tools or () if not tool.is_ours}
