"""What ranks tell each other beside MLX's collectives: bytes, between rank 0 and each other one.

A collective whose peer has died never returns. So nothing that may fail goes through one: a thread
hears each peer, whose silence or end it tells, and the others go on or end.
"""

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from queue import Empty, Queue

import mlx.core as mx
import numpy as np

from .launch import LaunchError, Place

# Seconds between two signs of life, and without one after which a peer is lost.
BEAT, SILENCE = 1.0, 8.0

# Seconds without a sign of its own after which a process has not run itself: it was asleep, or the
# machine has too much else to do. Then it waits for its peers once more.
LATE = 3.0

# Seconds in which all ranks have to be there; loading Python on a busy Mac takes long.
GATHERING = 120.0

# Bytes of one message: a file of prompts is one.
MOST_MESSAGE = (1 << 31) - 1

# What a message begins with, and the whole of the last one; a sign of life is empty.
_MESSAGE, _FAREWELL = b".", b"-"

_WORDS = 8  # of the key, 32 bits each


class Link:
    """Rank 0's connections to all others, or the one of another rank to rank 0.

    `received` gives pairs of a rank and its message, None once the rank has left or is lost; what
    it had sent before comes before. `lost` or `left` is called at once, in another thread.
    """

    def __init__(
        self,
        place: Place,
        peers: dict[int, Connection],
        lost: Callable[[int], None],
        left: Callable[[int], None] = lambda rank: None,
    ):
        self.place = place
        self._peers = peers
        self._locks = {rank: threading.Lock() for rank in peers}
        self._queue: Queue[tuple[int, bytes | None]] = Queue()
        self._lost, self._left = lost, left
        self._closed = threading.Event()
        self._beaten = time.monotonic()
        for rank in peers:
            threading.Thread(target=self._hear, args=(rank,), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def send(self, message: bytes, rank: int = 0) -> None:
        """Send a message to rank 0, or from it to another; who is lost is sent nothing."""
        with self._locks[rank], suppress(OSError):
            self._peers[rank].send_bytes(_MESSAGE + message)

    def received(self, seconds: float | None = None) -> tuple[int, bytes | None] | None:
        """The next message that has come; None where none does in so many seconds."""
        try:
            return self._queue.get(timeout=seconds) if seconds != 0 else self._queue.get_nowait()
        except Empty:
            return None

    def close(self) -> None:
        """Take leave; what was sent still arrives."""
        self._closed.set()
        for rank, peer in self._peers.items():
            with self._locks[rank], suppress(OSError):
                peer.send_bytes(_FAREWELL)
                peer.close()

    def _hear(self, rank: int) -> None:
        peer = self._peers[rank]
        with suppress(OSError, EOFError):
            while self._hears(peer):
                message = peer.recv_bytes(MOST_MESSAGE)
                if message == _FAREWELL:
                    self._left(rank)
                    self._queue.put((rank, None))
                    return
                if message:
                    self._queue.put((rank, message[len(_MESSAGE) :]))
        if not self._closed.is_set():
            self._lost(rank)  # before the main thread hears of it, and ends by itself
            self._queue.put((rank, None))

    def _hears(self, peer: Connection) -> bool:
        """Whether a peer says something in time."""
        if peer.poll(SILENCE):
            return True
        return time.monotonic() - self._beaten > LATE and peer.poll(SILENCE)

    def _beat(self) -> None:
        while not self._closed.wait(BEAT):
            self._beaten = time.monotonic()
            for rank, peer in self._peers.items():
                # One who is sending is alive as it is.
                if self._locks[rank].acquire(blocking=False):
                    with suppress(OSError):
                        peer.send_bytes(b"")
                    self._locks[rank].release()


def end(sentence: str) -> None:
    """End this process from any thread: the main one may wait in a collective for ever."""
    with suppress(OSError):
        shown = b"\r\x1b[?25h" if os.isatty(2) else b""  # the cursor, should it be hidden
        os.write(2, shown + f"error: {sentence}\n".encode())
    os._exit(1)


@contextmanager
def within(seconds: float, sentence: str) -> Iterator[None]:
    """End the process with a sentence if what stands here takes longer."""
    timer = threading.Timer(seconds, end, [sentence])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def all_ranks() -> mx.distributed.Group:
    """The group of all, which MLX connects.

    Raises:
        LaunchError: it cannot.
    """
    with within(GATHERING, f"not all ranks were there after {GATHERING:.0f} s"):
        try:
            return mx.distributed.init(strict=True)
        except (RuntimeError, ValueError) as error:
            raise LaunchError(f"mlx.distributed cannot begin: {error}") from None


def connect(
    place: Place,
    group: mx.distributed.Group,
    lost: Callable[[int], None],
    left: Callable[[int], None] = lambda rank: None,
) -> Link:
    """Connect all ranks of a group with rank 0, until it is closed.

    Port and key go through the group's only collective, so that nobody else can speak here.

    Raises:
        LaunchError: they cannot be connected.
    """
    with within(GATHERING, f"not all {place.size} ranks were there after {GATHERING:.0f} s"):
        try:
            peers = _lead(place, group) if place.leads else _follow(place, group)
        except (OSError, EOFError, AuthenticationError) as error:
            raise LaunchError(f"ranks cannot be connected at {place.host}: {error}") from None
    return Link(place, peers, lost, left)


def _lead(place: Place, group: mx.distributed.Group) -> dict[int, Connection]:
    key = secrets.token_bytes(4 * _WORDS)
    family = "AF_INET"
    with Listener((place.host, 0), family, backlog=place.size, authkey=key) as listener:
        port = np.array([listener.address[1]], np.uint32)
        _told(group, np.concatenate([port, np.frombuffer(key, np.uint32)]))
        peers: dict[int, Connection] = {}
        while len(peers) < place.size - 1:
            try:
                peer = listener.accept()
                rank = int.from_bytes(peer.recv_bytes(8), "little")
            except (AuthenticationError, EOFError, ConnectionError):
                continue  # a stranger
            peers[rank] = peer
    return peers


def _follow(place: Place, group: mx.distributed.Group) -> dict[int, Connection]:
    port, *words = _told(group, np.zeros(1 + _WORDS, np.uint32)).tolist()
    key = np.array(words, np.uint32).tobytes()
    peer = Client((place.host, port), "AF_INET", authkey=key)
    peer.send_bytes(place.rank.to_bytes(8, "little"))
    return {0: peer}


def _told(group: mx.distributed.Group, words: np.ndarray) -> np.ndarray:
    """What rank 0 says, of which all others know zeros."""
    return np.array(mx.distributed.all_sum(mx.array(words), group=group))
