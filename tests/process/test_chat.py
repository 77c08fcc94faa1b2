"""The chat as somebody types it, at a pseudo-terminal whose screen is looked at."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import paths
import pexpect
import pytest
from command import run
from gemma import gemma_tokenizer
from random_model import scripted, untrained
from terminal import Terminal

from mlx_diffgemma import ChatSession, ContextError, Done, Text, ToolResult, Truncated, generate
from mlx_diffgemma.cli import lines
from mlx_diffgemma.cli.keyboard import Interrupts
from mlx_diffgemma.diffusion.guards import OFF
from mlx_diffgemma.distributed.launch import Place

HERE = paths.TESTS
SUDOKU = str(paths.SUDOKU)
TOOLS = """
def weather(city: str, days: int = 1) -> str:
    '''Say how the weather is.

    Args:
        city: where
        days: for how long
    '''
    if city == "Nowhere":
        raise ValueError("no such city")
    return f"{days} days of rain in {city}"


def _hidden() -> None: ...
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return


def test_a_session_with_all_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a long path would wrap
    file = Path("my talk")
    chat = Terminal("--seed", "0", script=["One.", "Two.", "Three.", "Four.", "Five."])
    assert "/help" in "\n".join(chat.lines())
    answer, *stats = chat.type("hello")
    assert answer == "One."
    first = re.match(r"(\d+) prompt tokens in", "".join(stats))
    assert first
    stats = " ".join(chat.type("and more")[1:])
    cached = re.search(r"(\d+) prompt tokens \((\d+) of them cached\)", stats)
    assert cached
    assert cached[2] == first[1]
    assert chat.type("/retry")[0] == "Three."
    assert chat.type("/undo") == ["Forgotten: and more"]
    assert chat.type("/edit something else")[0] == "Four."
    chat.child.send("/edit\n")
    chat.wait("> something else$")
    assert "Five." in chat.type(" entirely")
    assert chat.type("/system Be brief.") == ["System message: Be brief."]
    assert chat.type("/steps 7") == ["Most steps a canvas: 7"]
    assert chat.type("/steps x") == ["/steps takes a number from 1."]
    assert chat.type("/seed 5") == ["Seed: 5"]
    assert chat.type("/seed") == ["Seed: drawn for each answer"]
    assert "tokens per forward pass" in "".join(chat.type("/stats"))
    assert "only text content is supported by this model" in chat.type("/image cat.png")[0]
    assert len(chat.type("/help")) > 10
    assert chat.type("/dance") == [
        "/dance is not a command; /help lists them, and // begins a message with /."
    ]
    assert chat.type(f'/save "{file}"') == [f"Saved to {file}."]
    assert chat.type("/reset") == ["Started over."]
    assert chat.type("/undo") == ["error: there is no message yet"]
    assert chat.type("/load nothing")[0].startswith("error: ")
    assert chat.type(f"/load {file}")[0].startswith("3 messages, ")
    assert chat.type("/undo") == ["Forgotten: something else entirely"]
    assert "Five." in chat.type('"""two\nlines"""')
    assert "Five." in chat.type("also\\\nthis")
    assert chat.type("/undo") == ["Forgotten: also", "this"]
    chat.child.send("/quit\n")
    assert chat.leaves() == 0
    # The next one knows what was typed, and goes on with the file.
    again = Terminal("--session", str(file), script=["Again."])
    assert "Going on with 3 messages" in "\n".join(again.lines())
    again.child.send("\x1b[A")
    again.wait("> /quit$")
    again.child.send("\x15")
    assert again.type("hi")[0] == "Again."
    again.child.send("\x04")
    assert again.leaves() == 0
    assert file.stat().st_size > 1000


def test_the_canvas_leaves_nothing_behind() -> None:
    """A second canvas used to begin in the row where the text before ended, and erased it."""
    long = "wide \u8a9e and so on " * 9
    chat = Terminal("--guards", "none", "--max-tokens", "90", script=["a\nb", long, "d"])
    assert chat.type("hello")[:2] == ["a", "b"]
    lines = chat.type("and")
    assert not any("accepted" in line for line in chat.lines())
    answer = "".join(lines[: next(i for i, line in enumerate(lines) if "prompt" in line)])
    tokenizer = gemma_tokenizer()
    wanted = tokenizer.decode(tokenizer.encode(long)[:64]) + "d"
    # pyte fills the second half of a wide character with nothing.
    assert "".join(answer.split()) == "".join(wanted.split())
    assert answer.count("\u8a9e") >= 2


