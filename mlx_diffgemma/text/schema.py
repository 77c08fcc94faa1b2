"""JSON Schema -> the pattern of its documents, in tokens: what comes out is valid by construction.

Documents are compact (no spaces between tokens) with properties in the schema's order. The parts
that the schema leaves no choice about become single tokens; the denoising loop pins them.

Supported: type, properties, required, additionalProperties (true or false), enum, const, minLength,
maxLength, minimum, maximum, exclusiveMinimum, exclusiveMaximum, items, minItems, maxItems, anyOf,
and $ref to $defs or definitions that do not contain themselves. Anything else is refused by name.

A schema may come from anybody. Its size is bounded before anything reads it, what it makes is
bounded while it is read, and all of it has a deadline. Nothing outside of it is ever looked up: the
library that checks values gets the keywords above, less $ref, and no others.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from pathlib import Path
from typing import Any, TypeVar

from ..diffusion.automaton import (
    COMPILE_SECONDS,
    Alternation,
    Concat,
    Deadline,
    Graph,
    Machine,
    Pattern,
    PatternError,
    PatternTimeout,
    Repeat,
    compile_pattern,
)
from ..errors import Error
from ..files import read_text
from .vocabulary import SHOWN, Vocabulary

Schema = Mapping[str, Any] | bool

Made = TypeVar("Made")

# Values in a schema (objects, lists, texts, numbers), several times what the largest in use have.
MOST_NODES = 20_000

# Characters of all its names and texts together.
MOST_CHARACTERS = 200_000

# Levels inside of each other, in JSON and through references: far from Python's limit of calls.
MOST_DEPTH = 128

# Digits of a whole number: what the largest double has. Python refuses to write over 4,300.
LONGEST_NUMBER = 309

# Parts of a pattern; references and optional members can make few lines of schema into very many.
MOST_PARTS = 200_000

# Characters that follow each other without a choice. They reach the tokenizer in one call, which
# cannot be interrupted and keeps other threads waiting: about 0.1 s with a large vocabulary.
LONGEST_LITERAL = 20_000

# Seconds to check a finished document. It is valid by construction: what is not checked by then
# would only tell of a defect of this module, and others wait meanwhile.
CHECK_SECONDS = 0.5

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

# Beside enum or const: what is checked in one look, and holds no further schema.
_BESIDE = frozenset({"type", "enum", "minItems", "maxItems"}).union(
    *(_BY_TYPE[kind] for kind in ("string", "number"))
)

# What the library checks values by; $ref is resolved before.
_CHECKED = frozenset({"type", "enum", "const", "anyOf"}).union(*_BY_TYPE.values())

# Dialects that read the keywords above alike; never fetched.
_DIALECTS = frozenset(
    f"json-schema.org/{dialect}schema"
    for dialect in ("", "draft-04/", "draft-06/", "draft-07/", "draft/2019-09/", "draft/2020-12/")
)


def _is_schema(value: Any) -> bool:
    return isinstance(value, dict | bool)


def _is_size(value: Any) -> bool:
    if isinstance(value, float):
        return value >= 0 and value.is_integer()
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_type(value: Any) -> bool:
    if isinstance(value, str):
        return value in _BY_TYPE
    return _is_names(value) and bool(value) and all(kind in _BY_TYPE for kind in value)


def _is_names(value: Any) -> bool:
    return (
        isinstance(value, list)
        and all(isinstance(name, str) for name in value)
        and len(set(value)) == len(value)
    )


def _is_dialect(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    return value.removesuffix("#").partition("://")[2] in _DIALECTS


# What a keyword's value must be.
_FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "$schema": (_is_dialect, "one of json-schema.org's drafts from 4 to 2020-12"),
    "$id": (lambda value: isinstance(value, str), "a text"),
    "$ref": (lambda value: isinstance(value, str), "a text"),
    "type": (_is_type, f"one of {', '.join(_BY_TYPE)}, or a list of some"),
    "enum": (lambda value: isinstance(value, list), "a list"),
    "anyOf": (
        lambda value: isinstance(value, list) and bool(value) and all(map(_is_schema, value)),
        "a list of schemas",
    ),
    "properties": (
        lambda value: isinstance(value, dict) and all(map(_is_schema, value.values())),
        "an object of schemas",
    ),
    "required": (_is_names, "a list of distinct names"),
    "additionalProperties": (_is_schema, "true, false or a schema"),
    "items": (_is_schema, "a schema"),
    **dict.fromkeys(
        ("minItems", "maxItems", "minLength", "maxLength"),
        (_is_size, "a whole number, 0 or more"),
    ),
    **dict.fromkeys(
        sorted(_BY_TYPE["number"]),
        (_is_number, "a number; true and false (draft 4) are not supported"),
    ),
}


class SchemaError(Error):
    """A schema that cannot be read, or asks for something that is not supported."""


def read_schema(path: Path) -> Schema:
    """A schema from a JSON file.

    Raises:
        SchemaError: there is no such file, or it is not JSON.
    """
    try:
        return json.loads(read_text(path, SchemaError))
    except ValueError as error:  # also a number of more digits than Python reads
        raise SchemaError(f"{path} is not JSON: {error}") from None
    except RecursionError:
        raise SchemaError(f"{path} is nested too deeply") from None


@dataclass(frozen=True, eq=False)
class Parsed:
    """A schema in which nothing is unsupported, and what its documents look like.

    `schema` has only what this module reads, with references replaced by what they name.
    """

    schema: Schema
    pattern: Pattern


def read_supported(path: Path) -> Parsed:
    """A schema from a JSON file; what is not supported is said before a model is loaded.

    Raises:
        SchemaError: as `read_schema` and `parse_schema`.
    """
    schema = read_schema(path)

    def parse(limit: Deadline) -> Parsed:
        reader = _Reader(schema, limit)
        pattern = reader.pattern()
        return Parsed(reader.resolved(), pattern)

    return _guarded(parse, math.inf)


def parse_schema(schema: Schema, deadline: float = math.inf) -> Pattern:
    """What the schema's documents look like, not yet in tokens.

    `deadline`, on the monotonic clock, counts where it is sooner than `COMPILE_SECONDS` from now.

    Raises:
        SchemaError: the schema is invalid, uses what is not supported, allows no document, is too
            large or too deep, or takes too long.
    """
    return _guarded(lambda limit: _Reader(schema, limit).pattern(), deadline)


def compile_schema(
    schema: Schema | Parsed,
    vocabulary: Vocabulary,
    deadline: float = math.inf,
    check: Callable[[], None] | None = None,
) -> Machine:
    """The automaton of a schema's documents, each followed by the end of the answer.

    Raises:
        SchemaError: as `parse_schema`, whose deadline this has, too.
    """

    def compile_(limit: Deadline) -> Machine:
        read = schema.pattern if isinstance(schema, Parsed) else _Reader(schema, limit).pattern()
        pattern = _Encoder(vocabulary, limit).encoded(read)
        machine = compile_pattern(vocabulary.answer(pattern), limit)
        _ = machine.shortest  # kept by the machine, so that the thread of MLX need not compute it
        return machine

    return _guarded(compile_, deadline, check)


@dataclass(frozen=True, eq=False)
class Compiled:
    """A schema with its automaton. It holds no arrays of MLX, so any thread may make it.

    `schema` has only what this module reads, with references replaced by what they name.
    """

    schema: Schema
    vocabulary: Vocabulary
    machine: Machine

    def check(self, document: str) -> None:
        """Check a finished document with a library, as far as `CHECK_SECONDS` go.

        Raises:
            SchemaError: it is not JSON, or not valid: a defect of this module.
        """
        try:
            validator = _library(Deadline.within(CHECK_SECONDS))(self.schema)
            problem = next(validator.iter_errors(json.loads(document)), None)
        except ValueError as error:
            raise SchemaError(f"the document is not JSON: {error}") from None
        except PatternTimeout:
            return
        if problem is not None:
            raise SchemaError(f"the document is not valid: {_shown(problem.message)}")


def compiled(
    schema: Schema | Parsed,
    vocabulary: Vocabulary,
    deadline: float = math.inf,
    check: Callable[[], None] | None = None,
) -> Compiled:
    """A schema with its automaton.

    Raises:
        SchemaError: as `parse_schema`, whose deadline this has, too; `check` is called now and
            then, and may raise something else.
    """
    machine = compile_schema(schema, vocabulary, deadline, check)
    if isinstance(schema, Parsed):
        return Compiled(schema.schema, vocabulary, machine)
    resolved = _guarded(lambda limit: _Reader(schema, limit).resolved(), deadline, check)
    return Compiled(resolved, vocabulary, machine)


def _guarded(
    work: Callable[[Deadline], Made], latest: float, check: Callable[[], None] | None = None
) -> Made:
    """Do the work within `COMPILE_SECONDS`, or until `latest`; its failures are a SchemaError."""
    limit = Deadline.within(COMPILE_SECONDS, latest, check)
    try:
        return work(limit)
    except PatternTimeout:
        raise SchemaError(
            f"compiling the schema took longer than {limit.seconds:.3g} seconds"
        ) from None
    except PatternError as error:
        raise SchemaError(f"the schema is too large: {error}") from None
    except RecursionError:
        raise SchemaError("the schema is nested too deeply") from None


def _library(deadline: Deadline) -> Callable[[Schema], Any]:
    """What makes validators that know the keywords of `_CHECKED`, given schemas of only those.

    Each keyword looks at the clock first. Identifiers, references, patterns and formats mean
    nothing to these validators, and their registry cannot fetch.
    """
    try:
        import jsonschema
        from referencing import Registry
    except ImportError:
        raise SchemaError(
            "schemas need the library jsonschema: pip install 'mlx-diffgemma[schema]'"
        ) from None
    known: Any = jsonschema.Draft202012Validator

    def timed(keyword: Callable[..., Any]) -> Callable[..., Any]:
        def check(*given: Any) -> Any:
            deadline.check()
            return keyword(*given)

        return check

    validators: Any = {word: timed(known.VALIDATORS[word]) for word in _CHECKED}
    kind = jsonschema.validators.create(
        meta_schema={}, validators=validators, type_checker=known.TYPE_CHECKER
    )
    return lambda schema: kind(schema, registry=Registry())


def _check_size(schema: Schema) -> None:
    """Refuse what is too large to be read, or no JSON; the cost is bounded whatever it is."""
    if not _is_schema(schema):
        raise SchemaError("a schema is a JSON object")
    nodes = characters = 0
    ahead: list[tuple[Any, int]] = [(schema, 1)]
    while ahead:
        value, depth = ahead.pop()
        nodes += 1
        if depth > MOST_DEPTH:
            raise SchemaError(f"the schema is nested too deeply: over {MOST_DEPTH} levels")
        inside = len(value) if isinstance(value, dict | list) else 0
        if nodes + len(ahead) + inside > MOST_NODES:
            raise SchemaError(f"the schema is too large: it has over {MOST_NODES:,} values")
        _check_value(value)
        if isinstance(value, str):
            characters += len(value)
        elif isinstance(value, dict):
            characters += sum(map(len, value))
            ahead.extend((part, depth + 1) for part in value.values())
        elif isinstance(value, list):
            ahead.extend((part, depth + 1) for part in value)
        if characters > MOST_CHARACTERS:
            raise SchemaError(
                f"the schema is too large: its texts have over {MOST_CHARACTERS:,} characters"
            )


def _check_value(value: Any) -> None:
    """Refuse what JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        raise SchemaError(f"the schema holds {value}, which is no number")
    # Bits, since writing so many digits is what is slow, or refused.
    if isinstance(value, int) and value.bit_length() > LONGEST_NUMBER * math.log2(10):
        raise SchemaError(f"the schema holds a number of over {LONGEST_NUMBER} digits")
    if value is not None and not isinstance(value, dict | list | str | int | float):
        raise SchemaError(f"the schema holds a {type(value).__name__}, which is not JSON")
    if isinstance(value, dict) and not all(isinstance(name, str) for name in value):
        raise SchemaError("the schema holds a name that is no text, which is not JSON")


