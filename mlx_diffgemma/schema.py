"""JSON Schema -> the pattern of its documents, in tokens: what comes out is valid by construction.

Documents are compact (no spaces between tokens) with properties in the schema's order. The parts
that the schema leaves no choice about become single tokens; the denoising loop pins them.

Supported: type, properties, required, additionalProperties (true or false), enum, const, minLength,
maxLength, minimum, maximum, exclusiveMinimum, exclusiveMaximum, items, minItems, maxItems, anyOf,
and $ref to $defs or definitions that do not contain themselves. Anything else is refused by name.
"""

import json
import math
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Row
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from pathlib import Path
from typing import Any

from .automaton import (
    Choice,
    Graph,
    Machine,
    Pattern,
    PatternError,
    Repeat,
    Sequence,
    compile_pattern,
)
from .canvas import planned_start
from .config import GenerationConfig
from .denoise import Start
from .errors import Error
from .files import read_text
from .generation import Starts
from .model import DiffusionGemma
from .sampler import Draws
from .vocabulary import Vocabulary

Schema = Mapping[str, Any] | bool

# Parts of a pattern; references and optional members can make few lines of schema into very many.
MOST_PARTS = 200_000
# Digits of a number that its schema does not bound: within what every JSON reader keeps exactly.
MOST_DIGITS = 15
MOST_DECIMALS = 6
# Keywords that say nothing about what is valid.
_ANNOTATIONS = frozenset(
    "title description default examples deprecated readOnly writeOnly $schema $id $comment $defs "
    "definitions".split()
)
_BY_TYPE = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength"}),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "boolean": frozenset[str](),
    "null": frozenset[str](),
}
# What a value may be where the schema does not say its type.
_SCALARS = ("string", "number", "boolean", "null")


class SchemaError(Error):
    """A schema that cannot be read, or asks for something that is not supported."""


def read_schema(path: Path) -> Schema:
    """A schema from a JSON file.

    Raises:
        SchemaError: there is no such file, or it is not JSON.
    """
    try:
        return json.loads(read_text(path, SchemaError))
    except json.JSONDecodeError as error:
        raise SchemaError(f"{path} is not JSON: {error}") from None


def read_supported(path: Path) -> Schema:
    """A schema from a JSON file; what is not supported is said before a model is loaded.

    Raises:
        SchemaError: as `read_schema` and `parse_schema`.
    """
    schema = read_schema(path)
    parse_schema(schema)
    return schema


def parse_schema(schema: Schema) -> Pattern:
    """What the schema's documents look like, not yet in tokens.

    Raises:
        SchemaError: the schema is invalid, uses what is not supported, allows no document, or is
            too large or too deep.
    """
    try:
        _check(schema)
        return _Reader(schema).value(schema, "#")
    except RecursionError:
        raise SchemaError("the schema is nested too deeply") from None


def compile_schema(schema: Schema, vocabulary: Vocabulary) -> Machine:
    """The automaton of a schema's documents, each followed by the end of the answer.

    Raises:
        SchemaError: as `parse_schema`.
    """
    try:
        pattern = _Encoder(vocabulary).encoded(parse_schema(schema))
        return compile_pattern(vocabulary.answer(pattern))
    except PatternError as error:
        raise SchemaError(f"the schema is too large: {error}") from None
    except RecursionError:
        raise SchemaError("the schema is nested too deeply") from None


@dataclass(frozen=True, eq=False)
class Compiled:
    """A schema with its automaton. It holds no arrays of MLX, so any thread may make it."""

    schema: Schema
    vocabulary: Vocabulary
    machine: Machine


def compiled(schema: Schema, vocabulary: Vocabulary) -> Compiled:
    """A schema with its automaton.

    Raises:
        SchemaError: as `parse_schema`.
    """
    return Compiled(schema, vocabulary, compile_schema(schema, vocabulary))


