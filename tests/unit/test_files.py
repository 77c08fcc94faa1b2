"""Files that take the place of others: who may read them."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_diffgemma.files import replacing


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_file_has_the_mode_of_any_other(tmp_path: Path) -> None:
    """An adapter or session on a shared Mac could be read by its writer alone: mode 0600."""
    path = tmp_path / "new"
    with replacing(path, suffix=".safetensors") as fresh:
        fresh.write_text("x")
    assert mode(path) == 0o640
    assert os.listdir(tmp_path) == ["new"]


@pytest.mark.parametrize("kept", [0o600, 0o664, 0o400])
def test_a_replaced_file_keeps_its_mode(tmp_path: Path, kept: int) -> None:
    """A session that its owner had shared was unreadable for others once it was saved again."""
    path = tmp_path / "old"
    path.write_text("old")
    path.chmod(kept)
    (tmp_path / "link").symlink_to(path)
    with replacing(tmp_path / "link") as fresh:
        assert mode(fresh) == 0o600  # half of what may be private
        fresh.write_text("new")
    assert (path.read_text(), mode(path)) == ("new", kept)
    assert (tmp_path / "link").is_symlink()


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), replacing(path):
        raise OSError("full")
    assert (os.listdir(tmp_path), path.read_text()) == (["old"], "old")
