"""Completions that ask how likely their prompts are, as evaluation tools ask."""

from collections.abc import Iterator
from typing import Any

import pytest
from servers import Server, serving

from mlx_diffgemma import load, score


@pytest.fixture(scope="module")
def small() -> Iterator[Server]:
    with serving() as server:
        yield server


ROUTE = "/v1/completions"
ASK: dict[str, Any] = {"echo": True, "max_tokens": 0, "logprobs": 2}


def test_scores_are_those_of_python(small: Server) -> None:
    texts = ["The capital of Norway", "a small house\nnear the river"]
    reply = small.client().completions.create(model="x", prompt=texts, **ASK)
    for text, choice in zip(texts, reply.choices, strict=True):
        found = score(*load(), None, text, top=2)
        assert choice.text == text
        assert choice.finish_reason == "length"
        told = choice.logprobs
        assert told is not None
        assert told.tokens == list(found.pieces)
        assert told.token_logprobs == pytest.approx(list(found.log_probabilities), abs=1e-4)
        assert told.text_offset is not None
        for piece, at in zip(found.pieces, told.text_offset, strict=True):
            assert text[at:].startswith(piece)
        assert told.top_logprobs is not None
        for piece, chance, best in zip(
            found.pieces, found.log_probabilities, told.top_logprobs, strict=True
        ):
            assert 2 <= len(best) <= 3  # the likeliest, and the one that is there
            assert best[piece] == pytest.approx(chance, abs=1e-4)
    assert reply.usage
    assert reply.usage.completion_tokens == 0
    read = sum(1 + len(load()[1].encode(text)) for text in texts)
    assert reply.usage.prompt_tokens == read


def test_prompts_of_ids_and_one_token_more(small: Server) -> None:
    """lm-evaluation-harness asks so, and leaves the last token out of what it sums up."""
    ids = [[2, 5, 361, 359, 345], [2, 300, 301]]
    ask = {**ASK, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1234}
    reply = small.post(ROUTE, {"prompt": ids, **ask})
    assert reply.headers["x-ignored-parameters"] == "seed,temperature"
    choices = reply.json()["choices"]
    for given, choice in zip(ids, choices, strict=True):
        found = score(*load(), given[:1], given[1:])
        told = choice["logprobs"]
        first, *chances = told["token_logprobs"]
        assert first is told["top_logprobs"][0] is None
        assert chances[:-1] == pytest.approx(list(found.log_probabilities), abs=1e-4)
        assert chances[-1] == max(told["top_logprobs"][-1].values())
        assert chances[-1] == pytest.approx(found.following[0][1], abs=1e-4)
    assert reply.json()["usage"] == {
        "prompt_tokens": 8, "completion_tokens": 2, "total_tokens": 10
    }  # fmt: skip
    (alone,) = small.post(ROUTE, {"prompt": ids[0], **ask}).json()["choices"]
    assert alone == choices[0]
    (bare,) = small.post(ROUTE, {"prompt": ids[0], **ASK, "logprobs": None}).json()["choices"]
    assert bare["logprobs"] is None
    written = small.post(ROUTE, {"prompt": ids[0], "max_tokens": 4, "steps": 1, "echo": True})
    assert written.json()["choices"][0]["text"].startswith(load()[1].decode(ids[0]))
    assert written.json()["usage"]["prompt_tokens"] == len(ids[0])


def test_what_makes_no_sense_is_refused(small: Server) -> None:
    for change, message in (
        ({"echo": False}, "max_tokens 0 goes with echo"),
        ({"prompt": [2]}, "a prompt of one token has nothing to score"),
        ({"prompt": [2, 768]}, "a token id must be from 0 to 767"),
        ({"prompt": [2, -1]}, "prompt"),
        ({"prompt": [[2, 3], []]}, "prompt"),
        ({"prompt": [2, "a"]}, "prompt"),
        ({"prompt": [2] * 4097}, "more than the context"),
        ({"logprobs": 6}, "logprobs"),
        ({"n": 2}, "neither stream, suffix, opening, n nor best_of"),
        ({"best_of": 2}, "neither stream, suffix, opening, n nor best_of"),
        ({"stream": True}, "neither stream, suffix, opening, n nor best_of"),
        ({"suffix": "x"}, "neither stream, suffix, opening, n nor best_of"),
        ({"prompt": [2, 3], "suffix": "x", "max_tokens": 4}, "a prompt of text, not of token ids"),
    ):
        reply = small.post(ROUTE, {"prompt": "a", **ASK, **change})
        assert reply.status_code == 400, change
        assert message in reply.json()["error"]["message"]
    told = small.post(ROUTE, {"prompt": "a", "max_tokens": 2, "steps": 1, "logprobs": 1})
    assert told.headers["x-ignored-parameters"] == "logprobs"
