"""A request answers in a batch as it does alone, whoever else is there."""

from dataclasses import replace
from itertools import islice
from typing import Any

import mlx.core as mx
import pytest
from gemma import gemma_tokenizer
from held import active_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from random_model import untrained

from mlx_diffgemma import (
    ConfidenceThreshold,
    ContextError,
    DiffusionGemma,
    Done,
    Draft,
    Error,
    Event,
    FillResult,
    Guards,
    PromptCache,
    Request,
    Text,
    Tokenizer,
    batch_generate,
    stream_batch,
    stream_generate,
)
from mlx_diffgemma.checkpoint.load import EMBEDDED
from mlx_diffgemma.diffusion.decoding import Batch, Decoding, drive
from mlx_diffgemma.diffusion.guards import OFF
from mlx_diffgemma.tasks.choose import ChooseRequest
from mlx_diffgemma.tasks.edit import EditRequest
from mlx_diffgemma.tasks.fill import FillRequest
from mlx_diffgemma.text.vocabulary import Vocabulary

TOKENIZER = gemma_tokenizer()
MODEL = untrained(768, 12, windows=(20, None, 9))


def facts(event: Event) -> Any:
    """What must not depend on who else is there: all but times and memory."""
    if isinstance(event, Draft):
        return event.canvas, event.step, event.tokens, event.accepted, event.text
    if isinstance(event, Done):
        return event.finish_reason, event.prompt_tokens, event.generated_tokens, event.canvases
    return event


def alone(request: Request) -> list[Any]:
    arguments = {name: value for name, value in vars(request).items() if name != "prompt"}
    return [facts(e) for e in stream_generate(MODEL, TOKENIZER, request.prompt, **arguments)]


def with_schema(request: Request) -> Request:
    """A third has a schema, with which some options do not go."""
    if request.seed is None or request.seed % 3:
        return request
    schema = {"type": "array", "items": {"type": "boolean"}}
    return replace(request, schema=schema, shrink=False, guards=OFF)


Requests = st.builds(
    Request,
    prompt=st.lists(st.integers(20, 767), min_size=1, max_size=60),
    max_tokens=st.integers(3, 40),
    steps=st.integers(1, 6),
    seed=st.integers(0, 99),
    sampler=st.sampled_from([None, ConfidenceThreshold(0.3)]),
    guards=st.sampled_from([OFF, Guards()]),
    shrink=st.booleans(),
).map(with_schema)


@settings(max_examples=25, deadline=None)
@given(st.lists(Requests, min_size=1, max_size=8), st.integers(1, 8))
def test_a_batch_gives_each_what_it_gets_alone(requests: list[Request], at_once: int) -> None:
    """Prompts, budgets, steps, samplers and schemas differ; rows come and go at any step."""
    got: dict[int, list[Any]] = {i: [] for i in range(len(requests))}
    running: set[int] = set()
    for i, event in stream_batch(MODEL, TOKENIZER, requests, max_batch=at_once):
        assert not isinstance(event, Error)
        got[i].append(facts(event))
        running = running - {i} if isinstance(event, Done) else running | {i}
        assert len(running) <= at_once
    for i, request in enumerate(requests):
        assert got[i] == alone(request)


