"""Typing, pasting, drawing and resizing at a pseudo-terminal, whose screen is looked at."""

import base64
import io
import os
import re
import signal
import stat
import sys
import time
from pathlib import Path

import pyte
import pytest
from rich.console import Console
from rich.text import Text as Styled
from terminal import Terminal

from mlx_diffgemma.cli.display import Frame
from mlx_diffgemma.cli.outside import copied
from mlx_diffgemma.errors import Error

TALKS = ["--guards", "none", "--max-tokens", "640"]
WORDS = "word after word " * 20


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("SSH_CONNECTION", raising=False)


def test_a_paste_is_one_message(tmp_path: Path) -> None:
    """Its lines used to be as many messages; a backslash or three quotes in it are text."""
    chat = Terminal(script=["One.", "Two.", "Three."])
    chat.paste('def f():\n    """Doc."""\n\n    return "\\\n"  # \x1b[31m\n')
    chat.wait(r"#")
    chat.press("\r")
    chat.wait(r"One\.[^>]*\n>$")
    # Only the shown text spells out what a terminal would obey.
    shown = ["Forgotten: def f():", '    """Doc."""', "", '    return "\\', '"  # \\x1b[31m']
    assert chat.type("/undo") == shown
    chat.press("a\x1b\rb\\\rc\r")  # Alt-Enter, then a backslash
    chat.wait(r"> a\n\. b\n\. c\nTwo\.[^>]*\n>$")
    assert chat.type("/undo") == ["Forgotten: a", "b", "c"]
    # A paste beyond what the terminal's queue holds.
    chat.paste("\n".join(f"{n} of very many lines" for n in range(5000)))
    chat.wait("4999 of very many lines$")
    chat.press("\r")
    chat.wait(r"the prompt has 1\d{5} tokens;[^>]*\n>$")
    chat.press("\x04")
    assert chat.leaves() == 0
    history = tmp_path / "state" / "mlx-diffgemma" / "history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    again = Terminal(script=["One."])
    again.press("\x1b[A" * 2)  # not that paste
    again.wait(r"> a\n\. b\n\. c$")


def test_what_is_typed_ahead_stands_in_the_next_prompt() -> None:
    """It was echoed amid the canvas, whose rows were then miscounted."""
    chat = Terminal(*TALKS, script=[*[WORDS] * 6, "Two.", "Three."], DELAY="0.05")
    chat.child.sendline("talk")
    chat.wait("canvas 2, step")
    assert not chat.echoes()
    chat.press("and \x1b\r")
    chat.paste("two\nthree")
    chat.wait("canvas 4, step")
    assert "three" not in "\n".join(chat.lines())
    chat.child.sendintr()
    chat.wait(r"Stopped; /retry.*\n> and\n\. two\n\. three$")
    assert not [line for line in chat.lines() if "accepted" in line]
    chat.press("\r")
    chat.wait("canvas 1, step")
    chat.press("/undo\rrest\x7f")  # sent in its turn, and half a message
    chat.wait(r"> /undo\nForgotten: and\ntwo\nthree\n> res$")
    chat.press("\x15\x04")
    assert chat.leaves() == 0


def test_nothing_typed_ahead_agrees_to_a_call(tmp_path: Path) -> None:
    file = tmp_path / "tools.py"
    file.write_text('def wipe(disk: str) -> str:\n    return "wiped"\n')
    call = '<|tool_call>call:wipe{disk:<|"|>all<|"|>}<tool_call|>'
    chat = Terminal("--tools", str(file), script=[call, "Good."], DELAY="0.2")
    chat.child.sendline("go")
    chat.wait("canvas 1, step")
    chat.press("y\r")
    chat.wait(r'Call "wipe" with {"disk": "all"}\?\n\[y/N\]$')
    chat.press("n\r")
    chat.wait(r"\[not called\]")
    chat.wait(r"> y\n")  # the message that it was
    assert "wiped" not in "\n".join(chat.lines())


@pytest.mark.parametrize("size", [(24, 80), (6, 40), (2, 30), (1, 12), (8, 1), (300, 500)])
def test_no_line_of_a_draft_stays(size: tuple[int, int]) -> None:
    """Nor is too much erased: in a window of one row, all of the canvas scrolled through it."""
    script = ["a \u8a9e\u8a9e\u8a9e b " * 15, "word " * 60, "last"]
    one = size[1] == 1
    begins = r"v\ne\ns\n\.$" if one else r">\s*$"  # no prompt is as narrow as that
    chat = Terminal(*TALKS, script=script, size=size, begins=begins, DELAY="0.03")
    chat.press("talk\r")
    chat.wait("0")  # of the progress
    chat.wait(r"s\nt\no\np\s*$" if one else begins)
    text = "".join("".join(chat.lines()).split())
    assert "accepted" not in text
    assert text.count("talk") == (not one)
    assert text.count("last") == 1
    assert text.count("b") == 4
    chat.press("\x04")
    assert chat.leaves() == 0
    assert chat.echoed


