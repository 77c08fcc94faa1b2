"""Verified edits and fills: the encoder corrects, and keeps what it likes best."""

from collections.abc import Sequence

import pytest
from paths import FIRST

from mlx_diffgemma import (
    DiffusionGemma,
    EditRequest,
    EditResult,
    FillRequest,
    FillResult,
    PromptCache,
    SettingError,
    Tokenizer,
    edit,
    fill,
    load,
    score,
)
from mlx_diffgemma.diffusion.causal import Doubts
from mlx_diffgemma.diffusion.decoding import Rest, drive
from mlx_diffgemma.model.diffusion_gemma import Pass
from mlx_diffgemma.tasks.batch import stream_batch
from mlx_diffgemma.tasks.edit import _allowed, _most
from mlx_diffgemma.tasks.proofread import Proofreader
from mlx_diffgemma.tasks.request import encode_prompt, run_prepared
from mlx_diffgemma.text.vocabulary import Vocabulary

Loaded = tuple[DiffusionGemma, Tokenizer]

TYPOS = (
    "they were much in eviednce during the fighing",
    "the mtate of having abnormallyy few cells",
    "to make or rpoduce a loud noise",
)

CITY = FillRequest(
    "The capital of Norway is {{city}}.",
    prompt="What is the capital of Norway?",
    steps=8,
    seed=1,
    verify=True,
)


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(FIRST / "tiny")


def total(loaded: Loaded, prompt: str, text: str) -> float:
    """The log-probability of an answer and its end."""
    return score(*loaded, prompt, f"{text}<turn|>").total


class SlowReader:
    """Reads prompt and answer anew for whatever is asked."""

    def __init__(self, loaded: Loaded, prompt: Sequence[int]):
        self._loaded, self._prompt, self._tokens = loaded, prompt, list[int]()

    def read(self, tokens: Sequence[int]) -> int:
        self._tokens = list(tokens)
        return len(tokens)

    def doubts(self, first: int = 0) -> Doubts:
        found = score(*self._loaded, list(self._prompt), self._tokens)
        tops = [top[0] for top in found.top][first:]
        return Doubts(
            found.log_probabilities[first:],
            tuple(token for token, _ in tops),
            tuple(chance for _, chance in tops),
        )


@pytest.mark.parametrize("text", TYPOS)
def test_verified_is_what_a_reader_without_a_cache_finds(loaded: Loaded, text: str) -> None:
    model, tokenizer = loaded
    plain = edit(model, tokenizer, text, "Fix", seed=0, steps=24).text
    found = edit(model, tokenizer, text, "Fix", seed=0, steps=24, verify=True)
    own, rewritten = tokenizer.encode(text), tokenizer.encode(plain)
    slow = SlowReader(loaded, encode_prompt(tokenizer, f"Fix: {text}"))
    vocabulary = Vocabulary(model, tokenizer)
    allowed = frozenset(_allowed(vocabulary, own))
    proofreader = Proofreader(
        slow,  # type: ignore[arg-type]
        allowed,
        [vocabulary.end],
        _most(own, model.config.canvas_length),
    )

    def corrected():  # type: ignore[no-untyped-def]
        best = yield from proofreader.likeliest([own, rewritten])
        yield (yield from proofreader.corrected(best))

    *_, tokens = drive(model, corrected())
    assert found.text == tokenizer.decode(tokens)
    assert 0 < found.encoder_passes < 40
    assert found.positions_encoded < found.positions_decoded / 2


def test_verified_is_liked_no_less_than_the_edit_or_the_text_itself(loaded: Loaded) -> None:
    """An edit is taken as it is without `verify`, whatever the encoder thinks of it."""
    worse = 0
    for text in (*TYPOS, "look for a specific person or thing", "of the"):
        for seed in range(2):
            plain = edit(*loaded, text, "Fix", seed=seed, steps=8).text
            found = edit(*loaded, text, "Fix", seed=seed, steps=8, verify=True).text
            own, edited, kept = (total(loaded, f"Fix: {text}", t) for t in (text, plain, found))
            assert kept >= max(own, edited) - 1e-3
            worse += edited < own
    assert worse  # else nothing was seen to be kept


def test_typos_that_an_edit_leaves_are_mended_and_what_is_right_stays(loaded: Loaded) -> None:
    wrong, right = TYPOS[0], "they were much in evidence during the fighing"
    assert edit(*loaded, wrong, "Fix", seed=0).text == wrong
    assert edit(*loaded, wrong, "Fix", seed=0, verify=True).text == right
    for seed in range(2):
        text = "look for a specific person or thing"
        assert edit(*loaded, text, "Fix", seed=seed, verify=True).text == text
    assert edit(*loaded, "x\n", "Fix", seed=0, verify=True).text.endswith("\n")  # one token
    with pytest.raises(SettingError, match="verify"):
        edit(*loaded, "x", "Fix", verify=1)  # type: ignore[arg-type]


def test_a_hole_is_written_anew_only_if_the_whole_line_is_likelier(loaded: Loaded) -> None:
    """The denoiser tries a few lengths; the encoder writes until the text behind follows."""
    prompt = CITY.prompt
    assert prompt is not None
    plain = fill(*loaded, CITY.template, prompt=prompt, seed=1, steps=8)
    found = fill(*loaded, CITY.template, prompt=prompt, seed=1, steps=8, verify=True)
    assert plain.values != {"city": "Oslo"}
    assert total(loaded, prompt, found.text) >= total(loaded, prompt, plain.text)
    assert found.values == {"city": "Oslo"}
    assert len(found.probabilities["city"]) == 4
    whole = fill(*loaded, "{{all}}", prompt=prompt, seed=1, steps=4, verify=True)
    assert whole.text == "The capital of Norway is Oslo."  # 25 tokens, a length that is not tried


def test_rows_of_a_batch_are_as_alone(loaded: Loaded) -> None:
    model, tokenizer = loaded
    asked = [EditRequest(text, "Fix", steps=6, seed=2, verify=True) for text in TYPOS]
    vocabulary = Vocabulary(model, tokenizer)
    ready = [each.prepare(model, vocabulary) for each in asked]
    alone = [list(run_prepared(model, each))[-1] for each in ready]
    order, found = list[int](), dict[int, object]()
    for number, event in stream_batch(model, tokenizer, [*asked, CITY], max_batch=4):
        order.append(number)
        found[number] = event
    for number, each in enumerate(alone):
        one = found[number]
        assert isinstance(one, EditResult)
        assert isinstance(each, EditResult)
        assert (one.text, one.encoder_passes) == (each.text, each.encoder_passes)
    city = found[3]
    assert isinstance(city, FillResult)
    assert city.values == {"city": "Oslo"}
    assert order != sorted(order)  # none holds up the others


@pytest.mark.parametrize("rests", [1, 3, 6])
def test_stopped_in_the_middle_a_prompt_cache_is_as_good_as_new(loaded: Loaded, rests: int) -> None:
    model, tokenizer = loaded
    request = EditRequest(TYPOS[0], "Fix", steps=6, seed=0, verify=True)
    cache = PromptCache(model)
    run = request.prepare(model, Vocabulary(model, tokenizer)).run(cache)
    hidden = None
    while rests:
        item = run.send(hidden)
        hidden = model.decode([item])[0] if isinstance(item, Pass) else None
        rests -= isinstance(item, Rest)
    run.close()
    prepared = request.prepare(model, Vocabulary(model, tokenizer))
    *_, again = run_prepared(model, prepared, cache)
    assert isinstance(again, EditResult)
    assert again.text == edit(model, tokenizer, TYPOS[0], "Fix", steps=6, seed=0, verify=True).text
