"""Checks and translates requests of OpenAI's Responses. Knows nothing of HTTP and of threads."""

from collections.abc import Sequence
from typing import Any

from ..diffusion.guards import OFF, Guards
from ..tasks.generate import Request
from ..text.tokenizer import Message
from .body import UNLIMITED
from .forced import forced_call
from .openai import arguments_of
from .pictures import Sent
from .refused import Refused
from .responses_body import Item, Part, ResponsesBody
from .responses_tools import INPUT, declared, full_name

ONLY = "only text and input_image are supported, no files"

ITEMS = (
    "only messages, reasoning, calls of functions and custom tools and their outputs are supported"
)

_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


def check(body: ResponsesBody) -> None:
    """Refuse what would be another answer if it were left out.

    Raises:
        Refused: it is asked for.
    """
    if body.background:
        raise Refused(
            400, "background: answers are not written in the background", param="background"
        )
    for name in ("conversation", "prompt"):
        if getattr(body, name) is not None:
            raise Refused(400, f"{name}: nothing is stored here by such a name", param=name)


def response_request(body: ResponsesBody, messages: Sequence[Message]) -> Request:
    """Translate a request, whose `messages` are those of all that was said before, too.

    Raises:
        Refused: a combination that is not supported.
    """
    known = declared(body.tools or ())
    tools = [each.declaration for each in known.values()]
    choice, schema, opening = body.tool_choice, body.schema_of_answer, ""
    if choice == "none":
        tools = []
    elif choice == "required":
        opening = forced_call(tools)
    elif isinstance(choice, dict):
        if choice.get("type") not in ("function", "custom"):
            told = "tool_choice: a type other than function and custom is not supported"
            raise Refused(400, told, param="tool_choice")
        wanted = str(choice.get("name"))
        named = (full for full, each in known.items() if wanted in (full, each.name))
        opening = forced_call(tools, next(named, wanted))
    if schema is not None and opening:
        raise Refused(400, "text.format does not go with a forced tool call", param="text.format")
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []
    return Request(
        [*system, *messages],
        max_tokens=body.max_output_tokens or UNLIMITED,
        steps=body.steps,
        seed=body.seed,
        enable_thinking=body.thinks and schema is None,
        schema=schema,
        guards=OFF if schema is not None else Guards(),
        tools=tools,
        opening=opening,
        top=body.top_logprobs or 0,
    )


def messages_of(body: ResponsesBody, before: Sequence[Message]) -> list[Message]:
    """Write down as templates want it what is said behind the messages `before`.

    What the assistant thinks, says and calls in a row is one message. Each picture is a `Sent`
    that nobody has read yet.

    Raises:
        Refused: an item or a part is not supported, or the result of a call that nobody has made.
    """
    if isinstance(body.input, str):
        return [{"role": "user", "content": body.input}]
    names = {
        call["id"]: call["function"]["name"] for m in before for call in m.get("tool_calls", ())
    }
    found: list[Message | _Turn] = []
    turn: _Turn | None = None  # the assistant's, while it goes on
    given: list[dict[str, Any]] = []  # pictures of results: templates write none into a result
    for i, item in enumerate(body.input):
        kind, place = item.type or "message", f"input[{i}]"
        if kind in ("function_call_output", "custom_tool_call_output"):
            result, pictures = _result(item, place, names)
            found.append(result)
            given += pictures
            turn = None
            continue
        if given:
            found.append({"role": "user", "content": given})
            given = []
        if kind == "message" and item.role != "assistant":
            found.append(_asked(item, place))
            turn = None
            continue
        if turn is None:
            turn = _Turn()
            found.append(turn)
        turn.say(item, place, names)
    if given:
        found.append({"role": "user", "content": given})
    return [each.message() if isinstance(each, _Turn) else each for each in found]


def _asked(item: Item, place: str) -> Message:
    """What a user or the system says."""
    if item.role is None:
        raise Refused(400, f"{place}.role: it is missing", param=f"{place}.role")
    role = "system" if item.role == "developer" else item.role
    parts = _parts(item.content, f"{place}.content")
    if any(part["type"] == "image" for part in parts):
        return {"role": role, "content": parts}
    return {"role": role, "content": "".join(part["text"] for part in parts)}


def _parts(given: str | list[Part] | None, place: str) -> list[dict[str, Any]]:
    """A content as parts, of text and of pictures.

    Raises:
        Refused: a part is something else.
    """
    if not isinstance(given, list):
        return [{"type": "text", "text": given or ""}]
    found: list[dict[str, Any]] = []
    for i, part in enumerate(given):
        at = f"{place}[{i}]"
        if part.type in _TEXTS and part.text is not None:
            found.append({"type": "text", "text": part.text})
        elif part.type == "refusal" and part.refusal is not None:
            found.append({"type": "text", "text": part.refusal})
        elif part.type == "input_image" and part.image_url is not None:
            sent = Sent(part.image_url, part.detail, f"{at}.image_url")
            found.append({"type": "image", "image": sent})
        else:
            raise Refused(400, f"{at}: {ONLY}", param=at)
    return found


def _text(given: str | list[Part] | None, place: str) -> str:
    parts = _parts(given, place)
    if any(part["type"] == "image" for part in parts):
        raise Refused(400, f"{place}: it has pictures, which nobody but users and tools shows")
    return "".join(part["text"] for part in parts)


class _Turn:
    """What the assistant thinks, says and calls in a row."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[dict[str, Any]] = []

    def say(self, item: Item, place: str, names: dict[str, str]) -> None:
        """Take what the assistant says, thinks or calls; `names` learns the calls.

        Raises:
            Refused: it is something else, or a call is not whole.
        """
        match item.type or "message":
            case "message":
                self._texts.append(_text(item.content, f"{place}.content"))
            case "reasoning":
                thought = _text(item.content, f"{place}.content") if item.content else ""
                self._thoughts.append(thought or _text(item.summary or "", f"{place}.summary"))
            case "function_call" | "custom_tool_call" as kind:
                if not item.call_id or item.name is None:
                    told = f"{place}: a {kind} needs call_id and name"
                    raise Refused(400, told, param=place)
                name = names[item.call_id] = full_name(item.namespace, item.name)
                if kind == "function_call":
                    arguments = arguments_of(name, item.arguments or "")
                else:
                    arguments = {INPUT: item.input or ""}
                function = {"name": name, "arguments": arguments}
                self._calls.append({"id": item.call_id, "type": "function", "function": function})
            case _:
                raise Refused(400, f"{place}: {ITEMS}", param=place)

    def message(self) -> Message:
        """Give the turn as templates want it."""
        found: Message = {"role": "assistant", "content": "".join(self._texts)}
        if any(self._thoughts):
            found["reasoning"] = "".join(self._thoughts)
        if self._calls:
            found["tool_calls"] = self._calls
        return found


def _result(item: Item, place: str, names: dict[str, str]) -> tuple[Message, list[dict[str, Any]]]:
    """The result of a call, and the pictures in it."""
    name = names.get(item.call_id or "")
    if name is None:
        at = f"{place}.call_id"
        raise Refused(400, f"{at}: no call before it has this id", param=at)
    parts = _parts(item.output, f"{place}.output")
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    message: Message = {"role": "tool", "tool_call_id": item.call_id, "name": name, "content": text}
    return message, [part for part in parts if part["type"] == "image"]
