"""Pictures of the terminal and of the page for README and docs/, from real runs of the small model.

    python scripts/screenshots.py docs

Needs tmux, and Chromium for the page. Writes demo.svg (a film), chat.svg (a
session), and what page_pictures.py says.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from film import as_svg, film
from page_pictures import RECORD, page_pictures
from rich.text import Text

ROWS, COLUMNS = 22, 92


# A command whose steps take long enough to be seen; the demo waits by itself.
SLOWLY = (
    f"{sys.executable} -c "
    '"import time; from mlx_diffgemma import DiffusionGemma as D; decode = D.decode; '
    "D.decode = lambda *a, **k: (time.sleep(0.5), decode(*a, **k))[1]; "
    'from mlx_diffgemma.cli.main import main; main()"'
)


class Terminal:
    """A tmux session of one command; `picture` saves what it shows."""

    def __init__(self, command: str):
        self._server = f"screenshots{os.getpid()}-{command.split()[-1]}"
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

    def screen(self) -> str:
        """What is shown, with its escapes."""
        return self._tmux("capture-pane", "-p", "-e")

    def picture(self, path: Path, title: str) -> None:
        path.write_text(as_svg(self.screen().rstrip(), COLUMNS, title, "terminal"))
        print(path)

    def film(self, path: Path, title: str, until: str, still: str) -> None:
        """All that is shown until a text is; the still is the first screen that shows `still`."""
        screens: list[str] = []
        before = ""
        while not screens or until not in Text.from_ansi(screens[-1]).plain:
            now = self.screen()
            # What did not change since is no half of a screen.
            if now.strip() and now == before and now not in screens[-1:]:
                screens.append(now)
            before = now
            time.sleep(0.05)
        first = next(i for i, each in enumerate(screens) if still in Text.from_ansi(each).plain)
        film(path, screens, COLUMNS, title, first)

    def close(self) -> None:
        self._tmux("kill-server")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    directory.mkdir(exist_ok=True)

    demo = Terminal("mlx-diffgemma demo --delay 1.2")
    demo.film(directory / "demo.svg", "mlx-diffgemma demo", "What to type next", still="4/48")
    demo.close()

    chat = Terminal(f"{SLOWLY} chat --seed 0")
    chat.wait("/help lists commands")
    chat.type("hello")
    chat.wait("finished")
    chat.type(RECORD)
    chat.wait("canvas 1, step 2/")
    chat.picture(directory / "chat.svg", "mlx-diffgemma chat")
    chat.close()

    page_pictures(directory)


if __name__ == "__main__":
    main()
