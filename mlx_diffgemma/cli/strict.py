"""Answers that did not converge: always said, and with --strict an exit code."""

from typing import Annotated

import typer

from .terminal import say

# The exit code under --strict: 1 is a failure, 2 a mistake in the command.
UNSETTLED = 3

Strict = Annotated[
    bool, typer.Option("--strict", help=f"Exit with {UNSETTLED} if an answer does not converge.")
]


def tell_unsettled(what: str, *, strict: bool, so: str = "") -> None:
    """Say, also with --quiet, that the last step was not yet certain; end where it must be.

    Raises:
        SystemExit: with `strict`.
    """
    say(f"warning: {what} did not converge: the model was not sure of all of it in the end{so}")
    if strict:
        raise SystemExit(UNSETTLED)