def test_ctrl_c_stops_an_answer_and_keeps_what_is_committed() -> None:
    settings = ["--max-tokens", "4000", "--guards", "none"]
    chat = Terminal(*settings, script=["word after word " * 20], DELAY="0.05")
    chat.child.sendline("talk")
    chat.wait("canvas [3-9], step")
    chat.child.sendintr()
    chat.wait("Stopped; /retry")
    chat.wait("\n>$")
    assert any("word after word" in line for line in chat.lines())
    assert "Forgotten: talk" in chat.type("/undo")
    # At the prompt, the first says how to leave and the second leaves. Python misses one that comes
    # after the prompt is drawn and before it waits for keys.
    time.sleep(0.3)
    chat.child.sendintr()
    chat.wait("Ctrl-C again")
    chat.child.sendintr()
    assert chat.leaves() == 0


def test_a_second_ctrl_c_leaves(tmp_path: Path) -> None:
    """The session on disk is still written, however often the keys are pressed.

    The test used to press twice within 0.1 s, and a busy machine took that for once.
    """
    file = tmp_path / "talk"
    settings = ["--max-tokens", "4000", "--guards", "none", "--session", str(file)]
    chat = Terminal(*settings, script=["word after word " * 20], HANG="2")
    chat.child.sendline("talk")
    chat.wait("canvas 2, step")
    while chat.child.isalive():  # in a step that takes longer than all of this
        chat.child.sendintr()
        with suppress(pexpect.TIMEOUT, pexpect.EOF):
            chat.child.expect(pexpect.EOF, timeout=0.1)
    assert chat.leaves() == 130
    again = Terminal("--session", str(file), script=["x"])
    assert "Going on with 2 messages" in "\n".join(again.lines())
    assert any("word after word" in line for line in chat.lines())


def test_what_the_launcher_has_started_ends_with_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """After it `mlx.launch` passes nothing on: a chat would wait for ever."""
    typed = Mock(read=Mock(side_effect=["hello", KeyboardInterrupt, "lost"]))
    monkeypatch.setattr(lines, "place", lambda: Place(0, 2))
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert list(lines.messages(typed)) == ["hello"]


def test_two_signals_during_one_operation_count_as_two() -> None:
    """They used to count as one: Python calls a handler once for both."""

    def press() -> None:
        for _ in range(2):
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    def wait() -> None:
        keys = threading.Thread(target=press)
        keys.start()
        keys.join()
        time.sleep(0.01)

    before = signal.getsignal(signal.SIGINT)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(10)  # the handler does not run in between
    try:
        with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
            wait()
    finally:
        sys.setswitchinterval(interval)
    assert interrupts.stopped
    assert signal.getsignal(signal.SIGINT) is before
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.stopped
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # nothing is torn while it leaves
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [(["--no-live"], {}), ([], {"NO_COLOR": "1"}), ([], {"TERM": "dumb"})],
)
def test_plain_terminals_get_plain_text(arguments: list[str], environment: dict[str, str]) -> None:
    begins = r"\n> *$"
    chat = Terminal(*arguments, script=["**One.**"], begins=begins, **environment)
    chat.child.logfile_read = raw = io.BytesIO()
    chat.type("hello", begins)
    assert "**One.**" in chat.lines()
    assert b"accepted" not in raw.getvalue()
    if "TERM" in environment:
        assert b"\x1b" not in raw.getvalue()


def test_thinking_is_folded_and_shown_on_request() -> None:
    script = ["<|channel>thought\nIs it cold?<channel|>Yes."]
    chat = Terminal("--thinking", script=script)
    lines = chat.type("well?")
    assert lines[:2] == ["Yes.", "[thought: 11 characters, /thought shows them]"]
    assert chat.type("/thought") == ["Is it cold?"]
    assert chat.type("/thinking off") == ["Thinking is off."]
    assert chat.type("/thinking maybe") == ["/thinking takes on or off."]


def test_tools_are_called_once_the_user_agrees(tmp_path: Path) -> None:
    file = tmp_path / "tools.py"
    file.write_text(TOOLS)
    call = '<|tool_call>call:weather{city:<|"|>Oslo<|"|>,days:2}<tool_call|>'
    fails = '<|tool_call>call:weather{city:<|"|>Nowhere<|"|>}<tool_call|>'
    chat = Terminal("--tools", str(file), script=[call, "Rain.", call, "Pity.", fails, "Hm.", "x"])
    chat.child.sendline("how is it?")
    chat.wait(r'Call "weather" with {"city": "Oslo", "days": 2}\?\n\[y/N\]$')
    lines = chat.type("y")
    assert "gives 2 days of rain in Oslo]" in "".join(lines)
    assert "Rain." in lines
    assert not any("tool_call" in line for line in chat.lines())
    chat.child.sendline("and now?")
    chat.wait(r"\[y/N\]$")
    lines = chat.type("n")
    assert "[not called]" in lines
    assert "Pity." in lines
    chat.child.sendline("there?")
    chat.wait(r"\[y/N\]$")
    assert "ValueError: no such city" in "".join(chat.type("y"))


