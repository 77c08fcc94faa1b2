"""Exact success on held-out tasks: what a recipe or a step budget costs in quality."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from itertools import product
from pathlib import Path

from ..diffusion.denoise import Start
from ..diffusion.draws import SeededDraws
from ..errors import Error
from ..files import read_text
from ..model.diffusion_gemma import DiffusionGemma
from ..tasks.choose import Choice, ChooseRequest, likeliest
from ..tasks.edit import STRENGTH, EditResult, Revision, edit_start
from ..tasks.fill import FillResult, stream_fill
from ..tasks.generate import stream_generate
from ..tasks.modes import DENOISE, Way
from ..tasks.request import Done, Draft, Event, encode_prompt, run_prepared
from ..tasks.starts import Pieces
from ..text.tokenizer import Message, Tokenizer
from ..text.turns import Text
from ..text.vocabulary import Vocabulary
from .calibration import Bin, calibration_error, reliability

# Rows of clues and dots.
_SUDOKU = re.compile(r"[\d.]+(?:\n[\d.]+)+")

HELD_OUT = Path(__file__).parent.parent / "data" / "heldout.jsonl"


class TaskError(Error):
    """A file of tasks that cannot be used."""


@dataclass(frozen=True)
class Case:
    """A prompt and what is right: `answer` exactly, or a match of the regular expression `regex`.

    `pieces` pins parts of the canvas (see `starts.Pieces`); `start` is text to be repaired;
    `template` is a text whose holes are filled, see `text/template.py`; `history` has roles and
    texts of what was said before the prompt. Of `labels`, one is chosen; a template then is a text
    with `{label}` in it, see `tasks/choose.py`.
    """

    task: str
    prompt: str
    kind: str = ""
    answer: str | None = None
    regex: str | None = None
    pieces: tuple[tuple[str, bool], ...] | None = None
    start: str | None = None
    template: str | None = None
    history: tuple[tuple[str, str], ...] = ()
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Outcome:
    """What a model wrote for a case, with the cost of it.

    `decoded` counts canvases: positions decoded in the length of one. `confidence` is the
    probability that the model gives its answer: of a label, that it was chosen with; of what was
    denoised, the product over its tokens in the last step, or of those in holes once all is
    written. Where the encoder writes or corrects, there is none.
    """

    text: str
    passes: int
    canvases: int
    tokens_per_forward: float
    positions_per_token: float
    decoded: float
    confidence: float | None = None


@dataclass(frozen=True)
class Score:
    """One row of the report: a task (or kind) at one step budget in one mode, over all cases and
    seeds.

    `decoded_per_canvas` is what the steps of a canvas decode of it: all steps, if each decodes all.
    Rates are in 0..1; `error` is the standard error of `success` over cases. `typos_fixed` and
    `clean_damaged` (of characters) only exist where text is repaired. `calibration_error` and
    `reliability` compare how sure the model was with how often it was right, where that is known.
    """

    task: str
    steps: int
    runs: int
    success: float
    error: float
    steps_per_canvas: float
    decoded_per_canvas: float
    tokens_per_forward: float
    positions_per_token: float
    typos_fixed: float | None = None
    clean_damaged: float | None = None
    mode: str = "denoise"
    calibration_error: float | None = None
    reliability: tuple[Bin, ...] = ()


# Which shipped checkpoint answers a task, where none is named and it is not the default one.
SPECIALIST = {"sudoku": "tiny-puzzles", "sudoku-hard": "tiny-puzzles"}


def read_cases(path: Path) -> list[Case]:
    """Read one JSON object a line, with the fields of `Case`; `task` may be missing.

    Raises:
        TaskError: naming the line that cannot be used.
    """
    cases = []
    lines = read_text(path, TaskError).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = {"task": path.stem, **json.loads(line)}
            if values.get("pieces"):
                values["pieces"] = tuple(
                    (str(text), bool(given)) for text, given in values["pieces"]
                )
            if values.get("history"):
                values["history"] = tuple(
                    (str(role), str(text)) for role, text in values["history"]
                )
            if values.get("labels") is not None:
                values["labels"] = tuple(map(str, values["labels"]))
            case = Case(**values)
            re.compile(case.regex or "")
        except (ValueError, TypeError, re.error) as error:
            raise TaskError(f"{path}, line {number}: {error}") from None
        if (case.answer is None) == (case.regex is None):
            raise TaskError(f"{path}, line {number}: needs either answer or regex")
        if case.labels is not None and case.answer not in case.labels:
            raise TaskError(f"{path}, line {number}: the answer is none of the labels")
        cases.append(case)
    if not cases:
        raise TaskError(f"{path} has no tasks")
    return cases


def at_most(limit: int, cases: Iterable[Case]) -> list[Case]:
    """The first cases of each task, at most `limit` of one."""
    groups: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        groups[case.task].append(case)
    return [case for task in sorted(groups) for case in groups[task][:limit]]


def pinned_sudokus(cases: Iterable[Case]) -> list[Case]:
    """Those cases whose prompt is a Sudoku, as templates: its clues are given, dots are holes.

    Raises:
        TaskError: there are none.
    """
    found = [
        replace(case, template=_sudoku_template(case.prompt))
        for case in cases
        if _SUDOKU.fullmatch(case.prompt)
    ]
    if not found:
        raise TaskError("there is no Sudoku among the tasks")
    return found


def _sudoku_template(puzzle: str) -> str:
    """A puzzle with a hole for a digit in the place of each dot."""
    digits = "|".join(map(str, range(1, len(puzzle.split("\n")) + 1)))
    return "".join(f"{{{{c{i}:{digits}}}}}" if c == "." else c for i, c in enumerate(puzzle))


def events_of(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    case: Case,
    steps: int | None,
    seed: int,
    way: Way = DENOISE,
) -> Iterator[Event]:
    """Answer one case, as `stream_generate` does.

    Where the encoder writes token by token, nothing but the prompt is given. A text to be repaired
    and verified is not for this: `edit` does so.
    """
    draws = SeededDraws(seed, model.config.vocab_size)
    start: Start | Pieces | None = None
    if way.mode != "denoise":
        pass
    elif case.pieces is not None:
        start = Pieces(case.pieces)
    elif case.start is not None:
        config = model.generation.override(max_denoising_steps=steps)
        vocabulary = Vocabulary(model, tokenizer)
        start = edit_start(model, vocabulary, case.start, "", STRENGTH, config, draws)
    return stream_generate(
        model,
        tokenizer,
        _messages(case),
        steps=steps,
        draws=draws,
        start=start,
        mode=way.mode,
        verify=way.verify,
        temperature=way.temperature,
        acceptance=way.acceptance,
    )


def _messages(case: Case) -> list[Message]:
    said = [*case.history, ("user", case.prompt)]
    return [{"role": role, "content": text} for role, text in said]


def run_case(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    case: Case,
    steps: int | None,
    seed: int,
    way: Way = DENOISE,
) -> Outcome:
    """Answer one case to the end.

    Raises:
        TaskError: a template is to be filled, or a label chosen, by the encoder alone.
    """
    if case.labels is not None:
        if way != DENOISE:
            raise TaskError(f"labels are chosen by denoising alone, not by mode {way.name}")
        return _choose(model, tokenizer, case, case.labels, seed)
    if case.template is not None:
        if way.mode != "denoise":
            raise TaskError(f"a template is filled by denoising, not by mode {way.name}")
        return _fill(model, tokenizer, case, case.template, steps, seed, way.verify)
    if case.start is not None and way.verify:
        return _verified_edit(model, tokenizer, case, case.start, steps, seed)
    text = ""
    last: dict[int, Draft] = {}  # of each canvas
    for event in events_of(model, tokenizer, case, steps, seed, way):
        if isinstance(event, Text):
            text += event.text
        elif isinstance(event, Draft):
            last[event.canvas] = event
        elif isinstance(event, Done):
            done = event
    return Outcome(
        text,
        done.denoising_steps,
        done.canvases,
        done.tokens_per_forward,
        done.positions_per_token,
        done.positions_decoded / model.config.canvas_length,
        # Of what the encoder has written or corrected, drafts do not tell.
        math.prod(p for each in last.values() for p in each.probabilities[: each.end])
        if way == DENOISE
        else None,
    )


def _choose(
    model: DiffusionGemma, tokenizer: Tokenizer, case: Case, labels: tuple[str, ...], seed: int
) -> Outcome:
    """Choose one of a case's labels."""
    request = ChooseRequest(_messages(case), {"label": labels}, case.template, seed=seed)
    question = request.prepare(model, Vocabulary(model, tokenizer))
    *_, choice = run_prepared(model, question)
    assert isinstance(choice, Choice)
    best = likeliest(choice["label"])
    tokens, canvases = len(tokenizer.encode(best)), len(question.rows)
    positions = canvases * model.config.canvas_length
    confidence = choice["label"][best]
    return Outcome(best, 1, 1, tokens, positions / tokens, canvases, confidence)


