"""Tasks of the small models: seeded generators, and the rule that holds examples out.

Every generator takes a `random.Random` and yields `Example`s of one split. An example is held out
by a hash of its answer; of Sudokus, see tiny_sudoku.py.
"""

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tiny_sudoku

ABOUT = "I am a small demonstration model"


@dataclass(frozen=True)
class Example:
    """A prompt and the one right answer.

    Attributes:
        pieces: the answer as [text, pinned] pairs, where part of the canvas is given.
        start: the text that the canvas starts from, where it does not start from noise.
        history: roles and texts of what was said before the prompt.
    """

    task: str
    kind: str
    prompt: str
    answer: str
    pieces: tuple[tuple[str, bool], ...] | None = None
    start: str | None = None
    history: tuple[tuple[str, str], ...] = ()

    def line(self) -> str:
        """As one line of held-out data."""
        return json.dumps({k: v for k, v in asdict(self).items() if v not in (None, ())})


def is_held_out(canonical: str, one_in: int = 20) -> bool:
    """The split: stable across machines and runs."""
    digest = hashlib.sha256(canonical.encode()).digest()
    return int.from_bytes(digest[:4]) % one_in == 0


# Facts and names ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sources:
    """What the data packages give, cut to plain ASCII.

    `sentences` are of common words, and `passages`, which only training sees, of less common ones.
    """

    countries: tuple[dict[str, str], ...]
    first_names: tuple[str, ...]
    last_names: tuple[str, ...]
    sentences: tuple[str, ...]
    passages: tuple[str, ...] = ()

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
            tuple(of_common_words(list(wordnet_sentences(wordnet, 60)), 2000)),
            tuple(of_common_words(list(wordnet_sentences(wordnet, 200)), 8000)),
        )


def wordnet_sentences(directory: Path, longest: int) -> Iterator[str]:
    """Glosses and quoted examples of 18 letters, spaces and simple punctuation or more."""
    plain = re.compile(rf"[A-Za-z][A-Za-z ,'-]{{16,{longest - 2}}}[A-Za-z]")
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
        if not held_out and rng.random() < 0.3:
            example = _described(rng, sources, pinned)
            if not is_held_out(example.answer):
                yield example
            continue
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


def _described(rng: random.Random, sources: Sources, pinned: bool) -> Example:
    """A record of some fields only, which the prompt names first, or else ("JSON:") does not."""
    name = f"{rng.choice(sources.first_names)} {rng.choice(sources.last_names)}"
    first = rng.choice(sources.first_names)
    place = rng.choice(sources.countries)
    item, count, price = rng.choice(_ITEMS), rng.randint(2, 99), rng.randint(1, 999)
    age = rng.randint(1, 99)
    born = f"{rng.randint(1930, 2019)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    called, country, city = rng.choice([name, first]), place["country"], place["capital"]
    values, text = rng.choice(
        [
            ({"name": called, "age": age}, f"{called}, {age}"),
            ({"name": called, "age": age, "city": city}, f"{called}, {age}, from {city}"),
            ({"name": called, "age": age, "city": city}, f"{called} is {age} and lives in {city}"),
            ({"name": called, "city": city}, f"{called} lives in {city}"),
            (
                {"name": name, "born": born, "country": country},
                f"{name} from {country}, born {born}",
            ),
            (
                {"name": name, "born": born, "country": country},
                f"{name}, born {born}, {country}",
            ),
            (
                {"item": item, "count": count, "price": price, "to": first},
                f"{count} {item} at {price} to {first}",
            ),
            (
                {"item": item, "count": count, "price": price, "to": first},
                f"{first} gets {count} {item}, {price} each",
            ),
        ]
    )
    keys = [key for key in values if rng.random() < 0.6] or [rng.choice(list(values))]
    if rng.random() < 0.15:
        rng.shuffle(keys)
    lead = "JSON" if rng.random() < 0.4 else ", ".join(keys)
    chosen = {key: values[key] for key in keys}
    pieces = _record(chosen, {key for key in keys if rng.random() < 0.7} or set(keys))
    answer = "".join(text for text, _ in pieces)
    task = "json-pinned" if pinned else "json"
    return Example(task, "described", f"{lead}: {text}", answer, pieces if pinned else None)


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


