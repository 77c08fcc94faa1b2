"""Model turns taken apart, and Gemma's syntax of tool calls."""

import time
from itertools import groupby, pairwise
from typing import Any

import pytest
from gemma import gemma_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_diffgemma import BadToolCall, Text, Thought, ToolCall
from mlx_diffgemma.text.calls import CallError, parse_call
from mlx_diffgemma.text.turns import Part, TurnReader

TOKENIZER = gemma_tokenizer()
TURN = (
    "Let me see.<|channel>thought\nA cold\nplace?<channel|>One moment"
    '<|tool_call>call:weather{city:<|"|>Oslo {a}<|"|>}<tool_call|>'
    "<|tool_call>nonsense<tool_call|> é done<|channel>thought\nagain<channel|>.<turn|>"
)


def joined(parts: list[Part]) -> list[Part]:
    """Neighbours of one kind put together: canvases end anywhere."""
    found: list[Part] = []
    for kind, run in groupby(parts, key=type):
        same = list(run)
        if kind in (Text, Thought):
            same = [kind("".join(part.text for part in same))]  # type: ignore[union-attr]
        found += same
    return found


WHOLE = [
    Text("Let me see."),
    Thought("A cold\nplace?"),
    Text("One moment"),
    ToolCall("weather", {"city": "Oslo {a}"}),
    BadToolCall("nonsense", "it does not begin with call:NAME{"),
    Text(" é done"),
    Thought("again"),
    Text("."),
]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 200), max_size=5))
def test_a_turn_is_read_alike_however_canvases_cut_it(cuts: list[int]) -> None:
    ids = TOKENIZER.encode(TURN)
    reader = TurnReader(TOKENIZER)
    parts: list[Part] = []
    edges = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    for start, end in pairwise(edges):
        before = reader.kinds(ids[start:end])
        assert before == reader.kinds(ids[start:end])  # looking takes nothing in
        parts += reader.feed(ids[start:end], last=end == len(ids) and start != end)
    assert joined(parts) == WHOLE


def test_a_thought_that_the_prompt_has_opened() -> None:
    """After a tool's response templates open the thought themselves, with its header."""
    reader = TurnReader(TOKENIZER, TOKENIZER.encode("<|turn>model\n<|channel>thought\n"))
    assert reader.thinking
    ids = TOKENIZER.encode("so\nit is<channel|>cold<turn|>")
    assert reader.kinds(ids)[-1] == "text"
    assert joined(reader.feed(ids, last=True)) == [Thought("so\nit is"), Text("cold")]
    closed = TurnReader(TOKENIZER, TOKENIZER.encode("<|channel>thought\n<channel|>"))
    assert not closed.thinking


def test_a_call_that_the_answer_does_not_end() -> None:
    """Generation stops at the response token, which need not follow a closing marker."""
    ids = TOKENIZER.encode("<|tool_call>call:now{}<|tool_response>")
    assert TurnReader(TOKENIZER).feed(ids, last=True) == [ToolCall("now", {})]


def test_text_that_looks_like_a_marker_stays_text() -> None:
    spelled = [i for part in ("<", "|channel", ">thought") for i in TOKENIZER.encode(part)]
    assert TurnReader(TOKENIZER).feed(spelled, last=True) == [Text("<|channel>thought")]


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("call:f{}", {}),
        (' call: f {a:<|"|>x, y}<|"|>} ', {"a": "x, y}"}),
        ("call:f{a:3,b:-2.5,c:1e3,d:true,e:false,g:null,h:None,i:True}",
         {"a": 3, "b": -2.5, "c": 1000.0, "d": True, "e": False, "g": None, "h": None, "i": True}),
        ('call:f{a:{b:[1,<|"|>x<|"|>,{}],<|"|>c d<|"|>:[]}}',
         {"a": {"b": [1, "x", {}], "c d": []}}),
        ('call:f{"a": "q\\"uote", b : bare word , c:12 C}',
         {"a": 'q"uote', "b": "bare word", "c": "12 C"}),
        ('call:f{a:<|"|><|"|>}', {"a": ""}),
        ('call:f{a:<|"|>"quoted" \\ line\nbreak<|"|>,}', {"a": '"quoted" \\ line\nbreak'}),
    ],
)  # fmt: skip
def test_values_of_a_call(text: str, arguments: dict[str, Any]) -> None:
    call = parse_call(text)
    assert call == ToolCall("f", arguments)
    assert [type(v) for v in call.arguments.values()] == [type(v) for v in arguments.values()]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "does not begin"),
        ("call:f", "does not begin"),
        ("call:f{a:1", "a comma or }"),
        ("call:f{a:1}}", "more behind its end"),
        ('call:f{a:<|"|>x}', "does not end"),
        ('call:f{a:"x}', "does not end"),
        ("call:f{a}", "a colon"),
        ("call:f{:1}", "a name is missing"),
        ("call:f{a:}", "a value is missing"),
        ("call:f{a:" + "[" * 100_000, "nested too deeply"),
        ("call:f{a:" + "9" * 5000 + "}", "too long"),  # ended the chat: Python prints no such int
        ("call:f{a:1e999}", "too large"),  # no JSON
        ('call:f{a:"\\ud800"}', "half a character"),  # no UTF-8
    ],
)
def test_calls_that_cannot_be_read(text: str, problem: str) -> None:
    with pytest.raises(CallError, match=problem):
        parse_call(text)


def test_words_without_quotes_are_one_text() -> None:
    assert parse_call("call:f{a:[1 2]}").arguments == {"a": ["1 2"]}


def test_digits_that_are_no_number_are_read_at_once() -> None:
    """All ways to divide them between two parts of a number were tried: minutes, for these."""
    digits = "1" * 200_000
    began = time.monotonic()
    assert parse_call(f"call:f{{a:{digits}x}}").arguments == {"a": f"{digits}x"}
    assert time.monotonic() - began < 10


Names = st.text("abcdefgh_", min_size=1, max_size=6)
Values = st.recursive(
    st.none() | st.booleans() | st.integers(-1000, 1000) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(Names, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(Names, Values, max_size=4))
def test_what_a_template_writes_is_read_back(arguments: dict[str, Any]) -> None:
    function = {"name": "f", "arguments": arguments}
    message = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
    text = TOKENIZER.apply_chat_template([{"role": "user", "content": "x"}, message])
    call = text.partition("<|tool_call>")[2].partition("<tool_call|>")[0]
    assert parse_call(call).arguments == arguments