def _shown(text: str) -> str:
    """A text of a schema as errors repeat it: short, and such as every encoding can write."""
    start = text[: SHOWN + 1]
    if not start.isprintable():
        start = start.encode("unicode_escape").decode()
    return start if len(start) <= SHOWN else start[: SHOWN - 3] + "..."


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
    """Turns patterns of characters into patterns of tokens; what stands in several is made once."""

    vocabulary: Vocabulary
    deadline: Deadline
    count: int = 0
    _literals: dict[str, Pattern] = field(default_factory=dict)
    # By identity: the pattern, what it became, and its parts.
    _made: dict[int, tuple[Pattern, Pattern, int]] = field(default_factory=dict)

    def encoded(self, pattern: Pattern) -> Pattern:
        self.deadline.check()
        known = self._made.get(id(pattern))
        if known is not None:
            self._add(known[2])
            return known[1]
        before = self.count
        self._add(1)
        made = self._encode(pattern)
        self._made[id(pattern)] = pattern, made, self.count - before
        return made

    def _add(self, parts: int) -> None:
        # Optional members stand in several options each, and so do the members inside of them.
        self.count += parts
        if self.count > MOST_PARTS:
            raise SchemaError(f"the schema is too large: it has over {MOST_PARTS:,} parts")

    def _encode(self, pattern: Pattern) -> Pattern:
        match pattern:
            case _Spelled(text):
                return self._literal(text)
            case _OneOf(characters):
                return self.vocabulary.character(characters)
            case _Inside(least, most):
                return self.vocabulary.json_characters(least, most)
            case Concat(parts):
                return Concat(tuple(map(self.encoded, _merged(parts))))
            case Alternation(options):
                return Alternation(tuple(map(self.encoded, options)))
            case Repeat(part, least, most):
                return Repeat(self.encoded(part), least, most)
        return pattern

    def _literal(self, text: str) -> Pattern:
        if text not in self._literals:
            if len(text) > LONGEST_LITERAL:
                raise SchemaError(
                    f"the schema is too large: over {LONGEST_LITERAL:,} characters follow each "
                    "other without a choice"
                )
            self._literals[text] = self.vocabulary.literal(text)
        return self._literals[text]


