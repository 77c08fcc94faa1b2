"""The command line: its commands, and what their failures become.

A file of commands is a line in `FILES`. Imports of MLX and of the rest of the package stand inside
the commands: `--help` must not wait.
"""

import os
import sys
from importlib import import_module
from io import StringIO
from typing import Any

import typer

from ..errors import Error
from .terminal import fail, write

# In the order in which --help lists their commands.
FILES = [
    "generate",
    "talk",
    "write",
    "score",
    "serve",
    "measure",
    "checkpoints",
    "models",
]

app = typer.Typer(
    name="mlx-diffgemma",
    help="Run DiffusionGemma on Apple silicon.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

for file in FILES:
    app.add_typer(import_module(f".{file}", __package__).app)

# Mistakes in options and arguments. Newer versions of typer carry a click of their own.
UsageError: Any = typer.BadParameter.__base__


def main() -> None:
    """Entry point of the console command."""
    try:
        raise SystemExit(app(standalone_mode=False))
    except UsageError as error:
        said = StringIO()  # it quotes what was typed
        error.show(said)
        write(said.getvalue(), sys.stderr)
        raise SystemExit(error.exit_code) from None
    except Error as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except typer.Abort:
        fail("the input has ended")
    except BrokenPipeError:
        # The reader of our stdout has left; Python would complain again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