def schema_starts(
    model: DiffusionGemma,
    schema: Compiled,
    prompt_tokens: int,
    config: GenerationConfig,
    draws: Draws,
) -> Starts:
    """Canvases that are, one after another, a document of the schema within the token budget.

    Raises:
        SchemaError: the shortest document is over the budget.
    """
    machine = schema.machine
    length = model.config.canvas_length
    room = (model.context - prompt_tokens) // length * length
    budget = min(config.max_new_tokens, room)
    if machine.shortest > budget:
        raise SchemaError(
            f"the shortest document of the schema has {machine.shortest} tokens, more than the "
            f"{budget} that may be written"
        )

    def start(generated: Row[int]) -> Start:
        states = machine.advance(frozenset([machine.first]), generated)
        plan = machine.plan(length, budget - len(generated), states)
        return planned_start([plan], schema.vocabulary, draws)

    return start


def validate(schema: Schema, document: str) -> None:
    """Check a finished document with the library that the schema was checked with.

    Raises:
        SchemaError: it is not JSON, or not valid: a defect of this module.
    """
    import jsonschema
    from referencing import Registry

    try:
        value = json.loads(document)
        # A registry of one's own: the library's default asks the network for what it does not know.
        kind = jsonschema.validators.validator_for(schema)
        kind(schema, registry=Registry()).validate(value)
    except ValueError as error:
        raise SchemaError(f"the document is not JSON: {error}") from None
    except jsonschema.ValidationError as error:
        raise SchemaError(f"the document is not valid: {error.message}") from None


def _check(schema: Schema) -> None:
    try:
        import jsonschema
    except ImportError:
        raise SchemaError(
            "schemas need the library jsonschema: pip install 'mlx-diffgemma[schema]'"
        ) from None
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise SchemaError("a schema is a JSON object")
    try:
        jsonschema.validators.validator_for(schema).check_schema(schema)
    except jsonschema.SchemaError as error:
        raise SchemaError(f"the schema is invalid at {error.json_path}: {error.message}") from None


class _Unencoded:
    """A pattern of characters, which `_encode` turns into one of tokens."""

    def build(self, graph: Graph, start: int) -> int:
        raise AssertionError("patterns of characters are encoded first")


@dataclass(frozen=True)
class _Spelled(_Unencoded):
    """This text; runs of it are encoded as one, as a tokenizer would."""

    text: str


@dataclass(frozen=True)
class _OneOf(_Unencoded):
    """One of these characters."""

    characters: str


@dataclass(frozen=True)
class _Inside(_Unencoded):
    """The inside of a string, by its number of characters."""

    least: int
    most: int | None


@dataclass
class _Encoder:
    """Turns patterns of characters into patterns of tokens."""

    vocabulary: Vocabulary
    count: int = 0

    def encoded(self, pattern: Pattern) -> Pattern:
        # Optional members stand in several options each, and so do the members inside of them.
        self.count += 1
        if self.count > MOST_PARTS:
            raise SchemaError(f"the schema is too large: it has over {MOST_PARTS:,} parts")
        match pattern:
            case _Spelled(text):
                return self.vocabulary.literal(text)
            case _OneOf(characters):
                return self.vocabulary.character(characters)
            case _Inside(least, most):
                return self.vocabulary.json_characters(least, most)
            case Sequence(parts):
                flat: list[Pattern] = []
                for part in _flat(parts):
                    last = flat[-1] if flat else None
                    if isinstance(part, _Spelled) and isinstance(last, _Spelled):
                        flat[-1] = _Spelled(last.text + part.text)
                    else:
                        flat.append(part)
                return Sequence(tuple(map(self.encoded, flat)))
            case Choice(options):
                return Choice(tuple(map(self.encoded, options)))
            case Repeat(part, least, most):
                return Repeat(self.encoded(part), least, most)
        return pattern


def _flat(parts: tuple[Pattern, ...]) -> Iterator[Pattern]:
    for part in parts:
        if isinstance(part, Sequence):
            yield from _flat(part.parts)
        else:
            yield part


