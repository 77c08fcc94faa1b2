"""A launch agent of macOS that runs a command: what `serve --print-launchd` prints."""

import os
import plistlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .terminal import fail

LABEL = "io.github.mlx-diffgemma.serve"

# What a service has to know of the shell that it was printed in, if it is set there.
INHERITED = ("MLX_DIFFGEMMA_MODEL", "MLX_DIFFGEMMA_API_KEY", "HF_HOME", "HF_HUB_CACHE", "HF_TOKEN")

HOW_TO_LOAD = (
    f"To have it run now and after each login, save this as ~/Library/LaunchAgents/{LABEL}.plist, "
    f"readable for you alone, and: launchctl bootstrap gui/$(id -u) "
    f"~/Library/LaunchAgents/{LABEL}.plist"
)


def launch_agent(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """The property list of an agent that runs our command with these arguments, from here.

    Names of files among them may be relative, as the agent's working directory is this one.
    """
    log = str(Path.home() / "Library" / "Logs" / "mlx-diffgemma.log")
    agent = {
        "Label": LABEL,
        "ProgramArguments": [sys.executable, "-m", "mlx_diffgemma", *arguments],
        "WorkingDirectory": os.getcwd(),
        "EnvironmentVariables": {n: environment[n] for n in INHERITED if n in environment},
        "RunAtLoad": True,
        "KeepAlive": True,
        "ProcessType": "Interactive",  # else macOS slows it down in favour of what has a window
        "StandardOutPath": log,
        "StandardErrorPath": log,
    }
    try:
        return plistlib.dumps(agent, sort_keys=False).decode()
    except ValueError:
        fail("a launch agent cannot have control characters, or what is no text, in its arguments")
