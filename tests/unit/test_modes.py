"""Modes: what the encoder writes is what it scores highest, and drafts change nothing of it."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gemma import gemma_tokenizer
from paths import FIRST
from random_model import Reciting, chain, untrained

from mlx_diffgemma import (
    ChatSession,
    DiffusionGemma,
    Done,
    Draft,
    Guards,
    PromptCache,
    Request,
    SeededDraws,
    SettingError,
    Text,
    Thought,
    Tokenizer,
    ToolCall,
    load,
    score,
    stream_generate,
)
from mlx_diffgemma.diffusion.decoding import drive
from mlx_diffgemma.diffusion.draws import Categorical, Draws
from mlx_diffgemma.diffusion.guards import trust
from mlx_diffgemma.tasks.batch import stream_batch
from mlx_diffgemma.tasks.canvases import Committed, decode_tokens
from mlx_diffgemma.tasks.modes import Way
from mlx_diffgemma.tasks.request import encode_prompt
from mlx_diffgemma.tasks.starts import Noise

QUESTIONS = (
    "What is the capital of Norway?",
    "Record: Anna Berg from Norway, born 1984-03-12",
    "Fix: they were much in eviednce during the fighing",
)

EVERY_WAY: list[dict[str, Any]] = [
    {},
    {"verify": True},
    {"mode": "causal"},
    {"mode": "speculative"},
    {"mode": "speculative", "acceptance": "typical"},
    {"mode": "causal", "temperature": 0.9},
    {"mode": "speculative", "temperature": 0.9},
    {"mode": "speculative", "temperature": 0.9, "acceptance": "typical"},
]

# What the denoiser gets wrong now and then.
RECORDS = (
    "Record: Guinea-Bissau, continent and phone",
    "Record: Sweden, phone and currency",
    "Record: Adaline Ortega from Rwanda, born 2010-06-21",
)


@pytest.fixture(scope="module")
def loaded() -> tuple[DiffusionGemma, Tokenizer]:
    return load(FIRST / "tiny")


def answered(
    loaded: tuple[DiffusionGemma, Tokenizer], prompt: Any, **options: Any
) -> tuple[Done, str]:
    events = list(stream_generate(*loaded, prompt, **options))
    assert isinstance(events[-1], Done)
    return events[-1], "".join(event.text for event in events if isinstance(event, Text))


@pytest.mark.parametrize("question", QUESTIONS)
def test_causal_is_the_best_of_score_step_by_step(
    loaded: tuple[DiffusionGemma, Tokenizer], question: str
) -> None:
    model, tokenizer = loaded
    prompt, written = encode_prompt(tokenizer, question), list[int]()
    while not written or written[-1] not in model.generation.eos_token_ids:
        ((token, _),) = score(model, tokenizer, prompt, [*written, 0]).top[-1]
        written.append(token)
    events = list(stream_generate(model, tokenizer, question, mode="causal"))
    drafts = [event for event in events if isinstance(event, Draft)]
    done = events[-1]
    assert isinstance(done, Done)
    assert [draft.tokens for draft in drafts] == [(token,) for token in written]
    assert done.finish_reason == "stop"
    assert (done.generated_tokens, done.encoder_passes) == (len(written), len(written) - 1)
    assert (done.denoising_steps, done.positions_decoded) == (0, 0)


@pytest.mark.parametrize("question", QUESTIONS)
def test_speculative_is_causal(loaded: tuple[DiffusionGemma, Tokenizer], question: str) -> None:
    causal, text = answered(loaded, question, mode="causal")
    done, drafted = answered(loaded, question, mode="speculative", seed=3)
    assert (drafted, done.generated_tokens) == (text, causal.generated_tokens)
    assert done.tokens_per_forward > causal.tokens_per_forward


def test_a_schema_holds_in_every_mode(loaded: tuple[DiffusionGemma, Tokenizer]) -> None:
    schema = {
        "type": "object",
        "properties": {"sky": {"enum": ["blue", "grey"]}, "n": {"type": "integer"}},
        "required": ["sky", "n"],
        "additionalProperties": False,
    }
    causal, text = answered(loaded, "Hello", schema=schema, mode="causal")
    assert json.loads(text)["sky"] in ("blue", "grey")
    assert causal.finish_reason == "stop"
    assert answered(loaded, "Hello", schema=schema, mode="speculative", seed=1)[1] == text
    for seed in range(3):  # that it is a document is checked at its end
        assert answered(loaded, "Hello", schema=schema, verify=True, seed=seed)[1]


def test_what_is_verified_is_liked_no_less_and_right_more_often(
    loaded: tuple[DiffusionGemma, Tokenizer],
) -> None:
    cases = map(json.loads, (FIRST / "heldout.jsonl").read_text().splitlines())
    answers = {case["prompt"]: case["answer"] for case in cases if case["prompt"] in RECORDS}
    right = {False: 0, True: 0}
    for question, answer in answers.items():
        liked = []
        for verify in (False, True):
            done, text = answered(
                loaded, question, seed=0, steps=16, verify=verify, likelihood=True
            )
            liked.append(done.mean_log_probability)
            right[verify] += text == answer
        assert liked[1] >= liked[0] - 1e-4
    assert right[True] > right[False] + 2


def test_the_last_draft_is_what_is_committed(loaded: tuple[DiffusionGemma, Tokenizer]) -> None:
    """Probabilities of a verified answer were those of a canvas that had been given up, and of one
    in which what is kept of others is certain."""

    def drafted(question: str) -> tuple[Done, str, Draft, Draft]:
        options: dict[str, Any] = {"seed": 2, "steps": 4, "verify": True, "top": 2}
        events = list(stream_generate(*loaded, question, **options))
        drafts = [event for event in events if isinstance(event, Draft)]
        text = "".join(event.text for event in events if isinstance(event, Text))
        done = events[-1]
        assert isinstance(done, Done)
        assert done.denoising_steps == len(drafts) - 1
        return done, text, *[each for each in drafts if each.decoded][-1:], drafts[-1]

    done, text, given_up, last = drafted("Tell a story.")
    assert given_up.text != text == last.text
    assert done.positions_decoded == 13 * 64
    _, text, opened, last = drafted(QUESTIONS[-1])
    assert opened.text == text == last.text
    kept = [i for i, p in enumerate(opened.probabilities[: last.end]) if p == 1]
    assert min(last.probabilities[i] for i in kept) < 0.9
    assert last.top is not None
    for i in range(last.end):
        assert last.top[i][0][0] == last.tokens[i]
        assert math.exp(last.top[i][0][1]) == pytest.approx(last.probabilities[i], abs=1e-3)


@pytest.mark.parametrize("options", EVERY_WAY, ids=str)
def test_rows_of_a_batch_and_later_turns_are_as_alone(
    loaded: tuple[DiffusionGemma, Tokenizer], options: dict[str, Any]
) -> None:
    model, tokenizer = loaded
    options = {**options, "steps": 8}  # equal before anything has converged, too
    alone = [answered(loaded, question, seed=2, **options)[1] for question in QUESTIONS]
    texts = ["", "", ""]
    order = list[int]()
    requests = [Request(question, seed=2, **options) for question in QUESTIONS]
    for number, event in stream_batch(model, tokenizer, requests, max_batch=3):
        order.append(number)
        if isinstance(event, Text):
            texts[number] += event.text
    assert texts == alone
    assert order != sorted(order)  # none holds up the others
    cache = PromptCache(model)  # what was read in vain leaves no trace in it
    for question, text in zip(QUESTIONS, alone, strict=True):
        assert answered(loaded, question, seed=2, prompt_cache=cache, **options)[1] == text


@pytest.mark.parametrize("options", EVERY_WAY, ids=str)
def test_stops_openings_budgets_and_schemas(
    loaded: tuple[DiffusionGemma, Tokenizer], options: dict[str, Any]
) -> None:
    done, text = answered(loaded, QUESTIONS[0], seed=4, stop=["a"], **options)
    assert ("a" in text, done.finish_reason) == (False, "stop")
    done, _ = answered(loaded, QUESTIONS[0], seed=4, max_tokens=2, **options)
    assert (done.generated_tokens, done.finish_reason) == (2, "length")
    assert answered(loaded, "Norway?", opening="The cap", **options)[1].startswith("The cap")
    # That it is a document is checked at its end.
    assert answered(loaded, "Hi", schema={"enum": ["yes", "no"]}, **options)[1] in ('"yes"', '"no"')


TURN = "Let me see.<|channel>thought\nA cold\nplace?<channel|>One moment"
CALL = 'é <|tool_call>call:weather{city:<|"|>Oslo<|"|>}<tool_call|>'
TOOL = {"type": "function", "function": {"name": "weather"}}


def reciting(tokenizer: Tokenizer, *answers: str, wrong: int) -> Reciting:
    model: Reciting = untrained(768, 64, width=128, kind=Reciting)
    signs = mx.random.bernoulli(shape=(768, 128), key=mx.random.key(0)) * 2.0 - 1.0
    model.model.decoder.embed_tokens.weight = signs / 128**0.5
    opens = tokenizer.encode("<|turn>model\n")
    model.begin(opens, *([*tokenizer.encode(text), 6] for text in answers), wrong=wrong)
    return model


@pytest.mark.parametrize("options", EVERY_WAY, ids=str)
@pytest.mark.parametrize("wrong", [0, 1, 5])
def test_thoughts_calls_and_sessions(options: dict[str, Any], wrong: int) -> None:
    """Whatever the denoiser drafts, the encoder's turn is what comes, and stays in the cache."""
    if wrong and options in ({}, {"verify": True}):
        pytest.skip("there the denoiser writes")
    tokenizer = gemma_tokenizer()
    model = reciting(tokenizer, TURN + CALL, "It is cold.", wrong=wrong)
    talk = ChatSession(model, tokenizer, tools=[TOOL], max_tokens=200, guards=Guards(), **options)
    parts = [e for e in talk.stream("Weather?") if isinstance(e, Text | Thought | ToolCall)]
    told = {kind: "".join(e.text for e in parts if type(e) is kind) for kind in (Text, Thought)}
    assert told == {Text: "Let me see.One momenté ", Thought: "A cold\nplace?"}
    assert parts[-1] == ToolCall("weather", {"city": "Oslo"})
    assert [e.text for e in talk.stream("And now?") if isinstance(e, Text)] != []
    fresh = PromptCache(model)
    fresh.extend(talk.prompt_cache.tokens)
    (found,), (wanted,) = talk.prompt_cache.encoding([9]), fresh.encoding([9])
    assert mx.allclose(found, wanted, atol=1e-4)


