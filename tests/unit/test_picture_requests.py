"""Prompts with pictures: what becomes of their parts, who is told apart, and what is refused."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from looking import BEGIN, CONFIG, END, IMAGE, looking_checkpoint
from PIL import Image

from mlx_diffgemma import (
    ChatSession,
    ContextError,
    Done,
    Error,
    PromptCache,
    Request,
    SessionError,
    SettingError,
    TokenizerError,
    ToolResult,
    fill,
    generate,
    load,
)
from mlx_diffgemma.diffusion.prompt_cache import PrefixCache
from mlx_diffgemma.model.placeholders import LostPicture, Placeholder, pieces, placeholders
from mlx_diffgemma.model.sight import Sight
from mlx_diffgemma.tasks import pictures as module
from mlx_diffgemma.tasks.choose import choose
from mlx_diffgemma.text.vocabulary import Vocabulary


def noise(seed: int, size: tuple[int, int] = (60, 80)) -> Image.Image:
    drawn = np.random.default_rng(seed).integers(0, 256, (*size, 3))
    return Image.fromarray(drawn.astype(np.uint8))


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(looking_checkpoint(tmp_path_factory.mktemp("looking")), dtype="float32")


def part(image: Any, **more: Any) -> dict[str, Any]:
    return {"type": "image", "image": image, **more}


def asked(*parts: Any, role: str = "user") -> list[dict[str, Any]]:
    return [
        {
            "role": role,
            "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts],
        }
    ]


def ids_of(seeing: Any, chat: Any) -> list[int]:
    model, tokenizer = seeing
    return Request(chat).prepare(model, Vocabulary(model, tokenizer)).prompt


def test_a_part_becomes_the_tokens_that_its_picture_has(seeing: Any, tmp_path: Path) -> None:
    """A path, its bytes and the image itself are one picture; budgets change its size."""
    noise(1).save(tmp_path / "it.png")
    path = tmp_path / "it.png"
    given = [path, path.read_bytes(), noise(1)]
    one, *others = (ids_of(seeing, asked("see ", part(each))) for each in given)
    assert all(each == one for each in others)
    begin = one.index(BEGIN)
    seen = [token for token in one if isinstance(token, Placeholder)]
    assert one[begin + 1 : begin + 1 + len(seen)] == seen
    assert one[begin + 1 + len(seen)] == END
    assert len(seen) == seen[0].picture.tokens == 63
    more = ids_of(seeing, asked("see ", part(noise(1), tokens=140)))
    assert len(more) - len(one) == 130 - 63
    assert np.array_equal(np.array(mx.array([seen])), [[IMAGE] * 63])
    assert [int(token) for token in seen] == [IMAGE] * 63


def test_markers_in_texts_are_ordinary_text(seeing: Any) -> None:
    """They stood for a picture that was never there, wherever a stranger wrote them."""
    for chat in (
        "<|image|>",
        asked("<|image|>", part(noise(1)), "<|image>x<image|>"),
        [*asked("<|image|>", role="system"), *asked(part(noise(1)))],
        [*asked(part(noise(1))), {"role": "tool", "content": "<|image|>", "name": "<|image|>"}],
    ):
        ids = ids_of(seeing, chat)
        shown = sum(isinstance(token, Placeholder) for token in ids)
        assert shown == (0 if chat == "<|image|>" else 63)
        assert [int(i) for i in ids].count(IMAGE) == shown
        assert ids.count(BEGIN) == ids.count(END) == (shown > 0)


def test_a_template_that_writes_no_pictures(seeing: Any) -> None:
    model, tokenizer = seeing
    from copy import copy

    other = copy(tokenizer)
    other._template_source = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    other.__dict__.pop("_template", None)
    with pytest.raises(TokenizerError, match="writes 0 places for 1 pictures"):
        generate(model, other, asked(part(noise(1))))


def test_what_is_no_picture_is_one_sentence(
    seeing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path as text is refused: from a client it would show what lies on this machine."""
    model, tokenizer = seeing
    (tmp_path / "empty.png").touch()
    for given, said in (
        (part("/etc/passwd"), "is a pathlib.Path, bytes of a file or an image"),
        (part(None), "is a pathlib.Path"),
        (part(tmp_path / "none.png"), "does not exist"),
        (part(tmp_path / "empty.png"), "is empty"),
        (part(b"no picture"), "is not a picture in PNG"),
        (part(noise(1), tokens=71), "70, 140, 280, 560, 1120 tokens; not 71"),
        (part(noise(1), tokens=True), "tokens; not True"),
        ({"type": "audio"}, "text content"),
    ):
        with pytest.raises(Error, match=said) as raised:
            generate(model, tokenizer, asked("x", given))
        assert "\n" not in str(raised.value)
    monkeypatch.setattr(module, "MOST_PICTURES", 2)
    with pytest.raises(SettingError, match="at most 2 pictures"):
        generate(model, tokenizer, asked(*[part(noise(1))] * 3))
    with pytest.raises(ContextError, match="pictures of the prompt have more than 100 tokens"):
        module.shown_messages(asked(part(noise(1)), part(noise(2))), model.sight, 100)


