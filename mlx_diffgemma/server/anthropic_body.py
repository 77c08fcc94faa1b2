"""Holds what clients of Anthropic's API send, field by field."""

from typing import Annotated, Any, Literal

from pydantic import Field

from .body import Body, Budget, Many, NonNegative, NotBlank, Positive, Steps


class Source(Body):
    """Where a picture or a document is: in base64, at an address, or as text."""

    type: str
    media_type: str | None = None
    data: str | None = None
    url: str | None = None


class Tool(Body):
    name: NotBlank
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    defer_loading: bool | None = None  # it is declared once a message names it
    cache_control: dict[str, Any] | None = None


class Change(Body):
    """A tool that a message brings or takes away: one of `tools` by its name, or a whole one."""

    type: str
    name: NotBlank | None = None
    definition: Tool | None = None


class Given(Body):
    """A block that the result of a tool may have, which holds no others."""

    type: str
    text: str | None = None
    source: Source | None = None
    tool_name: NotBlank | None = None
    tool: Change | None = None
    cache_control: dict[str, Any] | None = None  # what was read is kept anyway


class Block(Given):
    id: NotBlank | None = None
    name: NotBlank | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | Many[Given] | None = None
    is_error: bool | None = None
    thinking: str | None = None
    signature: str | None = None  # of a thought; nothing is signed here

    @property
    def has_pictures(self) -> bool:
        """Say whether it is a picture, or the result of a tool with one."""
        inner = self.content if isinstance(self.content, list) else ()
        return self.type == "image" or any(each.type == "image" for each in inner)


class TextBlock(Body):
    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = None


class ChatMessage(Body):
    role: Literal["user", "assistant", "system"]
    content: str | Many[Block]

    @property
    def blocks(self) -> list[Block]:
        """Give the content as blocks."""
        if isinstance(self.content, str):
            return [Block(type="text", text=self.content)]
        return self.content


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None


class ThinkingConfig(Body):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Positive | None = None


class OutputFormat(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    format: OutputFormat | None = None


class CountBody(Body):
    """Holds what is read of a request, whose tokens can be counted."""

    model: str | None = None
    messages: Annotated[Many[ChatMessage], Field(min_length=1)]
    system: str | Many[TextBlock] | None = None
    tools: Many[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """Give the schema of a guaranteed document."""
        form = None if self.output_config is None else self.output_config.format
        return None if form is None else form.schema_

    @property
    def slow(self) -> bool:
        """Say whether a few bytes may be long work: a schema, or pictures to decode."""
        blocks = (block for message in self.messages for block in message.blocks)
        return self.schema_of_answer is not None or any(each.has_pictures for each in blocks)


class MessagesBody(CountBody):
    max_tokens: Budget = None
    stop_sequences: Annotated[Many[NotBlank], Field(max_length=16)] | None = None
    stream: bool | None = None
    metadata: dict[str, Any] | None = None  # says who asks, which changes nothing
    seed: NonNegative | None = None
    steps: Steps | None = None

    def unused(self) -> set[str]:
        """Name what means nothing beside a schema, whose document begins at once and is not cut."""
        if self.schema_of_answer is None:
            return set()
        told = {"stop_sequences": self.stop_sequences, "thinking": self.thinking}
        return {name for name, value in told.items() if value}
