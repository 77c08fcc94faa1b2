"""A command at a pseudo-terminal, whose screen is looked at."""

import json
import os
import re
import shlex
import sys
import termios
import time

import paths
import pexpect
import pyte

HERE = paths.TESTS


class Terminal:
    """A command, `chat` unless said otherwise, at a terminal of 24 rows of 80 columns."""

    def __init__(
        self,
        *arguments: str,
        script: list[str] | None = None,
        command: str = "chat",
        size: tuple[int, int] = (24, 80),
        begins: str = "\n>$",
        shell: bool = False,
        **environment: str,
    ):
        program = ["-m", "mlx_diffgemma"]
        if script is not None:
            environment |= {"SCRIPT": json.dumps(script), "PYTHONPATH": str(HERE)}
            program = [str(HERE / "scripted_cli.py")]
        words = [sys.executable, *program, command, *arguments]
        self.command = shlex.join(words)
        if shell:  # in which somebody types the command
            words = ["bash", "--norc", "-i"]
            environment |= {"PS1": "$ ", "BASH_SILENCE_DEPRECATION_WARNING": "1"}  # that of macOS
        self.child = pexpect.spawn(
            words[0],
            words[1:],
            env={**os.environ, "TERM": "xterm-256color", **environment},
            dimensions=size,
            timeout=60,
        )
        self.child.delaybeforesend = None
        self._screen = pyte.HistoryScreen(size[1], size[0], history=1000)
        self._stream = pyte.ByteStream(self._screen)
        self.wait(begins)

    def lines(self) -> list[str]:
        """All that the terminal shows and has scrolled away, without empty lines at the end."""
        columns = range(self._screen.columns)
        above = ["".join(row[i].data for i in columns) for row in self._screen.history.top]
        rows = [row.rstrip() for row in [*above, *self._screen.display]]
        while rows and not rows[-1]:
            rows.pop()
        return rows

    def wait(self, pattern: str, after: int = 0, *, drawing: bool = False) -> re.Match[str]:
        """Until the screen shows a pattern, below so many lines; once nothing more comes, or amid
        `drawing`, which may go on to the end of an answer."""
        ends = time.monotonic() + 15
        while time.monotonic() < ends:
            quiet = False
            try:
                self._stream.feed(self.child.read_nonblocking(1 << 16, timeout=0.05))
            except (pexpect.TIMEOUT, pexpect.EOF):
                quiet = True
            shown = "\n".join(self.lines()[after:]) if quiet or drawing else ""
            if found := re.search(pattern, shown):
                return found
        raise AssertionError(f"{pattern!r} is not on the screen:\n" + "\n".join(self.lines()[-30:]))

    def type(self, line: str, pattern: str = r"\n>$") -> list[str]:
        """Type a line, wait for the next prompt; the lines between."""
        before = len(self.lines())
        self.child.sendline(line)
        begins = line.partition("\n")[0][:20].removesuffix("\\").rstrip()
        self.wait(re.escape(begins), after=before - 1)
        self.wait(pattern, after=before - 1)
        return self.lines()[before:-1] if pattern.endswith(">$") else self.lines()[before:]

    def press(self, keys: str) -> None:
        """Send keys, and no Enter."""
        self.child.send(keys)

    def paste(self, text: str) -> None:
        """As a terminal pastes where it was asked to mark pastes; lines end as Enter does."""
        self.press("\x1b[200~" + text.replace("\n", "\r") + "\x1b[201~")

    def resize(self, rows: int, columns: int) -> None:
        """As an emulator that cuts lines and does not wrap them anew: xterm is one."""
        self._screen.resize(rows, columns)
        self.child.setwinsize(rows, columns)

    def echoes(self) -> bool:
        """Whether the terminal shows what is typed."""
        return bool(termios.tcgetattr(self.child.child_fd)[3] & termios.ECHO)

    @property
    def cursor_hidden(self) -> bool:
        return bool(self._screen.cursor.hidden)

    def leaves(self) -> int | None:
        """Read to the end; the exit code. `echoed` says how the terminal was left."""
        try:
            while True:
                self._stream.feed(self.child.read_nonblocking(1 << 16, timeout=60))
        except pexpect.EOF:
            self.echoed = self.echoes()
            self.child.close()
        return self.child.exitstatus  # type: ignore[no-any-return]