def test_a_model_without_a_tower_refuses_pictures(tmp_path: Path) -> None:
    model, tokenizer = load(looking_checkpoint(tmp_path, tower=False))
    assert model.sight is None
    with pytest.raises(SettingError, match="its checkpoint has no vision tower"):
        generate(model, tokenizer, asked(part(noise(1))))


def test_the_tower_is_loaded_with_the_first_picture(tmp_path: Path) -> None:
    model, tokenizer = load(looking_checkpoint(tmp_path))
    generate(model, tokenizer, "hello", seed=1)
    assert not model.sight.loaded
    ids = ids_of((model, tokenizer), asked(part(noise(1))))
    assert not model.sight.loaded
    generate(model, tokenizer, ids, seed=1)
    assert model.sight.loaded


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_token_id": None}, "image_token_id = None is no id of the vocabulary"),
        ({"eoi_token_id": 97}, "eoi_token_id = 97 is no id"),
        ({"boi_token_id": IMAGE}, "are not three ids"),
        ({"picture_mask": "mine"}, "picture_mask is 'mine', none of reference, gemma"),
        ({"vision_soft_tokens_per_image": 99}, "per_image is 99, none of 70"),
        ({"image_token_id": 60}, "has no marker of pictures for the id 60"),
    ],
)
def test_a_config_that_does_not_say_how_to_see(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    """Who reads text alone is not held up by it."""
    model, tokenizer = load(looking_checkpoint(tmp_path, **changes))
    generate(model, tokenizer, "hello", seed=1)
    with pytest.raises(Error, match=said):
        generate(model, tokenizer, asked(part(noise(1))))


def test_the_tower_counts_for_memory(tmp_path: Path) -> None:
    """With little memory a prompt with a picture is refused, and one of text is answered."""
    directory = looking_checkpoint(tmp_path)
    model, tokenizer = load(directory, max_memory="1.2MB")
    assert generate(model, tokenizer, "hello", seed=1) is not None
    with pytest.raises(Error, match="with a short prompt and pictures"):
        generate(model, tokenizer, asked(part(noise(1))))


def test_a_prompt_with_pictures_has_less_context(tmp_path: Path) -> None:
    """The tower takes memory from the context, before it is loaded already."""
    model, tokenizer = load(looking_checkpoint(tmp_path))
    model.sight = Sight(CONFIG, model.sight._load, lambda: 96)
    generate(model, tokenizer, "x" * 90, seed=1)
    with pytest.raises(ContextError, match="context of 96, which is all that fits into memory"):
        generate(model, tokenizer, asked(part(noise(1)), "what?"))
    assert model.context == 4096
    model.sight = Sight(CONFIG, model.sight._load, lambda: 200)
    generate(model, tokenizer, asked(part(noise(1)), "what?"), seed=1)
    assert model.context == 200


def hidden(model: Any, cache: PromptCache) -> np.ndarray:
    return np.array(cache._model(mx.zeros((1, 16), dtype=mx.int32), cache.cache))


def test_equal_ids_of_other_pixels_are_another_context(seeing: Any) -> None:
    model, _ = seeing
    one, other = (ids_of(seeing, asked("see ", part(noise(n)), "now")) for n in (1, 2))
    assert [int(token) for token in one] == [int(token) for token in other]
    assert one != other
    first = one.index(BEGIN) + 1
    cache = PromptCache(model)
    cache.read(one)
    assert cache.shared(ids_of(seeing, asked("see ", part(noise(1)), "now"))) == len(one)
    alone = PromptCache(model)
    alone.read(other)
    assert cache.read(other) == len(other)  # no snapshot stands before the picture
    np.testing.assert_array_equal(hidden(model, cache), hidden(model, alone))
    kept = PrefixCache(model, 1 << 30)
    kept.give(alone)
    assert len(kept.take(one)) == 0
    assert len(kept.take(other)) == len(other)
    text = PromptCache(model)
    text.read([int(token) for token in one])
    assert text.shared(one) == 0  # agreed to the first placeholder, where no snapshot is
    assert first > 0


def test_what_was_read_holds_no_pixels_and_ends_with_no_part(seeing: Any) -> None:
    model, _ = seeing
    ids = ids_of(seeing, asked("see ", part(noise(1)), "now"))
    cache = PromptCache(model)
    mark = cache.mark()
    cache.read(ids)
    (held,) = {token.picture for token in cache.tokens if isinstance(token, Placeholder)}
    with pytest.raises(LostPicture, match="its pixels were not kept"):
        _ = held.patches
    with pytest.raises(SettingError, match="end within a picture"):
        cache.trim(mark, ids.index(BEGIN) + 9)
    with pytest.raises(SettingError, match="as a whole, or not at all"):
        generate(*seeing, ids[: ids.index(BEGIN) + 9])
    assert len(cache) == len(ids)


def test_no_chunk_ends_within_a_picture() -> None:
    class Some:
        tokens, digest = 5, b""

    tokens = [1, 2, 3, *placeholders(9, [Some(), Some()]), 4, 4, 4]  # type: ignore[list-item]
    assert pieces(tokens, 100) == [16]
    assert pieces(tokens, 5) == [3, 8, 13, 16]
    assert pieces(tokens, 7) == [3, 8, 15, 16]
    assert pieces(tokens, 2) == [2, 3, 8, 13, 15, 16]
    assert pieces(tokens, 9) == [8, 16]
    assert pieces([], 4) == []


def test_fill_and_choose_read_pictures(seeing: Any) -> None:
    model, tokenizer = seeing
    found = []
    for n in (1, 2):
        choice = choose(model, tokenizer, asked(part(noise(n)), "which"), {"label": ["cat", "dog"]})
        filled = fill(model, tokenizer, "a {{x:a|b}}", seed=1, images=[noise(n)], image_tokens=70)
        found.append((choice["label"]["cat"], filled.probabilities["x"]))
    assert found[0] != found[1]


def told(session: ChatSession, content: Any, seed: int = 1) -> None:
    for _ in session.stream(content, seed=seed):
        pass


def test_a_session_with_a_picture_is_saved_and_gone_on_with(seeing: Any, tmp_path: Path) -> None:
    """Digest and size are enough to go on; the pixels are there again if they were asked for."""
    model, tokenizer = seeing
    session = ChatSession(model, tokenizer, prefill_chunk=40)
    told(session, asked("what ", part(noise(1)))[0]["content"])
    assert session.question == "what "
    told(session, "more")
    session.save(tmp_path / "digests")
    session.save(tmp_path / "pixels", pixels=True)
    told(session, "and now")
    for name in ("digests", "pixels"):
        again = ChatSession(model, tokenizer, prefill_chunk=40)
        again.restore(tmp_path / name)
        *_, done = again.stream("and now", seed=1)
        assert isinstance(done, Done)
        assert done.cached_tokens > 100
        assert again.messages[-1] == session.messages[-1]
        again.system = "anew"
        if name == "pixels":
            told(again, "x")
            continue
        before = again.messages
        with pytest.raises(LostPicture, match="give it once more"):
            told(again, "x")
        assert again.messages == before
    plain = load(looking_checkpoint(tmp_path / "plain", tower=False))
    with pytest.raises(SessionError, match="has pictures"):
        session.switch(*plain)


def test_a_tool_gives_back_a_picture(seeing: Any, tmp_path: Path) -> None:
    """A result was text alone, though a tool's message may have pictures."""
    model, tokenizer = seeing
    session = ChatSession(model, tokenizer)
    told(session, "draw")
    function = {"name": "draw", "arguments": {}}
    call = {"id": "call_0", "type": "function", "function": function}
    session._messages[-1]["tool_calls"] = [call]
    before = session.messages
    for wrong in (3, [], [{"type": "text"}], [part(b"no picture")]):
        with pytest.raises(Error, match=r"text, or parts|is not a picture"):
            session.respond([ToolResult("draw", wrong)])  # type: ignore[arg-type]
    assert session.messages == before
    *_, done = session.respond(
        [ToolResult("draw", asked(part(noise(1)), "here")[0]["content"])], seed=1
    )
    assert done.prompt_tokens - done.cached_tokens > 63  # the picture's
    assert session.messages[-2]["role"] == "tool"
    session.save(tmp_path / "it", pixels=True)
    again = ChatSession(model, tokenizer)
    again.restore(tmp_path / "it")
    kept, own = (each.messages[-2]["content"][0]["image"] for each in (again, session))
    assert kept.digest == own.digest


def test_parts_that_are_none_are_not_part_of_a_session(seeing: Any) -> None:
    """A text part without a text was kept, and the next question was a KeyError."""
    session = ChatSession(*seeing)
    for content in ([], [3], {}, [{"type": "text"}], [part(noise(1)), {"type": "text", "text": 3}]):
        with pytest.raises(Error, match="is text, or parts that are text or images"):
            session.stream(content)  # type: ignore[arg-type]
    assert session.messages == ()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"rows": ', '"rows": -'),
        ('"start": ', '"start": 9'),
        ('"digest": "', '"digest": "x'),
        ('"png": "', '"png": "x'),
    ],
)
def test_damaged_pictures_of_a_session(seeing: Any, tmp_path: Path, old: str, new: str) -> None:
    model, tokenizer = seeing
    session = ChatSession(model, tokenizer)
    told(session, asked(part(noise(1)), "x")[0]["content"])
    session.save(tmp_path / "it", pixels=True)
    arrays, metadata = mx.load(  # type: ignore[misc]
        str(tmp_path / "it"), format="safetensors", return_metadata=True
    )
    changed = {k: v.replace(old, new) for k, v in metadata.items()}  # type: ignore[union-attr]
    assert changed != metadata
    mx.eval(arrays)
    mx.save_safetensors(str(tmp_path / "bad.safetensors"), arrays, changed)  # type: ignore[arg-type]
    with pytest.raises(SessionError, match="is damaged"):
        ChatSession(model, tokenizer).restore(tmp_path / "bad.safetensors")
