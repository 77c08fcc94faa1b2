"""Sessions: what is reused is exact, what goes wrong leaves the conversation whole."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gemma import gemma_tokenizer
from paths import TESTS
from random_model import Scripted, scripted, untrained

from mlx_diffgemma import (
    ChatSession,
    ContextError,
    Done,
    Draft,
    Event,
    Guards,
    PromptCache,
    Reading,
    SessionError,
    Text,
    Thought,
    ToolCall,
    ToolResult,
    load,
    stream_generate,
)
from mlx_diffgemma.diffusion.guards import OFF
from mlx_diffgemma.tasks.generate import generate

TOKENIZER = gemma_tokenizer()
MODEL = untrained(768, 16, windows=(40, None))
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def session(**settings: object) -> ChatSession:
    return ChatSession(MODEL, TOKENIZER, guards=OFF, steps=4, max_tokens=40, **settings)  # type: ignore[arg-type]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Text))


def done_of(events: list[Event]) -> Done:
    assert isinstance(events[-1], Done)
    return events[-1]


def ids(text: str) -> list[int]:
    return [*TOKENIZER.encode(text), 6]


def speaking(*answers: str, **settings: object) -> tuple[ChatSession, Scripted]:
    model = scripted()
    model.begin(*map(ids, answers))
    return ChatSession(model, TOKENIZER, **settings), model  # type: ignore[arg-type]


def test_a_cached_session_answers_as_one_encoded_from_scratch() -> None:
    talk = session(system="Be brief.")
    for turn, message in enumerate(["Hello there", "And what else?", "More of it"]):
        asked = [*talk.messages, {"role": "user", "content": message}]
        events = list(talk.stream(message, seed=turn))
        again = generate(MODEL, TOKENIZER, asked, seed=turn, steps=4, max_tokens=40)
        assert text_of(events) == again
        # The same logits for a canvas behind all that was said.
        prompt = TOKENIZER.encode(TOKENIZER.apply_chat_template(talk.messages))
        fresh = PromptCache(MODEL)
        fresh.read(prompt)
        talk.prompt_cache.read(prompt)
        canvas = mx.array([[5] * 16])
        np.testing.assert_allclose(
            np.array(MODEL(canvas, talk.prompt_cache.cache)),
            np.array(MODEL(canvas, fresh.cache)),
            rtol=2e-4,
            atol=2e-4,
        )


def test_the_second_turn_of_a_long_conversation_encodes_only_its_own_tokens() -> None:
    talk, _ = speaking("It is long.", "Yes.", "No.", "Maybe.")
    first = done_of(list(talk.stream("word " * 400)))
    assert first.prompt_tokens > 2000
    assert first.cached_tokens == 0
    second = done_of(list(talk.stream("Really?")))
    own = second.prompt_tokens - first.prompt_tokens
    answer = len(TOKENIZER.encode("It is long.<turn|>\n"))
    question = len(TOKENIZER.encode("<|turn>user\nReally?<turn|>\n<|turn>model\n"))
    assert own == answer + question
    assert second.cached_tokens == first.prompt_tokens
    # Answering again encodes nothing, another question only itself and the answer before.
    again = done_of(list(talk.retry()))
    assert again.cached_tokens == again.prompt_tokens == second.prompt_tokens
    talk.undo()
    other = done_of(list(talk.stream("Honestly?")))
    assert other.prompt_tokens - other.cached_tokens == own - len(
        TOKENIZER.encode("Really?")
    ) + len(TOKENIZER.encode("Honestly?"))


def test_retry_undo_and_reset() -> None:
    talk, _ = speaking("one", "two", "three", "four")
    with pytest.raises(SessionError, match="no message yet"):
        talk.undo()
    with pytest.raises(SessionError, match="no message yet"):
        talk.retry()
    list(talk.stream("first"))
    list(talk.stream("second"))
    assert [m["content"] for m in talk.messages] == ["first", "one", "second", "two"]
    list(talk.retry())
    assert [m["content"] for m in talk.messages] == ["first", "one", "second", "three"]
    assert talk.undo() == "second"
    assert [m["content"] for m in talk.messages] == ["first", "one"]
    talk.system = "Be kind."
    assert talk.messages[0] == {"role": "system", "content": "Be kind."}
    talk.reset()
    assert (len(talk.messages), len(talk.prompt_cache)) == (1, 0)
    assert text_of(list(talk.stream("again"))) == "four"
    talk.system = None
    assert [m["role"] for m in talk.messages] == ["user", "assistant"]


def test_stopping_keeps_what_is_committed() -> None:
    canvas = TOKENIZER.encode("A first canvas without an end. " * 3)[:64]
    model = scripted()
    model.begin(canvas, canvas)
    talk = ChatSession(model, TOKENIZER, max_tokens=200)
    events = talk.stream("go on")
    assert isinstance(next(events), Draft)
    events.close()
    assert talk.messages == ()  # nothing was committed: as if never asked
    events = talk.retry()  # this used to answer the message before, or find none
    next(events)
    events.close()
    assert talk.messages == ()
    model.begin(canvas, ids("rest"), ids("fresh"))
    events = talk.stream("go on")
    assert any(isinstance(event, Text) for event in iter(events.__next__, None))
    assert isinstance(next(events), Draft)
    events.close()
    assert [m["content"] for m in talk.messages] == ["go on", TOKENIZER.decode(canvas)]
    assert text_of(list(talk.stream("and then?"))) == "fresh"


def test_undo_takes_back_a_message_that_was_stopped_before_its_answer_began() -> None:
    """It used to forget the message before, and its answer."""
    talk, _ = speaking(*["one"] * 4)
    list(talk.stream("first"))
    for ask in (lambda: talk.stream("second"), talk.retry):
        stopped = ask()
        next(stopped)
        stopped.close()
        assert talk.question == "second"
    assert talk.undo() == "second"
    assert [m["content"] for m in talk.messages] == ["first", "one"]
    stopped = talk.retry()
    next(stopped)
    stopped.close()
    assert talk.undo() == "first"
    assert talk.messages == ()


def test_another_model_goes_on_with_the_conversation() -> None:
    talk, _ = speaking("one")
    list(talk.stream("first"))
    other = scripted()
    other.begin(ids("two"))
    talk.switch(other, TOKENIZER)
    assert done_of(list(talk.stream("second"))).cached_tokens == 0
    assert [m["content"] for m in talk.messages] == ["first", "one", "second", "two"]
    model, tokenizer = load()
    able = ChatSession(other, TOKENIZER, tools=TOOLS)
    with pytest.raises(SessionError, match="knows no tools"):
        able.switch(model, tokenizer)
    assert able._model is other


def test_a_message_that_does_not_fit_changes_nothing() -> None:
    talk, model = speaking("fine", "fine")
    list(talk.stream("hello"))
    before = talk.messages, talk.prompt_cache.tokens
    with pytest.raises(ContextError, match="does not fit"):
        next(talk.stream("x " * 3000))
    with pytest.raises(ContextError, match="empty"):
        next(talk.stream("  "))
    assert (talk.messages, talk.prompt_cache.tokens) == before
    assert model._next == 1


def test_reading_a_long_prompt_can_be_stopped() -> None:
    """Stopping used to wait until all of it was read; what was read is not lost."""
    talk, _ = speaking("Fine.", "Fine.")
    events = stream_generate(
        talk._model, TOKENIZER, [30] * 1800, prompt_cache=talk.prompt_cache, prefill_chunk=500
    )
    assert [next(events), next(events)] == [Reading(500, 1800), Reading(1000, 1800)]
    events.close()
    assert talk.prompt_cache.tokens == (30,) * 1000
    done = done_of(
        list(stream_generate(talk._model, TOKENIZER, [30] * 1800, prompt_cache=talk.prompt_cache))
    )
    assert done.cached_tokens == 1000


def test_save_and_load_go_on_alike(tmp_path: Path) -> None:
    talk = session(system="Be brief.")
    for turn in range(3):
        list(talk.stream(f"Question {turn}", seed=turn))
    file = tmp_path / "talk"
    talk.save(file)
    again = ChatSession.load(file, MODEL, TOKENIZER)
    with pytest.raises(AttributeError):  # settings stand together, and nowhere else
        again.steps = 4  # type: ignore[attr-defined]
    again.settings = {"guards": OFF, "steps": 4, "max_tokens": 40}
    assert again.messages == talk.messages
    for other in (talk, again):
        assert done_of(list(other.retry(seed=7))).cached_tokens > 60
    assert again.messages == talk.messages
    assert text_of(list(talk.stream("x", seed=1))) == text_of(list(again.stream("x", seed=1)))
    with pytest.raises(SessionError, match="another model"):
        ChatSession.load(file, untrained(768, 16, windows=(40, None), seed=9), TOKENIZER)
    PromptCache(MODEL).save(file)
    with pytest.raises(SessionError, match="prompt cache"):
        ChatSession.load(file, MODEL, TOKENIZER)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A session with a mark, a tool call and thoughts."""
    talk = session(system="Be brief.", tools=TOOLS)
    list(talk.stream("How is Oslo?", seed=0))
    call = {"id": "call_0", "type": "function"}
    call["function"] = {"name": "weather", "arguments": {"city": "Oslo"}}  # type: ignore[assignment]
    answer = {"role": "assistant", "content": "", "reasoning": "hm", "tool_calls": [call]}
    told = {"role": "tool", "name": "weather", "tool_call_id": "call_0", "content": "3 C"}
    talk._messages = [*talk.messages[:2], answer, told]
    talk.prompt_cache.extend([30] * 9)
    file = tmp_path_factory.mktemp("saved") / "talk"
    talk.save(file)
    return file


