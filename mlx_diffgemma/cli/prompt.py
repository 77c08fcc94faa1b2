"""A prompt on a terminal: editing over lines, a history, completion, and what is typed ahead."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from select import select
from typing import TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import (
    CompleteEvent,
    Completer,
    Completion,
    PathCompleter,
    WordCompleter,
    merge_completers,
)
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import DummyHistory, FileHistory
from prompt_toolkit.input import create_input
from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.layout.processors import Processor, Transformation, TransformationInput
from prompt_toolkit.output import create_output
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.shortcuts import CompleteStyle

from ..files import replacing
from .keyboard import silenced
from .lines import DIRECTORIES, FILES, Arguments, continued, open_ended
from .terminal import visible

# Messages that the history file keeps, and characters of the longest of them.
MOST_HISTORY = 1000
MOST_REMEMBERED = 100_000


class Prompt:
    """Reads messages from a terminal.

    Args:
        screen: where the prompt is drawn.
        history: the file that keeps what was typed.
        commands: names, each with words that may follow it.
    """

    def __init__(self, screen: TextIO, history: Path, commands: Arguments):
        self._input = create_input(sys.stdin)
        output = create_output(screen)
        if isinstance(output, Vt100_Output):
            # Where the cursor is need not be known, and a late answer would be typed text.
            output.enable_cpr = False
        self._messages: PromptSession[str] = PromptSession(
            "> ",
            multiline=True,
            prompt_continuation=". ",
            history=Remembered(history),
            completer=Commands(commands),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            key_bindings=_keys(),
            input_processors=[SpelledOut()],
            enable_suspend=True,
            enable_open_in_editor=True,
            tempfile_suffix=".md",
            input=self._input,
            output=output,
        )
        self._questions: PromptSession[str] = PromptSession(
            history=DummyHistory(), input=self._input, output=output
        )

    def read(self, text: str = "") -> str:
        """A message; Enter ends it, a paste does not. What is no UTF-8 is `?`."""
        return self._messages.prompt(default=text).encode(errors="replace").decode()

    def ask(self, question: str) -> str:
        """An answer that was typed after the question; what stood there before stays for `read`."""
        self._take()
        typed = get_typeahead(self._input)
        try:
            return self._questions.prompt(question)
        finally:
            store_typeahead(self._input, typed + get_typeahead(self._input))

    @contextmanager
    def ahead(self) -> Iterator[Callable[[], None]]:
        """While open, nothing typed is echoed; what is given takes it for the next `read`."""
        with silenced(self._input.fileno(), by_key=True):
            try:
                yield self._take
            finally:
                self._take()

    def aside(self) -> AbstractContextManager[None]:
        """While open, the terminal is as other programs expect it."""
        return self._input.cooked_mode()

    def _take(self) -> None:
        # Until the queue is empty: the terminal's holds 4,096 bytes, or 1,024 on macOS.
        while not self._input.closed and select([self._input.fileno()], [], [], 0)[0]:
            store_typeahead(self._input, self._input.read_keys())


def _keys() -> KeyBindings:
    """Enter sends, or goes on where `open_ended` says so; Alt-Enter begins another line."""
    keys = KeyBindings()

    @keys.add("enter", filter=has_focus(DEFAULT_BUFFER))
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and open_ended(buffer.text):
            buffer.document = Document(f"{continued(buffer.text)}\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=has_focus(DEFAULT_BUFFER))
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


class Remembered(FileHistory):
    """What was typed, in a file for its owner alone; without it where it cannot be kept."""

    def __init__(self, file: Path):
        super().__init__(file)
        self._file = file

    def load_history_strings(self) -> Iterable[str]:
        """The newest first; a file that has grown to twice as many is cut."""
        try:
            strings = list(super().load_history_strings())
            if len(strings) > 2 * MOST_HISTORY:
                with replacing(self._file) as file:
                    kept = FileHistory(file)
                    for string in reversed(strings[:MOST_HISTORY]):
                        kept.store_string(string)
        except OSError:
            return []
        return strings[:MOST_HISTORY]

    def store_string(self, string: str) -> None:
        """Append to the file."""
        if len(string) > MOST_REMEMBERED:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.touch(mode=0o600)
            super().store_string(string)
        except OSError:
            return


class Commands(Completer):
    """Completes names of commands, and what may follow them."""

    def __init__(self, commands: Arguments):
        self._names = sorted(commands)
        self._after = {name: _completer(words) for name, words in commands.items()}

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        """What may stand at the cursor; nothing that a terminal would obey."""
        name, space, rest = document.text_before_cursor.partition(" ")
        if not space and name.startswith("/"):
            for each in self._names:
                if each.startswith(name):
                    yield Completion(each, start_position=-len(name))
        elif name in self._after:
            for found in self._after[name].get_completions(Document(rest), event):
                if visible(found.text) == found.text:
                    yield found


def _completer(words: Iterable[str]) -> Completer:
    paths = {
        FILES: PathCompleter(expanduser=True),
        DIRECTORIES: PathCompleter(only_directories=True, expanduser=True),
    }
    on_disk: list[Completer] = [paths[word] for word in words if word in paths]
    rest = [word for word in words if word not in paths]
    return merge_completers([WordCompleter(rest, WORD=True), *on_disk])


class SpelledOut(Processor):
    """Shows as a blot what the prompt would send as it is; a paste may hold it."""

    def apply_transformation(self, given: TransformationInput) -> Transformation:
        """Each character stays one, so that the cursor stands where it should."""
        shown = [
            (part[0], "".join(_blot(c) for c in part[1]), *part[2:]) for part in given.fragments
        ]
        return Transformation(shown)


def _blot(character: str) -> str:
    # Below 0xa0 the prompt spells out itself.
    return character if character < "\xa0" or visible(character) == character else "\ufffd"
