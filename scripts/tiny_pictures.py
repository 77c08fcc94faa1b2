"""Pictures of coloured shapes and digits, questions about them, and a record of what is there.

A scene has one or two objects, each in a quarter of its own. It is held out by a hash of what is
where, so that held-out pictures show what training never showed, not only other pixels of it.
"""

import json
import random
from dataclasses import dataclass
from functools import cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from tiny_data import is_held_out

SHAPES = ("circle", "cross", "triangle")
PLURALS = {"cross": "crosses"}
DIGITS = tuple("0123457")  # 6, 8 and 9 would take the tower longer to tell apart
COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 200, 40),
}
PLACES = ("top left", "top right", "bottom left", "bottom right")
KINDS = ("number", "colour", "place", "digit", "what", "record")
RECORD = "Write a record of all objects."
HELD_OUT = 10  # one in so many scenes


@dataclass(frozen=True)
class Thing:
    """An object: what it is, its colour, and the quarter that it stands in."""

    object: str
    colour: str
    place: str


Scene = tuple[Thing, ...]


@dataclass(frozen=True)
class Question:
    """What is asked of a picture, and the one right answer."""

    kind: str
    prompt: str
    answer: str


def draw_scene(rng: random.Random, held_out: bool, digits: float = 0.6) -> Scene:
    """A scene of the split; objects in the order of their places.

    `digits` is the chance that one of them is a digit: there are more of these to learn.
    """
    while True:
        count = rng.randint(1, 2)
        kinds = [rng.choice(SHAPES) for _ in range(count)]
        if rng.random() < digits:
            kinds[0] = rng.choice(DIGITS)
        rng.shuffle(kinds)
        places = sorted(rng.sample(PLACES, count), key=PLACES.index)
        scene = tuple(
            Thing(kind, rng.choice(list(COLOURS)), place)
            for kind, place in zip(kinds, places, strict=True)
        )
        if is_held_out(record(scene), HELD_OUT) == held_out:
            return scene


def record(scene: Scene) -> str:
    """The scene in JSON, as the model writes it."""
    return json.dumps([vars(thing) for thing in scene], separators=(",", ":"))


def questions(rng: random.Random, scene: Scene) -> list[Question]:
    """One question of each kind that has one answer, in a random order."""
    asked = [_what(rng, scene), _count(rng, scene), Question("record", RECORD, record(scene))]
    shapes = [thing.object for thing in scene]
    single = [thing for thing in scene if shapes.count(thing.object) == 1]
    if single:
        thing = rng.choice(single)
        asked.append(Question("colour", f"What colour is the {thing.object}?", thing.colour))
        thing = rng.choice(single)
        asked.append(Question("place", f"Where is the {thing.object}?", thing.place))
    digits = [shape for shape in shapes if shape in DIGITS]
    if digits:
        asked.append(Question("digit", "Which digit is there?", digits[0]))
    rng.shuffle(asked)
    return asked


def _what(rng: random.Random, scene: Scene) -> Question:
    place = rng.choice(PLACES)
    there = [f"{thing.colour} {thing.object}" for thing in scene if thing.place == place]
    return Question("what", f"What is at the {place}?", (there or ["nothing"])[0])


def _count(rng: random.Random, scene: Scene) -> Question:
    what = rng.choice([*SHAPES, *COLOURS, "object"])
    found = [what in (thing.object, thing.colour, "object") for thing in scene]
    named = f"{what} objects" if what in COLOURS else PLURALS.get(what, f"{what}s")
    return Question("number", f"How many {named} are there?", str(sum(found)))


# Drawing -----------------------------------------------------------------------------------------


def draw(rng: random.Random, scene: Scene) -> Image.Image:
    """A square picture of the scene; sizes, places, colours and the ground vary."""
    side = rng.choice((96, 128, 192))
    light = rng.choice((rng.randint(0, 50), rng.randint(205, 255)))
    image = Image.new("RGB", (side, side), _near(rng, (light, light, light), 8))
    brush = ImageDraw.Draw(image)
    for thing in scene:
        down, across = divmod(PLACES.index(thing.place), 2)
        loose = 0.02 if thing.object in DIGITS else 0.05
        x, y = ((0.25 + 0.5 * each + rng.uniform(-loose, loose)) * side for each in (across, down))
        _draw_thing(brush, thing, x, y, rng.uniform(0.14, 0.2) * side, rng)
    return image


def _draw_thing(
    brush: ImageDraw.ImageDraw, thing: Thing, x: float, y: float, r: float, rng: random.Random
) -> None:
    colour = _near(rng, COLOURS[thing.colour], 20)
    if thing.object == "circle":
        brush.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif thing.object == "cross":
        arm = 0.3 * r
        brush.rectangle((x - r, y - arm, x + r, y + arm), fill=colour)
        brush.rectangle((x - arm, y - r, x + arm, y + r), fill=colour)
    elif thing.object == "triangle":
        brush.polygon([(x, y - r), (x - r, y + 0.9 * r), (x + r, y + 0.9 * r)], fill=colour)
    else:
        size = brush.im.size[0] * rng.uniform(0.5, 0.56)
        stroke = max(1, round(size / 32))
        brush.text((x, y), thing.object, colour, _font(round(size)), "mm", stroke_width=stroke)


@cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def held_out(count: int, seed: int) -> list[tuple[Scene, Image.Image, Question]]:
    """Pictures that training never shows, with one question of each; the kinds in turn."""
    rng = random.Random(seed)
    cases: list[tuple[Scene, Image.Image, Question]] = []
    while len(cases) < count:
        scene = draw_scene(rng, held_out=True)
        kind = KINDS[len(cases) % len(KINDS)]
        found = [question for question in questions(rng, scene) if question.kind == kind]
        if found:
            cases.append((scene, draw(rng, scene), found[0]))
    return cases


def _near(rng: random.Random, colour: tuple[int, int, int], most: int) -> tuple[int, ...]:
    return tuple(min(max(each + rng.randint(-most, most), 0), 255) for each in colour)
