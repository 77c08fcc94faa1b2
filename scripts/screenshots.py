"""Pictures of the terminal and of the page for README and docs/, from real runs of the small model.

    python scripts/screenshots.py docs

Needs tmux, and Chromium for the page. Writes demo.svg (a Sudoku half solved), chat.svg (a session),
and what page_pictures.py says.
"""

import argparse
import os
import subprocess
import time
from pathlib import Path

from page_pictures import page_pictures
from rich.console import Console
from rich.text import Text

ROWS, COLUMNS = 22, 92
PUZZLE = '"""\n12.4.6\n.56123\n2315.4\n5642.1\n3.2645\n645.12\n"""'


class Terminal:
    """A tmux session of one command; `picture` saves what it shows."""

    def __init__(self, command: str):
        self._server = f"screenshots{os.getpid()}-{command.split()[1]}"
        size = ["-x", str(COLUMNS), "-y", str(ROWS)]
        self._tmux("-f", "/dev/null", "new-session", "-d", *size, f"sh -c '{command}; sleep 60'")

    def _tmux(self, *arguments: str) -> str:
        command = ["tmux", "-L", self._server, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def wait(self, *shown: str) -> None:
        """Until all of this is on the screen."""
        for _ in range(1200):
            screen = self._tmux("capture-pane", "-p", "-J")
            if all(text in screen for text in shown):
                return
            time.sleep(0.05)
        raise SystemExit(f"{shown} did not appear:\n{screen}")

    def type(self, text: str) -> None:
        for line in text.splitlines():
            self._tmux("send-keys", "-l", line)
            self._tmux("send-keys", "Enter")

    def picture(self, path: Path, title: str) -> None:
        console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"))  # noqa: SIM115
        console.print(Text.from_ansi(self._tmux("capture-pane", "-p", "-e").rstrip()))
        console.save_svg(str(path), title=title)
        print(path)

    def close(self) -> None:
        self._tmux("kill-server")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    directory.mkdir(exist_ok=True)

    demo = Terminal("mlx-diffgemma demo --delay 1.5")
    demo.wait("canvas 1, step 1/48")
    demo.picture(directory / "demo.svg", "mlx-diffgemma demo")
    demo.close()

    chat = Terminal("mlx-diffgemma chat --seed 0 2>&1")
    chat.wait("/help lists commands")
    chat.type("hello")
    chat.wait("finished")
    chat.type(PUZZLE)
    chat.wait("canvas 1, step 2/")
    chat.picture(directory / "chat.svg", "mlx-diffgemma chat")
    chat.close()

    page_pictures(directory)


if __name__ == "__main__":
    main()