def deep(levels: int) -> dict[str, Any]:
    return {"a": deep(levels - 1)} if levels else {}


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {}}}
FUNCTION: dict[str, Any] = CALL["function"]  # type: ignore[assignment]
NO_CALLS = [
    3, {}, {**CALL, "id": 1}, {**CALL, "more": 1}, {**CALL, "function": "f"},
    {**CALL, "function": {**FUNCTION, "arguments": "{}"}}, {**CALL, "function": {"name": "f"}},
    {**CALL, "function": {**FUNCTION, "name": None}},
    {**CALL, "function": {**FUNCTION, "arguments": deep(120)}},
]  # fmt: skip
NO_MESSAGES = [
    None, 3, "x", [], {}, {"role": "user"}, {"role": "user", "content": None},
    {"role": "user", "content": [{"type": "image"}]}, {"role": "root", "content": "x"},
    {"role": ["user"], "content": "x"}, {"role": "user", "content": "x", "more": 1},
    {"role": "system", "content": "not the first"}, {"role": "tool", "content": "x"},
    {"role": "tool", "name": 1, "tool_call_id": "c", "content": "x"},
    {"role": "assistant", "content": 1}, {"role": "assistant", "content": "", "reasoning": 1},
    {"role": "assistant", "content": "", "tool_calls": {}},
    {"role": "user", "content": "\ud800"}, {"role": "user", "content": "x", "y": float("nan")},
    *({"role": "assistant", "content": "", "tool_calls": [call]} for call in NO_CALLS),
]  # fmt: skip
# What stands in the file instead. It has 155 tokens and a mark behind the first 114.
METADATA: dict[str, list[str]] = {
    "format": ["", "mlx-diffgemma context 3"],
    "model": ["", "0" * 64],
    "tokens": [
        "", "3", "{}", "null", "[", "[]", "[1]", "[" * 100_000, "x" * 40_000_000,
        *(json.dumps([bad] * 155) for bad in ("5", True, -1, 768, 2**40, 5.0, None, [5])),
        "[" + "1" * 5000 + "]", "[NaN]", json.dumps([5] * 5000),
    ],
    "marks": [
        "", "3", "[]", "{}", '["9"]', "[true]", "[9.0]", "[0]", "[-1]", "[9, 9]", "[41, 9]",
        "[9]", "[155]", "[156]", "[1000000000000]", "[" * 100_000,
        json.dumps([*range(1_000_000)]), json.dumps([9] * 1_000_000),
    ],
    "extra": [
        "", "[", "[]", "3", "null", "{}", '{"messages": []}', "[" * 100_000,
        *(json.dumps({"messages": [m], "tools": [], "thinking": False}) for m in (3, "x", None)),
        *(
            json.dumps({"messages": [{"role": "user", "content": "x"}, m]}
                       | {"tools": [], "thinking": False})
            for m in NO_MESSAGES
        ),
        *(
            json.dumps({"messages": [], "tools": t, "thinking": False})
            for t in (None, {}, "x", [3], [{}], [{"function": {}}], [{"function": {"name": 1}}],
                      [{"function": {"name": "f", "parameters": 3}}])
        ),
        *(
            json.dumps({"messages": [], "tools": [], "thinking": t}) for t in (None, 1, "yes", [])
        ),
    ],
}  # fmt: skip


