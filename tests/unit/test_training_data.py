"""Files of examples: what becomes a sample, and that each mistake is named by its file and line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gemma import gemma_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from mlx_diffgemma.checkpoint.files import SHIPPED
from mlx_diffgemma.tasks.request import encode_prompt
from mlx_diffgemma.training import lines
from mlx_diffgemma.training.data import Data, Encoder, read_data
from mlx_diffgemma.training.lines import DataError, Keys
from mlx_diffgemma.training.run import encoder_of
from mlx_diffgemma.training.settings import Settings

ENCODER = encoder_of(SHIPPED["tiny"], Settings())
TOKENIZER = ENCODER.tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "2 it is"},
]


def written(folder: Path, *examples: Any, name: str = "train") -> Path:
    """A folder with a file of lines: objects as JSON, bytes as they are."""
    lines = [each if isinstance(each, bytes) else json.dumps(each).encode() for each in examples]
    (folder / f"{name}.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    return folder


def read(folder: Path, encoder: Encoder = ENCODER, keys: Keys | None = None) -> Data:
    return read_data(folder, encoder, keys or Keys(), train=True, test=False)


@pytest.mark.parametrize(
    "example",
    [
        {"messages": CHAT},
        {"prompt": CHAT[:-1], "completion": CHAT[-1:]},
        {"prompt": CHAT[:-1], "completion": "2 it is", "id": 7},
    ],
)
def test_the_response_is_what_the_last_turn_adds_to_the_prompt(
    tmp_path: Path, example: Any
) -> None:
    """It begins behind the turn's header, which generation gives, and its end token ends it."""
    (found,) = read(written(tmp_path, example)).train
    prompt, response = found.sample.prompt, found.sample.response
    assert list(prompt) == encode_prompt(TOKENIZER, CHAT[:-1])
    assert TOKENIZER.decode(response) == "2 it is"
    assert response[-1] == TOKENIZER.token_id("<turn|>")
    assert found.asks


def test_a_prompt_and_a_completion_are_a_chat_of_two_turns(tmp_path: Path) -> None:
    (found,) = read(written(tmp_path, {"prompt": "one", "completion": "2 it is"})).train
    assert list(found.sample.prompt) == encode_prompt(TOKENIZER, "one")
    own = Keys(prompt="ask", completion="say")
    again = read(written(tmp_path, {"ask": "one", "say": "2 it is"}), keys=own).train
    assert again[0].sample == found.sample


def test_text_is_read_as_it_stands_and_ends(tmp_path: Path) -> None:
    marked = "<bos><|turn>user\nhello<turn|>\n"
    plain, whole = read(written(tmp_path, {"text": "hello"}, {"text": marked})).train
    begin = (TOKENIZER.token_id("<bos>"),)
    assert plain.sample.prompt == whole.sample.prompt == begin
    assert plain.sample.response == (*TOKENIZER.encode("hello"), ENCODER.ends[0])
    assert (*whole.sample.prompt, *whole.sample.response) == (
        *TOKENIZER.encode(marked),
        ENCODER.ends[0],
    )
    assert not plain.asks


