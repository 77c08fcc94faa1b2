"""Tasks of the embedded model: seeded generators, and the rule that holds examples out.

Every generator takes a `random.Random` and yields `Example`s of one split. An example is held out
by a hash of its answer. 6x6 Sudokus are held out by class: all grids that equal, up to the names of
the digits, a solution in tests/data/sudoku6/puzzles.txt, because training starts from that
checkpoint and those puzzles are the ones it has not seen.
"""

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

ABOUT = "I am a small demonstration model"


@dataclass(frozen=True)
class Example:
    """A prompt and the one right answer.

    Attributes:
        pieces: the answer as [text, pinned] pairs, where part of the canvas is given.
        start: the text that the canvas starts from, where it does not start from noise.
    """

    task: str
    kind: str
    prompt: str
    answer: str
    pieces: tuple[tuple[str, bool], ...] | None = None
    start: str | None = None

    def line(self) -> str:
        """As one line of held-out data."""
        return json.dumps({k: v for k, v in asdict(self).items() if v is not None})


def is_held_out(canonical: str, one_in: int = 20) -> bool:
    """The split: stable across machines and runs."""
    digest = hashlib.sha256(canonical.encode()).digest()
    return int.from_bytes(digest[:4]) % one_in == 0


SEEN_BY_NOBODY = Path(__file__).parents[1] / "tests" / "data" / "sudoku6" / "puzzles.txt"


# Sudoku ------------------------------------------------------------------------------------------


def _solve(cells: list[int], size: int, rng: random.Random | None, limit: int) -> int:
    """Fill `cells` in place with a solution; returns how many there are, counted up to `limit`."""
    height, width = 2, size // 2
    best: tuple[int, set[int]] | None = None
    for i, cell in enumerate(cells):
        if cell:
            continue
        row, column = divmod(i, size)
        top, left = row - row % height, column - column % width
        seen = set(cells[row * size : row * size + size]) | set(cells[column::size])
        for r in range(top, top + height):
            seen |= set(cells[r * size + left : r * size + left + width])
        options = set(range(1, size + 1)) - seen
        if best is None or len(options) < len(best[1]):
            best = i, options
    if best is None:
        return 1
    i, options = best
    ordered = sorted(options)
    if rng:
        rng.shuffle(ordered)
    found = 0
    solution: list[int] | None = None
    for digit in ordered:
        trial = cells.copy()
        trial[i] = digit
        count = _solve(trial, size, rng, limit - found)
        if count and solution is None:
            solution = trial
        found += count
        if found >= limit:
            break
    if solution is not None:
        cells[:] = solution
    return found


def relabelled(solution: str) -> str:
    """Digits renamed in order of first appearance: the class of a solution under relabelling."""
    names: dict[str, str] = {}
    return "".join(names.setdefault(c, str(len(names) + 1)) if c.isdigit() else c for c in solution)


def _held_out_classes() -> frozenset[str]:
    lines = SEEN_BY_NOBODY.read_text().splitlines()
    return frozenset(relabelled(line.split()[1]) for line in lines)


HELD_OUT_CLASSES = _held_out_classes()


def is_held_out_grid(solution: str) -> bool:
    """The split of Sudokus: by list for 6x6, by hash for the twelve classes of 4x4."""
    kind = relabelled(solution.replace("\n", ""))
    return kind in HELD_OUT_CLASSES if len(kind) == 36 else is_held_out(kind, one_in=4)


def held_out_sudokus() -> Iterator[Example]:
    """The 6x6 puzzles of the list."""
    for line in SEEN_BY_NOBODY.read_text().splitlines():
        rows = [[part[i : i + 6] for i in range(0, 36, 6)] for part in line.split()]
        yield Example("sudoku", "6x6", "\n".join(rows[0]), "\n".join(rows[1]))


