"""Chromium, and what a page that is shown in it did wrong."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")

# Without those of the network, Chromium asks hosts of its maker at each start.
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

WIDE, PHONE = {"width": 1200, "height": 800}, {"width": 390, "height": 780}


@contextmanager
def chromium() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


class Problems:
    """What a page did that it must not do: errors, and requests to elsewhere."""

    def __init__(self, page: Any, url: str):
        self.found: list[str] = []
        page.on("pageerror", lambda error: self.found.append(str(error)))
        page.on("console", self._said)
        page.on("dialog", self._asked_back)
        page.on("request", lambda request: self._asked(request.url, url))

    def _asked_back(self, dialog: Any) -> None:
        if dialog.type != "confirm":  # none of ours says anything
            self.found.append(dialog.message)
        dialog.accept()

    def _said(self, message: Any) -> None:
        # Chromium tells of each refusal of a server by itself.
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            self.found.append(message.text)

    def _asked(self, asked: str, url: str) -> None:
        if not asked.startswith((url, "data:", "blob:")):
            self.found.append(f"asked for {asked}")


def sse(*events: Any, end: bool = True) -> str:
    """A stream of chunks with these deltas; a string goes as it is, a dictionary is a delta."""
    lines = []
    for event in events:
        if isinstance(event, dict):
            event = f"data: {json.dumps({'choices': [{'index': 0, 'delta': event}]})}"
        lines.append(event)
    return "".join(f"{line}\n\n" for line in [*lines, *["data: [DONE]"] * end])


def draft(*tokens: tuple[str, bool, float], step: int = 1) -> str:
    """A draft event of these tokens: text, whether accepted, probability."""
    facts = {
        "canvas": 0,
        "step": step,
        "steps": 48,
        "text": "".join(text for text, _, _ in tokens),
        "accepted": sum(accepted for _, accepted, _ in tokens),
        "length": len(tokens),
        "tokens": [{"text": t, "accepted": a, "probability": p} for t, a, p in tokens],
        "positions": "".join("#" if a else str(int(9 * p)) for _, a, p in tokens),
    }
    return f"event: draft\ndata: {json.dumps(facts)}"