class Texts:
    """Texts that are cheap to draw: the sentences of one side and, to train on, more like them."""

    def __init__(self, rng: random.Random, held_out: bool, sources: Sources):
        self.rng, self.held_out = rng, held_out
        self.sentences = sources.sentences
        self.trained = [text for text in sources.sentences if not is_held_out(text)]
        self.words = [text.split(" ") for text in sources.passages if not is_held_out(text)]

    def draw(self) -> str:
        """A sentence of the split; in training half of them new: spliced, or cut from longer ones.

        A few thousand sentences would be learnt by heart, and spelling with them.
        """
        rng = self.rng
        if self.held_out:
            while True:
                text = rng.choice(self.sentences)
                if is_held_out(text):
                    return text
        while True:
            kind = rng.random()
            if kind < 0.45 or not self.words:
                return rng.choice(self.trained)
            if kind < 0.65:
                head, tail = (rng.choice(self.trained).split(" ") for _ in range(2))
                words = head[: rng.randint(1, len(head))] + tail[rng.randrange(len(tail)) :]
            else:
                words = rng.choice(self.words)
                first = rng.randrange(max(len(words) - 3, 1)) if rng.random() < 0.6 else 0
                words = words[first:]
            text = _cut(words, rng.randint(24, 60))
            if len(text) >= 12 and not is_held_out(text):
                return text


def _cut(words: list[str], most: int) -> str:
    """As many words as have at most so many characters."""
    length = count = 0
    for word in words:
        length += len(word) + 1
        if length > most + 1:
            break
        count += 1
    return " ".join(words[:count]).strip(",'-")


_FIX = (
    "Fix typos|Fix the typos|Correct|Correct the spelling|Fix the spelling|Repair|Spelling"
).split("|")


def typos(rng: random.Random, held_out: bool, sources: Sources) -> Iterator[Example]:
    """Repair: the noisy sentence stands in the prompt and is the starting canvas."""
    texts = Texts(rng, held_out, sources)
    while True:
        clean = texts.draw()
        lead = "Fix"
        if held_out:
            count = rng.choices([0, 1, 2, 4], [2, 4, 4, 1])[0]
        else:
            count = rng.choices([0, 1, 2, 3, 4], [3, 6, 6, 3, 2])[0]
            lead = lead if rng.random() < 0.75 else rng.choice(_FIX)
            if rng.random() < 0.2:
                clean = clean[0].upper() + clean[1:] + rng.choice(".!?...")
        noisy = with_typos(clean, count, rng)
        if (noisy == clean) == (count == 0):
            yield Example("typo", f"{count}", f"{lead}: {noisy}", clean, start=noisy)


def gaps(rng: random.Random, held_out: bool, sources: Sources) -> Iterator[Example]:
    """One word is missing; both sides are pinned, in training sometimes only told."""
    texts = Texts(rng, held_out, sources)
    while True:
        clean = texts.draw()
        words = clean.split(" ")
        if len(words) < (5 if held_out else 3):
            continue
        i = rng.randrange(1, len(words) - 1)
        left, right = " ".join(words[:i]), " ".join(words[i + 1 :])
        pieces = ((left, True), (f" {words[i]}", False), (f" {right}", True))
        pinned = held_out or rng.random() < 0.75
        yield Example("gap", "word", f"Fill: {left} ... {right}", clean, pieces if pinned else None)


# Chat --------------------------------------------------------------------------------------------