def _dumps(value: Any) -> _Spelled:
    """JSON as documents have it. What is no character by itself is escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if not text.isprintable():
        text = json.dumps(value, separators=(",", ":"))
    return _Spelled(text)


class _Reader:
    """Reads schemas into patterns; `where` is the JSON pointer that errors name."""

    def __init__(self, root: Schema):
        self._root = root
        self._inside: list[str] = []
        self._parts = 0

    def _count(self, parts: int) -> None:
        self._parts += parts
        if self._parts > MOST_PARTS:
            raise SchemaError(f"the schema is too large: it has over {MOST_PARTS:,} parts")

    def value(self, schema: Schema, where: str) -> Pattern:
        self._count(1)
        if schema is False:
            raise SchemaError(f"{where} allows nothing")
        if schema is True or not isinstance(schema, dict):
            schema = {}
        if "$id" in schema and where != "#":
            raise SchemaError(f"{where}: $id inside of a schema is not supported")
        rules = {k: v for k, v in schema.items() if k not in _ANNOTATIONS}
        if "$ref" in rules:
            return self._reference(rules, where)
        if "const" in rules or "enum" in rules:
            return self._listed(schema, rules, where)
        if "anyOf" in rules:
            self._only(rules, {"anyOf"}, where, "supported beside anyOf")
            any_of = enumerate(rules["anyOf"])
            return Choice(tuple(self.value(s, f"{where}/anyOf/{i}") for i, s in any_of))
        kinds = rules.pop("type", None)
        if kinds is None:
            kinds = [kind for kind, words in _BY_TYPE.items() if words & rules.keys()][:1]
            kinds = kinds or list(_SCALARS)
        kinds = [kinds] if isinstance(kinds, str) else list(kinds)
        self._only(rules, set().union(*(_BY_TYPE[kind] for kind in kinds)), where, "supported")
        readers = {
            "object": self._object,
            "array": self._array,
            "string": self._string,
            "integer": self._number,
            "number": self._number,
            "boolean": lambda *_: Choice((_Spelled("true"), _Spelled("false"))),
            "null": lambda *_: _Spelled("null"),
        }
        if "number" in kinds and "integer" in kinds:
            kinds.remove("integer")
        options = [readers[kind](rules, where, kind) for kind in kinds]
        return options[0] if len(options) == 1 else Choice(tuple(options))

    def _only(self, rules: dict[str, Any], known: set[str], where: str, what: str) -> None:
        if unknown := sorted(rules.keys() - known):
            raise SchemaError(f"{where}: {unknown[0]} is not {what}")

    def _reference(self, rules: dict[str, Any], where: str) -> Pattern:
        self._only(rules, {"$ref"}, where, "supported beside $ref")
        target = rules["$ref"]
        if target in self._inside:
            raise SchemaError(f"{where}: {target} contains itself, which is not supported")
        found: Any = self._root
        if not target.startswith("#"):
            raise SchemaError(f"{where}: $ref to {target} is not supported")
        for step in target.removeprefix("#").split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, dict) or step not in found:
                raise SchemaError(f"{where}: there is no {target}")
            found = found[step]
        self._inside.append(target)
        pattern = self.value(found, target)
        self._inside.pop()
        return pattern

    def _listed(self, schema: Schema, rules: dict[str, Any], where: str) -> Pattern:
        """Values by name, less those that the other keywords exclude."""
        import jsonschema

        if "$ref" in json.dumps(schema):
            raise SchemaError(f"{where}: $ref beside enum or const is not supported")
        listed = [rules["const"]] if "const" in rules else rules["enum"]
        validator = jsonschema.validators.validator_for(self._root)(schema)
        valid = [value for value in listed if validator.is_valid(value)]
        if not valid:
            raise SchemaError(f"{where} allows nothing")
        return Choice(tuple(dict.fromkeys(_dumps(value) for value in valid)))

    def _open_object(self) -> Pattern:
        """Any object, whose values are nested at most two deep."""
        string = Sequence((_Spelled('"'), _Inside(0, None), _Spelled('"')))
        name = Sequence((_Spelled('"'), _Inside(1, None), _Spelled('":')))
        words = (_Spelled("true"), _Spelled("false"), _Spelled("null"))
        value: Pattern = Choice((string, self._any_number(), *words))

        def several(item: Pattern, opening: str, closing: str) -> Pattern:
            more = Repeat(Sequence((_Spelled(","), item)), 0, None)
            inside = Choice((Sequence((item, more)), _Spelled("")))
            return Sequence((_Spelled(opening), inside, _Spelled(closing)))

        for _ in range(2):
            found = several(Sequence((name, value)), "{", "}")
            value = Choice((value, found, several(value, "[", "]")))
        return found

    def _object(self, rules: dict[str, Any], where: str, kind: str) -> Pattern:
        told = rules.get("properties") or rules.get("required")
        if not told and rules.get("additionalProperties", True) is True:
            return self._open_object()
        properties: dict[str, Schema] = rules.get("properties", {})
        required = set(rules.get("required", []))
        if not isinstance(rules.get("additionalProperties", True), bool):
            raise SchemaError(f"{where}: additionalProperties with a schema is not supported")
        if missing := sorted(required - properties.keys()):
            raise SchemaError(f"{where}: required {missing[0]} is not among the properties")
        members = {
            name: Sequence(
                (
                    _Spelled(_dumps(name).text + ":"),
                    self.value(schema, f"{where}/properties/{name}"),
                )
            )
            for name, schema in properties.items()
            if schema is not False or name in required
        }
        names = list(members)
        # Before the first member there is no comma; which one is first is the model's choice when
        # those in front of it are optional.
        firsts = list(range(len(names)))
        if required:
            firsts = firsts[: 1 + min(names.index(name) for name in required)]
        self._count(len(firsts) * len(names))

        def rest(start: int) -> list[Pattern]:
            parts: list[Pattern] = []
            for name in names[start:]:
                member = Sequence((_Spelled(","), members[name]))
                parts.append(member if name in required else Choice((member, Sequence(()))))
            return parts

        bodies: list[Pattern] = [
            Sequence((members[names[i]], *rest(i + 1), _Spelled("}"))) for i in firsts
        ]
        if not required & set(names):
            bodies.append(_Spelled("}"))
        if len(bodies) == 1:
            return Sequence((_Spelled("{"), bodies[0]))
        return Sequence((_Spelled("{"), Choice(tuple(bodies))))

    def _array(self, rules: dict[str, Any], where: str, kind: str) -> Pattern:
        least = int(rules.get("minItems", 0))
        most = None if rules.get("maxItems") is None else int(rules["maxItems"])
        if most is not None and most < least:
            raise SchemaError(f"{where} allows nothing")
        empty = _Spelled("[]")
        if most == 0:
            return empty
        items = rules.get("items", True)
        if items is False and not least:
            return empty
        item = self.value(items, f"{where}/items")
        more = Sequence((_Spelled(","), item))
        repeat = Repeat(more, max(least - 1, 0), None if most is None else most - 1)
        filled = Sequence((_Spelled("["), item, repeat, _Spelled("]")))
        return filled if least else Choice((empty, filled))

    def _string(self, rules: dict[str, Any], where: str, kind: str) -> Pattern:
        least = int(rules.get("minLength", 0))
        most = None if rules.get("maxLength") is None else int(rules["maxLength"])
        if most is not None and most < least:
            raise SchemaError(f"{where} allows nothing")
        return Sequence((_Spelled('"'), _Inside(least, most), _Spelled('"')))

    def _number(self, rules: dict[str, Any], where: str, kind: str) -> Pattern:
        low, high = _bound(rules, "minimum"), _bound(rules, "maximum")
        edge_low = _bound(rules, "exclusiveMinimum")
        edge_high = _bound(rules, "exclusiveMaximum")
        limit = Decimal(10) ** MOST_DIGITS - 1
        options: list[Pattern] = []
        bounds = [b for b in (low, high, edge_low, edge_high) if b is not None]
        decimals = [0]
        if kind == "number":
            finest = max([-int(b.as_tuple().exponent) for b in bounds], default=0)
            if not bounds:
                return self._any_number()
            decimals += sorted({1, 2, max(finest, 1), finest + 1})
        for places in decimals:
            unit = Decimal(10) ** -places
            # In units of the last decimal place the bounds are whole numbers, both included.
            floor = max(_up(low, unit), _above(edge_low, unit), -int(limit / unit))
            ceiling = min(_down(high, unit), _below(edge_high, unit), int(limit / unit))
            if floor <= ceiling:
                options += self._between(floor, ceiling, places)
        if not options:
            raise SchemaError(f"{where} allows nothing")
        return Choice(tuple(options))

    def _any_number(self) -> Pattern:
        digit = _OneOf("0123456789")
        whole = Choice(
            (
                _Spelled("0"),
                Sequence((_OneOf("123456789"), Repeat(digit, 0, MOST_DIGITS - 1))),
            )
        )
        sign = Choice((Sequence(()), _Spelled("-")))
        decimals = Sequence((_Spelled("."), digit, Repeat(digit, 0, MOST_DECIMALS - 1)))
        return Sequence((sign, whole, Choice((Sequence(()), decimals))))

    def _between(self, low: int, high: int, places: int) -> list[Pattern]:
        """The numbers low..high, in units of 10 ** -places, with just as many decimals."""
        options: list[Pattern] = []
        if low < 0:
            negative = self._digits(max(1, -high), -low, places)
            options += [Sequence((_Spelled("-"), part)) for part in negative]
        if high >= 0:
            options += self._digits(max(0, low), high, places)
        return options

    def _digits(self, low: int, high: int, places: int) -> Iterator[Pattern]:
        for classes in _ranges(low, high, places + 1):
            parts: list[Pattern] = []
            for i, digits in enumerate(classes):
                if places and i == len(classes) - places:
                    parts.append(_Spelled("."))
                parts.append(_Spelled(digits) if len(digits) == 1 else _OneOf(digits))
            yield Sequence(tuple(parts))


def _bound(rules: dict[str, Any], name: str) -> Decimal | None:
    value = rules.get(name)
    if isinstance(value, bool):
        raise SchemaError(f"{name} as true or false (draft 4) is not supported")
    if isinstance(value, float) and not math.isfinite(value):
        raise SchemaError(f"{name} is no number")
    return None if value is None else Decimal(str(value))


def _up(bound: Decimal | None, unit: Decimal) -> int:
    return -(10**40) if bound is None else int((bound / unit).to_integral_value(ROUND_CEILING))


def _down(bound: Decimal | None, unit: Decimal) -> int:
    return 10**40 if bound is None else int((bound / unit).to_integral_value(ROUND_FLOOR))


def _above(bound: Decimal | None, unit: Decimal) -> int:
    return -(10**40) if bound is None else _down(bound, unit) + 1


def _below(bound: Decimal | None, unit: Decimal) -> int:
    return 10**40 if bound is None else _up(bound, unit) - 1


def _ranges(low: int, high: int, width: int) -> Iterator[list[str]]:
    """low..high as lists of digit classes, of at least `width` digits: 13..99 -> 1[3-9], [2-9]x."""
    for digits in range(max(width, len(str(low))), max(width, len(str(high))) + 1):
        first = max(low, 10 ** (digits - 1) if digits > width else 0)
        last = min(high, 10**digits - 1)
        if first <= last:
            yield from _same_width(str(first).zfill(digits), str(last).zfill(digits))


def _same_width(low: str, high: str) -> Iterator[list[str]]:
    if not low:
        yield []
        return
    if low[0] == high[0]:
        yield from ([low[0], *rest] for rest in _same_width(low[1:], high[1:]))
        return
    nines, zeros = "9" * (len(low) - 1), "0" * (len(low) - 1)
    first, last = int(low[0]), int(high[0])
    if low[1:] != zeros:
        yield from ([low[0], *rest] for rest in _same_width(low[1:], nines))
        first += 1
    if high[1:] != nines:
        last -= 1
    if first <= last:
        yield ["0123456789"[first : last + 1], *["0123456789"] * (len(low) - 1)]
    if high[1:] != nines:
        yield from ([high[0], *rest] for rest in _same_width(zeros, high[1:]))
