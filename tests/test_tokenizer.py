"""Ids, text and chat templates."""

import json
import threading
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from mlx_diffgemma import Tokenizer, TokenizerError
from mlx_diffgemma.tokenizer import COUNTED_AT_ONCE, TooLong

SUDOKU = Path(__file__).parent / "data" / "sudoku6"


def with_template(template: str | None) -> Tokenizer:
    backend = Backend.from_file(str(SUDOKU / "tokenizer.json"))
    settings = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "pad_token": None}
    return Tokenizer(backend, settings, template)


def test_round_trip_and_framing() -> None:
    tokenizer = Tokenizer.from_directory(SUDOKU)
    text = "12.\n34."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    framed = tokenizer.encode(f"<bos><|turn>{text}<turn|><eos><pad>")
    assert tokenizer.decode(framed) == text
    # Markers of channels are for the caller to parse: dropping them used to mix thought and answer.
    thought = tokenizer.encode("<|channel>12<channel|>3<turn|>")
    assert tokenizer.decode(thought) == "<|channel>12<channel|>3"


def test_bytes_of_one_character() -> None:
    vocab = {"<unk>": 0, "a": 1, **{f"<0x{b:02X}>": b + 2 for b in range(256)}}
    backend = Backend(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = Tokenizer(backend, {}, None)
    ids = tokenizer.encode("aé")
    assert len(ids) == 3
    assert tokenizer.decode(ids) == "aé"
    assert tokenizer.decode(ids[:2]) == "a\ufffd"
    assert tokenizer.pieces(ids) == ["a", "\ufffd", "\ufffd"]


def test_template_gets_what_gemma_uses() -> None:
    tokenizer = with_template(
        "{{ bos_token }}{% if enable_thinking %}<think>{% endif %}"
        "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}\n"
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}\n"
        "    {{- m.role }}:{{ m['content'] | trim }};{% endfor %}"
        "{% if add_generation_prompt %}model{% endif %}"
    )
    chat = [{"role": "user", "content": " hi "}] * 3
    assert tokenizer.render_chat(chat) == "<bos>user:hi;user:hi;model"
    text = tokenizer.render_chat(
        chat, enable_thinking=True, add_generation_prompt=False, tools=[{"name": "é<"}]
    )
    assert text == '<bos><think>{"name": "é<"}user:hi;user:hi;'


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "no chat template"),
        ("{% for %}", "is damaged"),
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must"),
        ("{{ messages.nothing.at.all }}", "refuses these messages"),
        # Templates come from strangers: the sandbox keeps them from Python's internals.
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "refuses these messages"),
        ("{{ messages.append(1) }}", "refuses these messages"),
    ],
)
def test_templates_that_fail(template: str | None, said: str) -> None:
    with pytest.raises(TokenizerError, match=said):
        with_template(template).render_chat([{"role": "user", "content": "hi"}])


def test_template_inside_tokenizer_config(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((SUDOKU / name).read_text())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ messages[0].content }}!"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    chat = [{"role": "user", "content": "hi"}]
    assert Tokenizer.from_directory(tmp_path).render_chat(chat) == "hi!"


def test_plain_texts_are_what_a_token_adds() -> None:
    """A decoder that drops the first space made " b" look one character long."""
    vocabulary = {"<unk>": 0, "a": 1, "\u2581b": 2, "<0x41>": 3, "</s>": 4, "\u2581": 5}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["</s>", "<unk>"])
    assert backend.decode([2]) == "b"
    assert Tokenizer(backend, {}, None).plain == {1: "a", 2: " b", 5: " "}


def test_encoding_lets_other_threads_run() -> None:
    """A megabyte used to hold the interpreter for a second, and a server's /health with it."""
    tokenizer = Tokenizer.from_directory(SUDOKU)
    ticks, over = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not over.wait(0.001):
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    before = ticks
    tokenizer.encode("12 " * 1_000_000)
    while_encoding = ticks - before
    over.set()
    thread.join()
    assert while_encoding >= 5


def test_text_that_cannot_fit_is_not_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it was, whatever came: 3.9 MB took ten seconds and 1.7 GB, to be refused."""
    tokenizer = Tokenizer.from_directory(SUDOKU)
    encode, sizes = Tokenizer.encode, []

    def noted(self: Tokenizer, text: str) -> list[int]:
        sizes.append(len(text))
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode", noted)
    most = 1000 * tokenizer.longest
    with pytest.raises(TooLong, match=f"the text has {most + 1:,} characters; 1,000 tokens of at"):
        tokenizer.encode_within("1" * (most + 1), 1000, "the text")
    assert sizes == []
    with pytest.raises(TooLong, match="far more than 200,000 tokens"):
        tokenizer.encode_within("1" * 1_900_000, 200_000, "the text")
    assert sum(sizes) < 500_000
    sizes.clear()
    text = "12.\n<|turn>" * 30_000
    assert tokenizer.encode_within(text, 150_000, "the text") == encode(tokenizer, text)
    assert len(sizes) == 1 + -(-len(text) // COUNTED_AT_ONCE)

    def stop() -> None:
        if len(sizes) == 3:
            raise KeyError

    sizes.clear()
    with pytest.raises(KeyError):
        tokenizer.encode_within(text, 150_000, "the text", stop)
    assert len(sizes) == 3


def test_half_a_character_is_refused() -> None:
    """It was a TypeError, and an answer of 500."""
    with pytest.raises(TokenizerError, match="surrogate"):
        Tokenizer.from_directory(SUDOKU).encode("1\ud800")
