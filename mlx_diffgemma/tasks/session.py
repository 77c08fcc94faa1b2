"""A conversation that pays only for what is new: each turn goes on from the cache of the last."""

import sys
from bisect import bisect_left
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Unpack, get_args

from ..arguments import SettingError, check_kind
from ..diffusion.cache_file import SessionError
from ..diffusion.guards import Guards
from ..diffusion.prompt_cache import ContextError, PromptCache, remaining_context
from ..model.diffusion_gemma import READS_TEXT, DiffusionGemma
from ..model.placeholders import Pixels
from ..text.tokenizer import Declaration, Message, Tokenizer
from ..text.turns import Text, Thought, ToolCall
from .conversation import is_declaration, is_part, read_conversation, written_messages
from .generate import stream_generate
from .pictures import Given, pictures_of, show, shown_messages
from .request import Done, Event, Settings, encode_messages

Overflow = Literal["refuse", "truncate"]

# Of the context, what is free once turns were left out: else every further turn would leave out
# another, and read the rest anew.
FREED = 1 / 4


_PARTS = "a message or a tool's result is text, or parts that are text or images"


@dataclass(frozen=True)
class Truncated:
    """The conversation exceeded the context: its oldest `turns` were left out."""

    turns: int


@dataclass(frozen=True)
class ToolResult:
    """Tells the model what a called function gave back: a text, or parts as of a message."""

    name: str
    content: str | Sequence[dict[str, Any]]


