"""`mlx-diffgemma` within this process: what it prints and its exit code.

A process of its own takes seconds to import MLX. Each checkpoint is loaded once, but to be trained.
"""

import io
import os
import sys
from contextlib import ExitStack, chdir
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import TextIO
from unittest.mock import patch

from mlx_diffgemma.checkpoint import load as loading
from mlx_diffgemma.cli.main import main

_load = cache(loading.load)


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    returncode: int
    stdout: str
    stderr: str


def run(
    *arguments: str | Path, stdin: str | bytes = "", cwd: Path | None = None, **environment: str
) -> Done:
    """Run a command with pipes, in a directory, with more environment variables."""
    with (
        TemporaryFile("w+", encoding="utf-8") as stdout,
        TemporaryFile("w+", encoding="utf-8") as stderr,
    ):
        given = (
            io.StringIO(stdin) if isinstance(stdin, str) else io.TextIOWrapper(io.BytesIO(stdin))
        )
        code = _main(arguments, given, stdout, stderr, cwd, environment)
        for file in (stdout, stderr):
            file.seek(0)
        return Done(code, stdout.read(), stderr.read())


class _Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def at_a_terminal(*arguments: str | Path) -> str:
    """All that a command sends to a terminal, in order."""
    screen = _Screen()
    _main(arguments, io.StringIO(), screen, screen, None, {})
    return screen.getvalue()


def _main(
    arguments: tuple[str | Path, ...],
    stdin: TextIO,
    stdout: TextIO,
    stderr: TextIO,
    cwd: Path | None,
    environment: dict[str, str],
) -> int:
    with ExitStack() as stack:
        if arguments[0] != "lora":  # which changes the model
            stack.enter_context(patch.object(loading, "load", _load))
        stack.enter_context(patch.object(sys, "argv", ["mlx-diffgemma", *map(str, arguments)]))
        for name, stream in {"stdin": stdin, "stdout": stdout, "stderr": stderr}.items():
            stack.enter_context(patch.object(sys, name, stream))
        stack.enter_context(patch.object(sys, "excepthook", sys.excepthook))  # typer sets it
        stack.enter_context(patch.dict(os.environ, environment))
        if cwd is not None:
            stack.enter_context(chdir(cwd))
        try:
            main()
        except SystemExit as ended:
            return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        return 0
