"""A text with holes: `{{}}`, `{{name}}`, `{{name:12}}`, `{{name:int}}`, `{{name:a|b|c}}`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal as Lit

from ..arguments import shown
from ..errors import Error

# What may be a hole, and what it may be called. One expression for both takes time that grows with
# the square of a run of spaces, or its cube.
_BRACES = re.compile(r"(\\?)\{\{([^{}]*)\}\}")

_NAME = re.compile(r"[^\W\d]\w*")

MOST_HOLES = 1000

MOST_OPTIONS = 4096  # of all holes: each is a path of the automaton that a canvas follows

NO_HOLE = "the template has no hole such as {{}} or {{name}}"

MOST_DIGITS = 6  # of a number of tokens; no canvas has a million


class TemplateError(Error):
    """A template that cannot be filled."""


@dataclass(frozen=True)
class Hole:
    """A gap in a text: of `tokens` tokens, at `most` as many, or as many as fit best.

    With `line` there is no line break in it.
    """

    name: str
    kind: Lit["text", "int", "choice"] = "text"
    tokens: int | None = None
    most: int | None = None
    options: tuple[str, ...] = ()
    line: bool = False


def parse_template(template: str) -> list[str | Hole]:
    """Return texts and holes in turn. `{{}}`, `{{name}}`, `{{name:12}}` (tokens), `{{name:int}}`,
    `{{name:a|b|c}}` (one of these); `\\{{` is no hole.

    Raises:
        TemplateError: no hole, two of one name, or a hole that makes no sense.
    """
    parts: list[str | Hole] = []
    given, position, options = "", 0, 0
    names: set[str] = set()
    for found in _BRACES.finditer(template):
        escaped, inside = found.groups()
        name, _, spec = (part.strip() for part in inside.partition(":"))
        if name and not _NAME.fullmatch(name):
            continue
        given += template[position : found.start()]
        position = found.end()
        if escaped:
            given += found.group()[1:]
            continue
        if given:
            parts.append(given)
        given = ""
        hole = _hole(name or str(len(names) + 1), spec, found.group())
        parts.append(hole)
        if hole.name in names:
            raise TemplateError(f"two holes are called {short(hole.name)}")
        options += len(hole.options)
        if options > MOST_OPTIONS:
            raise TemplateError(f"the template's holes have more than {MOST_OPTIONS} options")
        names.add(hole.name)
        if len(names) > MOST_HOLES:
            raise TemplateError(f"the template has more than {MOST_HOLES} holes")
    if given + template[position:]:
        parts.append(given + template[position:])
    if not names:
        raise TemplateError(NO_HOLE)
    return parts


def check_parts(parts: Sequence[object]) -> None:
    """Refuse what `parse_template` would not have given.

    Raises:
        TemplateError: a part is neither text nor hole, there is no hole, or two have one name.
    """
    names: set[str] = set()
    for part in parts:
        if isinstance(part, Hole):
            if part.name in names:
                raise TemplateError(f"two holes are called {short(part.name)}")
            names.add(part.name)
        elif not isinstance(part, str):
            raise TemplateError(f"a template's parts are texts and holes, not {shown(part)}")
    if not names:
        raise TemplateError(NO_HOLE)


def short(written: str) -> str:
    return written if len(written) <= 60 else f"{written[:60]}..."


def _hole(name: str, spec: str, written: str) -> Hole:
    if not spec:
        return Hole(name)
    if spec == "int":
        return Hole(name, "int")
    if "|" in spec:
        options = tuple(dict.fromkeys(option.strip() for option in spec.split("|")))
        if "" in options:
            raise TemplateError(f"{short(written)} has an empty option")
        return Hole(name, "choice", options=options)
    if spec.isdecimal() and len(spec) <= MOST_DIGITS and int(spec) > 0:
        return Hole(name, tokens=int(spec))
    raise TemplateError(
        f"{short(written)}: after the colon stands a number of tokens of at most {MOST_DIGITS} "
        "digits, int, or a|b|c"
    )