def test_nothing_that_others_wrote_moves_the_cursor(tmp_path: Path) -> None:
    """Answers, thoughts, names, results and saved messages used to reach the terminal raw."""
    hostile, shown = "\x1b]52\x07\x9b\u202e[b]:ok:", r"\x1b]52\x07\x9b\u202e[b]:ok:"
    file = tmp_path / "tools.py"
    file.write_text(f"def rm(city: str) -> str:\n    return {hostile!r}\n")
    script = [
        f"<|channel>thought\n{hostile}<channel|>{hostile}",
        '<|tool_call>call:rm{ci\u200bty\x9b:<|"|>\x1b[1A\u2028\x7f<|"|>}<tool_call|>',
        '<|tool_call>call:rm{city:<|"|>Oslo<|"|>}<tool_call|>',
        f"<|tool_call>call:no{hostile.split(' ')[0]}{{}}<tool_call|>",
        f"<|tool_call>{hostile}<tool_call|>",
        "end",
    ]
    chat = Terminal("--tools", str(file), "--thinking", script=script)
    chat.child.logfile_read = raw = io.BytesIO()
    assert chat.type("hello")[0] == shown
    assert chat.type("/thought") == [shown]
    chat.child.sendline("go on")
    lines = chat.wait(r"Call .*\n\[y/N\]$")[0]
    wanted = 'Call "rm" with {"ci\\u200bty\\x9b": "\\u001b[1A\\u2028\\x7f"}?\n[y/N]'
    assert lines == wanted
    chat.child.sendline("n")
    chat.wait(r'Call "rm" with {"city": "Oslo"}\?\n\[y/N\]$')
    lines = "".join(chat.type("y"))
    assert f"gives {shown}]" in lines
    assert r'["no\u001b]52\u0007\x9b\u202e[b]:ok:" with {}: there is no such tool]' in lines
    assert b"\x1b]52" not in raw.getvalue()
    assert not set(raw.getvalue().decode()) & set("\x9b\u202e\u2028")


