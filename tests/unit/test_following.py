"""Ranks that share a model have read what rank 0 has, whatever becomes of a conversation."""

from pathlib import Path
from typing import Any

import pytest
from leading import leading
from paths import SUDOKU

from mlx_diffgemma import ChatSession, DiffusionGemma, Draft, Reading, Text, Tokenizer

SETTINGS: Any = {"steps": 2, "max_tokens": 60, "prefill_chunk": 8}


def texts(events: Any) -> str:
    return "".join(event.text for event in events if isinstance(event, Text))


def leave_at(events: Any, kind: type) -> None:
    """Stop listening at the first event of a kind."""
    next(event for event in events if isinstance(event, kind))
    events.close()


def converse(model: DiffusionGemma, tokenizer: Tokenizer, folder: Path) -> list[Any]:
    """All that a user may do with a conversation, and what it holds after each."""
    session, found = ChatSession(model, tokenizer, **SETTINGS), []

    def note(said: Any) -> None:
        found.append((said, session.messages, session.prompt_cache.standing))

    note(texts(session.stream("1.2.", seed=1)))
    note(session.undo())
    leave_at(session.stream("3" * 40, seed=2), Reading)  # within the prompt
    note("left")
    leave_at(session.stream("4" * 12, seed=3), Draft)
    note("left")
    note(texts(session.retry(seed=4)))
    note(texts(session.stream("5.", seed=5)))
    session.save(folder / "saved")
    note(texts(session.stream("6.", seed=6)))
    session.reset()
    note(texts(session.stream("61", seed=7)))
    session.restore(folder / "saved")
    note(texts(session.stream("6.", seed=6)))
    session.prompt_cache.save(folder / "last")
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_a_conversation_of_ranks_is_one_of_one(tmp_path: Path, size: int) -> None:
    (tmp_path / "one").mkdir(), (tmp_path / "ranks").mkdir()
    with leading(SUDOKU, 1) as alone:
        wanted = converse(*alone, tmp_path / "one")
    with leading(SUDOKU, size) as part:
        assert converse(*part, tmp_path / "ranks") == wanted
        # What one process has saved, ranks go on with.
        session = ChatSession.load(tmp_path / "one" / "saved", *part)
        session.settings |= SETTINGS
        assert texts(session.stream("6.", seed=6)) == wanted[-1][0]
    session = ChatSession.load(tmp_path / "ranks" / "saved", *alone)
    session.settings |= SETTINGS
    assert texts(session.stream("6.", seed=6)) == wanted[-1][0] == wanted[-3][0]