def sudoku(rng: random.Random, held_out: bool, size: int = 6) -> Iterator[Example]:
    """Puzzles with one solution. 6x6: 12 to 27 blanks; 4x4: 4 to 10."""
    fewest, most = (12, 27) if size == 6 else (4, 10)

    def text(cells: list[int]) -> str:
        joined = "".join(str(c) if c else "." for c in cells)
        return "\n".join(joined[i : i + size] for i in range(0, size * size, size))

    while True:
        cells = [0] * size * size
        _solve(cells, size, rng, 1)
        solution = cells.copy()
        if is_held_out_grid(text(solution)) != held_out:
            continue
        blanks = rng.randint(fewest, most)
        for i in rng.sample(range(size * size), size * size):
            if cells.count(0) == blanks:
                break
            kept, cells[i] = cells[i], 0
            if cells.count(0) > size and _solve(cells.copy(), size, None, 2) > 1:
                cells[i] = kept
        if cells.count(0) < fewest:
            continue
        yield Example("sudoku", f"{size}x{size}", text(cells), text(solution))


def shuffled(rng: random.Random, held_out: bool, size: int) -> Iterator[Example]:
    """Puzzles under digit, row, column, band and stack permutations, split anew.

    Making a puzzle takes milliseconds, so this draws from a pool of them.
    """
    fresh = sudoku(rng, held_out, size)
    pool = [next(fresh) for _ in range(3000)]
    while True:
        base = rng.choice(pool)
        digits = rng.sample("123456"[:size], size)
        width = size // 2
        bands = rng.sample(range(width), width)
        rows = [band * 2 + r for band in bands for r in rng.sample(range(2), 2)]
        stacks = rng.sample(range(2), 2)
        columns = [stack * width + c for stack in stacks for c in rng.sample(range(width), width)]

        def moved(
            text: str,
            rows: list[int] = rows,
            columns: list[int] = columns,
            digits: list[str] = digits,
        ) -> str:
            grid = text.split("\n")
            lines = ("".join(grid[r][c] for c in columns) for r in rows)
            return "\n".join(lines).translate(
                str.maketrans("123456"[: len(digits)], "".join(digits))
            )

        puzzle, answer = moved(base.prompt), moved(base.answer)
        if is_held_out_grid(answer) == held_out:
            yield Example("sudoku", base.kind, puzzle, answer)


# Facts and names ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sources:
    """What the data packages give, cut to plain ASCII."""

    countries: tuple[dict[str, str], ...]
    first_names: tuple[str, ...]
    last_names: tuple[str, ...]
    sentences: tuple[str, ...]

    @classmethod
    def read(cls, wordnet: Path, countries: Path, people: dict[str, Any]) -> "Sources":
        continents = json.loads((countries / "continents.min.json").read_text())
        table = json.loads((countries / "countries.min.json").read_text())
        known = [
            {
                "country": c["name"],
                "capital": c["capital"],
                "continent": continents[c["continent"]],
                "currency": c["currency"][0],
                "phone": str(c["phone"][0]),
            }
            for c in table.values()
            if c["capital"] and c["currency"] and c["phone"]
        ]
        known = [c for c in known if all(v.isascii() and len(v) <= 20 for v in c.values())]
        first = sorted({n for names in people["names"].values() for n in names})
        last = sorted(set(people["surnames"]))
        return cls(
            tuple(known),
            tuple(n for n in first if n.isascii() and n.isalpha() and len(n) <= 8),
            tuple(n for n in last if n.isascii() and n.isalpha() and len(n) <= 8),
            tuple(of_common_words(list(wordnet_sentences(wordnet)), 2000)),
        )


def wordnet_sentences(directory: Path) -> Iterator[str]:
    """Glosses and quoted examples of 18 to 60 letters, spaces and simple punctuation."""
    plain = re.compile(r"[A-Za-z][A-Za-z ,'-]{16,58}[A-Za-z]")
    seen = set()
    for part in ("noun", "verb", "adj", "adv"):
        for line in (directory / "dict" / f"data.{part}").read_text().splitlines():
            gloss = line.partition(" | ")[2]
            for text in [gloss.partition(";")[0], *re.findall(r'"([^"]*)"', gloss)]:
                text = re.sub(r"\([^)]*\) ?", "", text).strip()
                if plain.fullmatch(text) and text not in seen:
                    seen.add(text)
                    yield text


def of_common_words(sentences: list[str], count: int) -> Iterator[str]:
    """Sentences of the `count` most frequent words; a small model cannot spell the others."""
    frequency = Counter(word for text in sentences for word in text.split(" "))
    common = {word for word, _ in frequency.most_common(count)}
    return (text for text in sentences if common.issuperset(text.split(" ")))