def test_a_conversation_beyond_the_context_goes_on_without_its_oldest_turns() -> None:
    """It used to be refused for good; the answers are those of a chat that never held more."""
    model, tokenizer = untrained(768, 16, windows=(40, None), context=400), gemma_tokenizer()
    settings: dict[str, Any] = {"guards": OFF, "steps": 3, "max_tokens": 30}
    talk = ChatSession(model, tokenizer, system="Be brief.", overflow="truncate", **settings)
    left_out = []
    for turn in range(14):
        events = list(talk.stream(f"{turn} " + "word " * 12, seed=turn))
        left_out += [(turn, event.turns) for event in events if isinstance(event, Truncated)]
        asked = list(talk.messages[:-1])
        assert asked[0] == {"role": "system", "content": "Be brief."}
        assert [message["role"] for message in asked[1::2]] == ["user"] * (len(asked) // 2)
        text = "".join(event.text for event in events if isinstance(event, Text))
        assert text == generate(model, tokenizer, asked, seed=turn, steps=3, max_tokens=30)
    assert 2 <= len(left_out) <= 7
    assert all(count > 1 for _, count in left_out)  # or every further turn would be read anew
    before = talk.messages
    with pytest.raises(ContextError, match=r"does not fit into the context of 400$"):
        list(talk.stream("word " * 400))
    assert talk.messages == before
    talk.overflow = "refuse"
    with pytest.raises(ContextError, match="--overflow truncate"):
        list(talk.stream("word " * 400))


def test_turns_are_left_out_with_their_calls() -> None:
    """Results without a call, or two calls of one name, would confuse the template."""
    model, tokenizer = scripted(), gemma_tokenizer()
    call = "<|tool_call>call:weather{}<tool_call|>"
    model.begin(*([*tokenizer.encode(text), 6] for text in [call, "Rain.", call, "Sun."]))
    declaration = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    talk = ChatSession(model, tokenizer, tools=[declaration], overflow="truncate")
    list(talk.stream("How is it?"))
    list(talk.respond([ToolResult("weather", "wet")]))
    model.context = len(talk.prompt_cache) + 96
    (first, *_) = talk.stream("And in the other place?")
    assert first == Truncated(1)
    (*_, last) = talk.respond([ToolResult("weather", "dry")])
    assert isinstance(last, Done)
    assert [message["role"] for message in talk.messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert talk.messages[1]["tool_calls"][0]["id"] == talk.messages[2]["tool_call_id"]


def test_a_chat_says_what_to_do_beyond_the_context() -> None:
    chat = Terminal(script=["One.", "Two.", "Three."], CONTEXT="140")
    long = "word " * 8
    assert chat.type(long)[0] == "One."
    said = "".join(chat.type(long))
    assert "/overflow truncate) leaves the oldest turns out" in said
    assert chat.type("/overflow") == ["/overflow takes refuse or truncate."]
    assert chat.type("/overflow truncate") == ["Beyond the context: truncate."]
    answer, notice, *_ = chat.type(long)
    assert answer == "Two."
    assert notice.startswith("[the conversation is longer than the context: its oldest turn was")


def test_tools_without_asking_and_in_json(tmp_path: Path) -> None:
    file = tmp_path / "tools.json"
    file.write_text('[{"name": "weather", "parameters": {"type": "object", "properties": {}}}]')
    call = "<|tool_call>call:weather{}<tool_call|>"
    chat = Terminal("--tools", str(file), script=[call, "Fine."])
    chat.child.sendline("how is it?")
    chat.wait("What does it give\\?$")
    assert "Fine." in chat.type("sunny")
    file = tmp_path / "tools.py"
    file.write_text(TOOLS)
    endless = ['<|tool_call>call:weather{city:<|"|>Oslo<|"|>}<tool_call|>']
    chat = Terminal("--tools", str(file), "--yes", script=endless)
    assert chat.type("how is it?")[-1] == "Stopped: 16 rounds of tool calls for one answer."


def test_a_model_that_cannot_be_loaded_leaves_the_one_there_is() -> None:
    typed = "/model no/such/thing\nhello\n/model tiny-puzzles\n/model\n/undo\n"
    done = run("chat", "--seed", "0", stdin=typed)
    assert "error: no/such/thing is neither a directory nor a name on the hub" in done.stderr
    assert done.stdout.startswith("Hello!")
    said = "Model: tiny-puzzles; it reads the conversation anew.\nModel: tiny-puzzles\n"
    assert done.stderr.endswith(f"{said}Forgotten: hello\n")


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0")
    empty = tmp_path / "empty.py"
    empty.write_text("x = 1")
    for arguments, message in (
        (["--tools", str(tmp_path / "none.py")], "cannot be read"),
        (["--tools", str(broken)], "ZeroDivisionError"),
        (["--tools", str(empty)], "declares no function"),
        (["--guards", "all,of,them"], "--guards takes"),
        (["--thinking"], "knows no thinking"),
        (["--session", str(broken)], "damaged, or no saved context"),
    ):
        done = run("chat", *arguments, stdin="hello\n")
        assert done.returncode in (1, 2), arguments
        assert message in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.skipif(not shutil.which("tmux"), reason="needs a terminal that rewraps its lines")
def test_another_window_leaves_no_rows_behind(tmp_path: Path) -> None:
    """Frames used to be erased by the rows they had when they were drawn."""

    def tmux(*arguments: str) -> str:
        command = ["tmux", "-L", f"test{os.getpid()}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    script = json.dumps(["word after word " * 20])
    run = f"PYTHONPATH={HERE} SCRIPT='{script}' DELAY=0.05 {sys.executable} {HERE}/scripted_cli.py"
    size = ["-x", "100", "-y", "30"]
    run += " chat --guards none --max-tokens 900"
    tmux("-f", "/dev/null", "new-session", "-d", *size, run)
    try:
        for _ in range(200):
            if "/quit leaves" in tmux("capture-pane", "-p"):
                break
            time.sleep(0.1)
        tmux("send-keys", "talk", "Enter")
        # A window that loses nearly half of its width within a step may keep lines of a draft.
        for width, height in ((80, 30), (60, 20), (75, 12), (60, 20), (70, 14), (80, 30)):
            time.sleep(0.15)
            tmux("resize-window", "-x", str(width), "-y", str(height))
        for _ in range(200):
            if "finished: length" in tmux("capture-pane", "-p", "-J", "-S", "-100"):
                break
            time.sleep(0.1)
        seen = tmux("capture-pane", "-p", "-J", "-S", "-100")
        assert "finished: length" in seen
        assert "accepted" not in seen
        assert re.search("/quit leaves.\n> talk\nword after", seen), seen  # nor too much erased
    finally:
        tmux("kill-server")
