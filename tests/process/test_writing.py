"""`fill` and `edit` as commands: files and stdin, what stays of them, mistakes in one sentence."""

import os
import re
import stat
from pathlib import Path

from command import run
from paths import TESTS


def test_edit_of_a_file_through_stdin() -> None:
    text = (TESTS / "paths.py").read_text()
    flags = ("-i", "Fix", "--lines", "5", "--seed", "1", "--steps", "6", "--strength", "1")
    done = run("edit", "-", *flags, stdin=text)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("--- a/stdin\n+++ b/stdin\n@@ ")
    removed = [x for x in done.stdout.splitlines()[2:] if x.startswith("-")]
    assert removed == ["-" + text.splitlines()[4]]
    whole = run("edit", "-", *flags, "--text", stdin=text)
    assert whole.stdout.splitlines()[:4] == text.splitlines()[:4]
    assert whole.stdout.endswith("".join(text.splitlines(keepends=True)[5:]))


def test_edit_in_place_keeps_mode_and_line_ends_and_leaves_nothing_behind(tmp_path: Path) -> None:
    file = tmp_path / "note.txt"
    file.write_bytes(b"first\r\na smal hosue\r\nlast\r\n")
    file.chmod(0o640)
    done = run("edit", str(file), "-i", "Fix", "--lines", "2:2", "--seed", "0", "--in-place")
    assert done.returncode == 0, done.stderr
    written = file.read_bytes()
    assert re.fullmatch(rb"first\r\n[^\r]*\r\nlast\r\n", written, re.DOTALL)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert sorted(os.listdir(tmp_path)) == ["note.txt", "note.txt.bak"]
    kept = tmp_path / "note.txt.bak"
    assert kept.read_bytes() == b"first\r\na smal hosue\r\nlast\r\n"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o640
    assert f"What it was is kept in {kept}." in done.stderr


def test_mistakes_of_edit_are_one_sentence(tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    for arguments, code, message in (
        (("nofile", "-i", "x"), 1, "cannot be read"),
        ((str(binary), "-i", "x"), 1, "is not UTF-8 text"),
        (("-", "-i", "x", "--in-place"), 2, "not stdin"),
        (("-", "-i", "x", "--lines", "1:x"), 2, "a range such as 10:20"),
        (("-", "-i", "x", "--lines", "7"), 1, "there is no line 7; the text has 1"),
    ):
        done = run("edit", *arguments, stdin="one line\n")
        assert done.returncode == code
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_fill_of_a_file_through_stdin() -> None:
    """The text left of a hole is context, and it is said what the model could not see."""
    text = (TESTS / "paths.py").read_text()
    left, right = text.split("tests find")
    done = run("fill", "--seed", "0", "--steps", "2", stdin=f"{left}{{{{word:2}}}}{right}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(left)
    assert done.stdout.endswith(right)
    assert "did not see the last" in done.stderr
