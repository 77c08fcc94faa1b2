"""Pictures of the page, from real runs of the small model; screenshots.py takes them, too.

    python scripts/page_pictures.py docs

Needs Chromium. Writes page.png (a canvas that resolves), page-fill.png (holes filled, in the dark)
and page-phone.png (an edit, on a phone).
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

WIDE, PHONE = {"width": 1080, "height": 560}, {"width": 390, "height": 780}

# Drafts of the answer that the first picture shows.
STEPS = 2

SEED = "0"

# It takes seven steps.
RECORD = "Record: Bartholomew Featherstone from Liechtenstein, born 1984-03-12"


@contextmanager
def serving() -> Iterator[str]:
    """A server of the small model; its address."""
    command = [sys.executable, "-m", "mlx_diffgemma", "serve", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    try:
        for line in process.stderr:
            if found := re.search(r"running on (http://\S+)", line):
                yield found[1]
                return
        raise SystemExit("the server did not start")
    finally:
        process.terminate()
        process.wait()


def opened(browser: Browser, url: str, size: dict[str, int], scheme: str) -> Page:
    """The page in a window of its own, with a fixed seed."""
    page = browser.new_page(
        viewport=size,  # type: ignore[arg-type]
        color_scheme=scheme,  # type: ignore[arg-type]
        device_scale_factor=2,
        reduced_motion="reduce",
    )
    page.set_default_timeout(120_000)
    page.goto(url)
    expect(page.locator(".example").first).to_be_visible()
    page.click("#settings-open")
    page.fill("#set-seed", SEED)
    page.click("text=Save")
    return page


def save(page: Page, path: Path) -> None:
    page.mouse.move(0, 0)
    page.wait_for_timeout(600)  # colours change slowly
    page.screenshot(path=path)
    print(path)


def ask(page: Page, example: str) -> None:
    page.fill("#message", example)
    page.keyboard.press("Enter")
    expect(page.locator("#send")).to_be_visible(timeout=120_000)


def page_pictures(directory: Path) -> None:
    with serving() as url, sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = opened(browser, url, WIDE, "light")
        for question in (
            "What is the capital of Norway?",
            "hello",
            RECORD,
        ):
            page.click("#chat-new")
            ask(page, question)
        # Watched again by hand, the canvas stands still for the picture.
        page.evaluate("window.setInterval = step => (window.next = step, 0)")
        page.locator(".model").get_by_text("Watch again").click()
        for _ in range(STEPS - 1):
            page.evaluate("window.next()")
        save(page, directory / "page.png")

        page = opened(browser, url, WIDE, "dark")
        page.click("#tab-fill")
        page.locator("#fill-examples button").last.click()
        page.click("#fill-go")
        expect(page.locator("#fill-result mark")).to_be_visible(timeout=120_000)
        save(page, directory / "page-fill.png")

        page = opened(browser, url, PHONE, "light")
        page.click("#tab-edit")
        page.locator("#edit-examples button").first.click()
        page.click("#edit-go")
        expect(page.locator("#edit-result .message-actions")).to_be_visible(timeout=120_000)
        page.locator("#edit-result").scroll_into_view_if_needed()
        save(page, directory / "page-phone.png")
        browser.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    page_pictures(parser.parse_args().directory)
