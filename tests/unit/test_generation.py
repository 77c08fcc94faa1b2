"""The loop and the layers above it, on the trained Sudoku checkpoint."""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from held import active_memory
from paths import SUDOKU
from random_model import scripted

from mlx_diffgemma import (
    ConfidenceThreshold,
    ContextError,
    DiffusionGemma,
    Done,
    Draft,
    Error,
    SeededDraws,
    SettingError,
    Text,
    Tokenizer,
    choose,
    edit,
    fill,
    generate,
    load,
    stream_generate,
)
from mlx_diffgemma.diffusion.decoding import drive
from mlx_diffgemma.diffusion.denoise import Start, denoise
from mlx_diffgemma.diffusion.prompt_cache import prefill
from mlx_diffgemma.model.cache import LayerCache
from mlx_diffgemma.tasks.canvases import Committed, generate_tokens
from mlx_diffgemma.tasks.starts import CanvasError, First, forced_tokens
from mlx_diffgemma.text.turns import StopStrings
from mlx_diffgemma.text.vocabulary import Vocabulary

PUZZLES = [line.split() for line in (SUDOKU / "puzzles.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def loaded() -> tuple[DiffusionGemma, Tokenizer]:
    return load(SUDOKU)


def rows(cells: str) -> str:
    return "\n".join(cells[i : i + 6] for i in range(0, 36, 6))


def test_events_in_order_with_statistics(loaded: tuple[DiffusionGemma, Tokenizer]) -> None:
    puzzle, solution = PUZZLES[0]
    events = list(stream_generate(*loaded, rows(puzzle), seed=0))
    kinds = [type(event) for event in events]
    done = events[-1]
    assert isinstance(done, Done)
    assert kinds == [Draft] * done.denoising_steps + [Text, Done]
    assert [e.step for e in events if isinstance(e, Draft)] == [*range(1, done.denoising_steps + 1)]
    assert "".join(e.text for e in events if isinstance(e, Text)) == rows(solution)
    assert done.finish_reason == "stop"
    assert done.prompt_tokens == 47  # <bos><|turn><user>, 41 characters, <turn|><|turn><model>
    assert done.generated_tokens == 42  # 41 characters and the end token
    assert done.canvases == 1
    assert done.tokens_per_forward == 42 / done.denoising_steps
    assert done.peak_memory > 0
    with pytest.raises(FrozenInstanceError):
        done.canvases = 2  # type: ignore[misc]


def test_seed_repeats_and_other_seeds_differ(loaded: tuple[DiffusionGemma, Tokenizer]) -> None:
    puzzle = rows(PUZZLES[3][0])

    def first_draft(seed: int) -> tuple[int, ...]:
        event = next(stream_generate(*loaded, puzzle, seed=seed, steps=4))
        assert isinstance(event, Draft)
        return event.tokens

    assert first_draft(5) == first_draft(5)
    assert len({first_draft(seed) for seed in range(8)}) > 1
    assert generate(*loaded, puzzle, seed=5) == generate(*loaded, puzzle, seed=5)


class CountingModel:
    """Counts decoder passes of a model without changing it."""

    def __init__(self, model: DiffusionGemma, monkeypatch: pytest.MonkeyPatch):
        self.passes = 0
        decode = type(model).decode

        def counted(this: DiffusionGemma, *args: Any) -> mx.array:
            self.passes += 1
            return decode(this, *args)

        monkeypatch.setattr(type(model), "decode", counted)


def test_a_step_is_computed_when_it_is_asked_for(
    loaded: tuple[DiffusionGemma, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = CountingModel(loaded[0], monkeypatch)
    events = stream_generate(*loaded, rows(PUZZLES[0][0]), seed=0)
    assert counter.passes == 0
    for passes in (1, 2):
        assert isinstance(next(events), Draft)
        assert counter.passes == passes
    events.close()
    assert counter.passes == 2
    assert list(events) == []


def test_closing_frees_the_cache(loaded: tuple[DiffusionGemma, Tokenizer]) -> None:
    """A generator left open used to keep its cache, gigabytes with a real model."""
    caches: list[int] = []

    def alive() -> int:
        gc.collect()
        return sum(isinstance(found, LayerCache) for found in gc.get_objects())

    before = alive()
    memory = active_memory()
    events = stream_generate(*loaded, list(range(20, 60)) * 20, seed=0)
    next(events)
    caches.append(alive() - before)
    assert mx.get_active_memory() > memory
    events.close()
    caches.append(alive() - before)
    assert caches == [len(loaded[0].config.layers), 0]
    assert mx.get_cache_memory() < 4096  # freed buffers are handed back, not hoarded
    assert active_memory() < memory + 1000  # constants of compiled kernels stay


def test_max_tokens_cuts_exactly(loaded: tuple[DiffusionGemma, Tokenizer]) -> None:
    for budget in (1, 7, 41):
        *_, done = stream_generate(*loaded, rows(PUZZLES[0][0]), seed=0, max_tokens=budget)
        assert isinstance(done, Done)
        assert (done.generated_tokens, done.finish_reason) == (budget, "length")


def without_end(model: DiffusionGemma) -> Any:
    return replace(model.generation, eos_token_ids=(), max_new_tokens=110, max_denoising_steps=2)


def test_several_canvases_follow_each_other(loaded: tuple[DiffusionGemma, Tokenizer]) -> None:
    """The second canvas is written after the first: its cache holds prompt and first canvas."""
    model, _ = loaded
    config = without_end(model)
    prompt = list(range(20, 50))
    run = generate_tokens(model, prompt, config, SeededDraws(1, 128))
    committed = [item for item in run if isinstance(item, Committed)]
    assert [len(c.tokens) for c in committed] == [48, 48, 14]

    draws = SeededDraws(1, 128)
    text: list[int] = []
    for block in committed:  # the slow way: encode everything from scratch before each canvas
        cache = model.make_cache()
        prefill(model, prompt + text, cache)
        *_, last = drive(model, denoise(model, cache, config, draws))
        text += last.argmax[0].tolist()
        assert text[-48:][: len(block.tokens)] == list(block.tokens)


@pytest.mark.parametrize(
    ("settings", "sure", "unsure"),
    [
        ({}, 2, 48),  # the reference: certain and as the step before, or all steps
        ({"stability_threshold": 0}, 1, 48),
        ({"stability_threshold": 0, "min_steps": 3}, 3, 48),
        ({"plateau": 4}, 2, 5),  # the best canvas has not changed for four steps
        ({"plateau": 4, "min_steps": 7}, 7, 7),
    ],
)
def test_what_ends_a_canvas(settings: dict[str, Any], sure: int, unsure: int) -> None:
    for line, steps in (([5] * 64, sure), ([None] * 64, unsure)):
        model = scripted()
        model.begin(line)
        config = replace(model.generation, **settings)
        cache = model.make_cache()
        assert len(list(drive(model, denoise(model, cache, config, SeededDraws(0, 768))))) == steps


def test_speeds_change_only_sampler_settings(loaded: tuple[DiffusionGemma, Tokenizer]) -> None:
    faithful = loaded[0].generation
    assert faithful.with_speed("faithful") == faithful
    for speed in ("balanced", "fast"):
        at = faithful.with_speed(speed)  # type: ignore[arg-type]
        assert at != faithful
        assert (at.max_new_tokens, at.eos_token_ids) == (48, faithful.eos_token_ids)


def test_finish_reasons(
    loaded: tuple[DiffusionGemma, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = loaded

    def reason(config: Any, prompt: list[int]) -> Any:
        *_, last = generate_tokens(model, prompt, config, SeededDraws(1, 128))
        return last.finish_reason if isinstance(last, Committed) else None

    # Two steps of a canvas that is not a puzzle do not converge.
    assert reason(without_end(model), list(range(20, 50))) == "not_converged"
    settled = replace(without_end(model), stability_threshold=0, confidence_threshold=100.0)
    assert reason(settled, list(range(20, 50))) == "length"
    # The context ends: room for one canvas of 48 and not for a second.
    monkeypatch.setattr(model, "context", 200)
    full = replace(settled, max_new_tokens=1000)
    assert reason(full, [20] * (200 - 90)) == "length"


def test_pinned_tokens_stay_and_count_for_nothing(loaded: tuple[DiffusionGemma, Tokenizer]) -> None:
    model, tokenizer = loaded
    puzzle, solution = PUZZLES[1]
    prompt = tokenizer.encode(
        tokenizer.apply_chat_template([{"role": "user", "content": rows(puzzle)}])
    )
    cache = model.make_cache()
    prefill(model, prompt, cache)
    start = tokenizer.encode(rows(solution))
    start += tokenizer.encode("<turn|>") * (48 - len(start))
    given, pinned = mx.array([start]), mx.array([[i % 3 > 0 for i in range(48)]])
    snapshots = list(
        drive(
            model,
            denoise(model, cache, model.generation, SeededDraws(2, 128), Start(given, pinned)),
        )
    )
    for state in snapshots:
        kept = np.array(pinned)
        assert (np.array(state.canvas)[kept] == np.array([start])[kept]).all()
        assert (np.array(state.argmax)[kept] == np.array([start])[kept]).all()
        assert (np.array(state.entropy)[kept] == 0).all()
        assert np.array(state.accepted)[kept].all()
    assert snapshots[-1].argmax[0].tolist()[:41] == start[:41]

    all_pinned = mx.ones((1, 48), dtype=mx.bool_)
    begun = Start(given, all_pinned)
    run = drive(model, denoise(model, cache, model.generation, SeededDraws(2, 128), begun))
    assert [s.argmax[0].tolist() for s in run] == [start, start]  # stable after two steps


def test_unaccepted_positions_go_back_to_the_background(
    loaded: tuple[DiffusionGemma, Tokenizer],
) -> None:
    """Fresh noise used to destroy a text that was to be repaired."""
    model, tokenizer = loaded
    cache = model.make_cache()
    prefill(model, list(range(20, 60)), cache)
    text = Start(mx.array([tokenizer.encode("12" * 24)]), background=mx.full((1, 48), 7))
    for state in drive(model, denoise(model, cache, model.generation, SeededDraws(2, 128), text)):
        free = ~np.array(state.accepted)
        assert (np.array(state.canvas)[free] == 7).all()


def test_canvases_of_text(loaded: tuple[DiffusionGemma, Tokenizer]) -> None:
    model, tokenizer = loaded
    draws = SeededDraws(0, 128)
    words = Vocabulary(model, tokenizer)
    forced = forced_tokens(model, words, [("12", True), ("345", False), ("6", True)])
    made = First(forced).begin([], draws)
    assert made is not None
    assert made.pinned is not None
    assert made.pinned[0].tolist() == [True, True, False, False, False, True] + [True] * 42
    ids = made.canvas[0].tolist()
    assert tokenizer.decode(ids[:2] + ids[5:]) == "126"
    assert ids[6:] == [tokenizer.token_id("<turn|>")] + [tokenizer.token_id("<eos>")] * 41
    with pytest.raises(CanvasError, match="48 tokens, more than a canvas of 48"):
        forced_tokens(model, words, [("1" * 48, True)])


def test_confidence_sampler_never_takes_back(loaded: tuple[DiffusionGemma, Tokenizer]) -> None:
    model, tokenizer = loaded
    solved = 0
    for puzzle, solution in PUZZLES[:10]:
        prompt = tokenizer.encode(
            tokenizer.apply_chat_template([{"role": "user", "content": rows(puzzle)}])
        )
        cache = model.make_cache()
        prefill(model, prompt, cache)
        config = model.generation.override(sampler=ConfidenceThreshold(0.7))
        held = np.zeros((1, 48), dtype=bool)
        before = np.zeros((1, 48))
        for state in drive(model, denoise(model, cache, config, SeededDraws(0, 128))):
            accepted, canvas = np.array(state.accepted), np.array(state.canvas)
            assert (accepted | ~held).all(), "a held position was given up"
            assert (canvas[held] == before[held]).all(), "a held token was changed"
            assert (np.array(state.argmax)[accepted] == canvas[accepted]).all()
            held, before = accepted, canvas
        assert state.converged
        solved += tokenizer.decode(state.argmax[0].tolist()).startswith(rows(solution))
    assert solved >= 5


def test_prompts_that_cannot_run_are_refused_before_computing(
    loaded: tuple[DiffusionGemma, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = CountingModel(loaded[0], monkeypatch)
    for prompt in ("", "  \n", [], [20] * 4096, [20] * (4096 - 47)):
        with pytest.raises(ContextError, match=r"empty|does not fit"):
            list(stream_generate(*loaded, prompt))
    for flags in ({"steps": 0}, {"max_tokens": 0}):
        with pytest.raises(Error):
            stream_generate(*loaded, "x", **flags)
    assert counter.passes == 0


NO_IDS: list[Any] = [
    [20, 128], [-1], [2**40], [2**70], [10**5000], [True], [20.0], [float("nan")], [None], ["a"],
    (20, 128), np.array([20, 128]), np.array([20.5]), np.array([[20]]), mx.array([128]), [[20]],
    [20, {"role": "user", "content": "x"}],
]  # fmt: skip


def test_ids_that_the_vocabulary_lacks_are_refused_before_computing(
    loaded: tuple[DiffusionGemma, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were read from beyond the embedding table, or ended the process."""
    counter = CountingModel(loaded[0], monkeypatch)
    for ids in NO_IDS:
        with pytest.raises(SettingError, match=r"token id|ids|prompt") as refused:
            stream_generate(*loaded, ids)
        assert len(str(refused.value)) < 100
        with pytest.raises(SettingError):
            choose(*loaded, ids, {"x": ["1", "2"]})
    assert counter.passes == 0
    ids = [20, 127]
    for same in (tuple(ids), np.array(ids), np.array(ids, dtype=np.uint8), mx.array(ids)):
        assert generate(*loaded, same, seed=1, steps=1) == generate(*loaded, ids, seed=1, steps=1)  # type: ignore[arg-type]


def test_starts_that_are_no_canvas_are_refused(loaded: tuple[DiffusionGemma, Tokenizer]) -> None:
    """Ids pinned to a canvas were read from beyond the embedding table; a late start asserted."""
    model, _ = loaded
    cache = model.make_cache()
    prefill(model, [20], cache)
    canvas, pinned = mx.full((1, 48), 20), mx.zeros((1, 48), dtype=mx.bool_)
    assert list(
        drive(
            model,
            denoise(model, cache, model.generation, SeededDraws(0, 128), Start(canvas, pinned)),
        )
    )
    wrong: list[Any] = [
        Start(mx.full((1, 48), 128)),
        Start(mx.full((1, 48), -1)),
        Start(mx.full((1, 48), 2**40, dtype=mx.int64)),
        Start(mx.full((1, 48), 20.0)),
        Start(pinned),
        Start(canvas[0]),
        Start(canvas[:, :0]),
        Start([[20] * 48]),  # type: ignore[arg-type]
        Start(canvas, pinned[:, 1:]),
        Start(canvas, canvas),
        Start(canvas, [[False] * 48]),  # type: ignore[arg-type]
        Start(canvas, background=mx.full((1, 48), 128)),
        Start(canvas, background=canvas[:, 1:]),
        Start(canvas, first_step=0),
        Start(canvas, first_step=49),
        Start(canvas, first_step=1.5),  # type: ignore[arg-type]
    ]
    for start in wrong:
        with pytest.raises(SettingError):
            next(drive(model, denoise(model, cache, model.generation, SeededDraws(0, 128), start)))
        with pytest.raises(SettingError):
            list(stream_generate(*loaded, "x", start=start))
    with pytest.raises(SettingError, match="draws of 129 ids"):  # noise beyond the table
        list(stream_generate(*loaded, "x", draws=SeededDraws(0, 129)))


def test_settings_of_the_wrong_type_or_size(loaded: tuple[DiffusionGemma, Tokenizer]) -> None:
    """MLX's TypeError came through for seeds; True was a seed; `prefill_chunk=0` never ended."""
    for seed in (-1, 2**64, 2**70, 10**5000, True, 1.0, "1", float("nan"), [1]):
        given: Any = seed
        runs: list[Callable[[], Any]] = [
            lambda: SeededDraws(given, 128),  # noqa: B023
            lambda: stream_generate(*loaded, "x", seed=given),  # noqa: B023
            lambda: fill(*loaded, "1{{}}", seed=given),  # noqa: B023
            lambda: edit(*loaded, "12", "x", seed=given),  # noqa: B023
            lambda: choose(*loaded, "x", {"x": ["1", "2"]}, seed=given),  # noqa: B023
        ]
        for run in runs:
            with pytest.raises(SettingError, match="a seed must be") as refused:
                run()
            assert len(str(refused.value)) < 110
    for fine in (0, 2**64 - 1, np.int32(5), np.uint64(2**64 - 1)):
        assert SeededDraws(fine, 128).tokens((1, 4)).shape == (1, 4)  # type: ignore[arg-type]
    for name, least in (("prefill_chunk", "prefill_chunk"), ("max_tokens", "max tokens"),
                        ("steps", "denoising steps")):  # fmt: skip
        for wrong in (0, -1, True, 1.5, "3", mx.array([1, 2])):
            with pytest.raises(SettingError, match=f"{least} must be"):
                stream_generate(*loaded, "x", **{name: wrong})  # type: ignore[arg-type]


def test_prompt_forms_agree(loaded: tuple[DiffusionGemma, Tokenizer]) -> None:
    model, tokenizer = loaded
    text = rows(PUZZLES[0][0])
    chat = [{"role": "user", "content": text}]
    ids = tokenizer.encode(tokenizer.apply_chat_template(chat))
    answers: Iterator[str] = (generate(model, tokenizer, p, seed=3) for p in (text, chat, ids))
    assert len(set(answers)) == 1


@pytest.mark.parametrize(
    ("stop", "parts", "shown"),
    [
        (["END"], ["ab", "cE", "ND", "x"], "abc"),
        (["END"], ["ab", "cE", "N", "x"], "abcENx"),
        (["b", "abc"], ["xa", "bc"], "x"),
        (["aab"], ["aa", "aa", "b"], "aa"),
        (["", "q"], ["abc"], "abc"),
    ],
)
def test_text_ends_at_a_stop_string_wherever_canvases_cut_it(
    stop: list[str], parts: list[str], shown: str
) -> None:
    stop_strings = StopStrings(stop)
    text = ""
    for part in parts:
        text += stop_strings.feed(part)
        assert shown.startswith(text)  # nothing is shown that would have to be taken back
        if stop_strings.hit:
            break
    assert text + stop_strings.rest() == shown


def test_an_answer_begins_with_its_opening(loaded: tuple[DiffusionGemma, Tokenizer]) -> None:
    text = generate_text(loaded, opening="12.\n", max_tokens=9, steps=3)
    assert text.startswith("12.\n")
    with pytest.raises(ContextError, match="more than a canvas"):
        generate_text(loaded, opening="1" * 64)
    assert generate_text(loaded, stop=["\n"]) == generate_text(loaded).split("\n")[0]


def generate_text(loaded: tuple[DiffusionGemma, Tokenizer], **settings: Any) -> str:
    events = stream_generate(*loaded, rows(PUZZLES[0][0]), seed=0, **settings)
    return "".join(event.text for event in events if isinstance(event, Text))


def test_a_long_stop_string_costs_no_more_than_what_has_come() -> None:
    """Each text was compared with all beginnings of a stop string, megabytes of it."""
    stop_strings = StopStrings(["a" * 1_000_000 + "b"])
    began = time.monotonic()
    assert stop_strings.feed("some text aa") == "some text "
    assert stop_strings.rest() == "aa"
    assert time.monotonic() - began < 2