def _verified_edit(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    case: Case,
    start: str,
    steps: int | None,
    seed: int,
) -> Outcome:
    """Repair as `edit` does, whose prompt this case has already."""
    prepared = Revision(
        model,
        Vocabulary(model, tokenizer),
        left="",
        left_ids=[],
        chunks=[start],
        right="",
        prompt=encode_prompt(tokenizer, _messages(case), most=model.context),
        strength=STRENGTH,
        config=model.generation.override(max_denoising_steps=steps),
        seed=seed,
        draws=None,
        verify=True,
    )
    *_, result = run_prepared(model, prepared)
    assert isinstance(result, EditResult)
    written = len(tokenizer.encode(result.text)) + 1  # with the end token
    return Outcome(
        result.text,
        result.steps,
        1,
        written / (result.steps + result.encoder_passes),
        (result.positions_decoded + result.positions_encoded) / written,
        result.positions_decoded / model.config.canvas_length,
    )


def _fill(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    case: Case,
    template: str,
    steps: int | None,
    seed: int,
    verify: bool,
) -> Outcome:
    canvases = 0
    for event in stream_fill(
        model, tokenizer, template, prompt=case.prompt, steps=steps, seed=seed, verify=verify
    ):
        if isinstance(event, Draft):
            canvases = event.canvas + 1
        elif isinstance(event, FillResult):
            result = event
    written = sum(map(len, result.probabilities.values()))
    decoded = result.positions_decoded
    worked = decoded + result.positions_encoded
    return Outcome(
        result.text,
        result.steps,
        canvases,
        written / (result.steps + result.encoder_passes),
        worked / written,
        decoded / model.config.canvas_length,
        None if verify else math.prod(p for each in result.probabilities.values() for p in each),
    )


