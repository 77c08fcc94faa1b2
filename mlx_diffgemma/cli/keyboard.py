"""The keyboard while an answer is computed: signals are counted, nothing that is typed shows."""

import os
import signal
import socket
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

# Removes what is drawn below the cursor, and shows the cursor again.
LEAVE = b"\r\x1b[J\x1b[?25h\x1b[?2004l"

# Terminals that know it wrap a paste in marks, so that its lines stay together.
PASTES = b"\x1b[?2004h"


class Interrupts:
    """While open, the first Ctrl-C only sets `stopped`; a second one leaves.

    An exception in the middle of a step would leave a cache half written. Python calls a handler
    once for all signals that came during a long operation, so they are counted by what the signal
    itself writes to a socket.
    """

    stopped = False

    def __enter__(self) -> "Interrupts":
        self._received, self._sent = socket.socketpair()
        self._received.setblocking(False)
        self._sent.setblocking(False)
        descriptor = self._sent.fileno()
        self._woken = signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)
        self._before = signal.signal(signal.SIGINT, self._stop)
        return self

    def __exit__(self, *of: object) -> None:
        signal.signal(signal.SIGINT, self._before)
        signal.set_wakeup_fd(self._woken)
        self._received.close()
        self._sent.close()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        try:
            count = self._received.recv(4096).count(number)
        except BlockingIOError:  # counted already, by the call for the one before
            return
        if self.stopped or count > 1:
            self.stopped = True
            signal.signal(number, signal.SIG_IGN)  # a third one must not tear what is closing
            raise KeyboardInterrupt
        self.stopped = bool(count)


@contextmanager
def silenced(descriptor: int | None, *, by_key: bool = False) -> Iterator[None]:
    """Do not echo what is typed at a terminal: it would stand amid what is drawn.

    What is typed stays in the terminal's queue, also when Ctrl-C comes, which stays a signal.
    Ctrl-Z and SIGTERM put the terminal back first. Nothing happens where the descriptor is no
    terminal, or another process has it.

    Args:
        descriptor: of the terminal; None is none.
        by_key: keys can be read as they come, and not only whole lines; pastes are marked, and
            Ctrl-Z is a key as others are.
    """
    main = threading.current_thread() is threading.main_thread()  # the one that gets signals
    if descriptor is None or not main or not in_foreground(descriptor):
        yield
        return
    before = termios.tcgetattr(descriptor)

    def change(mode: list[Any]) -> None:
        # In the background it may be continued, too, and would be stopped for changing the mode.
        with suppress(termios.error):  # it has hung up
            if in_foreground(descriptor):
                termios.tcsetattr(descriptor, termios.TCSANOW, mode)

    def silence() -> None:
        change(_quiet(descriptor, before, by_key))
        if by_key:
            os.write(descriptor, PASTES)

    def aside(number: int, frame: FrameType | None) -> None:
        os.write(descriptor, LEAVE)  # a handler may interrupt a stream's own write
        change(before)
        signal.signal(number, handlers[signal.Signals(number)])
        signal.raise_signal(number)
        signal.signal(number, aside)  # it was continued
        silence()

    signals = (signal.SIGTERM, signal.SIGTSTP)
    handlers = {number: signal.getsignal(number) for number in signals}
    for number in signals:
        signal.signal(number, aside)
    try:
        silence()
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        change(before)


def in_foreground(descriptor: int) -> bool:
    """Whether a terminal is this process's to draw on and to change; in a shell's `&` it is not."""
    if not os.isatty(descriptor):
        return False
    try:
        return os.tcgetpgrp(descriptor) == os.getpgrp()
    except OSError:  # it controls no process, as in some containers
        return True


def _quiet(descriptor: int, mode: list[Any], by_key: bool) -> list[Any]:
    """A terminal's settings without echo."""
    flags_in, flags_out, control, local, speed_in, speed_out, characters = mode
    local = local & ~termios.ECHO & ~termios.ECHONL | termios.NOFLSH
    if by_key:
        local &= ~(termios.ICANON | termios.IEXTEN)
        flags_in &= ~(termios.ICRNL | termios.INLCR | termios.IGNCR | termios.IXON)
        characters = list(characters)
        characters[termios.VMIN], characters[termios.VTIME] = b"\x01", b"\x00"
        characters[termios.VSUSP] = bytes([os.fpathconf(descriptor, "PC_VDISABLE")])
    return [flags_in, flags_out, control, local, speed_in, speed_out, characters]