def test_tools_and_their_calls(tmp_path: Path) -> None:
    """Arguments may be OpenAI's text of JSON; calls end where their results would begin."""
    encoder = replace(ENCODER, tokenizer=gemma_tokenizer())
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    call = {"function": {"name": "add", "arguments": '{"a": 1}'}}
    asked = {"role": "user", "content": "one"}
    called = [asked, {"role": "assistant", "content": None, "tool_calls": [call]}]
    result = {"role": "tool", "name": "add", "content": "2"}
    chat = [*called, result, {"role": "assistant", "content": "2"}]
    (found,) = read(written(tmp_path, {"messages": chat, "tools": tools}), encoder).train
    assert "call:add{a:1}" in encoder.tokenizer.decode(found.sample.prompt)
    written(tmp_path, {"messages": called, "tools": tools})
    with pytest.raises(DataError, match="line 1: the chat template does not end the answer"):
        read(tmp_path, encoder)
    waits = encoder.tokenizer.token_id("<|tool_response>")
    (found,) = read(tmp_path, replace(encoder, ends=(*encoder.ends, waits))).train
    assert found.sample.response[-1] == waits
    with pytest.raises(DataError, match="line 1: it has tools, and this model's chat template"):
        read(written(tmp_path, {"messages": chat, "tools": tools}))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "it is not JSON"),
        (b"[1]", "it is not a JSON object"),
        (b'{"text": "\xff"}', "it is not UTF-8"),
        (b"[" * 3000, "it is not JSON: values are nested too deeply"),
        (b'{"prompt": "a", "completion": NaN}', "it is not JSON"),
        ({}, "it is empty"),
        ({"question": "a"}, "its keys are ['question']"),
        ({"prompt": "", "completion": "b"}, "the prompt is empty"),
        ({"prompt": "a", "completion": " \n"}, "the completion is empty"),
        ({"prompt": "a", "completion": 3}, "the completion is neither text nor messages"),
        ({"prompt": "a", "completion": "b", "images": ["x.png"]}, "only text can be trained on"),
        ({"messages": []}, "messages are no list"),
        ({"messages": "hello"}, "messages are no list"),
        ({"messages": CHAT[:-1]}, "the last message is the user's"),
        ({"messages": CHAT[-1:]}, "no prompt before it"),
        ({"messages": [CHAT[1], {"role": "assistant", "content": ""}]}, "message is empty"),
        ({"messages": [CHAT[1], {"role": "gpt", "content": "x"}]}, "role 'gpt'"),
        ({"messages": [CHAT[1], {"from": "gpt", "value": "x"}]}, "no object with a role"),
        ({"messages": [{"role": "user", "content": 3}, CHAT[-1]]}, "no content that is text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, CHAT[-1]]},
            "only text content is supported",
        ),
        ({"messages": CHAT, "tools": [3]}, "tools are no list"),
        ({"prompt": "a", "completion": "b<turn|>c"}, "'<turn|>', a special token"),
        ({"prompt": "a", "completion": "<bos>"}, "'<bos>', a special token"),
        ({"prompt": "word " * 3000, "completion": "b"}, "leaves no room for an answer"),
        ({"text": "hello"}, "it has text, and line 1 has prompt and completion"),
    ],
)
def test_a_mistake_is_named_by_file_and_line(tmp_path: Path, line: Any, said: str) -> None:
    """And by nothing but a sentence; blank lines count as lines."""
    right = {"prompt": "a", "completion": "b"}
    folder = written(tmp_path, right, b"", line, right)
    if isinstance(line, dict) and "messages" in line:
        folder = written(tmp_path, {"messages": CHAT}, b"", line)
    with pytest.raises(DataError) as failed:
        read(folder)
    assert str(failed.value).startswith(f"{folder / 'train.jsonl'}, line 3: ")
    assert said in str(failed.value)
    assert len(str(failed.value)) < 600


def test_mistakes_are_told_together_and_counted(tmp_path: Path) -> None:
    with pytest.raises(DataError) as failed:
        read(written(tmp_path, *[b"{"] * 7))
    assert str(failed.value).count("line ") == lines.MOST_SAID + 3  # JSON's own say "line 1"
    assert str(failed.value).endswith("(and 4 more)")


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=3), st.lists))
def test_no_value_in_the_place_of_another_is_a_crash(value: Any) -> None:
    chat = {"messages": value}, {"messages": [value]}, {"messages": [{"role": value}, CHAT[-1]]}
    call = {"role": "assistant", "tool_calls": value}
    others = {"text": value}, {"prompt": value, "completion": value}, {"messages": [CHAT[0], call]}
    content = {"messages": [{"role": "user", "content": value}, CHAT[-1]], "tools": value}
    for each in (*chat, *others, content):
        line = json.dumps(each).encode()
        try:
            record = lines._record(lines._object(line), Keys().kind(each), Keys())
            ENCODER.sample(record)
        except lines.Error:
            continue


