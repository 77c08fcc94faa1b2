"""`tokenizer.model` gives the ids and texts that sentencepiece gives, and is refused where not."""

import io
import json
import random
import shutil
import struct
from pathlib import Path

import pytest
from paths import SUDOKU
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from mlx_diffgemma import CheckpointError
from mlx_diffgemma.checkpoint.load import read_tokenizer
from mlx_diffgemma.convert import convert
from mlx_diffgemma.text import pieces
from mlx_diffgemma.text.pieces import SPACE, SentencePieceError, read_pieces
from mlx_diffgemma.text.tokenizer import Tokenizer

# As Gemma's: marks of turns, runs of newlines and spaces are pieces that are never merged.
DEFINED = ["<|turn>", "<turn|>", "<|channel>", "\n", "\n\n", "\t", 2 * SPACE, 4 * SPACE]
LINES = [
    line
    for page in sorted((SUDOKU.parents[2] / "docs").glob("*.md"))
    for line in page.read_text(encoding="utf-8").splitlines()
    if line.strip()
]


def trained(lines: list[str], size: int = 700, **settings: object) -> bytes:
    """A vocabulary as Gemma's, but small."""
    out = io.BytesIO()
    chosen: dict[str, object] = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "character_coverage": 0.995,
        "user_defined_symbols": DEFINED,
        "hard_vocab_limit": False,
        **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
        **{"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>"},
        **settings,
    }
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, vocab_size=size, minloglevel=2, **chosen
    )
    return out.getvalue()


@pytest.fixture(scope="module")
def model() -> bytes:
    return trained(LINES)


@pytest.fixture
def directory(model: bytes, tmp_path: Path) -> Path:
    """The small checkpoint with this vocabulary, whose ids fit into its own."""
    copy = Path(shutil.copytree(SUDOKU, tmp_path / "checkpoint"))
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer_config.json").unlink()
    (copy / "tokenizer.model").write_bytes(model)
    return copy


