"""What ranks tell each other beside collectives, and how one notices that another is gone."""

import threading
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from queue import Queue
from typing import Any

import numpy as np
import pytest

from mlx_diffgemma.distributed import link as linking
from mlx_diffgemma.distributed.launch import Place
from mlx_diffgemma.distributed.link import Link, connect

GROUP: Any = None


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> "Queue[np.ndarray]":
    """What rank 0 says, in place of a collective."""
    words: Queue[np.ndarray] = Queue()

    def say(group: object, mine: np.ndarray) -> np.ndarray:
        if mine.any():
            words.put(mine)
            return mine
        return words.get(timeout=10)

    monkeypatch.setattr(linking, "_told", say)
    return words


def pair(lost: "Queue[int]") -> tuple[Link, Link]:
    """Rank 0's end, and rank 1's."""
    made: Queue[Link] = Queue()
    lead = threading.Thread(target=lambda: made.put(connect(Place(0, 2), GROUP, lost.put)))
    lead.start()
    other = connect(Place(1, 2), GROUP, lambda rank: None)
    return made.get(timeout=10), other


def test_messages_arrive_whole_and_before_the_end(told: "Queue[np.ndarray]") -> None:
    lost: Queue[int] = Queue()
    first, other = pair(lost)
    first.send(b"", 1)
    first.send(b"x" * 3_000_000, 1)
    assert [other.received(10), other.received(10)] == [(0, b""), (0, b"x" * 3_000_000)]
    other.send(b"last")
    other.close()
    assert [first.received(10), first.received(10)] == [(1, b"last"), (1, None)]
    first.send(b"to nobody", 1)
    first.close()
    assert lost.empty()  # it has taken leave


def test_an_end_without_leave_is_a_loss(told: "Queue[np.ndarray]") -> None:
    lost: Queue[int] = Queue()
    first, other = pair(lost)
    other.send(b"last")
    other._peers[0].close()  # as the system does for who is killed
    assert [first.received(10), first.received(10)] == [(1, b"last"), (1, None)]
    assert lost.get(timeout=10) == 1
    first.close()


def test_silence_is_an_end(told: "Queue[np.ndarray]", monkeypatch: pytest.MonkeyPatch) -> None:
    """A Mac whose cable is pulled closes nothing."""
    monkeypatch.setattr(linking, "SILENCE", 0.3)
    monkeypatch.setattr(linking, "BEAT", 0.05)
    lost: Queue[int] = Queue()
    first, other = pair(lost)
    assert first.received(1.0) is None  # signs of life are no messages, and keep it
    other._closed.set()  # no more of them, and the connection stays
    assert lost.get(timeout=10) == 1
    first.close()


def test_who_has_slept_waits_once_more(
    told: "Queue[np.ndarray]", monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine with too much to do, both took each other for lost."""
    monkeypatch.setattr(linking, "SILENCE", 1.0)
    monkeypatch.setattr(linking, "LATE", 0.3)
    lost: Queue[int] = Queue()
    monkeypatch.setattr(linking, "BEAT", 100.0)  # none of them runs
    first, other = pair(lost)
    time.sleep(1.3)
    other.send(b"awake")
    assert first.received(10) == (1, b"awake")
    assert lost.empty()
    assert lost.get(timeout=10) == 1
    first.close()


def test_strangers_are_not_heard(told: "Queue[np.ndarray]") -> None:
    made: Queue[Link] = Queue()
    lead = threading.Thread(target=lambda: made.put(connect(Place(0, 2), GROUP, print)))
    lead.start()
    words = told.get(timeout=10)
    with pytest.raises((AuthenticationError, EOFError, ConnectionError)):
        Client(("127.0.0.1", int(words[0])), authkey=b"guessed").recv_bytes()
    told.put(words)
    other = connect(Place(1, 2), GROUP, print)
    other.send(b"known")
    first = made.get(timeout=10)
    assert first.received(10) == (1, b"known")
    first.close()
    other.close()
