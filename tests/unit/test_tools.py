"""Functions of a user's file: whatever they do, the chat goes on."""

import re
from pathlib import Path

import pytest

from mlx_diffgemma.tasks.tools import MOST_RESULT, ToolError, by_name, read_tools

WILD = """
import sys

class Rude(BaseException):
    def __str__(self):
        raise ValueError("no")

def leaves():
    sys.exit("bye")

def rude():
    raise Rude

def interrupted():
    raise KeyboardInterrupt

def odd():
    return object()

def circular():
    found = []
    found.append(found)
    return found

def deep():
    found = []
    for _ in range(100_000):
        found = [found]
    return found

def digits():
    return 10 ** 5000

def long():
    return "x" * 5_000_000

def half():
    return "a" + chr(0xD800)

def loud():
    print("x" * 100_000)
    return 3
"""


def test_what_a_tool_does_is_told_to_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`sys.exit` used to end the chat, and what was printed went between the answers."""
    file = tmp_path / "tools.py"
    file.write_text(WILD)
    tools = by_name(read_tools(file))
    told = {name: tool.call({}) for name, tool in tools.items() if name != "interrupted"}
    assert told["leaves"] == "error: SystemExit: bye"
    assert told["rude"] == "error: Rude"
    assert told["odd"] == "error: TypeError: Object of type object is not JSON serializable"
    assert told["circular"] == "error: ValueError: Circular reference detected"
    assert told["deep"].startswith("error: RecursionError")
    assert told["digits"].startswith("error: ValueError: Exceeds the limit")
    assert told["long"] == "x" * MOST_RESULT + " (and 4900000 more characters)"
    assert told["half"] == "a?"
    assert told["loud"] == "3"
    said = capsys.readouterr()
    assert (said.out, len(said.err)) == ("", 100_001)
    assert tools["odd"].call({"x": 1}).startswith("error: TypeError")
    with pytest.raises(KeyboardInterrupt):
        tools["interrupted"].call({})


@pytest.mark.parametrize(
    ("name", "source", "problem"),
    [
        ("tools.py", "import sys; sys.exit(0)", "SystemExit: 0"),
        ("tools.py", "raise BaseException('x')", "BaseException: x"),
        ("tools.py", "def f(x: Nothing): pass\n", None),
        ("tools.py", "def f(x: 'Nothing'): pass\n", "NameError"),
        ("tools.py", "(" * 10_000, "fails"),
        ("tools.py", "x = 1\0", "fails"),
        ("tools.json", "[" * 200_000, "nested too deeply"),
        ("tools.json", '{"name": "\\ud800"}', "half a character"),
        ("tools.json", '{"name": "f", "parameters": NaN}', "NaN"),
        ("tools.json", "[3]", "needs a name"),
    ],
)
def test_files_that_declare_nothing_are_one_sentence(
    name: str, source: str, problem: str | None, tmp_path: Path
) -> None:
    """A file that calls `sys.exit` used to end the chat without a word."""
    file = tmp_path / name
    file.write_text(source)
    with pytest.raises(ToolError, match=re.escape(problem or "fails")) as refused:
        read_tools(file)
    assert len(str(refused.value).splitlines()) == 1
