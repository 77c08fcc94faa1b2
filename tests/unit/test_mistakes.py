"""Mistakes of Python's callers raise this package's errors, before anything is computed."""

from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest

from mlx_diffgemma import (
    CanvasError,
    ChatSession,
    ConfidenceThreshold,
    ContextError,
    DiffusionGemma,
    EditError,
    Error,
    Pieces,
    SettingError,
    TemplateError,
    batch_generate,
    choose,
    edit,
    fill,
    generate,
    load,
)
from mlx_diffgemma.text.template import Hole

HALF = "\ud800"

Call = Callable[..., object]


@pytest.fixture(scope="module")
def small() -> Any:
    return load()


@pytest.fixture(autouse=True)
def _computes_nothing() -> Iterator[None]:
    def computed(*given: object) -> None:
        pytest.fail("computed")

    with (
        patch.object(DiffusionGemma, "decode", computed),
        patch.object(DiffusionGemma, "encode", computed),
    ):
        yield


def _case(call: Call, error: type[Error], said: str, *given: Any, **named: Any) -> Any:
    shown = ", ".join([*map(repr, given), *(f"{k}={v!r}" for k, v in named.items())])
    return pytest.param(call, error, said, given, named, id=f"{call.__name__}({shown})"[:60])


NO_HOLE = "has no hole such as"


@pytest.mark.parametrize(
    ("call", "error", "said", "given", "named"),
    [
        _case(generate, SettingError, "a seed must be from 0", "hi", seed=-1),
        _case(generate, SettingError, "a seed must be from 0", "hi", seed=2**70),
        _case(generate, SettingError, "a prompt is text, messages", None),
        _case(generate, SettingError, "a prompt is text, messages", b"abc"),
        _case(generate, SettingError, "a prompt is text, messages", {"role": "user"}),
        _case(generate, SettingError, "a whole number, not '4'", "hi", steps="4"),
        _case(generate, SettingError, "a sampler is", "hi", sampler="entropy"),
        _case(generate, SettingError, "is not in 0..1", "hi", sampler=ConfidenceThreshold("x")),  # type: ignore[arg-type]
        _case(generate, SettingError, "guards must be Guards", "hi", guards="all"),
        _case(generate, SettingError, "a stop string must be", "hi", stop=[5]),
        _case(generate, SettingError, "stop must be a list", "hi", stop=5),
        _case(generate, SettingError, "opening must be", "hi", opening=5),
        _case(generate, SettingError, "start must be", "hi", start="x"),
        _case(generate, SettingError, "tools must be", "hi", tools=5),
        _case(generate, SettingError, "prompt_cache must be", "hi", prompt_cache="x"),
        _case(generate, CanvasError, "no text in the pieces", "hi", start=Pieces((("", True),))),
        _case(generate, Error, "half of a surrogate pair", HALF),
        _case(generate, Error, "half of a surrogate pair", "hi", opening=HALF),
        _case(fill, TemplateError, NO_HOLE, "abc"),
        _case(fill, TemplateError, NO_HOLE, []),
        _case(fill, TemplateError, NO_HOLE, ["abc"]),
        _case(fill, TemplateError, "two holes are called a", [Hole("a"), Hole("a")]),
        _case(fill, TemplateError, "are texts and holes, not 5", [5]),
        _case(fill, TemplateError, "a template is text, not None", None),
        _case(fill, SettingError, "a prompt must be text", "{{a}}", prompt=5),
        _case(fill, Error, "half of a surrogate pair", HALF + "{{a}}"),
        _case(edit, SettingError, "the text must be text", None, "fix"),
        _case(edit, SettingError, "an instruction must be text", "a", None),
        _case(edit, SettingError, "strength must be over 0", "a", "fix", strength="much"),
        _case(edit, EditError, "a first and a last number", "a", "fix", lines=(1,)),
        _case(edit, Error, "half of a surrogate pair", HALF, "fix"),
        _case(choose, SettingError, "slots must be", "hi", 5),
        _case(choose, Error, "must be a list, not 'yes'", "hi", {"a": "yes"}),
        _case(choose, SettingError, "a label must be text", "hi", {"a": [1, 2]}),
        _case(choose, Error, "half of a surrogate pair", "hi", {"a": [HALF, "b"]}),
        _case(batch_generate, SettingError, "not one text", "hi"),
        _case(batch_generate, SettingError, "a prompt or a Request", [5]),
        _case(batch_generate, SettingError, "max_batch must be at least 1", ["hi"], max_batch=0),
        _case(ChatSession, SettingError, "overflow is one of", overflow="forget"),
        _case(ChatSession, SettingError, "a system message must be", system=5),
    ],
)
def test_mistakes_are_our_errors(
    small: Any, call: Call, error: type[Error], said: str, given: Any, named: Any
) -> None:
    """They were TypeError, AttributeError, or an answer: `fill([])` gave an empty text."""
    with pytest.raises(error, match=said):
        call(*small, *given, **named)


def test_mistakes_of_loading() -> None:
    for settings, said in (
        ({"speed": "slow"}, "speed is one of faithful"),
        ({"dtype": "int8"}, "dtype is one of float32"),
        ({"max_memory": 1.5}, "a whole number, not 1.5"),
    ):
        with pytest.raises(SettingError, match=said):
            load(**settings)  # type: ignore[arg-type]


def test_a_session_refuses_what_is_no_text(small: Any) -> None:
    with pytest.raises(ContextError, match="a message or a tool's result is text"):
        next(ChatSession(*small).stream(None))  # type: ignore[arg-type]


def test_one_stop_string_is_not_a_list_of_characters(small: Any) -> None:
    """`stop="am"` stopped at the first "a" or "m"."""
    from mlx_diffgemma import Request
    from mlx_diffgemma.text.vocabulary import Vocabulary

    model, tokenizer = small
    for stop in ("am", ["am"]):
        prepared = Request("hello", stop=stop).prepare(model, Vocabulary(model, tokenizer))
        assert prepared.stop == ("am",)