# JSON records ------------------------------------------------------------------------------------


def _record(values: dict[str, Any], free: set[str]) -> tuple[tuple[str, bool], ...]:
    """The record as pieces: keys, punctuation and given values pinned, the values of `free` not."""
    pieces: list[tuple[str, bool]] = []
    text = "{"
    for i, (key, value) in enumerate(values.items()):
        text += ("," if i else "") + f'"{key}":'
        quote = '"' if isinstance(value, str) else ""
        text += quote
        written = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        if key in free:
            pieces += [(text, True), (written, False)]
            text = quote
        else:
            text += written + quote
    pieces.append((text + "}", True))
    return tuple(pieces)


def records(
    rng: random.Random, held_out: bool, sources: Sources, pinned: bool
) -> Iterator[Example]:
    """Typed records: persons and orders are copied, countries remembered, sums computed."""
    while True:
        kind = rng.choice(["person", "person", "order", "country", "sum"])
        if kind == "person":
            country = rng.choice(sources.countries)["country"]
            name = f"{rng.choice(sources.first_names)} {rng.choice(sources.last_names)}"
            born = f"{rng.randint(1930, 2019)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
            values: dict[str, Any] = {"name": name, "born": born, "country": country}
            prompt = rng.choice(
                [
                    f"Record: {name}, born {born}, {country}",
                    f"Record: {name} from {country}, born {born}",
                    f"Record: born {born} in {country}, {name}",
                ]
            )
            free = {k for k in values if rng.random() < 0.7} or {"name"}
        elif kind == "order":
            item = rng.choice(_ITEMS)
            name = rng.choice(sources.first_names)
            number, price = rng.randint(2, 99), rng.randint(1, 999)
            values = {"item": item, "count": number, "price": price, "to": name}
            prompt = rng.choice(
                [
                    f"Record: {number} {item} at {price} to {name}",
                    f"Record: {name} gets {number} {item}, {price} each",
                    f"Record: {item} for {name}, price {price}, count {number}",
                ]
            )
            free = {k for k in values if rng.random() < 0.7} or {"item"}
        elif kind == "country":
            # A memory task: the fact is in training, this choice of fields may not be.
            fact = rng.choice(sources.countries)
            keys = rng.sample(["capital", "continent", "currency", "phone"], 2)
            values = {"country": fact["country"], **{k: fact[k] for k in keys}}
            prompt = f"Record: {fact['country']}, {keys[0]} and {keys[1]}"
            free = set(keys)
        else:
            numbers = [rng.randint(1, 20) for _ in range(rng.randint(2, 4))]
            values = {"items": numbers, "count": len(numbers), "sum": sum(numbers)}
            prompt = f"Record: {', '.join(map(str, numbers))}, count and sum"
            free = {"count", "sum"}
        pieces = _record(values, free)
        answer = "".join(text for text, _ in pieces)
        if is_held_out(answer) != held_out:
            continue
        # Arithmetic is a task of its own: its answers are not in the prompt.
        task = ("json-pinned" if pinned else "json") + ("-sum" if kind == "sum" else "")
        yield Example(task, kind, prompt, answer, pieces if pinned else None)


_ITEMS = (
    "apples bags books boxes cakes chairs clocks coats cups desks dolls eggs hats keys lamps maps "
    "nails nuts pears pens plates ropes shoes socks spoons tables tents tools toys wheels"
).split()


# Sentences ---------------------------------------------------------------------------------------


def with_typos(text: str, count: int, rng: random.Random) -> str:
    """`count` typos on letters: wrong, swapped, missing or doubled."""
    letters = list(text)
    for _ in range(count):
        i = rng.choice([j for j, c in enumerate(letters) if c.isalpha()])
        kind = rng.choices(["wrong", "swap", "missing", "double"], [4, 3, 2, 1])[0]
        if kind == "wrong":
            letters[i] = rng.choice([c for c in "abcdefghijklmnopqrstuvwxyz" if c != letters[i]])
        elif kind == "swap" and i + 1 < len(letters) and letters[i + 1].isalpha():
            letters[i], letters[i + 1] = letters[i + 1], letters[i]
        elif kind == "missing":
            del letters[i]
        else:
            letters.insert(i, letters[i])
    return "".join(letters)