def test_fills_edits_and_choices_in_a_batch_give_what_they_give_alone() -> None:
    """Their passes have several rows; answers stand beside them, and come and go."""
    small = Tokenizer.from_directory(EMBEDDED)
    model = untrained(small.vocab_size, 24, windows=(20, None, 9))
    templates = ["a {{x}} b", "{{n:int}} c {{y:yes|no}}", "{{a:2}} and so on and so on {{b:2}} d"]
    slots = {"x": ["1", "12", "345"]}
    tasks: list[Any] = [
        *(FillRequest(t, "x", 3, seed) for seed, t in enumerate(templates)),
        EditRequest("ab cd ef", "fix", strength=0.9, steps=3, seed=4),
        ChooseRequest("x", slots, draws=2),
        Request("hello", seed=1, steps=4),
    ]

    def runs() -> list[Decoding[Any, None]]:
        prepared = [task.prepare(model, Vocabulary(model, small)) for task in tasks]
        return [each.run(PromptCache(model)) for each in prepared]

    def told(event: Any) -> Any:
        if isinstance(event, FillResult):  # a probability may differ in its last digit
            return event.text, event.steps, event.notes
        return (
            {k: pytest.approx(v) for k, v in event["x"].items()}
            if isinstance(event, dict)
            else None
        )

    single = [[facts(event) for event in drive(model, run)] for run in runs()]
    batch = Batch[Any](model)
    for run in runs():
        batch.add(run)
    got: dict[int, list[Any]] = {i: [] for i in range(len(single))}
    while len(batch):
        for i, event in batch.step():
            if event is not None:
                got[i].append(facts(event))
    for i, alone_events in enumerate(single):
        assert got[i][:-1] == alone_events[:-1]
        assert told(got[i][-1]) == told(alone_events[-1])
        assert told(got[i][-1]) or got[i][-1] == alone_events[-1]


def test_passes_are_decoded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    decode = DiffusionGemma.decode

    def counted(self: DiffusionGemma, passes: Any, evaluate: Any) -> Any:
        sizes.append(len(passes))
        return decode(self, passes, evaluate)

    monkeypatch.setattr(DiffusionGemma, "decode", counted)
    requests = [Request([30 + i], steps=3 + i, max_tokens=12, seed=i) for i in range(4)]
    batch_generate(MODEL, TOKENIZER, requests)
    assert sizes == [4, 4, 4, 3, 2, 1]


def test_one_that_fails_does_not_take_the_others_with_it() -> None:
    requests = [Request("fine", steps=2), Request([5] * 5000), Request("x", steps=0), Request("y")]
    ends = {}
    for i, event in stream_batch(MODEL, TOKENIZER, requests, max_batch=2):
        if isinstance(event, Done | Error):
            ends[i] = type(event).__name__
    assert ends == {0: "Done", 1: "ContextError", 2: "SettingError", 3: "Done"}
    with pytest.raises(ContextError):
        batch_generate(MODEL, TOKENIZER, ["fine", " "])


def test_requests_are_taken_when_there_is_room() -> None:
    taken = 0

    def endless() -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield Request([40], steps=2, max_tokens=12, seed=taken)

    events = stream_batch(MODEL, TOKENIZER, endless(), max_batch=3)
    seen = list(islice(events, 30))
    assert len({i for i, _ in seen}) == taken
    assert taken - sum(isinstance(event, Done) for _, event in seen) <= 3
    events.close()


def test_removing_a_request_frees_what_it_holds() -> None:
    batch = Batch[Event](MODEL)
    mx.eval(MODEL.parameters(), MODEL.constants)
    before = active_memory()
    requests = [Request([60] * 500, max_tokens=60, steps=6, seed=i) for i in range(3)]
    words = Vocabulary(MODEL, TOKENIZER)
    prepared = [request.prepare(MODEL, words) for request in requests]
    keys = [batch.add(each.run(PromptCache(MODEL))) for each in prepared]
    list(batch.step())
    list(batch.step())
    assert mx.get_active_memory() > before
    batch.remove(keys[1])
    assert {key for key, _ in batch.step()} == {keys[0], keys[2]}
    for key, _ in batch.step():
        batch.remove(key)  # from within the step, as a server does whose client has gone
    batch.close()
    assert len(batch) == 0
    assert active_memory() < before + 1000  # constants of compiled kernels stay


def test_a_prompt_cache_serves_one_request_after_another() -> None:
    prompt_cache = PromptCache(MODEL)
    for cached in (0, 30):
        *_, done = stream_generate(MODEL, TOKENIZER, [50] * 30, steps=1, prompt_cache=prompt_cache)
        assert isinstance(done, Done)
        assert done.cached_tokens == cached


def test_texts_come_in_the_order_of_the_prompts() -> None:
    texts = batch_generate(MODEL, TOKENIZER, [Request("a", seed=1, steps=2), "b"])
    events = stream_generate(MODEL, TOKENIZER, "a", seed=1, steps=2)
    assert texts[0] == "".join(event.text for event in events if isinstance(event, Text))
