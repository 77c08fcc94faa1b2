"""Sessions: what is reused is exact, what goes wrong leaves the conversation whole."""

import gc
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from gemma import gemma_tokenizer
from random_model import Scripted, scripted, untrained

from mlx_diffgemma import (
    ChatSession,
    Context,
    ContextError,
    Done,
    Draft,
    Event,
    Guards,
    Reading,
    SessionError,
    Text,
    Thought,
    ToolCall,
    ToolResult,
    load,
    stream_generate,
)
from mlx_diffgemma.generation import generate
from mlx_diffgemma.guards import OFF

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
        prompt = TOKENIZER.encode(TOKENIZER.render_chat(talk.messages))
        fresh = Context(MODEL)
        fresh.read(prompt)
        talk.context.read(prompt)
        canvas = mx.array([[5] * 16])
        np.testing.assert_allclose(
            np.array(MODEL(canvas, talk.context.cache)),
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
    assert (len(talk.messages), len(talk.context)) == (1, 0)
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


def test_a_message_that_does_not_fit_changes_nothing() -> None:
    talk, model = speaking("fine", "fine")
    list(talk.stream("hello"))
    before = talk.messages, talk.context.tokens
    with pytest.raises(ContextError, match="does not fit"):
        next(talk.stream("x " * 3000))
    with pytest.raises(ContextError, match="empty"):
        next(talk.stream("  "))
    assert (talk.messages, talk.context.tokens) == before
    assert model._next == 1


def test_reading_a_long_prompt_can_be_stopped() -> None:
    """Stopping used to wait until all of it was read; what was read is not lost."""
    talk, _ = speaking("Fine.", "Fine.")
    events = stream_generate(
        talk._model, TOKENIZER, [30] * 1800, context=talk.context, prefill_chunk=500
    )
    assert [next(events), next(events)] == [Reading(500, 1800), Reading(1000, 1800)]
    events.close()
    assert talk.context.tokens == (30,) * 1000
    done = done_of(list(stream_generate(talk._model, TOKENIZER, [30] * 1800, context=talk.context)))
    assert done.cached_tokens == 1000


def test_save_and_load_go_on_alike(tmp_path: Path) -> None:
    talk = session(system="Be brief.")
    for turn in range(3):
        list(talk.stream(f"Question {turn}", seed=turn))
    file = tmp_path / "talk"
    talk.save(file)
    again = ChatSession.load(file, MODEL, TOKENIZER)
    again.guards, again.steps, again.max_tokens = OFF, 4, 40
    assert again.messages == talk.messages
    for other in (talk, again):
        assert done_of(list(other.retry(seed=7))).cached_tokens > 60
    assert again.messages == talk.messages
    assert text_of(list(talk.stream("x", seed=1))) == text_of(list(again.stream("x", seed=1)))
    with pytest.raises(SessionError, match="another model"):
        ChatSession.load(file, untrained(768, 16, windows=(40, None), seed=9), TOKENIZER)
    Context(MODEL).save(file)
    with pytest.raises(SessionError, match="prompt cache"):
        ChatSession.load(file, MODEL, TOKENIZER)


def test_thoughts_are_events_and_no_history() -> None:
    talk, _ = speaking(
        "<|channel>thought\nhm<channel|>Yes.", "So.", enable_thinking=True, guards=Guards()
    )
    events = list(talk.stream("Is it?"))
    assert [type(e) for e in events if not isinstance(e, Draft)] == [Thought, Text, Done]
    assert talk.messages[-1] == {"role": "assistant", "content": "Yes.", "reasoning": "hm"}
    list(talk.stream("Why?"))
    said = TOKENIZER.decode(talk.context.tokens)
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
    said = TOKENIZER.decode(talk.context.tokens)
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


def test_a_hundred_turns_leave_memory_flat() -> None:
    """Drafts, marks and forgotten branches used to be what a long chat grows by."""
    model, tokenizer = load()
    talk = ChatSession(model, tokenizer, steps=2)
    list(talk.stream("hello", seed=0))
    used: list[int] = []
    for turn in range(100):
        if turn % 2:
            list(talk.retry(seed=turn))
        else:
            talk.undo()
            list(talk.stream("thanks a lot" if turn % 4 else "good morning", seed=turn))
        gc.collect()
        used.append(mx.get_active_memory() + mx.get_cache_memory())
    assert max(used[50:]) <= max(used[:10]) + 20_000  # a turn's keys and values are 48 kB
    assert talk.context.nbytes < 200_000
