"""Where an answer ends early: at the first of some strings."""

from collections.abc import Sequence


class StopStrings:
    """Cuts text before the first of some strings; an end that may become one is held back."""

    def __init__(self, stop: Sequence[str]):
        self._stop = [text for text in stop if text]
        self._held = ""
        self.hit: str | None = None  # the one that was found

    def feed(self, text: str) -> str:
        """Take in more text and return what can be shown of all."""
        self._held += text
        found = [(at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        end, self.hit = min(found, default=(len(self._held), None))
        if not found:
            held = (
                n
                for stop in self._stop
                for n in range(min(len(stop) - 1, len(self._held)), 0, -1)
                if self._held.endswith(stop[:n])
            )
            end -= max(held, default=0)
        shown, self._held = self._held[:end], "" if found else self._held[end:]
        return shown

    def rest(self) -> str:
        """Return what was held back, where no more text comes."""
        shown, self._held = self._held, ""
        return shown
