"""Ranks that share a model have read what rank 0 has, whatever becomes of a conversation."""

import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

import mlx.core as mx
import pytest
from leading import Ended, leading
from paths import SUDOKU
from random_model import untrained

from mlx_diffgemma import (
    ChatSession,
    DiffusionGemma,
    Done,
    Draft,
    PromptCache,
    Reading,
    Request,
    SessionError,
    SettingError,
    Text,
    Tokenizer,
    generate,
    stream_generate,
)
from mlx_diffgemma.distributed import others
from mlx_diffgemma.distributed.launch import LaunchError
from mlx_diffgemma.errors import CheckpointError
from mlx_diffgemma.model.placeholders import LostPicture
from mlx_diffgemma.model.sight import Sight
from mlx_diffgemma.model.vision import Vision
from mlx_diffgemma.tasks import following
from mlx_diffgemma.tasks.engine import Engine, prepared, reseeded
from mlx_diffgemma.tasks.together import Elsewhere
from mlx_diffgemma.text.vocabulary import Vocabulary

VISION = SUDOKU.parent / "tiny_vision"
SETTINGS: Any = {"steps": 2, "max_tokens": 60, "prefill_chunk": 8}


def texts(events: Any) -> str:
    return "".join(event.text for event in events if isinstance(event, Text))


def leave_at(events: Any, kind: type) -> None:
    """Stop listening at the first event of a kind."""
    next(event for event in events if isinstance(event, kind))
    events.close()


def converse(model: DiffusionGemma, tokenizer: Tokenizer, folder: Path) -> list[Any]:
    """All that a user may do with a conversation, and what it holds after each."""
    session, found = ChatSession(model, tokenizer, **SETTINGS), []

    def note(said: Any) -> None:
        found.append((said, session.messages, session.prompt_cache.standing))

    note(texts(session.stream("1.2.", seed=1)))
    note(session.undo())
    leave_at(session.stream("3" * 40, seed=2), Reading)  # within the prompt
    note("left")
    leave_at(session.stream("4" * 12, seed=3), Draft)
    note("left")
    note(texts(session.retry(seed=4)))
    note(texts(session.stream("5.", seed=5)))
    session.save(folder / "saved")
    note(texts(session.stream("6.", seed=6)))
    session.reset()
    note(texts(session.stream("61", seed=7)))
    session.restore(folder / "saved")
    note(texts(session.stream("6.", seed=6)))
    session.prompt_cache.save(folder / "last")
    return found


def test_a_conversation_of_ranks_is_one_of_one(tmp_path: Path) -> None:
    """Of four, with two heads of keys: some ranks have the same."""
    (tmp_path / "one").mkdir(), (tmp_path / "ranks").mkdir()
    with leading(SUDOKU, 1) as alone:
        wanted = converse(*alone, tmp_path / "one")
    with leading(SUDOKU, 4) as part:
        assert converse(*part, tmp_path / "ranks") == wanted
        # What one process has saved, ranks go on with.
        session = ChatSession.load(tmp_path / "one" / "saved", *part)
        session.settings |= SETTINGS
        assert texts(session.stream("6.", seed=6)) == wanted[-1][0]
    session = ChatSession.load(tmp_path / "ranks" / "saved", *alone)
    session.settings |= SETTINGS
    assert texts(session.stream("6.", seed=6)) == wanted[-1][0] == wanted[-3][0]


def converse_on_a_picture(model: DiffusionGemma, tokenizer: Tokenizer, file: Path) -> list[str]:
    """A picture in a turn, in a file, without pixels where they are wanted, then in an engine."""
    session = ChatSession(model, tokenizer, steps=2, max_tokens=64)
    shown = {"type": "image", "image": VISION / "pictures.png"}
    asked = "How many circles are there?"
    found = [texts(session.stream([shown, {"type": "text", "text": asked}], seed=1))]
    session.save(file)
    session.restore(file)
    found.append(texts(session.stream("And squares?", seed=1)))
    session.system = "Count."
    with pytest.raises(LostPicture):
        texts(session.stream("And squares?", seed=1))
    session.system = None
    session.undo()
    found.append(texts(session.stream("And triangles?", seed=1)))
    part = {"type": "image", "image": session.show(shown["image"])}
    message = {"role": "user", "content": [part, {"type": "text", "text": asked}]}
    request = Request([message], steps=2, max_tokens=64, seed=3)
    work = prepared(request, model, Vocabulary(model, tokenizer), lambda: None)
    engine = Engine[Any](model, 10**8)
    return [*found, *served(engine, work), *served(engine, work)]