def drafts_of(model: DiffusionGemma, tokenizer: Tokenizer, **options: Any) -> list[list[Draft]]:
    """The denoised drafts of an answer, step by step."""
    options = {"mode": "speculative", **options}
    events = stream_generate(model, tokenizer, "Hello", seed=0, **options)
    drafts = [e for e in events if isinstance(e, Draft) and e.decoded]
    return [list(run) for _, run in groupby(drafts, key=lambda draft: draft.canvas)]


def test_steps_of_drafts_follow_from_what_was_taken() -> None:
    tokenizer = gemma_tokenizer()
    text = "word " * 40
    tokens = len(tokenizer.encode(text)) + 1
    steps = {}
    for wrong in (0, 1, 6):
        runs = drafts_of(reciting(tokenizer, text, wrong=wrong), tokenizer, max_tokens=200)
        steps[wrong] = [run[0].steps - run[0].step + 1 for run in runs]
    assert steps[0][:2] == [2, 1]  # all were taken: fewer will do
    assert max(steps[6]) > 2  # they paid, and went wrong
    assert steps[1][:2] == [2, 1]  # none was taken
    assert sum(steps[1]) < tokens / 4  # then the encoder writes alone, longer and longer


def test_drafts_end_where_the_answer_can(loaded: tuple[DiffusionGemma, Tokenizer]) -> None:
    """They were whole canvases, under a schema too, and decoded all of it in each step."""
    drafts = drafts_of(*loaded, max_tokens=10)
    assert [len(draft.tokens) for draft in drafts[0]] == [10, 10]
    assert all(len(draft.tokens) <= 10 for run in drafts for draft in run)
    drafts = drafts_of(*loaded, schema={"enum": ["yes", "no"]})
    longest = max(len(loaded[1].encode(text)) for text in ('"yes"', '"no"')) + 1
    assert [len(draft.tokens) for draft in drafts[0]] == [longest] * 2
    assert max(len(draft.tokens) for run in drafts for draft in run) == longest
    drafts = drafts_of(*load(FIRST / "tiny"))  # whose drafts take more steps
    assert len(drafts[0][0].tokens) == 64
    assert sum(run[-1].decoded for run in drafts) < sum(
        len(d.tokens) for run in drafts for d in run
    )


