"""What Python shows of things: short texts, and a draft in a notebook as in a terminal."""

import re
from html import unescape
from html.parser import HTMLParser
from importlib.metadata import version
from typing import Any

import pytest

import mlx_diffgemma
from mlx_diffgemma import (
    ChatSession,
    Draft,
    PromptCache,
    fill,
    load,
    stream_edit,
    stream_generate,
)
from mlx_diffgemma.cli.display import draw, progress
from mlx_diffgemma.tasks.notebook import _CSS

# Not all of it is accepted in the first step.
RECORD = "Record: Bartholomew Featherstone from Liechtenstein, born 1984-03-12"


@pytest.fixture(scope="module")
def small() -> Any:
    return load()


def test_the_version_is_that_of_the_package() -> None:
    assert mlx_diffgemma.__version__ == version("mlx-diffgemma")


def test_dir_lists_public_names_alone() -> None:
    """It listed `import_module`, `Any` and `_HOME`, and completion offered them."""
    shown = {name for name in dir(mlx_diffgemma) if not name.startswith("__")}
    assert shown == set(mlx_diffgemma.__all__)


def test_nothing_shows_an_address_or_hundreds_of_numbers(small: Any) -> None:
    model, tokenizer = small
    events = list(stream_generate(model, tokenizer, "hello", seed=0, steps=2))
    filled = fill(model, tokenizer, "{{a:yes|no}}", seed=0, steps=1)
    session = ChatSession(model, tokenizer)
    for each in (model, tokenizer, PromptCache(model), session, filled, *events):
        shown = repr(each)
        assert len(shown) < 500
        assert " at 0x" not in shown
        assert type(each).__name__ in shown
    long = Draft(0, 1, 2, (1,), (True,), (0.0,), (1.0,), (False,), 1, 1, (True,), "x" * 5000)
    assert len(repr(long)) < 200


def test_a_draft_knows_where_its_schedule_was_entered(small: Any) -> None:
    """An edit begins at a later step; its first was said to have decoded 3% of the canvas."""
    drafts = [e for e in stream_edit(*small, "a hosue", "Fix", seed=0) if isinstance(e, Draft)]
    assert drafts[0].step == drafts[0].first_step > 1
    assert all("decoded" not in progress(draft) for draft in drafts)


class _Spans(HTMLParser):
    """Collects the text of each span with its style; fails where tags are not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, given: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.style = dict(given).get("style") or ""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] == "span":
            self.found.append((self.style, data))


def test_a_notebook_colours_tokens_as_a_terminal_does(small: Any) -> None:
    model, tokenizer = small
    draft = next(stream_generate(model, tokenizer, RECORD, seed=0))
    assert isinstance(draft, Draft)
    page = _Spans()
    page.feed(draft._repr_html_())
    assert not page.open
    drawn = draw(draft, tokenizer.pieces(draft.tokens))
    shown = {"opacity:.45": "dim"} | {
        f"font-weight:bold;color:{css}": f"bold {name}" for name, css in _CSS.items()
    }
    by_character = [shown[style] for style, text in page.found[:-1] for _ in text]
    in_terminal = [
        next(str(span.style) for span in drawn.spans if span.start <= at < span.end)
        for at in range(len(by_character))
    ]
    assert by_character == in_terminal
    assert len(set(by_character)) > 1
    assert "".join(text for _, text in page.found) == drawn.plain.replace("\n", "", 1)


def test_tokens_are_text_on_a_page_not_tags(small: Any) -> None:
    class Hostile:
        def pieces(self, ids: object) -> list[str]:
            return ['<script>"&']

    draft = Draft(0, 1, 2, (1,), (True,), (0.0,), (1.0,), (False,), 1, 1, (True,), "<b>", Hostile())  # type: ignore[arg-type]
    page = draft._repr_html_()
    assert "<script" not in page
    assert '<script>"&' in unescape(page)
    plain = Draft(
        0, 1, 2, (1,), (True,), (0.0,), (1.0,), (False,), 1, 1, (True,), "<b>"
    )._repr_html_()
    assert re.sub("</?pre>", "", plain) == "&lt;b&gt;"