def texts(count: int, lines: list[str], pieces: list[str]) -> list[str]:
    """Lines, pieces in any order, characters of any script, and runs."""
    draw = random.Random(1)
    made = []
    for number in range(count):
        length = draw.randrange(40)
        match number % 5:
            case 0:
                made.append(draw.choice(lines))
            case 1:
                made.append("".join(draw.choices(pieces, k=length // 3)))
            case 2:
                made.append("".join(draw.choices(pieces, k=length // 3)).replace(SPACE, " "))
            case 3:
                ranges = [(32, 127), (0, 32), (0xA0, 0x3000), (0x4E00, 0x9FFF), (0x1F300, 0x1FA00)]
                made.append(
                    "".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(length))
                )
            case 4:
                made.append("".join(draw.choice("a b\n<|>") * draw.randrange(9) for _ in range(9)))
    return made


def test_ids_and_texts_are_those_of_sentencepiece(model: bytes, directory: Path) -> None:
    """3,000 texts, marks of turns, single bytes and runs of spaces among them."""
    processor = SentencePieceProcessor(model_proto=model)
    tokenizer = Tokenizer.from_directory(directory)
    pieces = [processor.id_to_piece(i) for i in range(4, processor.get_piece_size())]
    ours = tokenizer._backend
    spelled = set()
    for text in texts(3000, LINES, pieces):
        ids = processor.encode(text)
        assert tokenizer.encode(text) == ids, text
        assert ours.decode(ids, skip_special_tokens=False) == processor.decode(ids), text
        spelled |= set(ids)
    draw = random.Random(2)
    whole = [i for i in range(4, processor.get_piece_size()) if not processor.is_byte(i)]
    for _ in range(300):  # ids that no text has
        ids = draw.choices(whole, k=8)
        assert ours.decode(ids, skip_special_tokens=False) == processor.decode(ids), ids
    assert len(spelled) > 0.8 * len(pieces)
    assert {processor.piece_to_id(piece) for piece in [*DEFINED, "<0x00>", "<0xF0>"]} <= spelled


@pytest.mark.parametrize("alphabet", ["ab", "aaab ", "a"])
def test_runs_are_merged_from_the_same_side(alphabet: str, tmp_path: Path) -> None:
    """In runs of one letter several pairs make the same piece, and compete."""
    draw = random.Random(3)
    lines = ["".join(draw.choices(alphabet, k=draw.randrange(1, 60))) for _ in range(300)]
    data = trained(lines, 330, user_defined_symbols=[])
    (tmp_path / "tokenizer.model").write_bytes(data)
    made, _ = read_pieces(tmp_path / "tokenizer.model")
    processor = SentencePieceProcessor(model_proto=data)
    for line in [*lines, *("a" * count for count in range(99))]:
        assert made.encode(line, add_special_tokens=False).ids == processor.encode(line)


def test_special_tokens_are_found_and_leave_no_trace(directory: Path) -> None:
    """Chat templates write `<bos>`, which sentencepiece itself would spell in letters."""
    tokenizer = read_tokenizer(directory)
    ids = tokenizer.encode("<bos><|turn>user\nHi<turn|>\n")
    assert ids[:2] == [2, tokenizer.token_id("<|turn>")]
    assert tokenizer.token_id("<turn|>") in ids
    assert tokenizer.decode([*ids, 1, 0]) == "user\nHi\n"
    template = "{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}"
    (directory / "chat_template.jinja").write_text(template)
    chat = [{"role": "user", "content": "x"}]
    assert read_tokenizer(directory).apply_chat_template(chat) == "<bos>x<eos>"
    settings = {"bos_token": None, "eos_token": "<turn|>", "tokenizer_class": "GemmaTokenizer"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    assert read_tokenizer(directory).apply_chat_template(chat) == "<bos>x<turn|>"


def test_a_conversion_writes_the_tokenizer_beside_it(
    model: bytes, directory: Path, tmp_path: Path
) -> None:
    out = convert(directory, tmp_path / "out").directory
    assert (out / "tokenizer.model").read_bytes() == model
    assert json.loads((out / "tokenizer_config.json").read_text())["bos_token"] == "<bos>"
    (out / "tokenizer.model").unlink()  # it is not needed any more
    before, after = read_tokenizer(directory), read_tokenizer(out)
    for text in ["<bos><|turn>user\n", "\u6f22\U0001f642", *LINES[:200]]:
        ids = before.encode(text)
        assert after.encode(text) == ids
        assert after.decode(ids) == before.decode(ids)
    (directory / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="is not a model of sentencepiece"):
        convert(directory, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_tokenizer_json_comes_first(directory: Path) -> None:
    shutil.copy(SUDOKU / "tokenizer.json", directory)
    (directory / "tokenizer.model").write_bytes(b"nonsense")
    assert read_tokenizer(directory).encode("1") == read_tokenizer(SUDOKU).encode("1")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_type": "unigram"}, "not one of byte pairs"),
        ({"byte_fallback": False}, "cannot spell characters in bytes"),
        ({"normalization_rule_name": "nmt_nfkc"}, "changes characters"),
        ({"add_dummy_prefix": True}, "adds or removes spaces"),
        ({"remove_extra_whitespaces": True}, "adds or removes spaces"),
        ({"treat_whitespace_as_suffix": True}, "puts spaces behind words"),
    ],
)
def test_other_kinds_are_refused(settings: dict[str, object], said: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(trained(LINES[:300], 500, **settings))
    with pytest.raises(SentencePieceError, match=said):
        read_pieces(tmp_path / "tokenizer.model")


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def field(number: int, value: int | float | str | bytes) -> bytes:
    """A field of a message of protocol buffers."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def piece(text: str, score: float = -1.0, kind: int = 1) -> bytes:
    return field(1, field(1, text) + field(2, score) + field(3, kind))


BYTES = piece("<unk>", 0.0, 2) + b"".join(piece(f"<0x{i:02X}>", 0.0, 6) for i in range(256))
SETTINGS = field(2, field(3, 2) + field(35, 1)) + field(3, field(3, 0) + field(4, 0))


def test_files_of_anything(model: bytes, tmp_path: Path) -> None:
    """Each is one sentence; none takes memory or time beyond its size."""
    path = tmp_path / "tokenizer.model"
    long = "x" * 200
    cases: dict[bytes, str] = {
        b"": "is not a model of sentencepiece",
        b"\xff" * 100: "is not a model of sentencepiece",
        model[:-1]: "is not",
        model[: len(model) // 2]: "is not",
        b'{"model": {}}': "is not a model of sentencepiece",
        BYTES + SETTINGS + field(1, b"\x0a\x7fx"): "is not a model",
        BYTES + SETTINGS + piece("x", float("nan")): "is not a model",
        BYTES + SETTINGS + piece(""): "is not a model",
        BYTES + SETTINGS + field(1, field(1, b"\xff")): "is not a model",
        BYTES + SETTINGS + piece("x", 0.0, 9): "is not a model",
        BYTES + SETTINGS + piece("x") + piece("x"): "stands twice",
        BYTES + SETTINGS + piece("x", 0.0, 5): "not used, as 'x'",
        BYTES + SETTINGS + piece(long): "longer than 128",
        BYTES + SETTINGS + piece("<two>", 0.0, 2): "no piece for what is unknown",
    }
    for data, said in cases.items():
        path.write_bytes(data)
        with pytest.raises(SentencePieceError, match=said) as refused:
            read_pieces(path)
        assert len(str(refused.value).splitlines()) == 1
    draw = random.Random(4)
    for _ in range(60):
        spoiled = bytearray(model)
        for _ in range(draw.randrange(1, 6)):
            spoiled[draw.randrange(len(model))] = draw.randrange(256)
        path.write_bytes(spoiled)
        try:
            read_pieces(path)
        except SentencePieceError:
            continue
    path.unlink()
    with pytest.raises(SentencePieceError, match="cannot be read: No such file"):
        read_pieces(path)
    with path.open("wb") as file:
        file.truncate(50_000_001)
    with pytest.raises(SentencePieceError, match="larger than 50 MB"):
        read_pieces(path)


def test_what_sentencepiece_spells_otherwise_is_refused(
    model: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever we do not know of a file, wrong ids are not the way in which it is found out."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model)
    merges = pieces._merges
    monkeypatch.setattr(pieces, "_merges", lambda found: merges(found)[::2])
    with pytest.raises(SentencePieceError, match=r"sentencepiece spells '.*' otherwise"):
        read_pieces(path)


def test_a_file_without_special_pieces(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    letters = b"".join(piece(letter, -9.0) for letter in "abc" + SPACE)
    path.write_bytes(BYTES + letters + piece("ab", -1.0) + piece("abc", -2.0) + SETTINGS)
    made, special = read_pieces(path)
    assert made.encode("abcab").tokens == ["abc", "ab"]
    assert special == {"unk_token": "<unk>"}
    # The better score comes first, not the earlier id.
    path.write_bytes(BYTES + letters + piece("bc", -2.0) + piece("ab", -1.0) + SETTINGS)
    assert read_pieces(path)[0].encode("abc").tokens == ["ab", "c"]