# Sampling ----------------------------------------------------------------------------------------


LOGITS = [[0, 1, 2, 1], [2, 0, 0, 1], [0, 0, 1, 3], [1, 1, 0, 1.5]]


def chained(way: Way, draws: Draws, count: int) -> list[tuple[int, ...]]:
    """A text by a chain, as it was committed part by part."""
    model = chain(LOGITS)
    config = replace(model.generation, max_new_tokens=count)
    start, cache = Noise(model.config.canvas_length), PromptCache(model)
    decoding = decode_tokens(model, [0], config, draws, 64, start, cache, trust, way=way)
    return [item.tokens for item in drive(model, decoding) if isinstance(item, Committed)]


def unlike(tokens: Sequence[int], temperature: float) -> float:
    """Chi-squared of a text's pairs, of 12 degrees of freedom: 33 is exceeded once in 1,000."""
    counts, sum_ = Counter(pairwise(tokens)), 0.0
    for before, logits in enumerate(LOGITS):
        weights = np.exp(np.array(logits) / temperature)
        seen = np.array([counts[before, token] for token in range(4)])
        wanted = seen.sum() * weights / weights.sum()
        sum_ += float(((seen - wanted) ** 2 / wanted).sum())
    return sum_


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_samples_are_distributed_as_if_nothing_was_drafted(temperature: float) -> None:
    texts = {}
    for way in (Way("causal"), Way("speculative"), Way("speculative", acceptance="typical")):
        way = replace(way, temperature=temperature)
        parts = chained(way, SeededDraws(3, 4), 1200)
        texts[way.name] = [token for part in parts for token in part]
        assert (max(map(len, parts)) > 1) == (way.mode == "speculative")
    assert texts["speculative"] == texts["causal"]
    assert unlike(texts["speculative"], temperature) < 33
    assert unlike(texts["speculative (typical)"], temperature) > 66
    assert unlike(texts["causal"], 2 * temperature) > 66