def _merged(parts: tuple[Pattern, ...]) -> list[Pattern]:
    """The parts, with texts that follow each other as one."""
    joined: list[Pattern] = []
    texts: list[str] = []
    for part in (*_flat(parts), None):
        if isinstance(part, _Spelled):
            texts.append(part.text)
            continue
        if texts:
            joined.append(_Spelled("".join(texts)))
            texts = []
        if part is not None:
            joined.append(part)
    return joined


def _flat(parts: tuple[Pattern, ...]) -> Iterator[Pattern]:
    for part in parts:
        if isinstance(part, Concat):
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

    def __init__(self, root: Schema, deadline: Deadline):
        _check_size(root)
        self._root = root
        self._deadline = deadline
        self._inside: list[str] = []
        self._depth = 0
        self._parts = 0
        # By target of a reference. What refers to it often is counted by `_Encoder`.
        self._known: dict[str, Pattern] = {}
        self._resolved: dict[str, Schema] = {}
        self._validator = _library(deadline)

    def pattern(self) -> Pattern:
        """The pattern of the whole schema."""
        return self.value(self._root, "#")

    def resolved(self) -> Schema:
        """The schema with references replaced and only keywords that the library is to check.

        For a schema that `pattern` has read.
        """
        return self._resolve(self._root)

    def _count(self, parts: int) -> None:
        self._deadline.check()
        self._parts += parts
        if self._parts > MOST_PARTS:
            raise SchemaError(f"the schema is too large: it has over {MOST_PARTS:,} parts")

    def value(self, schema: Schema, where: str) -> Pattern:
        self._count(1)
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise SchemaError(f"the schema is nested too deeply: over {MOST_DEPTH} levels")
        pattern = self._value(schema, where)
        self._depth -= 1
        return pattern

    def _value(self, schema: Schema, where: str) -> Pattern:
        if schema is False:
            raise SchemaError(f"{where} allows nothing")
        rules = {} if schema is True else self._rules(schema, where)
        if "$ref" in rules:
            return self._reference(rules, where)
        if "const" in rules or "enum" in rules:
            return self._listed(rules, where)
        if "anyOf" in rules:
            self._only(rules, {"anyOf"}, where, "supported beside anyOf")
            any_of = enumerate(rules["anyOf"])
            return Alternation(tuple(self.value(s, f"{where}/anyOf/{i}") for i, s in any_of))
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
            "boolean": lambda *_: Alternation((_Spelled("true"), _Spelled("false"))),
            "null": lambda *_: _Spelled("null"),
        }
        if "number" in kinds and "integer" in kinds:
            kinds.remove("integer")
        options = [readers[kind](rules, where, kind) for kind in kinds]
        return options[0] if len(options) == 1 else Alternation(tuple(options))

    def _rules(self, schema: Any, where: str) -> dict[str, Any]:
        """The keywords of a schema that say what is valid, each of the form it must have."""
        if not isinstance(schema, dict):
            raise SchemaError(f"{where} must be a schema")
        for word, value in schema.items():
            if word in ("$id", "$schema") and where != "#":
                raise SchemaError(f"{where}: {word} inside of a schema is not supported")
            if word in _FORMS and not _FORMS[word][0](value):
                raise SchemaError(f"{where}: {word} must be {_FORMS[word][1]}")
        return {word: value for word, value in schema.items() if word not in _ANNOTATIONS}

    def _only(self, rules: dict[str, Any], known: Set[str], where: str, what: str) -> None:
        if unknown := sorted(rules.keys() - known):
            raise SchemaError(f"{where}: {_shown(unknown[0])} is not {what}")

    def _reference(self, rules: dict[str, Any], where: str) -> Pattern:
        self._only(rules, {"$ref"}, where, "supported beside $ref")
        target = rules["$ref"]
        if target in self._inside:
            raise SchemaError(f"{where}: {_shown(target)} contains itself, which is not supported")
        if target not in self._known:
            self._inside.append(target)
            self._known[target] = self.value(self._found(target, where), _shown(target))
            self._inside.pop()
        return self._known[target]

    def _found(self, target: str, where: str) -> Any:
        """What a reference names, inside of this schema; nothing else is looked up."""
        found: Any = self._root
        if target != "#" and not target.startswith("#/"):
            raise SchemaError(f"{where}: $ref to {_shown(target)} is not supported")
        for step in target.split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, dict) or step not in found:
                raise SchemaError(f"{where}: there is no {_shown(target)}")
            found = found[step]
        return found

    def _resolve(self, schema: Schema) -> Schema:
        self._deadline.check()
        if not isinstance(schema, dict):
            return schema
        target = schema.get("$ref")
        if target is not None:
            if target not in self._resolved:
                self._resolved[target] = self._resolve(self._found(target, "#"))
            return self._resolved[target]
        rules = {word: value for word, value in schema.items() if word in _CHECKED}
        if "properties" in rules:
            members = rules["properties"].items()
            rules["properties"] = {name: self._resolve(member) for name, member in members}
        if rules.get("maxItems") == 0:
            rules.pop("items", None)  # nobody has read it
        if "items" in rules:
            rules["items"] = self._resolve(rules["items"])
        if "anyOf" in rules:
            rules["anyOf"] = [self._resolve(option) for option in rules["anyOf"]]
        return rules

    def _listed(self, rules: dict[str, Any], where: str) -> Pattern:
        """Values by name, less those that the other keywords exclude."""
        word = "const" if "const" in rules else "enum"
        listed = [rules[word]] if word == "const" else rules[word]
        beside = {name: value for name, value in rules.items() if name != word}
        self._only(beside, _BESIDE, where, "supported beside enum or const")
        self._count(len(listed))
        if beside:
            validator = self._validator(beside)
            listed = [value for value in listed if validator.is_valid(value)]
        if not listed:
            raise SchemaError(f"{where} allows nothing")
        return Alternation(tuple(dict.fromkeys(_dumps(value) for value in listed)))

    def _open_object(self) -> Pattern:
        """Any object, whose values are nested at most two deep."""
        string = Concat((_Spelled('"'), _Inside(0, None), _Spelled('"')))
        name = Concat((_Spelled('"'), _Inside(1, None), _Spelled('":')))
        words = (_Spelled("true"), _Spelled("false"), _Spelled("null"))
        value: Pattern = Alternation((string, self._any_number(), *words))

        def several(item: Pattern, opening: str, closing: str) -> Pattern:
            more = Repeat(Concat((_Spelled(","), item)), 0, None)
            inside = Alternation((Concat((item, more)), _Spelled("")))
            return Concat((_Spelled(opening), inside, _Spelled(closing)))

        for _ in range(2):
            found = several(Concat((name, value)), "{", "}")
            value = Alternation((value, found, several(value, "[", "]")))
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
            missed = _shown(missing[0])
            raise SchemaError(f"{where}: required {missed} is not among the properties")
        members = {
            name: Concat(
                (
                    _Spelled(_dumps(name).text + ":"),
                    self.value(schema, f"{where}/properties/{_shown(name)}"),
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
            firsts = firsts[: 1 + next(i for i, name in enumerate(names) if name in required)]
        self._count(len(firsts) * len(names))
        later: list[Pattern] = []
        for name in names:
            member = Concat((_Spelled(","), members[name]))
            later.append(member if name in required else Alternation((member, Concat(()))))
        bodies: list[Pattern] = [
            Concat((members[names[i]], *later[i + 1 :], _Spelled("}"))) for i in firsts
        ]
        if not required & set(names):
            bodies.append(_Spelled("}"))
        if len(bodies) == 1:
            return Concat((_Spelled("{"), bodies[0]))
        return Concat((_Spelled("{"), Alternation(tuple(bodies))))

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
        more = Concat((_Spelled(","), item))
        repeat = Repeat(more, max(least - 1, 0), None if most is None else most - 1)
        filled = Concat((_Spelled("["), item, repeat, _Spelled("]")))
        return filled if least else Alternation((empty, filled))

    def _string(self, rules: dict[str, Any], where: str, kind: str) -> Pattern:
        least = int(rules.get("minLength", 0))
        most = None if rules.get("maxLength") is None else int(rules["maxLength"])
        if most is not None and most < least:
            raise SchemaError(f"{where} allows nothing")
        return Concat((_Spelled('"'), _Inside(least, most), _Spelled('"')))

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
        return Alternation(tuple(options))

    def _any_number(self) -> Pattern:
        digit = _OneOf("0123456789")
        whole = Alternation(
            (
                _Spelled("0"),
                Concat((_OneOf("123456789"), Repeat(digit, 0, MOST_DIGITS - 1))),
            )
        )
        sign = Alternation((Concat(()), _Spelled("-")))
        decimals = Concat((_Spelled("."), digit, Repeat(digit, 0, MOST_DECIMALS - 1)))
        return Concat((sign, whole, Alternation((Concat(()), decimals))))

    def _between(self, low: int, high: int, places: int) -> list[Pattern]:
        """The numbers low..high, in units of 10 ** -places, with just as many decimals."""
        options: list[Pattern] = []
        if low < 0:
            negative = self._digits(max(1, -high), -low, places)
            options += [Concat((_Spelled("-"), part)) for part in negative]
        if high >= 0:
            options += self._digits(max(0, low), high, places)
        return options

    def _digits(self, low: int, high: int, places: int) -> Iterator[Pattern]:
        for classes in _ranges(low, high, places + 1):
            self._count(len(classes))
            parts: list[Pattern] = []
            for i, digits in enumerate(classes):
                if places and i == len(classes) - places:
                    parts.append(_Spelled("."))
                parts.append(_Spelled(digits) if len(digits) == 1 else _OneOf(digits))
            yield Concat(tuple(parts))


def _bound(rules: dict[str, Any], name: str) -> Decimal | None:
    value = rules.get(name)
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
