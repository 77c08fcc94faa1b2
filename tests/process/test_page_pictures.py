"""Pictures on the page, in Chromium: pasted, dropped, chosen, made small, sent, kept, removed."""

import base64
import json
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from browser import PHONE, WIDE, Problems, chromium, needs_chromium
from looking import GENERATION, looking_checkpoint
from PIL import Image
from servers import Server, serving

from mlx_diffgemma import load

pytestmark = needs_chromium

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model that sees, and is content with what it writes at once."""
    directory = looking_checkpoint(tmp_path_factory.mktemp("looking"))
    content = {**GENERATION, "stability_threshold": 0, "confidence_threshold": 99}
    (directory / "generation_config.json").write_text(json.dumps(content))
    with serving(lambda: load(directory, dtype="float32")) as server:
        yield server


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    """Opens pages; at the end, none may have had a problem."""
    contexts: list[Any] = []
    problems: list[Problems] = []

    def opened(server: Server, **settings: Any) -> Any:
        contexts.append(browser.new_context(**{"viewport": WIDE} | settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        problems.append(Problems(page, server.url))
        page.goto(server.url)
        return page

    yield opened
    found = [each for problem in problems for each in problem.found]
    for context in contexts:
        context.close()
    assert found == []


def expect(locator: Any) -> Any:
    from playwright.sync_api import expect

    expect.set_options(timeout=30_000)
    return expect(locator)


def file_of(width: int, height: int, kind: str = "PNG", **options: Any) -> bytes:
    drawn = np.random.default_rng(width).integers(0, 256, (height, width, 3))
    file = BytesIO()
    Image.fromarray(drawn.astype(np.uint8)).save(file, kind, **options)
    return file.getvalue()


GIVE = """([name, kind, files, text]) => {
  const transfer = new DataTransfer();
  for (const [name, type, data] of files) {
    const bytes = Uint8Array.from(atob(data), (each) => each.charCodeAt(0));
    transfer.items.add(new File([bytes], name, { type }));
  }
  if (text) transfer.setData("text/plain", text);
  const common = { bubbles: true, cancelable: true };
  const event = kind === "paste"
    ? new ClipboardEvent("paste", { ...common, clipboardData: transfer })
    : new DragEvent(kind, { ...common, dataTransfer: transfer });
  return !document.querySelector(name).dispatchEvent(event);
}"""


def give(page: Any, kind: str, *data: bytes, text: str = "", name: str = "a.png") -> bool:
    """Paste or drop files; say whether the page has taken them."""
    files = [[name, "image/png", base64.b64encode(each).decode()] for each in data]
    place = "#message" if kind == "paste" else "#scroll"
    return bool(page.evaluate(GIVE, [place, kind, files, text]))


def sees(page: Any) -> None:
    expect(page.locator("#picture-add")).to_be_visible()  # the model is known


def sent(page: Any) -> list[Any]:
    found: list[Any] = []
    page.on("request", lambda it: found.append(it.post_data_json) if it.method == "POST" else None)
    return found


def image_of(address: str) -> Image.Image:
    assert address.startswith("data:image/")
    return Image.open(BytesIO(base64.b64decode(address.partition(",")[2])))


def test_a_pasted_picture_is_sent_and_answered(seeing: Server, opened: Open) -> None:
    """It shows before and after, and after a reload, and goes along with the next question."""
    page = opened(seeing)
    asked = sent(page)
    sees(page)
    data = file_of(60, 40)
    assert give(page, "paste", data)
    expect(page.locator("#pictures canvas")).to_have_count(1)
    page.fill("#message", "What is this?")
    page.keyboard.press("Enter")
    expect(page.locator(".user canvas")).to_have_count(1)
    expect(page.locator("#pictures canvas")).to_have_count(0)
    expect(page.locator(".model .facts")).to_be_visible()
    assert page.locator(".model .said").inner_text()
    picture, text = asked[0]["messages"][0]["content"]
    assert text == {"type": "text", "text": "What is this?"}
    seen = image_of(picture["image_url"]["url"])
    given = Image.open(BytesIO(data))
    assert (seen.format, seen.convert("RGB").tobytes()) == (
        "PNG",
        given.tobytes(),
    )  # small: pixel by pixel
    page.reload()
    expect(page.locator(".user canvas")).to_have_count(1)
    shown = "canvas => [...canvas.getContext('2d').getImageData(5, 5, 1, 1).data].slice(0, 3)"
    page.wait_for_function(f"() => ({shown})(document.querySelector('.user canvas')).some(Boolean)")
    assert page.eval_on_selector(".user canvas", shown) == [*given.getpixel((5, 5))]
    page.fill("#message", "And now?")
    page.keyboard.press("Enter")
    expect(page.locator(".model .facts")).to_have_count(2)
    assert asked[1]["messages"][0] == asked[0]["messages"][0]
    assert asked[1]["messages"][2]["content"] == "And now?"


def test_a_photo_is_made_small_and_stands_upright(seeing: Server, opened: Open) -> None:
    """A phone's has more bytes than the server takes, lies on its side and knows the place."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    photo = file_of(3000, 2000, "JPEG", exif=exif, quality=95)
    page = opened(seeing)
    asked = sent(page)
    sees(page)
    with page.expect_file_chooser() as chooser:
        page.click("#picture-add")
    file = {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": photo}
    chooser.value.set_files([file])
    expect(page.locator("#pictures canvas")).to_have_count(1)
    page.click("#send")  # a picture alone is a message, too
    expect(page.locator(".model .facts")).to_be_visible()
    (picture,) = asked[0]["messages"][0]["content"]
    seen = image_of(picture["image_url"]["url"])
    assert seen.width < seen.height <= 1344
    assert len(picture["image_url"]["url"]) <= 400_000
    assert not seen.getexif()


def test_pictures_are_dropped_removed_and_bounded(seeing: Server, opened: Open) -> None:
    page = opened(seeing)
    asked = sent(page)
    sees(page)
    assert give(page, "dragover", b"")  # or the browser would leave the page
    assert give(page, "drop", *[file_of(20 + i, 20) for i in range(9)])
    expect(page.locator("#pictures canvas")).to_have_count(8)
    expect(page.locator("#status")).to_have_text("A message has 8 pictures at most.")
    page.get_by_label("Remove picture 1", exact=True).click()
    expect(page.locator("#pictures canvas")).to_have_count(7)
    for _ in range(6):
        page.get_by_label("Remove picture 2", exact=True).click()
    for wrong in (b"", b"<svg xmlns='http://www.w3.org/2000/svg'/>", file_of(30, 30)[:60]):
        assert give(page, "paste", wrong, name="x.png")
        expect(page.locator("#status")).to_have_text("x.png is no picture that this browser reads.")
        page.evaluate("document.getElementById('status').textContent = ''")
    assert not give(page, "paste", file_of(20, 20), text="a text with a picture of itself")
    page.fill("#message", "x")
    page.keyboard.press("Enter")
    expect(page.locator(".model .facts")).to_be_visible()
    picture, _ = asked[0]["messages"][0]["content"]
    assert image_of(picture["image_url"]["url"]).size == (21, 20)


def test_a_model_that_reads_text_alone_has_no_button(opened: Open) -> None:
    with serving() as server:
        page = opened(server, has_touch=True)
        expect(page.locator(".example").first).to_be_visible()
        expect(page.locator("#picture-add")).to_be_hidden()
        expect(page.locator("#picture-take")).to_be_hidden()
        assert give(page, "drop", file_of(20, 20))
        expect(page.locator("#status")).to_have_text("This model reads text alone.")
        expect(page.locator("#pictures canvas")).to_have_count(0)


def test_history_keeps_pictures_within_its_bounds(seeing: Server, opened: Open) -> None:
    """Pictures go before chats do; addresses that others wrote there are not asked for."""
    page = opened(seeing)
    sees(page)
    address = "data:image/png;base64," + base64.b64encode(file_of(20, 20)).decode()
    large = "data:image/png;base64," + "A" * 300_000

    def keep(name: str, changed: int, *pictures: Any) -> None:
        messages = [{"role": "user", "content": name, "pictures": pictures}]
        chat = {"messages": messages, "changed": changed, "revision": "x"}
        page.evaluate(
            "([name, raw]) => localStorage.setItem('diffgemma.chat.' + name, raw)",
            [name, json.dumps(chat)],
        )

    bad = ["https://elsewhere.example/x.png", "data:image/svg+xml;base64,AAAA", 5, None, address]
    keep("hostile", 4, *bad)
    for i in range(3):
        keep(f"large {i}", i, *[large] * 3)
    page.reload()
    page.get_by_role("button", name="hostile", exact=True).click()
    expect(page.locator(".user canvas")).to_have_count(1)
    sees(page)
    page.click("#chat-new")
    page.fill("#message", "hello")
    page.keyboard.press("Enter")
    expect(page.locator(".model .facts")).to_be_visible()
    kept = page.evaluate("JSON.stringify(localStorage)")
    assert len(kept) < 2_100_000
    expect(page.locator("#chat-list li")).to_have_count(5)
    page.get_by_role("button", name="large 0", exact=True).click()
    expect(page.locator(".user .note")).to_have_text("3 pictures were not kept.")


@pytest.mark.parametrize("size", [WIDE, PHONE])
def test_axe_finds_nothing_beside_pictures(seeing: Server, opened: Open, size: Any) -> None:
    """On a phone there is a button for the camera."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    phone = size is PHONE
    page = opened(seeing, viewport=size, reduced_motion="reduce", has_touch=phone, is_mobile=phone)
    sees(page)
    assert page.locator("#picture-take").is_visible() == phone
    assert page.get_attribute("#picture-camera", "capture") == "environment"
    assert give(page, "paste", file_of(60, 40), file_of(300, 20))
    expect(page.locator("#pictures canvas")).to_have_count(2)

    def check() -> None:
        found = axe.run(page).response["violations"]
        assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []
        assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0

    check()
    page.click("#send")
    expect(page.locator(".model .facts")).to_be_visible()
    check()