def test_no_line_of_a_draft_stays_when_the_window_changes() -> None:
    """Rows were counted as if every terminal wrapped its lines anew, and too much was erased."""
    chat = Terminal(*TALKS, script=[WORDS], DELAY="0.1")
    before = chat.lines()
    chat.press("talk\r")
    chat.wait(r"canvas \d+, step")  # a canvas may be gone before anybody looks
    for columns in (60, 20, 90, 33, 80):
        time.sleep(0.1)
        chat.resize(24, columns)
    chat.wait(r"\n>$")
    lines = chat.lines()
    assert not [line for line in lines if "accep" in line or "step 1" in line]
    assert [line[:20] for line in before[:-1]] == lines[: len(before) - 1]
    assert lines[len(before) - 1] == "> talk"


def test_a_frame_goes_from_a_terminal_that_measures_otherwise() -> None:
    """Lines that it wrapped took more rows than were counted."""
    out = io.StringIO()
    frame = Frame(Console(file=out, force_terminal=True, width=80, height=24))
    screen = pyte.Screen(40, 24)  # as if its characters were twice as wide
    screen.set_mode(pyte.modes.LNM)
    for step in range(3):
        frame.draw(Styled(WORDS + str(step)))
    pyte.Stream(screen).feed(out.getvalue())
    assert screen.display[3].startswith("word after word word after word word a")
    frame.erase()
    pyte.Stream(screen).feed(out.getvalue())
    assert not "".join(screen.display).strip()


def test_a_dumb_terminal_gets_lines_and_no_escapes() -> None:
    chat = Terminal(script=["One.", "Two."], TERM="dumb", begins=r"\n>$")
    raw = chat.child.logfile_read = io.BytesIO()
    chat.press("two\nlines\n")  # pasted: they wait already
    chat.wait(r"One\.[^>]*\n>$")
    assert "Two." not in chat.lines()
    chat.type("/undo", r"Forgotten: two\nlines\n>$")
    chat.child.sendintr()
    chat.wait("Ctrl-C again")
    chat.press("\x04")
    assert chat.leaves() == 0
    assert b"\x1b" not in raw.getvalue()


def test_the_terminal_is_put_back(tmp_path: Path) -> None:
    """A kill used to leave the cursor hidden."""
    chat = Terminal(*TALKS, script=[WORDS], DELAY="0.05")
    raw = chat.child.logfile_read = io.BytesIO()
    chat.press("talk\r")
    chat.wait("canvas 2, step")
    os.kill(chat.child.pid, signal.SIGTERM)
    chat.leaves()
    assert chat.child.signalstatus == signal.SIGTERM
    assert chat.echoed
    assert raw.getvalue().rindex(b"\x1b[?25h") > raw.getvalue().rindex(b"\x1b[?25l")
    assert not [line for line in chat.lines() if "accepted" in line]


def test_markdown_is_shown_as_it_is_meant() -> None:
    script = [
        "# Head\n\nSome **bold** <b>\nnext",
        "&#x202e;x&#13;y [a](http://b.c)",
        "~~~\n\x1b[2J\n~~~\n\n- one\n- two",
    ]
    chat = Terminal(script=script)
    raw = chat.child.logfile_read = io.BytesIO()
    assert [line.strip() for line in chat.type("go")[:4]] == ["Head", "", "Some bold <b>", "next"]
    assert chat.type("more")[0] == r"\u202exy a (http://b.c)"
    lines = [line.strip() for line in chat.type("and more")]
    assert r"\x1b[2J" in lines
    assert "\u2022 one" in lines
    assert b"\x1b[2J" not in raw.getvalue()
    plain = Terminal("--plain", script=["**One.**"])
    assert plain.type("go")[0] == "**One.**"


def test_files_and_messages_that_begin_with_a_slash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "note one.txt").write_text("A ```\x1b[2J note.\n")
    os.mkfifo(tmp_path / "pipe")
    chat = Terminal(script=["One."], begins=r"\n>$", HOME=str(tmp_path))
    assert chat.type("//etc is")[0] == "One."
    assert chat.type("/undo") == ["Forgotten: /etc is"]
    assert chat.type(" /etc was")[0] == "One."
    assert chat.type("/undo") == ["Forgotten: /etc was"]
    assert chat.type("/etc")[0].startswith("/etc is not a command")
    said = "note one.txt: 16 characters stand before the next message."
    chat.press("/fil\t ~/no\t")
    assert chat.type("")[:1] == [said]
    assert chat.type("/undo") == ["Not part of the next message: note one.txt"]
    assert chat.type("/file ~/note one.txt") == [said]
    assert chat.type("say it")[0] == "One."
    shown = ["Forgotten: note one.txt:", "````", r"A ```\x1b[2J note.", "````", "", "say it"]
    assert chat.type("/undo") == shown
    for name, why in {
        "": "/file takes a file name.",
        "/dev/zero": "error: /dev/zero is not a file",
        "pipe": "error: pipe is not a file",
        "none": "error: none cannot be read: No such file or directory",
    }.items():
        assert "".join(chat.type(f"/file {name}")) == why
    chat.press("/bye\r")
    assert chat.leaves() == 0


