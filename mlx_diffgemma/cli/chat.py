"""The chat in a terminal: messages and commands in, answers out."""

import os
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rich.console import Console

from ..checkpoint.fit import TooLarge
from ..diffusion.prompt_cache import Reading
from ..distributed.launch import place
from ..errors import Error
from ..model.placeholders import Pixels
from ..tasks.pictures import Given
from ..tasks.request import Done, Draft, Event, Notice
from ..tasks.session import ChatSession, Overflow, ToolResult, Truncated
from ..tasks.tools import Tool
from ..text.tokenizer import Message, Tokenizer
from ..text.turns import BadToolCall, Text, Thought, ToolCall
from .display import Screen, summary, tell, told
from .images import dropped, pasted
from .keyboard import Interrupts
from .lines import (
    DIRECTORIES,
    FILES,
    Arguments,
    Lines,
    Plain,
    deaf,
    echoes,
    message_in,
    messages,
)
from .outside import copied, edited, given_path, text_of_file, with_files
from .terminal import quoted

if TYPE_CHECKING:
    from .options import Load

# Tool calls in a row, after which somebody should look.
ROUNDS = 16

# Digits of the longest number that a command takes: those of the largest seed.
MOST_DIGITS = 20

HELP = '''Enter sends a message, Alt-Enter begins another line, a paste is one message.
A message may also go on behind a \\ at the end of a line, or stand between """ and """.
/retry           answer the last message again
/edit [TEXT]     change the last message
/editor [TEXT]   write a message in $EDITOR
/undo            forget the last message, or files and pictures that wait
/reset, /clear   forget the conversation
/system [TEXT]   set or show the system message
/file NAME       put a text in front of the next message
/copy            put the last answer into the clipboard
/model [NAME]    show the model; go on with another
/thinking on|off ask for thoughts first
/thought         show the last thoughts
/overflow truncate|refuse  beyond the context, forget the oldest turns
/steps [N]       most denoising steps a canvas
/seed [N]        make answers repeatable
/save FILE       keep the conversation (--pixels FILE its pictures, too); /load goes on
/image [FILE]    put a picture in front of the next message; without FILE the clipboard's
                 (a file that is dropped here is one, too)
/stats           of the last answer
/quit            leave (or /exit, /bye, Ctrl-D); Ctrl-C stops an answer
//TEXT           a message that begins with /, as one behind a space does'''

# What may follow a command, for completion.
WORDS = {
    "/file": [FILES],
    "/image": [FILES],
    "/load": [FILES],
    "/model": ["tiny", "tiny-puzzles", DIRECTORIES],
    "/overflow": get_args(Overflow),
    "/save": [FILES],
    "/thinking": ["on", "off"],
}


class Leave(Exception):
    """The user wants to go."""


@dataclass(frozen=True)
class Answered:
    """An answer that is complete, and its figures."""

    message: Message
    done: Done