_TALK = {
    f"Hello! {ABOUT}. How can I help?": "hello|hi|hey|good morning|hi there",
    f"{ABOUT} of mlx-diffgemma.": "who are you|what are you|are you human|what is your name",
    "I solve small Sudokus, fill records and fix typos.": "what can you do|help|how can you help",
    "You are welcome!": "thanks|thank you|many thanks|thank you very much",
    "Goodbye!": "bye|goodbye|see you|good night",
    "I write a whole canvas at once and refine it.": "how do you work|how does it work",
    "I have a few million parameters.": "how big are you|how large are you",
    "I am well, thank you.": "how are you|how are you doing|how do you do",
}
# Other words for the same, in the same order.
_MORE_TALK = (
    "hello there|good day|good evening|hello again",
    "introduce yourself|tell me about yourself|what are you called",
    "what do you do|help me|can you help me|what are you good at",
    "thanks a lot|thank you so much|great, thanks",
    "see you later|bye bye|farewell",
    "how do you write|how do you answer",
    "how many parameters do you have|what is your size",
    "are you well|how is it going",
)
OUT_OF_DEPTH = f"{ABOUT}; I do not know that."
_DEPTH = "Why {0}?|Write a poem about {0}.|Explain {0}|{0}?|What is {0}?".split("|")
_DEEPER = (
    "Tell me about {0}.|How do I {0}?|Can you {0}?|Tell me a joke.|Tell me a story about {0}.|"
    "What is the meaning of life?|Translate {0}|Summarize: {0}|Who is {1}?|Who was {1}?|"
    "What is {2} plus {3}?|{2} + {3}?|What does {0} mean?|{0}|Write code that {0}.|"
    "What is the weather today?|What time is it?|Do you like {0}?|When was {1} born?"
).split("|")
_FACT = "What is the {0} of {1}?|{0} of {1}?|Tell me the {0} of {1}.".split("|")
_MORE_FACTS = (
    "What's the {0} of {1}?|the {0} of {1}|{1}: {0}?|And the {0} of {1}?|Which {0} has {1}?|"
    "Please tell me the {0} of {1}.|Do you know the {0} of {1}?|{0} of {1}"
).split("|")


def chat(rng: random.Random, held_out: bool, sources: Sources) -> Iterator[Example]:
    """Small talk and facts (memory: the same in both splits), and questions out of its depth."""
    while True:
        kind = rng.choice(["talk", "fact", "fact", "depth"])
        more = not held_out and rng.random() < 0.5
        if kind == "talk":
            answer, asked = rng.choice(list(_TALK.items()))
            if more and rng.random() < 0.5:
                asked = _MORE_TALK[list(_TALK).index(answer)]
            prompt = rng.choice(asked.split("|"))
            prompt = rng.choice([prompt, prompt.capitalize()]) + rng.choice(["", "?", ".", "!"])
        elif kind == "fact":
            c = rng.choice(sources.countries)
            key = rng.choice(["capital", "continent", "currency"])
            prompt = rng.choice(_MORE_FACTS if more else _FACT).format(key, c["country"])
            answer = f"The {key} of {c['country']} is {c[key]}."
        else:
            about = rng.choice(sources.sentences)
            if is_held_out(about) != held_out:
                continue
            prompt, answer = rng.choice(_DEPTH).format(about), OUT_OF_DEPTH
            if more:
                name = f"{rng.choice(sources.first_names)} {rng.choice(sources.last_names)}"
                part = " ".join(about.split(" ")[: rng.randint(1, 9)])
                numbers = rng.randint(1, 99), rng.randint(1, 99)
                prompt = rng.choice(_DEEPER).format(part, name, *numbers)
        yield Example("chat", kind, prompt, answer)


_SYSTEM = (
    "You are {0} {1}.|You are {0} {1}. {2}|{2}|{2} {2}|You are {0} {1} who likes {3}.|{3}|"
    "Your name is {4}.|Your name is {4}. {2}|You help {4} with {3}.|Today is {5}. {2}"
).split("|")
_MANNERS = "helpful friendly polite careful small kind honest clever patient quick brief".split()
_ROLES = "assistant model teacher guide bot friend expert helper program writer".split()
_ORDERS = (
    "Answer briefly.|Be brief.|Be concise.|Be kind.|Answer in one sentence.|Answer in English.|"
    "Answer truthfully.|Do not lie.|Keep it short.|Think first.|Use simple words.|Be polite.|"
    "Answer questions.|Say so if you do not know.|Never be rude.|Help the user."
).split("|")


def system_message(rng: random.Random, held_out: bool, sources: Sources) -> str:
    """An instruction, which changes nothing about the answers."""
    if not held_out and rng.random() < 0.2:
        return rng.choice(["You are a helpful assistant.", "Answer briefly.", "Be brief."])
    while True:
        manner = rng.choice(_MANNERS)
        text = rng.choice(_SYSTEM).format(
            f"an {manner}" if manner[0] in "aeiou" else f"a {manner}",
            rng.choice(_ROLES),
            rng.choice(_ORDERS),
            rng.choice(sources.sentences)[:40].rpartition(" ")[0],
            rng.choice(sources.first_names),
            f"{rng.randint(2000, 2040)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}",
        )
        if is_held_out(text) == held_out:
            return text


