"""Lines that are typed: messages over several, editing, a history."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .terminal import visible


def messages() -> Iterator[str]:
    """Messages that are not empty, from a prompt with line editing or from a pipe."""
    terminal = sys.stdin.isatty()
    warned = False
    while True:
        try:
            line = message(terminal)
        except EOFError:
            return
        except KeyboardInterrupt:
            if warned:
                print(file=sys.stderr)
                return
            warned = True
            print("\nCtrl-C again, /quit or Ctrl-D leaves.", file=sys.stderr, flush=True)
            continue
        warned = False
        if line:
            yield line


def message(terminal: bool) -> str:
    """One message: a line, lines that end with a backslash, or a block between triple quotes."""
    line = input("> " if terminal else "").strip()
    more = ". " if terminal else ""
    if line.startswith('"""'):
        lines = [line[3:]]
        with suppress(EOFError):
            while not lines[-1].endswith('"""'):
                lines.append(input(more))
        return "\n".join(lines).removesuffix('"""').strip()
    while line.endswith("\\"):
        line = line[:-1] + "\n" + input(more).strip()
    return line


def edited(text: str) -> str:
    """The text, changed by the user where there is a terminal with line editing."""
    try:
        import readline
    except ImportError:
        return text
    shown = visible(text)  # readline prints what it is given
    readline.set_startup_hook(lambda: readline.insert_text(shown))
    try:
        line = input("> ").strip()
        return text if line in ("", shown.strip()) else line
    except (EOFError, KeyboardInterrupt):
        return text
    finally:
        readline.set_startup_hook()


@contextmanager
def line_editing() -> Iterator[None]:
    """Editing of lines, and a history over sessions; nothing where input is no terminal."""
    try:
        import readline
    except ImportError:
        readline = None  # type: ignore[assignment]
    if readline is None or not sys.stdin.isatty():
        yield
        return
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    history = state / "mlx-diffgemma" / "history"
    with suppress(OSError):
        readline.read_history_file(history)
        for at in range(readline.get_current_history_length()):
            readline.replace_history_item(at, visible(readline.get_history_item(at + 1)))
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(history)