def typos(rng: random.Random, held_out: bool, sources: Sources) -> Iterator[Example]:
    """Repair: the noisy sentence stands in the prompt and is the starting canvas."""
    while True:
        clean = rng.choice(sources.sentences)
        if is_held_out(clean) != held_out:
            continue
        count = rng.choices([0, 1, 2, 4], [2, 4, 4, 1])[0]
        noisy = with_typos(clean, count, rng)
        if (noisy == clean) == (count == 0):
            yield Example("typo", f"{count}", f"Fix: {noisy}", clean, start=noisy)


def gaps(rng: random.Random, held_out: bool, sources: Sources) -> Iterator[Example]:
    """One word is missing; both sides are pinned."""
    while True:
        clean = rng.choice(sources.sentences)
        words = clean.split(" ")
        if is_held_out(clean) != held_out or len(words) < 5:
            continue
        i = rng.randrange(1, len(words) - 1)
        left, right = " ".join(words[:i]), " ".join(words[i + 1 :])
        pieces = ((left, True), (f" {words[i]}", False), (f" {right}", True))
        yield Example("gap", "word", f"Fill: {left} ... {right}", clean, pieces)


# Chat --------------------------------------------------------------------------------------------

_TALK = {
    f"Hello! {ABOUT}. How can I help?": "hello|hi|hey|good morning|hi there",
    f"{ABOUT} of mlx-diffgemma.": "who are you|what are you|are you human|what is your name",
    "I solve small Sudokus, fill records and fix typos.": "what can you do|help|how can you help",
    "You are welcome!": "thanks|thank you|many thanks|thank you very much",
    "Goodbye!": "bye|goodbye|see you|good night",
    "I write a whole canvas at once and refine it.": "how do you work|how does it work",
    "I have about two million parameters.": "how big are you|how large are you",
    "I am well, thank you.": "how are you|how are you doing|how do you do",
}
OUT_OF_DEPTH = f"{ABOUT}; I do not know that."


def chat(rng: random.Random, held_out: bool, sources: Sources) -> Iterator[Example]:
    """Small talk and facts (memory: the same in both splits), and questions out of its depth."""
    while True:
        kind = rng.choice(["talk", "fact", "fact", "depth"])
        if kind == "talk":
            answer, asked = rng.choice(list(_TALK.items()))
            prompt = rng.choice(asked.split("|"))
            prompt = rng.choice([prompt, prompt.capitalize()]) + rng.choice(["", "?", ".", "!"])
        elif kind == "fact":
            c = rng.choice(sources.countries)
            key = rng.choice(["capital", "continent", "currency"])
            prompt = rng.choice(
                ["What is the {0} of {1}?", "{0} of {1}?", "Tell me the {0} of {1}."]
            )
            prompt = prompt.format(key, c["country"])
            answer = f"The {key} of {c['country']} is {c[key]}."
        else:
            about = rng.choice(sources.sentences)
            if is_held_out(about) != held_out:
                continue
            frames = ["Why {0}?", "Write a poem about {0}.", "Explain {0}", "{0}?", "What is {0}?"]
            prompt, answer = rng.choice(frames).format(about), OUT_OF_DEPTH
        yield Example("chat", kind, prompt, answer)


def streams(
    rng: random.Random, held_out: bool, sources: Sources
) -> dict[str, tuple[float, Iterator[Example]]]:
    """Every task with its share of the training batches."""

    def sudoku6(r: random.Random) -> Iterator[Example]:
        return cycle(held_out_sudokus()) if held_out else shuffled(r, False, 6)

    make: dict[str, tuple[float, Callable[[random.Random], Iterator[Example]]]] = {
        "sudoku6": (0.22, sudoku6),
        "sudoku4": (0.02, lambda r: sudoku(r, held_out, 4)),
        "json": (0.10, lambda r: records(r, held_out, sources, pinned=False)),
        "json-pinned": (0.26, lambda r: records(r, held_out, sources, pinned=True)),
        "typo": (0.28, lambda r: typos(r, held_out, sources)),
        "gap": (0.05, lambda r: gaps(r, held_out, sources)),
        "chat": (0.07, lambda r: chat(r, held_out, sources)),
    }
    return {k: (share, f(random.Random(rng.random()))) for k, (share, f) in make.items()}