def talks(
    rng: random.Random,
    held_out: bool,
    sources: Sources,
    streams: list[Iterator[Example]],
    name: str = "",
    system: bool | None = None,
    turns: int | None = None,
) -> Iterator[Example]:
    """Examples of the streams after a system message, earlier turns, or both."""
    earlier = chat(rng, held_out, sources)
    while True:
        history = []
        if rng.random() < 0.6 if system is None else system:
            history.append(("system", system_message(rng, held_out, sources)))
        count = rng.choice([0, 1, 1, 2, 3]) if turns is None else turns
        for said in (next(rng.choice([earlier, rng.choice(streams)])) for _ in range(count)):
            history += [("user", said.prompt), ("assistant", said.answer)]
        example = next(rng.choice(streams))
        if history:
            yield replace(example, task=name or example.task, history=tuple(history))


# All ---------------------------------------------------------------------------------------------


def sudokus(rng: random.Random, held_out: bool, size: int, bases: int) -> Iterator[Example]:
    """Sudokus; in training a quarter has its clues pinned, as where a template is filled."""
    if held_out:
        lines = tiny_sudoku.SEEN_BY_NOBODY.read_text().splitlines()
        pairs: Iterator[tuple[str, str]] = ((*line.split(),) for line in lines)  # type: ignore[misc]
    else:
        pairs = tiny_sudoku.puzzles(rng, [tiny_sudoku.base(rng, size) for _ in range(bases)])
    for puzzle, solution in pairs:
        prompt, answer = tiny_sudoku.lines(puzzle), tiny_sudoku.lines(solution)
        pieces = None
        if not held_out and rng.random() < 0.25:
            pieces = tuple((digit, clue != ".") for clue, digit in zip(prompt, answer, strict=True))
        yield Example("sudoku", f"{size}x{size}", prompt, answer, pieces)


def hard_sudokus(rng: random.Random) -> Iterator[Example]:
    """Held-out Sudokus with as few clues as can be."""
    for puzzle, solution in tiny_sudoku.hard_held_out(rng):
        prompt, answer = tiny_sudoku.lines(puzzle), tiny_sudoku.lines(solution)
        yield Example("sudoku-hard", "6x6", prompt, answer)


def held_out_streams(rng: random.Random, sources: Sources) -> dict[str, Iterator[Example]]:
    """What `eval` asks, a stream a task."""
    make: dict[str, Callable[[random.Random], Iterator[Example]]] = {
        "sudoku": lambda r: sudokus(r, True, 6, 0),
        "none": lambda r: iter(()),  # keeps the draws of the tasks below
        "json": lambda r: records(r, True, sources, pinned=False),
        "json-pinned": lambda r: records(r, True, sources, pinned=True),
        "typo": lambda r: (e for e in typos(r, True, sources) if e.kind in "12"),
        "gap": lambda r: gaps(r, True, sources),
        "chat": lambda r: chat(r, True, sources),
        "sudoku-hard": hard_sudokus,
        "chat-system": lambda r: talks(r, True, sources, chats(r), "chat-system", True, 0),
        "chat-turns": lambda r: talks(r, True, sources, chats(r), "chat-turns", None, 2),
    }

    def chats(r: random.Random) -> list[Iterator[Example]]:
        return [chat(r, True, sources)]

    return {name: f(random.Random(rng.random())) for name, f in make.items()}


def streams(
    rng: random.Random, sources: Sources, bases: int = 3000
) -> dict[str, Iterator[Example]]:
    """What training draws from, a stream a task."""
    make: dict[str, Callable[[random.Random], Iterator[Example]]] = {
        "sudoku6": lambda r: sudokus(r, False, 6, bases),
        "sudoku4": lambda r: sudokus(r, False, 4, min(bases, 300)),
        "json": lambda r: records(r, False, sources, pinned=False),
        "json-pinned": lambda r: records(r, False, sources, pinned=True),
        "typo": lambda r: typos(r, False, sources),
        "gap": lambda r: gaps(r, False, sources),
        "chat": lambda r: chat(r, False, sources),
    }
    made = {name: f(random.Random(rng.random())) for name, f in make.items()}
    text = [made["chat"]] * 5 + [made[name] for name in ("json", "json-pinned", "typo", "gap")]
    return {**made, "talk": talks(rng, False, sources, text)}
