"""A chat whose tools and users misbehave."""

import os
import subprocess
import sys
from pathlib import Path

from paths import TESTS


def test_a_chat_outlives_its_tools_and_long_numbers(tmp_path: Path) -> None:
    """`sys.exit` in a tool used to end the chat, so did a seed that Python does not read."""
    file = tmp_path / "tools.py"
    file.write_text("import sys\ndef leaves(n: int = 0):\n    sys.exit(5)\n")
    script = ["<|tool_call>call:leaves{n:1}<tool_call|>", "one"]
    done = subprocess.run(
        [sys.executable, str(TESTS / "scripted_cli.py"),
         *("chat", "--tools", str(file), "--yes")],
        input=f"/seed {'9' * 5000}\n/steps {'9' * 5000}\ncall it\n",
        capture_output=True,
        text=True,
        env={**os.environ, "SCRIPT": str(script).replace("'", '"')},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "/seed takes a number from 0." in done.stderr
    assert "/steps takes a number from 1." in done.stderr
    assert "error: SystemExit: 5" in done.stderr
    assert "one" in done.stdout