@pytest.mark.parametrize("part", METADATA)
def test_words_of_a_session_file_that_no_session_writes(
    part: str, saved: Path, tmp_path: Path
) -> None:
    """Many were taken, and failed in the next turn: ids beyond the table read foreign memory."""
    arrays, metadata = mx.load(str(saved), format="safetensors", return_metadata=True)  # type: ignore[misc]
    file = tmp_path / "talk.safetensors"
    mx.save_safetensors(str(file), arrays, metadata)  # type: ignore[arg-type]
    talk = ChatSession.load(file, MODEL, TOKENIZER)
    assert (len(talk.messages), len(talk.prompt_cache)) == (4, 155)
    assert metadata["marks"] == "[114]"  # type: ignore[index]
    before = talk.messages, talk.prompt_cache.tokens
    for value in (*METADATA[part], None):
        changed = {name: text for name, text in metadata.items() if name != part}  # type: ignore[union-attr]
        changed |= {} if value is None else {part: value}
        mx.save_safetensors(str(file), arrays, changed)  # type: ignore[arg-type]
        with pytest.raises(SessionError) as refused:
            talk.restore(file)
        assert len(str(refused.value)) < 300
        assert "\n" not in str(refused.value)
    assert (talk.messages, talk.prompt_cache.tokens) == before


