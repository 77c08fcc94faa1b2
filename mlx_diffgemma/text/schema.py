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
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..diffusion.automaton import (
    COMPILE_SECONDS,
    Alternation,
    Concat,
    Deadline,
    Machine,
    Pattern,
    PatternError,
    PatternTimeout,
    Repeat,
    compile_pattern,
)
from ..files import read_text
from .schema_characters import MOST_PARTS, Encoder, Inside, Spelled, json_text
from .schema_check import check_document, validators
from .schema_keywords import (
    ANNOTATIONS,
    BESIDE,
    BY_TYPE,
    CHECKED,
    FORMS,
    MOST_DEPTH,
    SCALARS,
    check_size,
    shown,
)
from .schema_keywords import Schema as Schema
from .schema_keywords import SchemaError as SchemaError
from .schema_numbers import any_number, within_bounds
from .schema_types import schema_of
from .vocabulary import Vocabulary

Made = TypeVar("Made")


def read_schema(path: Path) -> Schema:
    """Read a schema from a JSON file.

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
    """Read a schema from a JSON file; what is not supported is said before a model is loaded.

    Raises:
        SchemaError: as `read_schema` and `parse_schema`.
    """
    schema = read_schema(path)
    return _bounded(lambda limit: _parsed(schema, limit), math.inf)


def parse_schema(schema: Schema, deadline: float = math.inf) -> Pattern:
    """Read the pattern of a schema's documents, in characters, not yet in tokens.

    `deadline`, on the monotonic clock, counts where it is sooner than `COMPILE_SECONDS` from now.

    Raises:
        SchemaError: the schema is invalid, uses what is not supported, allows no document, is too
            large or too deep, or takes too long.
    """
    return _bounded(lambda limit: _Reader(schema, limit).pattern(), deadline)


@dataclass(frozen=True, eq=False)
class Compiled:
    """A schema with its automaton. It holds no arrays of MLX, so any thread may make it.

    `schema` has only what this module reads, with references replaced by what they name.
    """

    schema: Schema
    vocabulary: Vocabulary = field(repr=False)
    machine: Machine = field(repr=False)

    def check(self, document: str) -> None:
        """Check a finished document with a library, as far as `schema_check.CHECK_SECONDS` go.

        Raises:
            SchemaError: it is not JSON, or not valid: a defect of this module.
        """
        check_document(self.schema, document)


def compiled(
    schema: Schema | type | Parsed,
    vocabulary: Vocabulary,
    deadline: float = math.inf,
    check: Callable[[], None] | None = None,
) -> Compiled:
    """Compile a schema, or that of a type: the automaton of its documents, each followed by the end
    of the answer.

    Raises:
        SchemaError: as `parse_schema`, whose deadline this has, too; `check` is called now and
            then, and may raise something else.
    """

    def compile_(limit: Deadline) -> Compiled:
        read = schema if isinstance(schema, Parsed) else _parsed(schema, limit)
        pattern = Encoder(vocabulary, limit).encoded(read.pattern)
        machine = compile_pattern(vocabulary.answer(pattern), limit)
        _ = machine.shortest  # kept by the machine, so that the thread of MLX need not compute it
        return Compiled(read.schema, vocabulary, machine)

    return _bounded(compile_, deadline, check)


def _parsed(schema: Schema | type, limit: Deadline) -> Parsed:
    reader = _Reader(schema_of(schema), limit)
    pattern = reader.pattern()
    return Parsed(reader.resolved(), pattern)


def compile_schema(
    schema: Schema,
    vocabulary: Vocabulary,
    deadline: float = math.inf,
    check: Callable[[], None] | None = None,
) -> Machine:
    """Return the automaton alone; arguments and errors as in `compiled`."""
    return compiled(schema, vocabulary, deadline, check).machine


def _bounded(
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


class _Reader:
    """Reads schemas into patterns; `where` is the JSON pointer that errors name."""

    def __init__(self, root: Schema, deadline: Deadline):
        check_size(root)
        self._root = root
        self._deadline = deadline
        self._inside: list[str] = []
        self._depth = 0
        self._parts = 0
        # By target of a reference. What refers to it often is counted by `Encoder`.
        self._known: dict[str, Pattern] = {}
        self._resolved: dict[str, Schema] = {}
        self._validator = validators(deadline)

    def pattern(self) -> Pattern:
        """Return the pattern of the whole schema."""
        return self.value(self._root, "#")

    def resolved(self) -> Schema:
        """Return the schema with references replaced and only the keywords that are checked.

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
            kinds = [kind for kind, words in BY_TYPE.items() if words & rules.keys()][:1]
            kinds = kinds or list(SCALARS)
        kinds = [kinds] if isinstance(kinds, str) else list(kinds)
        self._only(rules, set().union(*(BY_TYPE[kind] for kind in kinds)), where, "supported")
        readers = {
            "object": self._object,
            "array": self._array,
            "string": self._string,
            "integer": self._number,
            "number": self._number,
            "boolean": lambda *_: Alternation((Spelled("true"), Spelled("false"))),
            "null": lambda *_: Spelled("null"),
        }
        if "number" in kinds and "integer" in kinds:
            kinds.remove("integer")
        options = [readers[kind](rules, where, kind) for kind in kinds]
        return options[0] if len(options) == 1 else Alternation(tuple(options))

    def _rules(self, schema: Any, where: str) -> dict[str, Any]:
        """Return the keywords of a schema that say what is valid, each of the form it must have."""
        if not isinstance(schema, dict):
            raise SchemaError(f"{where} must be a schema")
        for word, value in schema.items():
            if word in ("$id", "$schema") and where != "#":
                raise SchemaError(f"{where}: {word} inside of a schema is not supported")
            if word in FORMS and not FORMS[word][0](value):
                raise SchemaError(f"{where}: {word} must be {FORMS[word][1]}")
        return {word: value for word, value in schema.items() if word not in ANNOTATIONS}

    def _only(self, rules: dict[str, Any], known: Set[str], where: str, what: str) -> None:
        if unknown := sorted(rules.keys() - known):
            raise SchemaError(f"{where}: {shown(unknown[0])} is not {what}")

    def _reference(self, rules: dict[str, Any], where: str) -> Pattern:
        self._only(rules, {"$ref"}, where, "supported beside $ref")
        target = rules["$ref"]
        if target in self._inside:
            raise SchemaError(f"{where}: {shown(target)} contains itself, which is not supported")
        if target not in self._known:
            self._inside.append(target)
            self._known[target] = self.value(self._found(target, where), shown(target))
            self._inside.pop()
        return self._known[target]

    def _found(self, target: str, where: str) -> Any:
        """Find what a reference names, inside of this schema; nothing else is looked up."""
        found: Any = self._root
        if target != "#" and not target.startswith("#/"):
            raise SchemaError(f"{where}: $ref to {shown(target)} is not supported")
        for step in target.split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, dict) or step not in found:
                raise SchemaError(f"{where}: there is no {shown(target)}")
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
        rules = {word: value for word, value in schema.items() if word in CHECKED}
        if "properties" in rules:
            members = rules["properties"].items()
            rules["properties"] = {name: self._resolve(member) for name, member in members}
        if rules.get("maxItems") == 0:
            rules.pop("items", None)  # which is never read: no item can follow it
        if "items" in rules:
            rules["items"] = self._resolve(rules["items"])
        if "anyOf" in rules:
            rules["anyOf"] = [self._resolve(option) for option in rules["anyOf"]]
        return rules

    def _listed(self, rules: dict[str, Any], where: str) -> Pattern:
        """Return values by name, less those that the other keywords exclude."""
        word = "const" if "const" in rules else "enum"
        listed = [rules[word]] if word == "const" else rules[word]
        beside = {name: value for name, value in rules.items() if name != word}
        self._only(beside, BESIDE, where, "supported beside enum or const")
        self._count(len(listed))
        if beside:
            validator = self._validator(beside)
            listed = [value for value in listed if validator.is_valid(value)]
        if not listed:
            raise SchemaError(f"{where} allows nothing")
        return Alternation(tuple(dict.fromkeys(json_text(value) for value in listed)))

    def _object(self, rules: dict[str, Any], where: str, kind: str) -> Pattern:
        told = rules.get("properties") or rules.get("required")
        if not told and rules.get("additionalProperties", True) is True:
            return _any_object()
        properties: dict[str, Schema] = rules.get("properties", {})
        required = set(rules.get("required", []))
        if not isinstance(rules.get("additionalProperties", True), bool):
            raise SchemaError(f"{where}: additionalProperties with a schema is not supported")
        if missing := sorted(required - properties.keys()):
            missed = shown(missing[0])
            raise SchemaError(f"{where}: required {missed} is not among the properties")
        members = {
            name: Concat(
                (
                    Spelled(json_text(name).text + ":"),
                    self.value(schema, f"{where}/properties/{shown(name)}"),
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
            member = Concat((Spelled(","), members[name]))
            later.append(member if name in required else Alternation((member, Concat(()))))
        bodies: list[Pattern] = [
            Concat((members[names[i]], *later[i + 1 :], Spelled("}"))) for i in firsts
        ]
        if not required & set(names):
            bodies.append(Spelled("}"))
        if len(bodies) == 1:
            return Concat((Spelled("{"), bodies[0]))
        return Concat((Spelled("{"), Alternation(tuple(bodies))))

    def _array(self, rules: dict[str, Any], where: str, kind: str) -> Pattern:
        least = int(rules.get("minItems", 0))
        most = None if rules.get("maxItems") is None else int(rules["maxItems"])
        if most is not None and most < least:
            raise SchemaError(f"{where} allows nothing")
        empty = Spelled("[]")
        if most == 0:
            return empty
        items = rules.get("items", True)
        if items is False and not least:
            return empty
        item = self.value(items, f"{where}/items")
        more = Concat((Spelled(","), item))
        repeat = Repeat(more, max(least - 1, 0), None if most is None else most - 1)
        filled = Concat((Spelled("["), item, repeat, Spelled("]")))
        return filled if least else Alternation((empty, filled))

    def _string(self, rules: dict[str, Any], where: str, kind: str) -> Pattern:
        least = int(rules.get("minLength", 0))
        most = None if rules.get("maxLength") is None else int(rules["maxLength"])
        if most is not None and most < least:
            raise SchemaError(f"{where} allows nothing")
        return Concat((Spelled('"'), Inside(least, most), Spelled('"')))

    def _number(self, rules: dict[str, Any], where: str, kind: str) -> Pattern:
        options = within_bounds(rules, kind, self._count)
        if not options:
            raise SchemaError(f"{where} allows nothing")
        return Alternation(tuple(options))


def _any_object() -> Pattern:
    """Return the pattern of any object whose values are nested at most two deep."""
    string = Concat((Spelled('"'), Inside(0, None), Spelled('"')))
    name = Concat((Spelled('"'), Inside(1, None), Spelled('":')))
    words = (Spelled("true"), Spelled("false"), Spelled("null"))
    value: Pattern = Alternation((string, any_number(), *words))

    def several(item: Pattern, opening: str, closing: str) -> Pattern:
        more = Repeat(Concat((Spelled(","), item)), 0, None)
        inside = Alternation((Concat((item, more)), Spelled("")))
        return Concat((Spelled(opening), inside, Spelled(closing)))

    for _ in range(2):
        found = several(Concat((name, value)), "{", "}")
        value = Alternation((value, found, several(value, "[", "]")))
    return found