class ChatSession:
    """Messages and the context that has read them.

    A turn renders the whole chat with the checkpoint's template and encodes what the context has
    not read yet, so answers are those of a chat encoded from scratch. Not for several threads: MLX
    belongs to one.

    Args:
        model: as `load` gives it.
        tokenizer: the same checkpoint's.
        system: the system message.
        tools: function declarations in JSON Schema, as the `openai` client sends them.
        enable_thinking: ask for thoughts before an answer.
        overflow: what to do about a conversation beyond the context: "refuse" the message, or
            "truncate", which forgets the oldest turns (a user's message with all up to the next);
            the system message stays, and a message that alone is too long is still refused. This
            attribute may change between turns.
        settings: see `Settings`; they may change between turns. Guards are all on unless told
            otherwise.

    Raises:
        SessionError: the template ignores tools or thinking, so asking for them would do nothing;
            or a tool is no declaration.
    """

    # A setting that is written beside `settings` is refused, not ignored.
    __slots__ = (
        "_messages",
        "_model",
        "_prompt_cache",
        "_thinking",
        "_tokenizer",
        "_tools",
        "_unanswered",
        "overflow",
        "settings",
    )

    def __init__(
        self,
        model: DiffusionGemma,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        tools: Sequence[Declaration] = (),
        enable_thinking: bool = False,
        overflow: Overflow = "refuse",
        **settings: Unpack[Settings],
    ):
        self._model = model
        self._tokenizer = tokenizer
        self._prompt_cache = PromptCache(model)
        self._messages: list[Message] = []
        self._unanswered: list[Message] | None = None
        self._tools = list(tools)
        self._thinking = False
        self.overflow: Overflow = overflow
        if overflow not in get_args(Overflow):
            raise SettingError(f"overflow is one of {', '.join(get_args(Overflow))}")
        check_kind("a system message", system, (str, NoneType), "text")
        self.settings: Settings = {"guards": Guards(), **settings}
        self.enable_thinking = enable_thinking
        if not all(map(is_declaration, self._tools)):
            raise SessionError("a tool is no declaration of a function")
        if tools and not tokenizer.knows_tools:
            raise SessionError("this model's chat template knows no tools")
        self.system = system

    def __repr__(self) -> str:
        return f"ChatSession({len(self._messages)} messages, {self._prompt_cache!r})"

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation so far, the system message first."""
        return tuple(self._messages)

    @property
    def prompt_cache(self) -> PromptCache:
        """Holds what the model has read."""
        return self._prompt_cache

    @property
    def system(self) -> str | None:
        """The system message; setting it has the whole conversation read anew."""
        if self._messages and self._messages[0]["role"] == "system":
            return str(self._messages[0]["content"])
        return None

    @system.setter
    def system(self, text: str | None) -> None:
        rest = [message for message in self._messages if message["role"] != "system"]
        self._messages = [{"role": "system", "content": text}] * bool(text) + rest

    @property
    def enable_thinking(self) -> bool:
        """Tell whether thoughts are asked for."""
        return self._thinking

    @enable_thinking.setter
    def enable_thinking(self, wanted: bool) -> None:
        if wanted and not self._tokenizer.knows_thinking:
            raise SessionError("this model's chat template knows no thinking")
        self._thinking = wanted

    def stream(
        self, content: str | Sequence[dict[str, Any]], *, seed: int | None = None
    ) -> Generator[Event | Truncated, None, None]:
        """Answer a message, a text or parts of which some are pictures.

        Events, arguments and errors are as in `stream_generate`.

        Where turns were left out, `Truncated` comes first.

        Closed early, the session keeps the message and what was committed of the answer, or
        neither if nothing was. After a `ToolCall`, go on with `respond`.
        """
        if isinstance(content, str) and not content.strip():
            raise ContextError("the message is empty")
        asked = self._shown([{"role": "user", "content": content}])
        return self._answer([*self._messages, *asked], seed)

    def _shown(self, messages: list[Message]) -> list[Message]:
        """Messages whose pictures are made ready.

        Raises:
            ContextError: one has what is neither text nor a picture, or nothing.
            Error: as `shown_messages`.
        """
        if not all(isinstance(each["content"], str | list | tuple) for each in messages):
            raise ContextError(_PARTS)
        found = shown_messages(messages, self._model.sight, self._model.context)
        for each in found:
            parts = each["content"]
            if not isinstance(parts, str) and (not parts or not all(map(is_part, parts))):
                raise ContextError(_PARTS)
        return found

    def respond(
        self, results: Sequence[ToolResult], *, seed: int | None = None
    ) -> Generator[Event | Truncated, None, None]:
        """Go on in the same model turn with the results of its tool calls, in their order.

        Raises:
            SessionError: the last answer did not ask for as many.
            Error: a picture in one cannot be read, as in `stream`.
        """
        calls = self._messages[-1].get("tool_calls", []) if self._messages else []
        if len(calls) != len(results) or not calls:
            raise SessionError(f"{len(results)} results for {len(calls)} tool calls")
        told: list[Message] = [
            {
                "role": "tool",
                "name": result.name,
                "tool_call_id": call["id"],
                "content": result.content,
            }
            for call, result in zip(calls, results, strict=True)
        ]
        return self._answer([*self._messages, *self._shown(told)], seed)

    def retry(self, *, seed: int | None = None) -> Generator[Event | Truncated, None, None]:
        """Answer the last message once more, also one whose answer was stopped before it began.

        Nothing of it is encoded again.

        Raises:
            SessionError: there is no message yet.
        """
        asked = self._unanswered or self._messages[: _last_question(self._messages) + 1]
        return self._answer(asked, seed)

    @property
    def question(self) -> str:
        """The last message, also one whose answer was stopped before it began.

        Raises:
            SessionError: there is none.
        """
        asked = self._unanswered or self._messages
        return _text_of(asked[_last_question(asked)])

    def show(self, given: Given, tokens: int | None = None) -> Pixels:
        """A picture made ready for a part of a message, so that what is wrong with it is told now;
        it takes so many tokens at most.

        Raises:
            SettingError: this model reads text alone.
            Error: as `pictures.show`.
        """
        if self._model.sight is None:
            raise SettingError(READS_TEXT)
        return show(given, self._model.sight, tokens)

    @property
    def pictures(self) -> list[Pixels]:
        """Those of the last message, as `question` says its text.

        Raises:
            SessionError: there is no message.
        """
        asked = self._unanswered or self._messages
        return pictures_of([asked[_last_question(asked)]])

    def undo(self) -> str:
        """Forget the last message and its answer; gives the message.

        Raises:
            SessionError: there is none.
        """
        asked = self._unanswered or self._messages
        question = asked[_last_question(asked)]
        kept = [i for i, message in enumerate(self._messages) if message is question]
        if kept:  # else its answer was stopped before it began
            del self._messages[kept[0] :]
        self._unanswered = None
        return _text_of(question)

    def switch(self, model: DiffusionGemma, tokenizer: Tokenizer) -> None:
        """Go on with another model, which reads the conversation anew.

        Raises:
            SessionError: its template ignores tools or thinking, or it reads text alone and there
                are pictures; this session is as it was.
        """
        if model.sight is None and pictures_of([*self._messages, *(self._unanswered or [])]):
            raise SessionError("that model reads text alone, and this conversation has pictures")
        other = ChatSession(  # which refuses what the template does not know
            model, tokenizer, tools=self._tools, enable_thinking=self._thinking
        )
        self._model, self._tokenizer = model, tokenizer
        self._prompt_cache = other._prompt_cache

    def reset(self) -> None:
        """Forget the conversation, not the system message."""
        self._unanswered = None
        del self._messages[bool(self.system) :]
        self._prompt_cache.clear()

    def save(self, path: Path, *, pixels: bool = False) -> None:
        """Write messages and cache to one file, at once.

        Of pictures digest and size are kept, which is enough to go on. With `pixels` they can also
        be read again, by a changed conversation.

        Raises:
            SessionError: it cannot be written.
        """
        messages = written_messages(self._messages, pixels=pixels)
        extra = {"messages": messages, "tools": self._tools, "thinking": self._thinking}
        self._prompt_cache.save(path, extra)

    @classmethod
    def load(
        cls,
        path: Path,
        model: DiffusionGemma,
        tokenizer: Tokenizer,
    ) -> "ChatSession":
        """Go on where a saved session stopped, with default settings.

        Raises:
            SessionError: as `restore`.
        """
        session = cls(model, tokenizer)
        session.restore(path)
        return session

    def restore(self, path: Path) -> None:
        """Take over a saved conversation; the settings of this session stay.

        Raises:
            SessionError: there is no such file, it is damaged or no session, or another model's;
                this session is as it was.
        """
        context, extra = PromptCache.load(path, self._model)
        if extra is None:
            raise SessionError(f"{path} is a prompt cache, not a session")
        messages, tools, thinking = read_conversation(path, extra)
        saved = ChatSession(  # which refuses what the template does not know
            self._model, self._tokenizer, tools=tools, enable_thinking=thinking
        )
        self._tools, self._thinking = saved._tools, saved._thinking
        self._messages, self._unanswered = messages, None
        self._prompt_cache = context

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        return encode_messages(
            self._tokenizer,
            messages,
            self._model.sight,
            sys.maxsize,
            enable_thinking=self._thinking,
            tools=self._tools,
        )

    def _fits(self, ids: list[int], free: float = 0) -> bool:
        """Tell whether a prompt leaves room for a canvas, and this part of the context."""
        room = self._model.context - len(ids)
        return room >= max(self._model.config.canvas_length, free * self._model.context)

    def _shortened(self, asked: list[Message], ids: list[int]) -> tuple[int, list[Message]]:
        """The conversation without the oldest turns, where it leaves no room; and how many."""
        if self._fits(ids):
            return 0, asked
        first = bool(asked and asked[0]["role"] == "system")
        begins = [i for i, message in enumerate(asked) if message["role"] == "user"]
        kept = [asked[:first] + asked[begin:] for begin in begins[1:]]

        def roomy(messages: list[Message]) -> bool:
            return self._fits(self._encode(messages), FREED)

        turns = min(bisect_left(kept, True, key=roomy), len(kept) - 1) + 1
        return (turns, kept[turns - 1]) if turns else (0, asked)

    def _answer(
        self,
        asked: list[Message],
        seed: int | None,
    ) -> Generator[Event | Truncated, None, None]:
        ids, turns = self._encode(asked), 0
        if self.overflow == "truncate":
            turns, short = self._shortened(asked, ids)
            ids = self._encode(short) if turns else ids
            if self._fits(ids):
                asked = short
            else:  # the message alone is too long, which is refused below: nothing is forgotten
                turns = 0
        self._refuse_long(ids)
        events = stream_generate(
            self._model,
            self._tokenizer,
            ids,
            prompt_cache=self._prompt_cache,
            seed=seed,
            **self.settings,
        )
        return self._record(asked, events, turns)

    def _refuse_long(self, ids: list[int]) -> None:
        """Refuse a prompt that leaves no room, and say what would help."""
        try:
            remaining_context(self._model, ids)
        except ContextError as error:
            if self.overflow == "truncate" or len(self._messages) <= bool(self.system):
                raise
            raise ContextError(
                f"{error}; /reset starts over, --overflow truncate (in a chat /overflow truncate) "
                "leaves the oldest turns out"
            ) from None

    def _record(
        self, asked: list[Message], events: Generator[Event, None, None], turns: int
    ) -> Generator[Event | Truncated, None, None]:
        text = thought = ""
        calls: list[dict[str, Any]] = []
        ended = False
        taken = {call["id"] for message in asked for call in message.get("tool_calls", [])}
        self._unanswered = None
        try:
            if turns:
                yield Truncated(turns)
            for event in events:
                if isinstance(event, Text):
                    text += event.text
                elif isinstance(event, Thought):
                    thought += event.text
                elif isinstance(event, ToolCall):
                    function = {"name": event.name, "arguments": event.arguments}
                    names = (f"call_{number}" for number in count())
                    identity = next(name for name in names if name not in taken)
                    taken.add(identity)
                    calls.append({"id": identity, "type": "function", "function": function})
                elif isinstance(event, Done):
                    ended = True
                    self._messages = [*asked, _assistant(text, thought, calls)]
                yield event
        finally:
            events.close()
            if text and not ended:
                self._messages = [*asked, _assistant(text, thought, calls)]
            elif not ended:
                self._unanswered = asked


def _last_question(messages: Sequence[Message]) -> int:
    for i in reversed(range(len(messages))):
        if messages[i]["role"] == "user":
            return i
    raise SessionError("there is no message yet")


def _text_of(message: Message) -> str:
    """The text of a message, without its pictures."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def _assistant(text: str, thought: str, calls: list[dict[str, Any]]) -> Message:
    """An answer as templates want it; they drop thoughts once the user speaks again."""
    message: Message = {"role": "assistant", "content": text}
    if thought:
        message["reasoning"] = thought.strip("\n")
    if calls:
        message["tool_calls"] = calls
    return message
