"""The chat in a terminal: messages and commands in, answers out."""

import shlex
import signal
import socket
import sys
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import get_args

from rich.console import Console

from ..diffusion.prompt_cache import Reading
from ..errors import Error
from ..tasks.request import Done, Draft, Event, Notice
from ..tasks.session import ChatSession, Overflow, ToolResult, Truncated
from ..tasks.tools import Tool
from ..text.tokenizer import Tokenizer
from ..text.turns import BadToolCall, Text, Thought, ToolCall
from .display import Screen, summary, tell, told
from .lines import edited, line_editing, messages
from .terminal import quoted

# Tool calls in a row, after which somebody should look.
ROUNDS = 16

# Digits of the longest number that a command takes: those of the largest seed.
MOST_DIGITS = 20

HELP = '''A message may go on over lines: end a line with \\, or put it between """ and """.
/retry           answer the last message again
/edit [TEXT]     change the last message
/undo            forget the last message
/reset           forget the conversation
/system [TEXT]   set or show the system message
/thinking on|off ask for thoughts first
/thought         show the last thoughts
/overflow truncate|refuse  beyond the context, forget the oldest turns
/steps [N]       most denoising steps a canvas
/seed [N]        make answers repeatable
/save FILE       keep the conversation; /load FILE goes on with one
/image FILE      (not supported: this runtime reads text only)
/stats           of the last answer
/quit            leave (or Ctrl-D); Ctrl-C stops an answer'''


class Interrupts:
    """While open, the first Ctrl-C only sets `stopped`; a second one leaves.

    An exception in the middle of a step would leave a cache half written. Python calls a handler
    once for all signals that came during a long operation, so they are counted by what the signal
    itself writes to a socket.
    """

    stopped = False

    def __enter__(self) -> "Interrupts":
        self._received, self._sent = socket.socketpair()
        self._received.setblocking(False)
        self._sent.setblocking(False)
        descriptor = self._sent.fileno()
        self._woken = signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)
        self._before = signal.signal(signal.SIGINT, self._stop)
        return self

    def __exit__(self, *of: object) -> None:
        signal.signal(signal.SIGINT, self._before)
        signal.set_wakeup_fd(self._woken)
        self._received.close()
        self._sent.close()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        try:
            count = self._received.recv(4096).count(number)
        except BlockingIOError:  # counted already, by the call for the one before
            return
        if self.stopped or count > 1:
            self.stopped = True
            signal.signal(number, signal.SIG_IGN)  # a third one must not tear what is closing
            raise KeyboardInterrupt
        self.stopped = bool(count)


class Leave(Exception):
    """The user wants to go."""


class Chat:
    """Reads messages until there are no more.

    Args:
        session: the conversation.
        tokenizer: for the text of single tokens while they are drawn.
        seed: of every answer; None draws one. A retry takes the next.
        tools: that the model may call, by name.
        yes: call them without asking.
        live: draw drafts where the terminal can.
    """

    def __init__(
        self,
        session: ChatSession,
        tokenizer: Tokenizer,
        *,
        seed: int | None,
        tools: dict[str, Tool],
        yes: bool,
        live: bool,
    ):
        self.session = session
        self._tokenizer = tokenizer
        self._seed = seed
        self._tries = 0
        self._tools = tools
        self._yes = yes
        self._live = live
        self._console = Console(stderr=True, highlight=False)
        self._thought = ""
        self._last: Done | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "/edit": self._edit,
            "/help": self._help,
            "/image": self._image,
            "/load": self._load,
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

    def run(self) -> None:
        """Until /quit, the end of input, or Ctrl-C twice."""
        if sys.stdin.isatty():
            self._say("Type a message; /help lists commands, /quit leaves.")
        with suppress(Leave), line_editing():
            for line in messages():
                try:
                    self._take(line)
                except Error as error:  # the conversation outlives a message that does not fit
                    self._say(f"error: {error}")

    def _take(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if not line.startswith("/"):
            self._ask(line)
        elif name in self._commands:
            self._commands[name](rest.strip())
        else:
            self._say(f"{name} is not a command; /help lists them.")

    def _ask(self, message: str) -> None:
        self._tries = 0
        self._answer(self.session.stream(message, seed=self._next_seed()))

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
        ended = False
        with (
            Interrupts() as interrupts,
            Screen(self._console, sys.stdout, live=self._live) as screen,
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
                            self._last, ended = event, True
                    if interrupts.stopped:
                        break
            finally:
                events.close()
            screen.end()
            if self._thought and ended:
                screen.note(f"[thought: {len(self._thought)} characters, /thought shows them]")
            if ended and not calls and sys.stdin.isatty():
                assert self._last is not None
                screen.note(summary(self._last))
            elif not ended:
                screen.note("Stopped; /retry answers again, /quit leaves.")
        return calls if ended else []

    def _call(self, call: ToolCall) -> ToolResult:
        shown = f"{quoted(call.name)} with {quoted(call.arguments)}"
        tool = self._tools.get(call.name)
        if tool is None:
            self._say(f"[{shown}: there is no such tool]")
            return ToolResult(call.name, f"error: there is no tool {call.name}")
        if tool.function is None:
            self._say(f"[{shown}]")
            return ToolResult(call.name, self._typed("What does it give? "))
        if not self._yes and self._typed(f"Call {shown}? [y/N] ").lower() != "y":
            self._say("[not called]")
            return ToolResult(call.name, "error: the user does not allow this call")
        result = tool.call(call.arguments)
        self._say(f"[{shown} gives {result}]")
        return ToolResult(call.name, result)

    def _typed(self, question: str) -> str:
        """A line from the terminal; nothing where nobody sits at one."""
        if not sys.stdin.isatty():
            return ""
        try:
            return input(question).strip()
        except (EOFError, KeyboardInterrupt):
            return ""

    def _say(self, line: str) -> None:
        tell(self._console, line)

    def _retry(self, rest: str) -> None:
        self._answer(self.session.retry(seed=self._next_seed()))

    def _edit(self, rest: str) -> None:
        old = self.session.undo()
        self._ask(rest or edited(old))

    def _undo(self, rest: str) -> None:
        self._say(f"Forgotten: {self.session.undo()}")

    def _reset(self, rest: str) -> None:
        self.session.reset()
        self._say("Started over.")

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
        path = given_path(rest)
        self.session.save(path)
        self._say(f"Saved to {path}.")

    def _load(self, rest: str) -> None:
        if not rest:
            self._say("/load takes a file name.")
            return
        self.session.restore(given_path(rest))
        held = len(self.session.prompt_cache)
        self._say(f"{len(self.session.messages)} messages, {held} tokens in the cache.")

    def _image(self, rest: str) -> None:
        self._say("Images are not supported: this runtime reads text only.")

    def _stats(self, rest: str) -> None:
        cache = self.session.prompt_cache
        held = f"{len(cache)} tokens, {cache.nbytes / 1e6:.1f} MB"
        self._say(summary(self._last) if self._last else "There is no answer yet.")
        self._say(f"context: {held}")

    def _help(self, rest: str) -> None:
        self._say(HELP)

    def _quit(self, rest: str) -> None:
        raise Leave


def left_out(event: Truncated) -> str:
    """One line on what the model no longer knows."""
    turns = "turn was" if event.turns == 1 else f"{event.turns} turns were"
    return f"[the conversation is longer than the context: its oldest {turns} left out]"


def given_path(text: str) -> Path:
    """A file name as a shell would read it: quotes, ~."""
    try:
        return Path(" ".join(shlex.split(text))).expanduser()
    except ValueError:
        return Path(text).expanduser()