class Recorded:
    """Draws as another does, and writes them down; or hands out what was written down."""

    def __init__(self, draws: Draws | None, written: list[mx.array]):
        self._draws, self.written, self._next = draws, written, 0

    def _drawn(self, kind: str, shape: tuple[int, ...]) -> mx.array:
        if self._draws is not None:
            self.written.append(getattr(self._draws, kind)(shape))
        self._next += 1
        assert self.written[self._next - 1].shape == shape
        return self.written[self._next - 1]

    def tokens(self, shape: tuple[int, ...]) -> mx.array:
        return self._drawn("tokens", shape)

    def gumbel(self, shape: tuple[int, ...]) -> mx.array:
        return self._drawn("gumbel", shape)

    def categorical(self, shape: tuple[int, ...]) -> Categorical:
        raise AssertionError("the text is drawn place by place, all else from other draws")


def test_draws_of_one_mode_replayed_in_the_other() -> None:
    way = Way("causal", temperature=0.8)
    recorded = Recorded(SeededDraws(1, 4), [])
    wanted = [token for part in chained(way, recorded, 150) for token in part]
    assert len(recorded.written) == 1 + 3  # a seed of drafts, and noise of 64 places at once
    parts = chained(replace(way, mode="speculative"), Recorded(None, recorded.written), 150)
    assert [token for part in parts for token in part] == wanted
    other = Recorded(SeededDraws(2, 4), [])
    assert [token for part in chained(way, other, 150) for token in part] != wanted


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": 0.5}, "a temperature goes with mode causal or speculative"),
        ({"mode": "causal", "temperature": 2.1}, "a temperature is 0 or from 0.001 to 2, not 2.1"),
        ({"mode": "causal", "temperature": 1e-9}, "a temperature is 0 or from 0.001 to 2"),
        ({"mode": "causal", "temperature": float("nan")}, "a temperature is 0 or from"),
        ({"mode": "causal", "temperature": True}, "a temperature is 0 or from"),
        ({"mode": "causal", "acceptance": "typical"}, "an acceptance goes with mode speculative"),
        ({"acceptance": "exact"}, "an acceptance goes with mode speculative"),
        ({"mode": "speculative", "acceptance": "greedy"}, "an acceptance is exact or typical"),
        ({"mode": "greedy"}, "a mode is one of denoise, causal, speculative"),
        ({"mode": "causal", "verify": True}, "mode causal does not go with verify"),
        ({"mode": "speculative", "shrink": True}, "mode speculative does not go with shrink"),
        ({"verify": 1}, "verify"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(
    loaded: tuple[DiffusionGemma, Tokenizer], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(SettingError, match=said):
        stream_generate(*loaded, "Hello", **options)


def test_trimmed_is_as_never_read(loaded: tuple[DiffusionGemma, Tokenizer]) -> None:
    """Behind what a sliding layer holds, within it, and where more was read than it can hold."""
    model, _ = loaded
    tokens = [5 + i % 700 for i in range(1700)]
    places = [(0, 20, 7), (505, 20, 512), (600, 40, 620), (600, 40, 600), (600, 900, 700)]
    for begun, read, left in places:
        cache = PromptCache(model)
        cache.extend(tokens[:begun])
        mark = cache.mark()
        cache.extend(tokens[begun : begun + read])
        cache.trim(mark, left)
        fresh = PromptCache(model)
        fresh.extend(tokens[:left])
        assert cache.tokens == fresh.tokens
        (found,), (wanted,) = cache.encoding([9]), fresh.encoding([9])
        assert mx.allclose(found, wanted, atol=1e-4)