def test_files_that_cannot_be_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"has no train\.jsonl"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"train\.jsonl has no examples"):
        read(written(tmp_path, b"", b"  "))
    with pytest.raises(DataError, match="is a file; --data names the folder"):
        read(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match="hf download --repo-type dataset mlx-community/wikisql"):
        read(Path("mlx-community/wikisql"))
    (tmp_path / "train.jsonl").write_text('{"text": "a"}', encoding="utf-16")
    with pytest.raises(DataError, match=r"train\.jsonl is UTF-16 text"):
        read(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"text": "a"}', encoding="utf-8-sig")
    assert len(read(tmp_path).train) == 1
    monkeypatch.setattr(lines, "MOST_LINE", 50)
    huge = {"text": "a" * 1000}
    with pytest.raises(DataError, match="line 2: it has more than 50 bytes") as failed:
        read(written(tmp_path, {"text": "a"}, huge, {"text": "b"}))
    assert "more)" not in str(failed.value)
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "train.jsonl").mkdir()
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read(tmp_path)


def test_long_answers_are_truncated_and_counted(tmp_path: Path) -> None:
    """And know it: what fills the last canvas of such a one is not the end of an answer."""
    long, short = ({"prompt": "a", "completion": "b " * count} for count in (500, 5))
    data = read(written(tmp_path, short, long), replace(ENCODER, most=100))
    cut, whole = data.train[1].sample, data.train[0].sample
    assert (cut.truncated, whole.truncated) == (True, False)
    assert len(cut.prompt) + len(cut.response) == 100
    assert "1 of 2 examples are longer than 100 tokens" in data.notices[0]
    assert "(the first in line 2)" in data.notices[0]
    in_context = read(tmp_path, replace(ENCODER, context=200)).train[1].sample
    assert len(in_context.response) == 128  # two canvases of 64 are what fits


def test_an_answer_of_whole_canvases_keeps_its_end(tmp_path: Path) -> None:
    """One that takes all there is room for is not truncated; one more token is."""
    exact = {"prompt": "a", "completion": "b" * 127}
    (found,) = read(written(tmp_path, exact)).train
    size = len(found.sample.prompt) + len(found.sample.response)
    for most, truncated in ((size, False), (size - 1, True)):
        (again,) = read(tmp_path, replace(ENCODER, most=most)).train
        assert again.sample.truncated == truncated
        assert len(again.sample.prompt) + len(again.sample.response) == most


def test_huge_texts_are_not_encoded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A book in one line would take gigabytes of ids, of which a few thousand are used."""
    seen = []
    encode = type(TOKENIZER).encode
    monkeypatch.setattr(
        type(TOKENIZER), "encode", lambda own, text: seen.append(len(text)) or encode(own, text)
    )
    (found,) = read(written(tmp_path, {"text": "b" * 1_000_000})).train
    assert found.sample.truncated
    assert max(seen) <= 2050 * TOKENIZER.longest


def test_examples_of_both_files_are_told(tmp_path: Path) -> None:
    one, two, three = ({"prompt": each, "completion": each} for each in "abc")
    written(tmp_path, one, two)
    found = read(written(tmp_path, three, b"", two, name="valid"))
    (notice,) = found.notices
    assert "valid.jsonl: 1 of 2 examples are also in train.jsonl" in notice
    assert "(the first in line 3, there in line 2)" in notice
    (tmp_path / "valid.jsonl").unlink()
    assert "has no valid.jsonl" in read(tmp_path).notices[0]


def test_a_template_whose_prompt_is_no_prefix_is_refused(tmp_path: Path) -> None:
    """As the first one that was published with the model: it opens a thought, and then none."""
    tokenizer = gemma_tokenizer()
    source = tokenizer._template_source or ""
    opened = source.replace(
        "'<|turn>model\\n' if last.role != 'tool' }}{{ '<|channel>",
        "'<|turn>model\\n<|channel>' }}{{ '<|channel>",
    )
    assert opened != source
    other = type(tokenizer)(tokenizer._backend, {}, opened)
    encoder = replace(ENCODER, tokenizer=other)
    with pytest.raises(DataError, match="line 1: the prompt that generation would be given is no"):
        read(written(tmp_path, {"prompt": "a", "completion": "b"}), encoder)