ARRAYS: dict[str, Callable[[mx.array], mx.array | None]] = {
    "missing": lambda a: None,
    "one row less": lambda a: a[:, :, 1:],
    "one row more": lambda a: mx.concatenate([a, a[:, :, :1]], axis=2),
    "one head less": lambda a: a[:, 1:],
    "two of them": lambda a: mx.concatenate([a, a]),
    "narrower": lambda a: a[..., 1:],
    "no rows": lambda a: a[:, :, :0],
    "flat": lambda a: a.reshape(-1),
    "deeper": lambda a: a[None],
    "float16": lambda a: a.astype(mx.float16),
    "integers": lambda a: a.astype(mx.int32),
    "complex": lambda a: a.astype(mx.complex64),
    "NaN": lambda a: mx.where(mx.arange(a.shape[-1]) == 3, mx.nan, a),
    "infinite": lambda a: a / 0,
}


@pytest.mark.parametrize("name", ["layers.0", "layers.1", "marks.0.layers.0"])
def test_arrays_of_a_session_file_that_no_session_writes(
    name: str, saved: Path, tmp_path: Path
) -> None:
    """They used to fail in the next turn, or not at all: NaN makes every answer nonsense."""
    arrays, metadata = mx.load(str(saved), format="safetensors", return_metadata=True)  # type: ignore[misc]
    assert isinstance(arrays, dict)
    assert name in arrays
    file = tmp_path / "talk.safetensors"
    for change in ARRAYS.values():
        changed = {key: array for key, array in arrays.items() if key != name}
        if (array := change(arrays[name])) is not None:
            changed[name] = array
        mx.save_safetensors(str(file), changed, metadata)  # type: ignore[arg-type]
        with pytest.raises(SessionError, match=f"damaged: {name}"):
            ChatSession.load(file, MODEL, TOKENIZER)
    mx.save_safetensors(str(file), {**arrays, "marks.0.layers.1": mx.ones(1)}, metadata)  # type: ignore[arg-type]
    with pytest.raises(SessionError, match="5 arrays, not 4"):
        ChatSession.load(file, MODEL, TOKENIZER)


def test_a_file_that_is_no_session_is_not_replaced(tmp_path: Path) -> None:
    """/save NOTES used to replace the notes."""
    talk = session()
    notes = tmp_path / "notes"
    notes.write_text("my notes")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    weights = tmp_path / "weights"
    mx.save_safetensors(f"{weights}.safetensors", {"a": mx.ones(3)})
    for path in (notes, pipe, tmp_path, Path(f"{weights}.safetensors")):
        with pytest.raises(SessionError, match="is left as it is"):
            talk.save(path)
    assert notes.read_text() == "my notes"
    empty = tmp_path / "empty"
    empty.touch()
    for _ in range(2):
        talk.save(empty)
    assert ChatSession.load(empty, MODEL, TOKENIZER).messages == ()
    talk._messages = [{"role": "user", "content": "\ud800"}]
    with pytest.raises(SessionError, match="half a character"):
        talk.save(empty)
    assert ChatSession.load(empty, MODEL, TOKENIZER).messages == ()


