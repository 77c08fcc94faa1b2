"""Commands with pictures: --image, batch files, a chat, and a sentence for each mistake."""

import json
import re
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Done, run
from looking import looking_checkpoint
from PIL import Image

from mlx_diffgemma.cli.images import dropped, pasted
from mlx_diffgemma.errors import Error


def noise(seed: int, size: tuple[int, int] = (60, 80)) -> Image.Image:
    drawn = np.random.default_rng(seed).integers(0, 256, (*size, 3))
    return Image.fromarray(drawn.astype(np.uint8))


def stored(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that sees, one that does not, and two pictures."""
    directory = tmp_path_factory.mktemp("place")
    looking_checkpoint(directory / "model")
    looking_checkpoint(directory / "blind", tower=False)
    for number in (1, 2):
        noise(number).save(directory / f"{number}.png")
    return directory


def refused(done: Done, said: str, code: int = 1) -> None:
    assert done.returncode == code
    assert said in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def generated(place: Path, *arguments: str, stdin: Any = "") -> dict[str, Any]:
    done = run("generate", "-m", "model", "--json", "--seed", "1", "-q", *arguments, cwd=place,
               stdin=stdin)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_generate_reads_pictures(place: Path) -> None:
    text = generated(place, "What?")
    one = generated(place, "What?", "--image", "1.png")
    two = generated(place, "What?", "--image", "1.png", "--image", "2.png")
    large = generated(place, "What?", "--image", "1.png", "--image-tokens", "140")
    prompts = [each["prompt_tokens"] for each in (text, one, two, large)]
    assert [count - prompts[0] for count in prompts[1:]] == [65, 130, 132]
    piped = generated(place, "What?", "--image", "-", stdin=(place / "1.png").read_bytes())
    assert (piped["text"], piped["prompt_tokens"]) == (one["text"], one["prompt_tokens"])


def test_a_prompt_cache_tells_pictures_apart(place: Path, tmp_path: Path) -> None:
    cached = []
    for name in ("1.png", "1.png", "2.png"):
        found = generated(
            place, "What?", "--image", name, "--prompt-cache", str(tmp_path / "cache")
        )
        cached.append(found["cached_tokens"])
    assert cached[0] == cached[2] == 0 < cached[1]


def bomb(side: int) -> bytes:
    """A PNG that says it is so large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" * 9)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


WRONG = {
    "0 bytes": (b"", "is empty"),
    "truncated": (stored(noise(1))[:2000], "cannot be read: image file is truncated"),
    "1 x 1": (stored(noise(1, (1, 1))), "is 1 x 1 pixels"),
    "1 x 30,000": (stored(noise(1, (30_000, 1))), "is 1 x 30,000 pixels"),
    "20,000 x 20,000": (bomb(20_000), "has more than 67,108,864 pixels"),
    "no picture": (b"hello\n" * 30, "is not a picture in PNG"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_one_sentence_before_a_model_is_loaded(case: str, tmp_path: Path) -> None:
    data, said = WRONG[case]
    (tmp_path / "it.png").write_bytes(data)
    for command in (("generate", "x"), ("fill", "{{x}}"), ("choose", "x", "--labels", "a,b")):
        done = run(*command, "-m", "no-such-model/x", "--image", "it.png", cwd=tmp_path)
        refused(done, f"it.png {said}")
    if data:
        done = run("generate", "x", "--image", "-", cwd=tmp_path, stdin=data)
        refused(done, f"the picture {said}")


def test_mistakes_with_pictures_are_one_sentence(place: Path) -> None:
    for arguments, said, code in (
        (["--image", "none.png"], "none.png does not exist", 1),
        (["--image", "."], ". is not a file", 1),
        (["--image", "-", "--image", "-"], "stdin is read once", 2),
        (["--image-tokens", "70"], "--image-tokens goes with --image", 2),
        (["--image", "1.png", "--image-tokens", "71"], "takes one of 70, 140", 2),
        (["--image", "1.png", "-m", "blind"], "its checkpoint has no vision tower", 1),
    ):
        refused(run("generate", "x", "-q", *arguments, cwd=place), said, code)
    refused(run("generate", "--image", "-", cwd=place), "stdin is read once", 2)
    done = run("generate", "--batch", "x.jsonl", "--image", "1.png", cwd=place)
    refused(done, "--batch goes with no prompt, --image", 2)


def test_fill_choose_and_a_schema_read_pictures(place: Path) -> None:
    """Values are those of the picture: another picture, other chances."""
    chances = []
    for name in ("1.png", "2.png"):
        done = run("choose", "Which?", "--labels", "cat,dog", "-m", "model", "--image", name, "-q",
                   cwd=place)  # fmt: skip
        chances.append(done.stdout)
        done = run("fill", "number: {{n:int}} kind: {{kind:cat|dog}}", "-m", "model", "--image",
                   name, "--seed", "1", "--json", cwd=place)  # fmt: skip
        values = json.loads(done.stdout)
        assert isinstance(values["n"], int)
        assert values["kind"] in ("cat", "dog")
    assert chances[0] != chances[1] != ""
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"],
              "additionalProperties": False}  # fmt: skip
    (place / "schema.json").write_text(json.dumps(schema))
    done = run("generate", "x", "-m", "model", "--image", "1.png", "--schema", "schema.json", "-q",
               cwd=place)  # fmt: skip
    assert json.loads(done.stdout)["n"] in (1, 2)


def test_a_batch_file_names_pictures_beside_it(place: Path, tmp_path: Path) -> None:
    parts = [{"type": "image", "image": "1.png"}, {"type": "text", "text": "What?"}]
    lines: list[dict[str, Any]] = [
        {"prompt": "What?", "images": ["1.png"]},
        {"messages": [{"role": "user", "content": parts}]},
        {"prompt": "What?", "images": ["none.png"]},
        {"messages": [{"role": "user", "content": "x"}], "images": ["1.png"]},
        {"prompt": "What?", "images": "1.png"},
        {"prompt": "What?"},
    ]
    (place / "batch.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = run("generate", "--batch", place / "batch.jsonl", "-m", place / "model", "-q",
               cwd=tmp_path)  # fmt: skip
    answers = sorted(map(json.loads, done.stdout.splitlines()), key=lambda each: each["index"])
    counts = [answers[i]["prompt_tokens"] for i in (0, 1, 5)]
    assert counts[0] == counts[1] == counts[2] + 65
    assert "does not exist" in answers[2]["error"]
    assert "images go with a prompt" in answers[3]["error"]
    assert "are no list of files" in answers[4]["error"]


def test_info_says_what_a_picture_takes(place: Path) -> None:
    done = run("info", place / "model")
    assert (
        "pictures take up to 70 tokens each, or 70, 140, 280, 560 or 1120; the first" in done.stdout
    )
    assert "here: with pictures a context of 4,096 tokens" in done.stdout
    assert json.loads(run("info", place / "model", "--json").stdout)["picture_tokens"] == 70
    assert "picture" not in run("info", place / "blind").stdout


def talked(place: Path, *lines: str, model: str = "model") -> str:
    """What a chat says beside its answers."""
    return run("chat", "-m", model, "--seed", "1", stdin="\n".join(lines), cwd=place).stderr


def test_a_chat_takes_pictures(place: Path, tmp_path: Path) -> None:
    said = talked(place, "/image 1.png", f"{place}/2.png", "What?", "/stats", "/edit Who?",
                  "/image none.png", "/image 1.png", "/undo", "/undo",
                  f"/save --pixels {tmp_path}/it")  # fmt: skip
    assert "1.png: a picture of 63 tokens stands before the next message." in said
    assert "2.png: a picture of 63 tokens" in said
    assert "error: none.png does not exist" in said
    assert "Not part of the next message: 1 picture" in said
    assert "Forgotten: Who?" in said
    assert (tmp_path / "it").exists()
    assert "no vision tower" in talked(place, "/image 1.png", model="blind")


def test_a_chat_begins_with_pictures(place: Path) -> None:
    """`chat` and `score` had no --image, as all others that read a prompt."""

    def held(*flags: str) -> int:
        done = run("chat", "-m", "model", "--seed", "1", *flags, cwd=place, stdin="What?\n/stats\n")
        assert done.returncode == 0, done.stderr
        found = re.search(r"context: (\d+) tokens", done.stderr)
        assert found is not None
        return int(found[1])

    assert held("--image", "1.png") - held() == 65
    refused(run("chat", "--image", "-", cwd=place, stdin="x"), "stdin is read once", 2)
    refused(run("chat", "--image", "none.png", "-m", "no/such", cwd=place), "does not exist")


def test_a_text_is_scored_behind_pictures(place: Path) -> None:
    found = [
        run("score", "A cat.", "--prompt", "What?", "-m", "model", "-q", *flags, cwd=place).stdout
        for flags in ((), ("--image", "1.png"), ("--image", "2.png"))
    ]
    assert len(set(found)) == 3
    assert all(each.count("\n") == 9 for each in found)
    refused(run("score", "x", "--image", "1.png", cwd=place), "--image goes with --prompt", 2)
    for flags in (("--prompt", "-", "x"), ("--prompt", "x", "-")):
        done = run("score", *flags, "--image", "-", "-m", "no/such", cwd=place, stdin=b"x")
        refused(done, "stdin is read once", 2)


def test_what_is_dropped_into_a_terminal(tmp_path: Path) -> None:
    names = ["a.png", "with a blank.JPG", "it's.webp", "note.txt"]
    paths = [tmp_path / name for name in names]
    for path in paths:
        path.touch()
    plain, blank, quote, text = paths
    escaped = str(blank).replace(" ", "\\ ")
    for line, found, rest in (
        (str(plain), [plain], ""),
        (f"{escaped} {plain} ", [blank, plain], ""),
        (f"'{blank}' what is  it?", [blank], "what is  it?"),
        (f'"{quote}"', [quote], ""),
        (blank.as_uri(), [blank], ""),
        (str(text), [], str(text)),
        ("a.png", [], "a.png"),
        (f"see {plain}", [], f"see {plain}"),
        ("/help", [], "/help"),
        ('"open', [], '"open'),
        (f"{tmp_path}/{'x' * 9999}.png", [], f"{tmp_path}/{'x' * 9999}.png"),
        ("/\0.png", [], "/\0.png"),
        ("", [], ""),
    ):
        assert dropped(line) == (found, rest)


def test_the_clipboard(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageGrab

    def given(what: object) -> None:
        def grab() -> object:
            if isinstance(what, Exception):
                raise what
            return what

        monkeypatch.setattr(ImageGrab, "grabclipboard", grab)

    image = noise(1)
    given(image)
    assert pasted() == [image]
    given(["/x/a.png", "/x/b.txt"])
    assert pasted() == [Path("/x/a.png")]
    for nothing in (None, [], ["/x/b.txt"]):
        given(nothing)
        with pytest.raises(Error, match="there is no picture in the clipboard"):
            pasted()
    given(NotImplementedError("wl-paste or xclip is required\nfor this"))
    with pytest.raises(Error, match="cannot be read: wl-paste or xclip is required for this"):
        pasted()