def test_copy_editor_model_and_stats(tmp_path: Path) -> None:
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nprintf "from\\nfile" >> "$1"\n')
    editor.chmod(0o700)
    chat = Terminal(script=["**One.**", "Two.", "Three."], EDITOR=str(editor), SSH_CONNECTION="far")
    raw = chat.child.logfile_read = io.BytesIO()
    assert chat.type("/stats")[0] == "There is no answer yet."
    assert chat.type("/copy") == ["There is no answer yet."]
    first = chat.type("first")[1:]
    assert "Sent 8 characters" in chat.type("/copy")[0]
    assert b"\x1b]52;c;" + base64.b64encode(b"**One.**") + b"\x07" in raw.getvalue()
    chat.type("second and longer")
    assert chat.type("/stats")[: len(first)] != first
    chat.type("/undo")
    # It told of the answer that was taken back.
    assert chat.type("/stats")[: len(first)] == first
    assert chat.type("/clear") == ["Started over."]
    assert chat.type("/stats")[0] == "There is no answer yet."
    chat.type("/editor it is ", r"> it is\s*from\n\. file$")
    chat.press("\r")
    chat.wait(r"Three\.[^>]*\n>$")
    assert chat.type("/undo") == ["Forgotten: it isfrom", "file"]
    assert chat.type("/model") == ["Model: tiny"]
    assert chat.type("/model tiny-puzzles") == [
        "Model: tiny-puzzles; it reads the conversation anew."
    ]
    chat.press("/exit\r")
    assert chat.leaves() == 0


def test_copy_asks_this_machine_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clipboard = tmp_path / "clipboard"
    program = tmp_path / "pbcopy"
    # It holds what it was given open for as long as it owns the clipboard.
    program.write_text(f"#!/bin/sh\ncat > {clipboard}\nsleep 60 &\n")
    program.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert copied("caf\xe9", sys.stderr) == "Copied 4 characters with pbcopy."
    assert clipboard.read_bytes() == b"caf\xc3\xa9"
    program.write_text("#!/bin/sh\nexit 1\n")
    for other in ("WAYLAND_DISPLAY", "DISPLAY"):
        monkeypatch.delenv(other, raising=False)
    with pytest.raises(Error, match="no clipboard"):
        copied("caf\xe9", io.StringIO())


def test_generate_shows_how_far_it_is_and_nothing_of_it_stays() -> None:
    """A prompt of a minute used to look like a hang."""
    seen = Terminal(
        "hello",
        *TALKS,
        command="generate",
        script=[WORDS, "end"],
        begins="canvas 2, step",
        DELAY="0.05",
    )
    assert not seen.echoes()
    assert re.search(r"canvas \d, step \d+/48, \d+/64 accepted$", "\n".join(seen.lines()))
    seen.press("ls\n")
    seen.wait("finished")
    assert seen.leaves() == 0
    assert seen.echoed
    assert "accepted" not in "\n".join(seen.lines())
    assert "ls" not in seen.lines()
    quiet = Terminal("hello", "-q", command="generate", script=["end"], begins="end")
    assert quiet.leaves() == 0
    assert quiet.lines() == ["end"]


def test_in_the_background_nothing_is_drawn() -> None:
    """Over what somebody types into the shell; nor is it stopped for changing the terminal."""
    at = Terminal(
        "hello",
        *TALKS,
        command="generate",
        script=[WORDS],
        shell=True,
        begins=r"\$$",
        DELAY="0.1",
    )
    at.press(f"{at.command} > /dev/null\r")
    at.wait("canvas 1, step")
    at.press("\x1a")
    at.wait(r"Stopped[^$]*\n\$$")
    assert "accepted" not in "\n".join(at.lines())
    at.press("fg\r")
    at.wait("canvas 3, step")
    at.press("\x1a")
    at.wait(r"fg\n[^$]*Stopped[^$]*\n\$$")
    at.press("bg\r")
    at.press("echo $((6 * 7))\r")
    at.wait("\n42\n")
    time.sleep(0.3)
    at.press("echo $((6 * 8))\r")
    at.wait("\n48\n")
    assert "finished" not in "\n".join(at.lines())
    assert "accepted" not in "\n".join(at.lines())
    at.press("wait\r")
    at.wait("Done")
    at.press("exit\r")
    at.leaves()