def test_a_full_disk_leaves_the_old_session(saved: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk"
    file.write_bytes(saved.read_bytes())
    code = """
import resource, sys
from pathlib import Path
from mlx_diffgemma import Error, PromptCache
from random_model import untrained
model = untrained(768, 16, windows=(40, None))
context, extra = PromptCache.load(Path(sys.argv[1]), model)
context.extend([30] * 200)
resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000))
try:
    context.save(Path(sys.argv[1]), extra)
except Error as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
    )
    assert done.stdout.startswith(f"{file} cannot be written: "), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["talk"]
    assert file.read_bytes() == saved.read_bytes()


def test_thoughts_are_events_and_no_history() -> None:
    talk, _ = speaking(
        "<|channel>thought\nhm<channel|>Yes.", "So.", enable_thinking=True, guards=Guards()
    )
    events = list(talk.stream("Is it?"))
    assert [type(e) for e in events if not isinstance(e, Draft)] == [Thought, Text, Done]
    assert talk.messages[-1] == {"role": "assistant", "content": "Yes.", "reasoning": "hm"}
    list(talk.stream("Why?"))
    said = TOKENIZER.decode(talk.prompt_cache.tokens)
    assert "Yes." in said
    assert "hm" not in said
    assert "<|think|>" in said


def test_tool_results_go_back_into_the_same_turn() -> None:
    call = (
        '<|channel>thought\nlook<channel|><|tool_call>call:weather{city:<|"|>Oslo<|"|>}<tool_call|>'
    )
    talk, _ = speaking(
        call, "cold<channel|>It is 3 degrees.", "ok", tools=TOOLS, enable_thinking=True
    )
    first = list(talk.stream("How is Oslo?"))
    assert ToolCall("weather", {"city": "Oslo"}) in first
    with pytest.raises(SessionError, match="0 results for 1 tool calls"):
        talk.respond([])
    second = list(talk.respond([ToolResult("weather", "3 C")]))
    # The template opens the thought after a response itself, so the model only closes it.
    assert [e for e in second if isinstance(e, Thought | Text)] == [
        Thought("cold"),
        Text("It is 3 degrees."),
    ]
    said = TOKENIZER.decode(talk.prompt_cache.tokens)
    assert said.count("model\n") == 1
    assert (
        'look\n<channel|><|tool_call>call:weather{city:<|"|>Oslo<|"|>}<tool_call|>'
        '<|tool_response>response:weather{value:<|"|>3 C<|"|>}<tool_response|>' in said
    )
    assert [m["role"] for m in talk.messages] == ["user", "assistant", "tool", "assistant"]
    with pytest.raises(SessionError, match="1 results for 0 tool calls"):
        talk.respond([ToolResult("weather", "3 C")])
    list(talk.stream("Thanks"))
    assert talk.undo() == "Thanks"
    assert talk.undo() == "How is Oslo?"
    assert talk.messages == ()


def test_a_template_that_knows_neither_tools_nor_thinking_says_so() -> None:
    model, tokenizer = load()
    with pytest.raises(SessionError, match="knows no tools"):
        ChatSession(model, tokenizer, tools=TOOLS)
    with pytest.raises(SessionError, match="knows no thinking"):
        ChatSession(model, tokenizer, enable_thinking=True)


def test_sixty_turns_leave_memory_flat() -> None:
    """Drafts, marks and forgotten branches used to be what a long chat grows by."""
    talk = ChatSession(MODEL, TOKENIZER, guards=OFF, steps=2, max_tokens=40)
    list(talk.stream("hello", seed=0))
    gc.freeze()  # what is there already takes the collector long to look at
    used: list[int] = []
    for turn in range(60):
        if turn % 2:
            list(talk.retry(seed=turn))
        else:
            talk.undo()
            list(talk.stream("thanks a lot" if turn % 4 else "good morning", seed=turn))
        gc.collect()
        used.append(mx.get_active_memory() + mx.get_cache_memory())
    gc.unfreeze()
    assert max(used[50:]) <= max(used[:10]) + 8_000  # a turn's keys and values are 15 kB
    assert talk.prompt_cache.nbytes < 200_000
