"""The command line: its commands, and what their failures become.

A file of commands is a line in `FILES`. Imports of MLX and of the rest of the package stand inside
the commands: `--help` must not wait.
"""

import os
import sys
from importlib import import_module
from io import StringIO
from typing import Annotated, Any

import typer

from ..errors import Error
from .habits import said_to
from .ranks import check_shared, enter, linger, tell_defect
from .terminal import fail, write

# In the order in which --help lists their commands.
FILES = [
    "generate",
    "talk",
    "write",
    "score",
    "serve",
    "mcp",
    "demo",
    "measure",
    "checkpoints",
    "lora",
    "fuse",
    "models",
]

app = typer.Typer(
    name="mlx-diffgemma",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for file in FILES:
    app.add_typer(import_module(f".{file}", __package__).app)

# Mistakes in options and arguments. Newer versions of typer carry a click of their own.
UsageError: Any = typer.BadParameter.__base__
NoSuchOption: Any = import_module(UsageError.__module__).NoSuchOption


def _tell_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(f"mlx-diffgemma {__version__}")
        raise typer.Exit


@app.callback()
def about(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_tell_version, is_eager=True, help="Say the version."),
    ] = False,
) -> None:
    """Run DiffusionGemma on Apple silicon."""
    check_shared(context.invoked_subcommand)


def main() -> None:
    """Entry point of the console command."""
    try:
        _main()
    except SystemExit as ended:
        linger(ended.code)
        raise


def _main() -> None:
    """The command, whose failures become exit codes."""
    try:
        enter()
        raise SystemExit(app(standalone_mode=False))
    except UsageError as error:
        foreign = said_to(error.option_name) if isinstance(error, NoSuchOption) else None
        if foreign is not None:
            fail(foreign, code=2)
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
    except Exception:
        tell_defect()
        raise
