"""`demo`: somebody sees canvases resolve, and learns what to type next."""

import re
import shlex
import time
from typing import Any

import pytest
from command import at_a_terminal, run
from terminal import Terminal
from typer.main import get_command

from mlx_diffgemma.cli.main import app
from mlx_diffgemma.measure.scenes import SCENES


def test_each_scene_resolves_over_five_to_fifteen_steps_and_ends_right() -> None:
    """The Sudoku was complete at its first step, so was the record, and the sentence never was."""
    done = run("demo")
    assert done.returncode == 0, done.stderr
    ends = [
        int(steps) for steps in re.findall(r"^Right: \d+ tokens in (\d+) steps", done.stderr, re.M)
    ]
    assert len(ends) == len(SCENES) >= 4, done.stderr
    assert all(5 <= steps <= 15 for steps in ends), ends
    # Where nobody watches: the first draft, one in the middle and the last.
    drafts = re.findall(r"^canvas 1, step (\d+)/48, .* \| (.*)$", done.stderr, re.M)
    for number, scene in enumerate(SCENES):
        assert scene.title in done.stdout
        assert scene.about in done.stderr
        assert f"\n{scene.case.answer}\n" in done.stdout
        shown = drafts[3 * number : 3 * number + 3]
        first, middle, last = (int(step) for step, _ in shown)
        assert (last - first + 1, middle) == (ends[number], (first + last) // 2)
        assert shown[0][1] != shown[2][1] == repr(scene.case.answer)
    assert len(drafts) == 3 * len(SCENES)


def test_it_ends_with_what_to_type_next() -> None:
    commands: Any = get_command(app)
    said = run("demo", "--fast").stderr.partition("What to type next:\n")[2]
    lines = re.findall(r"^  mlx-diffgemma (.*?)(?:   .*)?$", said, re.M)
    assert len(lines) >= 4
    for line in lines:
        name, *given = shlex.split(line)
        known = {each for option in commands.commands[name].params for each in option.opts}
        assert {each for each in given if each.startswith("-")} <= known


def test_a_terminal_shows_each_step_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it was over before one had read the first line."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    said = at_a_terminal("demo")
    steps = sum(map(int, re.findall(r"tokens in (\d+) steps", said)))
    assert len(waits) == steps == len(re.findall(r"step \d+/48", said))
    assert 15 <= sum(waits) <= 45
    assert " | '" not in said  # lines are for pipes
    waits.clear()
    assert at_a_terminal("demo", "--fast").count("\nRight: ") == len(SCENES)
    assert sum(waits) == 0


def test_ctrl_c_leaves_the_terminal_as_it_was() -> None:
    seen = Terminal(command="demo", begins="step 3/48")
    assert not seen.echoes()
    seen.press("\x03")
    assert seen.leaves() == 130
    assert seen.echoed
    assert not seen.cursor_hidden
    assert "accepted" not in "\n".join(seen.lines())