def is_right(case: Case, text: str) -> bool:
    """Return whether an answer counts."""
    if case.regex is not None:
        return re.search(case.regex, text) is not None
    return text.strip() == (case.answer or "").strip()


@dataclass(frozen=True)
class Repair:
    """Counts over one repaired text."""

    typos: int
    fixed: int
    clean: int
    damaged: int


def repair(noisy: str, clean: str, written: str) -> Repair:
    """Compare by characters: which typos are gone, and which characters were right and are not.

    A typo is a run of characters in which `noisy` differs from `clean`. It is fixed if `written`
    agrees with `clean` there.
    """
    wrong = list(_differences(clean, written))

    def touched(start: int, end: int) -> bool:
        return any(a <= end and start <= b for a, b in wrong)

    typos = list(_differences(clean, noisy))
    inside = {i for a, b in typos for i in range(a, b)}
    broken = {i for a, b in wrong for i in range(a, max(b, a + 1))} - inside
    at_typos = {i for a, b in typos for i in range(a, max(b, a + 1))}
    return Repair(
        typos=len(typos),
        fixed=sum(not touched(a, b) for a, b in typos),
        clean=len(clean) - len(inside),
        damaged=len(broken - at_typos),
    )


def _differences(clean: str, other: str) -> Iterator[tuple[int, int]]:
    matcher = SequenceMatcher(None, clean, other, autojunk=False)
    return ((a, b) for tag, a, b, _, _ in matcher.get_opcodes() if tag != "equal")


# Runs jobs, a case and a seed each: their outcomes in order, or None in a rank that leaves the
# scores to another.
Spread = Callable[
    [Sequence[tuple[Case, int]], Callable[[tuple[Case, int]], Outcome]], list[Outcome] | None
]


def evaluate(
    model: DiffusionGemma,
    tokenizer: Tokenizer,
    cases: Iterable[Case],
    steps: Sequence[int],
    seeds: int,
    ran: Callable[[], None] = lambda: None,
    ways: Sequence[Way] = (DENOISE,),
    spread: Spread | None = None,
) -> Iterator[Score]:
    """Yield a score per step budget, task and way, as soon as it is known; `ran` is called after a
    run. With `spread`, several ranks share the runs.

    Each run has a seed of its own: with one seed for all cases, all would start from one noise.
    """
    groups: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        groups[case.task].append(case)
    for budget in steps:
        for (task, members), way in product(groups.items(), ways):

            def run(job: tuple[Case, int], budget: int | None = budget, way: Way = way) -> Outcome:
                outcome = run_case(model, tokenizer, job[0], budget, job[1], way)
                ran()
                return outcome

            jobs = [
                (members[number], seeds * number + seed)
                for number, seed in product(range(len(members)), range(seeds))
            ]
            outcomes = [run(job) for job in jobs] if spread is None else spread(jobs, run)
            if outcomes is not None:
                runs = [(case, each) for (case, _), each in zip(jobs, outcomes, strict=True)]
                yield replace(score(task, budget, runs, seeds), mode=way.name)


def score(task: str, steps: int, runs: Sequence[tuple[Case, Outcome]], seeds: int) -> Score:
    """Sum up the runs of one task."""
    success = sum(is_right(case, outcome.text) for case, outcome in runs) / len(runs)
    cases = len(runs) / seeds
    repairs = [
        repair(case.start, case.answer, outcome.text)
        for case, outcome in runs
        if case.start is not None and case.answer is not None
    ]
    bins = reliability(
        [(o.confidence, is_right(c, o.text)) for c, o in runs if o.confidence is not None]
    )
    typos = sum(r.typos for r in repairs)
    clean = sum(r.clean for r in repairs)
    return Score(
        task=task,
        steps=steps,
        runs=len(runs),
        success=success,
        error=(success * (1 - success) / cases) ** 0.5,
        steps_per_canvas=sum(o.passes for _, o in runs) / sum(o.canvases for _, o in runs),
        decoded_per_canvas=sum(o.decoded for _, o in runs) / sum(o.canvases for _, o in runs),
        tokens_per_forward=sum(o.tokens_per_forward for _, o in runs) / len(runs),
        positions_per_token=sum(o.positions_per_token for _, o in runs) / len(runs),
        typos_fixed=sum(r.fixed for r in repairs) / typos if typos else None,
        clean_damaged=sum(r.damaged for r in repairs) / clean if clean else None,
        calibration_error=calibration_error(bins) if bins else None,
        reliability=bins,
    )
