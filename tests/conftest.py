"""Property tests draw the same examples everywhere; `--hypothesis-profile=default` explores."""

from itertools import count

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

_numbers = count()


@pytest.fixture(autouse=True)
def _nothing_is_kept_between_tests(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Histories and what was said today already, which stand in the user's home."""
    state = tmp_path_factory.getbasetemp() / "state" / str(next(_numbers))
    monkeypatch.setenv("XDG_STATE_HOME", str(state))