def test_ranks_look_at_the_same_pictures(tmp_path: Path) -> None:
    """A token that knows its picture could not be told to other ranks."""
    with leading(VISION, 1) as alone:
        wanted = converse_on_a_picture(*alone, tmp_path / "one")
    with leading(VISION, 2) as part:
        assert converse_on_a_picture(*part, tmp_path / "ranks") == wanted


def blind(model: DiffusionGemma, rank: int) -> None:
    """Make a rank fail to load its tower."""

    def load() -> Vision:
        raise CheckpointError("no tower")

    assert model.sight is not None
    if rank:
        model.sight = Sight({}, load, lambda: 4096)


def test_a_picture_that_one_rank_cannot_see_is_seen_by_none() -> None:
    with leading(VISION, 2, blind) as part:
        session = ChatSession(*part, steps=1, max_tokens=9)
        shown = {"type": "image", "image": VISION / "pictures.png"}
        with pytest.raises(LaunchError, match="1 of the ranks cannot see a picture"):
            texts(session.stream([shown], seed=1))
        texts(session.stream("How many?", seed=1))
        assert [each["role"] for each in session.messages] == ["user", "assistant"]


def test_what_goes_wrong_with_a_file_stops_no_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, another model's file, a damaged one; then Ctrl-C within a step, after which the
    conversation alone is saved."""
    with leading(SUDOKU, 1) as alone:
        ChatSession(*alone).save(tmp_path / "own")
        other = PromptCache(untrained(20, 8))
        other.save(tmp_path / "other", {})
    (tmp_path / "damaged").write_bytes((tmp_path / "own").read_bytes()[:-1])
    with leading(SUDOKU, 2) as part:
        session = ChatSession(*part, **SETTINGS)
        first = texts(session.stream("1.", seed=1))
        with monkeypatch.context() as patch:
            patch.setattr(mx, "save_safetensors", full)
            with pytest.raises(SessionError, match="cannot be written: disk full"):
                session.save(tmp_path / "new")
        assert not (tmp_path / "new").exists()
        for name, problem in (("other", "another model"), ("damaged", "damaged")):
            with pytest.raises(SessionError, match=problem):
                session.restore(tmp_path / name)
        session.undo()
        begun = stream_generate(*part, "2.", **SETTINGS)
        next(begun)
        with pytest.raises(SettingError, match="one answer at a time"):
            texts(session.stream("1.", seed=1))
        begun.close()
        assert texts(session.retry(seed=1)) == first
        others = part[0].part.share.others
        assert others is not None
        with pytest.raises(KeyboardInterrupt), others.in_step():
            raise KeyboardInterrupt
        session.save(tmp_path / "new")
        with pytest.raises(LaunchError, match="no longer the same"):
            texts(session.stream("2.", seed=1))
    saved = ChatSession.load(tmp_path / "new", *alone)
    assert saved.messages == session.messages[:2]
    assert len(saved.prompt_cache) == 0


def full(*arguments: object) -> None:
    raise RuntimeError("disk full")


def served(engine: Engine[Any], *works: Any, left: int | None = None) -> list[str]:
    """What comes of requests that begin at once; one of them is left after its first draft."""
    keys = [engine.begin(work) for work in works]
    found, gone = dict.fromkeys(keys, ""), None if left is None else keys[left]
    while len(engine):
        drafted = False
        for key, event in engine.step():
            if isinstance(event, Text):
                found[key] += event.text
            elif isinstance(event, Exception):
                found[key] += f"{type(event).__name__}: {event}"
            elif isinstance(event, Done):
                found[key] += f" {event.cached_tokens} cached"
            drafted |= isinstance(event, Draft) and key == gone
        if drafted and gone is not None:
            engine.remove(gone)
    return list(found.values())


@dataclass(frozen=True, eq=False)
class Failing:
    """Fails once its prompt is read."""

    prompt: tuple[int, ...] = (1, 2, 3)

    def prepare(self, *given: Any) -> "Failing":
        return self

    def run(self, prompt_cache: PromptCache) -> Any:
        yield from prompt_cache.reading(self.prompt)
        raise SettingError("it fails on all ranks")


def serve(model: DiffusionGemma, tokenizer: Tokenizer) -> list[list[str]]:
    """What an engine gives in three rounds: drafts of two requests at once, one that fails, one
    that is left, one that repeats a prompt, one with a schema, then with little room to keep."""
    vocabulary, found = Vocabulary(model, tokenizer), []

    def ready(task: Any) -> Any:
        return prepared(task, model, vocabulary, lambda: None)

    settings: Any = {"steps": 2, "max_tokens": 20}
    engine = Engine[Any](model, 10**6)
    one = Request("1.2.3", seed=1, **settings)
    drafted = Request("12" * 9, mode="speculative", max_tokens=9, steps=2)
    found.append(served(engine, *map(ready, (one, drafted, replace(drafted, prompt="54" * 5)))))
    schema = Request("7" * 30, seed=2, schema={"enum": ["12", "345"]}, steps=2)
    works = [*map(ready, (one, Failing(), schema, replace(one, prompt="6" * 20)))]
    found.append(served(engine, *works, reseeded(works[0], 5), left=3))
    small = Engine[Any](model, 100_000)
    for prompt in ("1.2.3", "4" * 20, "1.2.3", "5" * 5, "4" * 20):
        found.append(served(small, ready(replace(one, prompt=prompt))))
    small.close()
    return found


def test_ranks_serve_as_one() -> None:
    with leading(SUDOKU, 1) as alone:
        wanted = serve(*alone)
    with leading(SUDOKU, 2) as part:
        assert serve(*part) == wanted
    assert wanted[1][0].endswith(" 11 cached")
    assert wanted[1][1] == "SettingError: it fails on all ranks"
    assert wanted[1][3] == ""
    kept = [answer.split()[-2] for (answer,) in wanted[-5:]]
    assert kept == ["0", "0", "11", "0", "0"]


class Unspeakable(Request):
    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle it")


class Slow(Failing):
    """Is prepared until nobody waits."""

    def prepare(self, model: Any, vocabulary: Any, check: Any) -> Failing:
        while True:
            check()
            time.sleep(0.01)


def shortened(model: DiffusionGemma, rank: int) -> None:
    """Make a rank's context shorter than rank 0's."""
    if rank:
        model.context = 60


def test_what_ranks_cannot_prepare_is_refused_and_they_go_on() -> None:
    with leading(SUDOKU, 2, shortened) as (model, tokenizer):
        vocabulary, engine = Vocabulary(model, tokenizer), Engine[Any](model, 0)

        def ready(task: Any, check: Any = lambda: None) -> Any:
            return prepared(task, model, vocabulary, check)

        with pytest.raises(LaunchError, match="cannot be told this: cannot pickle it"):
            ready(Unspeakable("1."))
        with pytest.raises(Elsewhere, match=r"another rank .* the prompt has 46 tokens"):
            ready(Request("1" * 40))
        ends = time.monotonic() + 0.1

        def check() -> None:
            if time.monotonic() > ends:
                raise TimeoutError

        with pytest.raises(TimeoutError):
            ready(Slow(), check)
        (answer,) = served(engine, ready(Request("1.", seed=1, steps=1, max_tokens=9)))
        assert answer.endswith("0 cached")
    assert not [each for each in threading.enumerate() if each.name.startswith("preparing")]


class Breaking(DiffusionGemma):
    """Breaks in its second pass."""

    def decode(self, passes: Any, evaluate: Any = None) -> Any:
        self.passes = getattr(self, "passes", 0) + 1
        if self.passes == 2:
            raise RuntimeError("broken")
        return super().decode(passes, evaluate)


@pytest.mark.parametrize("ranks", [(0, 1), (0,), (1,)])
def test_what_fails_in_one_rank_fails_in_all_or_ends_all(
    ranks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that went on alone would wait in its next sum for ever."""
    monkeypatch.setattr(others, "AGREEING", 0.3)
    monkeypatch.setattr(following, "ALIKE", 0.3)

    def change(model: DiffusionGemma, rank: int) -> None:
        if rank in ranks:
            model.__class__ = Breaking

    asked: Any = {"seed": 1, "steps": 2, "max_tokens": 9}
    with ExitStack() as stack:
        if len(ranks) == 1:
            stack.enter_context(pytest.raises((Ended, RuntimeError, BrokenBarrierError)))
        part = stack.enter_context(leading(SUDOKU, 2, change))
        with pytest.raises(RuntimeError, match="broken"):
            generate(*part, "1.", **asked)
        assert generate(*part, "1.", **asked)
