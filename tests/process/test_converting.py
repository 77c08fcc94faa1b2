"""How far a conversion is, on a terminal and in a log."""

import re
from pathlib import Path

import pytest
from command import at_a_terminal, run
from paths import SUDOKU

from mlx_diffgemma.cli import converting
from mlx_diffgemma.convert import Fetched, Written


def test_bytes_are_told_from_the_start(tmp_path: Path) -> None:
    """A bar used to say "0/? bytes" until the first tensor was written, 20 of 47 seconds."""
    told = at_a_terminal("convert", SUDOKU, tmp_path / "out")
    bars = [line for line in re.split(r"[\r\n]", told) if "converting" in line]
    assert bars
    assert all(re.search(r"\d[\d.]*/3\.0 MB", bar) for bar in bars), bars
    assert "?" not in "".join(bars)
    assert "reading the headers of" in told


def test_a_log_gets_a_line_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where stderr was no terminal, hours passed without a word."""
    monkeypatch.setattr(converting, "FIRST_LINE", 0.0)
    monkeypatch.setattr(converting, "NEXT_LINE", 0.0)
    said = run("convert", SUDOKU, tmp_path / "out").stderr.splitlines()
    lines = [line for line in said if line.startswith("converting ")]
    assert len(lines) > 100  # one a slice
    assert lines[-1] == "converting 3.0 MB of 3.0 MB"
    tell = converting.Lines()
    tell(Fetched("a", 1_000_000, 5_000_000))
    tell(Written("x", 2_000, 5_000_000))
    assert capsys.readouterr().err.splitlines() == [
        "fetching 1.0 MB of 5.0 MB",
        "fetching 1.0 MB of 5.0 MB, converting 2.0 kB of 5.0 MB",
    ]


def test_a_name_moves_no_cursor(tmp_path: Path) -> None:
    told = at_a_terminal("convert", f"{tmp_path}/[bold]\x1b]52;c;eHh4\x07", tmp_path / "out")
    assert "\x1b]52" not in told
    assert "\x07" not in told
    assert "[bold]" in told.replace("\n", "")