class Chat:
    """Reads messages until there are no more.

    Args:
        session: the conversation.
        tokenizer: for the text of single tokens while they are drawn.
        load: what loaded the model, to load another like it.
        seed: of every answer; None draws one. A retry takes the next.
        tools: that the model may call, by name.
        yes: call them without asking.
        live: draw drafts where the terminal can.
        plain: show answers as they are written, not as Markdown.
        pictures: that stand before the first message.
    """

    def __init__(
        self,
        session: ChatSession,
        tokenizer: Tokenizer,
        load: "Load",
        *,
        seed: int | None,
        tools: dict[str, Tool],
        yes: bool,
        live: bool,
        plain: bool,
        pictures: Sequence[Pixels] = (),
    ):
        self.session = session
        self._tokenizer = tokenizer
        self._seed = seed
        self._tries = 0
        self._tools = tools
        self._yes = yes
        self._load_model = load
        self._live = live
        self._plain = plain
        self._console = Console(stderr=True, highlight=False)
        self._thought = ""
        self._answered: list[Answered] = []
        self._files: list[tuple[str, str]] = []
        self._pictures: list[Pixels] = list(pictures)
        self._commands: dict[str, Callable[[str], None]] = {
            "/bye": self._quit,
            "/clear": self._reset,
            "/copy": self._copy,
            "/edit": self._edit,
            "/editor": self._editor,
            "/exit": self._quit,
            "/file": self._file,
            "/help": self._help,
            "/image": self._image,
            "/load": self._load,
            "/model": self._model,
            "/overflow": self._set_overflow,
            "/quit": self._quit,
            "/reset": self._reset,
            "/retry": self._retry,
            "/save": self._save,
            "/seed": self._set_seed,
            "/stats": self._stats,
            "/steps": self._set_steps,
            "/system": self._set_system,
            "/thinking": self._set_thinking,
            "/thought": self._show_thought,
            "/undo": self._undo,
        }
        self._lines: Lines = lines_of({name: WORDS.get(name, []) for name in self._commands})

    def run(self) -> None:
        """Until /quit, the end of input, or Ctrl-C twice."""
        # Not only while answers are drawn: there is some time between an answer and its prompt.
        with suppress(Leave), self._lines.ahead():
            if sys.stdin.isatty():
                self._say("Type a message; /help lists commands, /quit leaves.")
            for line in messages(self._lines):
                try:
                    self._take(line)
                except Error as error:  # the conversation outlives a message that does not fit
                    self._say(f"error: {error}")

    def _take(self, line: str) -> None:
        pictures, text = dropped(line)
        if pictures:
            for path in pictures:
                self._show_next(path, path.name)
            if text:
                self._ask(text)
            return
        message = message_in(line)
        if message is not None:
            self._ask(message)
            return
        name, *rest = line.split(maxsplit=1)
        if name in self._commands:
            self._commands[name]("".join(rest).strip())
        else:
            self._say(f"{name} is not a command; /help lists them, and // begins a message with /.")

    def _ask(self, message: str) -> None:
        self._tries = 0
        text = with_files(self._files, message)
        asked: str | list[dict[str, Any]] = text
        if self._pictures:
            shown = [{"type": "image", "image": each} for each in self._pictures]
            asked = [*shown, {"type": "text", "text": text}]
        events = self.session.stream(asked, seed=self._next_seed())
        self._files, self._pictures = [], []
        self._answer(events)

    def _next_seed(self) -> int | None:
        """Another for each try, since the same one would give the same answer."""
        seed = None if self._seed is None else self._seed + self._tries
        self._tries += 1
        return seed

    def _answer(self, events: Generator[Event | Truncated, None, None]) -> None:
        self._thought = ""
        for _ in range(ROUNDS):
            calls = self._show(events)
            if not calls:
                return
            results = [self._call(call) for call in calls]
            events = self.session.respond(results, seed=self._next_seed())
        events.close()
        self._say(f"Stopped: {ROUNDS} rounds of tool calls for one answer.")

    def _show(self, events: Generator[Event | Truncated, None, None]) -> list[ToolCall]:
        """Print one model call; gives the tool calls that want an answer."""
        calls: list[ToolCall] = []
        done: Done | None = None
        with (
            Interrupts() as interrupts,
            self._lines.ahead() as take_keys,
            Screen(self._console, sys.stdout, live=self._live, rendered=not self._plain) as screen,
        ):
            try:
                for event in events:
                    match event:
                        case Draft() if screen.live:
                            screen.draft(event, self._tokenizer.pieces(event.tokens))
                        case Reading():
                            screen.reading(event.done, event.total)
                        case Text():
                            screen.text(event.text)
                        case Thought():
                            self._thought += event.text
                        case ToolCall():
                            calls.append(event)
                        case BadToolCall():
                            screen.note(f"[a tool call that cannot be read: {event.problem}]")
                        case Notice():
                            screen.note(told(event))
                        case Truncated():
                            screen.note(left_out(event))
                        case Done():
                            done = event
                            self._answered.append(Answered(self.session.messages[-1], event))
                    take_keys()
                    if interrupts.stopped:
                        break
            finally:
                events.close()
            screen.end()
            if interrupts.stopped and deaf():
                raise Leave
            if done is None:
                screen.note("Stopped; /retry answers again, /quit leaves.")
                return []
            if self._thought:
                screen.note(f"[thought: {len(self._thought)} characters, /thought shows them]")
            if not calls and sys.stdin.isatty():
                screen.note(summary(done))
        return calls

    def _call(self, call: ToolCall) -> ToolResult:
        shown = f"{quoted(call.name)} with {quoted(call.arguments)}"
        tool = self._tools.get(call.name)
        if tool is None:
            self._say(f"[{shown}: there is no such tool]")
            return ToolResult(call.name, f"error: there is no tool {call.name}")
        if tool.function is None:
            self._say(f"[{shown}]")
            return ToolResult(call.name, self._typed("What does it give? "))
        if not self._yes:
            self._say(f"Call {shown}?")  # not within the prompt, which shows what fits the window
            if self._typed("[y/N] ").lower() != "y":
                self._say("[not called]")
                return ToolResult(call.name, "error: the user does not allow this call")
        with self._lines.aside():  # it may ask something
            result = tool.call(call.arguments)
        self._say(f"[{shown} gives {result}]")
        return ToolResult(call.name, result)

    def _typed(self, question: str) -> str:
        """What somebody at the terminal answers; nothing where nobody sits at one."""
        try:
            return self._lines.ask(question).strip()
        except (EOFError, KeyboardInterrupt):
            return ""

    def _say(self, line: str) -> None:
        tell(self._console, line)

    def _retry(self, rest: str) -> None:
        self._answer(self.session.retry(seed=self._next_seed()))

    def _edit(self, rest: str) -> None:
        message = rest or self._reviewed(self.session.question)
        if message is not None:
            self._pictures = [*self.session.pictures, *self._pictures]
            self.session.undo()
            self._ask(message)

    def _editor(self, rest: str) -> None:
        if not sys.stdin.isatty():
            self._say("/editor needs a terminal.")
            return
        with self._lines.aside():
            text = edited(rest)
        message = self._reviewed(text) if text.strip() else None
        if message is not None:
            self._ask(message)

    def _reviewed(self, text: str) -> str | None:
        """A message that stands in the prompt first; None if it is not sent."""
        try:
            return self._lines.read(text).strip() or None
        except (EOFError, KeyboardInterrupt):
            self._say("Not sent.")
            return None

    def _undo(self, rest: str) -> None:
        if self._files:
            names = ", ".join(name for name, _ in self._files)
            self._files = []
            self._say(f"Not part of the next message: {names}")
            return
        if self._pictures:
            self._say(f"Not part of the next message: {_counted(len(self._pictures))}")
            self._pictures = []
            return
        self._say(f"Forgotten: {self.session.undo()}")
        self._thought = ""

    def _reset(self, rest: str) -> None:
        self.session.reset()
        self._files, self._pictures, self._thought = [], [], ""
        self._say("Started over.")

    def _file(self, rest: str) -> None:
        if not rest:
            self._say("/file takes a file name.")
            return
        path = given_path(rest)
        text = text_of_file(path)
        if not text.strip():
            self._say(f"{path} is empty.")
            return
        self._files.append((path.name, text))
        self._say(f"{path.name}: {len(text):,} characters stand before the next message.")

    def _copy(self, rest: str) -> None:
        answers = [m["content"] for m in self.session.messages if m["role"] == "assistant"]
        if not answers:
            self._say("There is no answer yet.")
            return
        self._say(copied(str(answers[-1]), self._console.file))

    def _model(self, rest: str) -> None:
        if not rest:
            self._say(f"Model: {self._load_model.model or 'tiny'}")
            return
        if self._load_model.shard:
            self._say("/model does not go with --shard.")
            return
        load = replace(self._load_model, model=str(given_path(rest)), revision=None)
        try:
            model, tokenizer = load()
        except TooLarge as error:
            raise TooLarge(f"beside the model that is loaded, {error}") from None
        self.session.switch(model, tokenizer)
        self._tokenizer, self._load_model = tokenizer, load
        self._say(f"Model: {load.model}; it reads the conversation anew.")

    def _set_system(self, rest: str) -> None:
        if rest:
            self.session.system = rest
        self._say(f"System message: {self.session.system or 'none'}")

    def _set_thinking(self, rest: str) -> None:
        if rest not in ("on", "off"):
            self._say("/thinking takes on or off.")
            return
        self.session.enable_thinking = rest == "on"
        self._say(f"Thinking is {rest}.")

    def _set_overflow(self, rest: str) -> None:
        if rest not in get_args(Overflow):
            self._say("/overflow takes refuse or truncate.")
            return
        self.session.overflow = "truncate" if rest == "truncate" else "refuse"
        self._say(f"Beyond the context: {rest}.")

    def _show_thought(self, rest: str) -> None:
        self._say(self._thought.strip() or "There was no thought.")

    def _set_steps(self, rest: str) -> None:
        if rest and (not rest.isdecimal() or len(rest) > MOST_DIGITS or int(rest) < 1):
            self._say("/steps takes a number from 1.")
            return
        if rest:
            self.session.settings["steps"] = int(rest)
        steps = self.session.settings.get("steps") or "as the checkpoint says"
        self._say(f"Most steps a canvas: {steps}")

    def _set_seed(self, rest: str) -> None:
        if rest and (not rest.isdecimal() or len(rest) > MOST_DIGITS):
            self._say("/seed takes a number from 0.")
            return
        self._seed = int(rest) if rest else None
        self._say(f"Seed: {'drawn for each answer' if self._seed is None else self._seed}")

    def _save(self, rest: str) -> None:
        if not rest:
            self._say("/save takes a file name.")
            return
        name = rest.removeprefix("--pixels ")
        path = given_path(name)
        self.session.save(path, pixels=name != rest)
        self._say(f"Saved to {path}.")

    def _load(self, rest: str) -> None:
        if not rest:
            self._say("/load takes a file name.")
            return
        self.session.restore(given_path(rest))
        held = len(self.session.prompt_cache)
        self._say(f"{len(self.session.messages)} messages, {held} tokens in the cache.")

    def _image(self, rest: str) -> None:
        if rest:
            path = given_path(rest)
            self._show_next(path, path.name)
            return
        for given in pasted():
            self._show_next(given, given.name if isinstance(given, Path) else "The clipboard")

    def _show_next(self, given: Given, name: str) -> None:
        picture = self.session.show(given)
        self._pictures.append(picture)
        self._say(f"{name}: a picture of {picture.tokens} tokens stands before the next message.")

    def _stats(self, rest: str) -> None:
        cache = self.session.prompt_cache
        held = f"{len(cache)} tokens, {cache.nbytes / 1e6:.1f} MB"
        last = self.session.messages[-1:]
        found = [each.done for each in self._answered if any(each.message is m for m in last)]
        self._say(summary(found[-1]) if found else "There is no answer yet.")
        self._say(f"context: {held}")

    def _help(self, rest: str) -> None:
        self._say(HELP)

    def _quit(self, rest: str) -> None:
        raise Leave


def _counted(pictures: int) -> str:
    return "1 picture" if pictures == 1 else f"{pictures} pictures"


def left_out(event: Truncated) -> str:
    """One line on what the model no longer knows."""
    turns = "turn was" if event.turns == 1 else f"{event.turns} turns were"
    return f"[the conversation is longer than the context: its oldest {turns} left out]"


def lines_of(commands: Arguments) -> Lines:
    """What the standard input allows: a prompt that can be edited, or plain lines.

    Args:
        commands: names, each with words that may follow it, for completion.
    """
    # Into a file go answers, and no prompts.
    screen = next((each for each in (sys.stderr, sys.stdout) if each.isatty()), None)
    dumb = os.environ.get("TERM", "").lower() in ("", "dumb", "unknown")
    launched = place().size > 1 and not echoes()
    if dumb or launched or screen is None or not sys.stdin.isatty():
        return Plain()
    from .prompt import Prompt

    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return Prompt(screen, state / "mlx-diffgemma" / "history", commands)
