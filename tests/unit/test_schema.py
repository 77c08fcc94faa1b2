"""Documents that follow a schema every time, also from a model that knows nothing."""

import itertools
import json
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import mlx.core as mx
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from random_model import untrained
from slow import best_canvas

from mlx_diffgemma import DiffusionGemma, Tokenizer, generate, stream_generate
from mlx_diffgemma.checkpoint.load import EMBEDDED
from mlx_diffgemma.diffusion.automaton import Repeat
from mlx_diffgemma.diffusion.draws import SeededDraws
from mlx_diffgemma.diffusion.plans import Plans
from mlx_diffgemma.tasks.canvases import Committed, generate_tokens
from mlx_diffgemma.tasks.request import Done
from mlx_diffgemma.tasks.starts import document
from mlx_diffgemma.text.schema import (
    SchemaError,
    compile_schema,
    compiled,
    parse_schema,
    read_schema,
)
from mlx_diffgemma.text.schema_numbers import digit_ranges
from mlx_diffgemma.text.vocabulary import Vocabulary

TOKENIZER = Tokenizer.from_directory(EMBEDDED)
MODELS = [untrained(TOKENIZER.vocab_size, 64, seed=seed) for seed in range(4)]
RANDOM = MODELS[0]
VOCABULARY = Vocabulary(RANDOM, TOKENIZER)

NAMES = st.sampled_from(["a", "b", "name", "größe", 'qu"ote', "z\n", "tag", "list", ""])
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-1000, 1000),
        st.sampled_from([0.5, -2.25, 1e9, "yes", "no", "", "Ünïcode", "tab\t", "\ud800", "日本"]),
    ),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=2),
    max_leaves=3,
)


@st.composite
def numbers(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["integer", "number"]))
    bounds = st.integers(-2000, 2000)
    if kind == "number":
        bounds = bounds | st.sampled_from([-0.75, 0.1, 0.25, 3.999, 1e-3, 12345.5])
    schema: dict[str, Any] = {"type": kind}
    low, high = sorted((draw(bounds), draw(bounds)))
    if draw(st.booleans()):
        schema[draw(st.sampled_from(["minimum", "exclusiveMinimum"]))] = low
    if draw(st.booleans()):
        schema[draw(st.sampled_from(["maximum", "exclusiveMaximum"]))] = high + 2
    return schema


@st.composite
def strings(draw: st.DrawFn) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    least = draw(st.integers(0, 5))
    if draw(st.booleans()):
        schema["minLength"] = least
    if draw(st.booleans()):
        schema["maxLength"] = least + draw(st.sampled_from([0, 1, 7, 600, 5000]))
    return schema


def arrays(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    def made(parts: tuple[Any, int | None, int | None]) -> dict[str, Any]:
        items, least, more = parts
        schema: dict[str, Any] = {"type": "array"}
        if items is not None:
            schema["items"] = items
        if least is not None:
            schema["minItems"] = least
        if more is not None:
            schema["maxItems"] = (least or 0) + more
        return schema

    count = st.none() | st.integers(0, 3)
    return st.tuples(st.none() | inner, count, count).map(made)


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    def made(parts: tuple[dict[str, Any], int, bool | None]) -> dict[str, Any]:
        properties, chosen, closed = parts
        schema: dict[str, Any] = {"type": "object", "properties": properties}
        schema["required"] = [n for i, n in enumerate(properties) if chosen >> i & 1]
        if closed is not None:
            schema["additionalProperties"] = closed
        return schema

    members = st.dictionaries(NAMES, inner, max_size=4)
    return st.tuples(members, st.integers(0, 15), st.none() | st.booleans()).map(made)


SCHEMAS = st.recursive(
    st.one_of(
        numbers(),
        strings(),
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {}, {"type": ["string", "null"]}]),
        VALUES.map(lambda value: {"const": value}),
        st.lists(VALUES, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    ),
    lambda inner: st.one_of(
        arrays(inner),
        objects(inner),
        st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
    ),
    max_leaves=6,
)


EXAMPLES = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=300, **EXAMPLES)
@given(SCHEMAS, st.sampled_from([16, 64]), st.integers(0, 2**31))
def test_random_schemas_allow_none_but_valid_documents(schema: Any, length: int, seed: int) -> None:
    """Of canvases that random logits choose, within 64 tokens; no model is asked."""
    machine = compiled(schema, VOCABULARY).machine
    assume(machine.shortest <= 64)
    tokens: list[int] = []
    for key in mx.random.split(mx.random.key(seed), 64 // length):
        states = machine.advance(frozenset([machine.first]), tokens)
        plan = machine.plan(length, 64 - len(tokens), states)
        logits = mx.random.normal((1, length, VOCABULARY.size), key=key)
        tokens += best_canvas(Plans([plan], VOCABULARY.size), logits)[0].tolist()
    end = min(tokens.index(token) for token in RANDOM.generation.eos_token_ids if token in tokens)
    document = json.loads(TOKENIZER.decode(tokens[:end]))
    jsonschema.Draft202012Validator(schema).validate(document)


@settings(max_examples=30, **EXAMPLES)
@given(SCHEMAS, st.sampled_from(MODELS), st.integers(0, 2**31))
def test_models_that_know_nothing_write_valid_documents(
    schema: Any, model: DiffusionGemma, seed: int
) -> None:
    assume(compiled(schema, VOCABULARY).machine.shortest <= model.generation.max_new_tokens)
    document = generate(model, TOKENIZER, "x", schema=schema, seed=seed, steps=2)
    jsonschema.Draft202012Validator(schema).validate(json.loads(document))


RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "tags": {"type": "array", "items": {"enum": ["x", "yy", "zzz"]}, "minItems": 1},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "tags", "age"],
}


def test_every_step_shows_a_valid_document_and_what_is_certain_is_pinned() -> None:
    for event in stream_generate(RANDOM, TOKENIZER, "x", schema=RECORD, seed=1, steps=6):
        if not isinstance(event, Done) and event.text:
            jsonschema.validate(json.loads(event.text), RECORD)
    schema = compiled(RECORD, Vocabulary(RANDOM, TOKENIZER))
    draws = SeededDraws(0, RANDOM.config.vocab_size)
    start = document(RANDOM, schema, 5, RANDOM.generation).begin([], draws)
    assert start is not None
    assert start.pinned is not None
    opening = TOKENIZER.encode('{"name":"')
    assert start.canvas[0, : len(opening)].tolist() == opening
    assert start.pinned[0, : len(opening)].all().item()
    assert not start.pinned[0, len(opening)].item()


def test_a_document_goes_on_over_several_canvases() -> None:
    """Arrays without a bound, in canvases of 16 tokens: the document ends within the budget."""
    model = untrained(TOKENIZER.vocab_size, 16)
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 12}
    config = model.generation.override(max_new_tokens=70, max_denoising_steps=2)
    draws = SeededDraws(5, model.config.vocab_size)
    parsed = compiled(schema, Vocabulary(model, TOKENIZER))
    start = document(model, parsed, 3, config)
    run = list(generate_tokens(model, [5, 6, 7], config, draws, start=start))
    canvases = [item for item in run if isinstance(item, Committed)]
    tokens = [token for item in canvases for token in item.tokens]
    assert 2 <= len(canvases) <= 5
    assert len(tokens) <= 70
    assert tokens[-1] in config.eos_token_ids
    jsonschema.validate(json.loads(TOKENIZER.decode(tokens)), schema)
    assert compile_schema(schema, Vocabulary(model, TOKENIZER)).accepts(tokens)


def test_digit_ranges_hold_just_the_numbers_between() -> None:
    from itertools import product

    for low, high, width in ((13, 257, 1), (0, 9, 1), (5, 5, 1), (0, 1000, 3), (999, 1001, 1)):
        numbers = [int("".join(d)) for c in digit_ranges(low, high, width) for d in product(*c)]
        assert sorted(numbers) == list(range(low, high + 1))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string", "pattern": "a+"}, "#: pattern is not supported"),
        (
            {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}},
            "#/properties/a: uniqueItems is not supported",
        ),
        ({"oneOf": [{}]}, "#: oneOf is not supported"),
        ({"type": "number", "multipleOf": 2}, "#: multipleOf is not supported"),
        ({"type": "strin"}, "#: type must be one of object, array"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "# allows nothing"),
        ({"enum": [1, 2], "type": "string"}, "# allows nothing"),
        ({"type": "object", "required": ["x"]}, "required x is not among the properties"),
        ({"$ref": "#/$defs/a"}, "there is no #/\\$defs/a"),
        ({"$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"}, "itself"),
        ([1], "a schema is a JSON object"),
        ({"type": "object", "additionalProperties": {"type": "string"}}, "additionalProperties"),
    ],
)
def test_what_is_not_supported_is_named(schema: Any, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        parse_schema(schema)


def test_references_annotations_and_types_in_lists() -> None:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Point",
        "$defs": {"axis": {"type": ["integer", "null"], "maximum": 9, "minimum": 8}},
        "type": "object",
        "properties": {"x": {"$ref": "#/$defs/axis"}, "y": {"$ref": "#/$defs/axis"}},
        "required": ["x", "y"],
    }
    machine = compile_schema(schema, Vocabulary(RANDOM, TOKENIZER))
    end = [TOKENIZER.token_id("<turn|>")]
    for text in ('{"x":8,"y":null}', '{"x":null,"y":9}'):
        assert machine.accepts(TOKENIZER.encode(text) + end), text
    for text in ('{"x":7,"y":null}', '{"x":8}', '{"y":8,"x":8}'):
        assert not machine.accepts(TOKENIZER.encode(text) + end), text


def test_a_budget_too_small_is_refused_before_computing() -> None:
    with pytest.raises(SchemaError, match=r"shortest document .* more than the 8"):
        stream_generate(RANDOM, TOKENIZER, "x", schema=RECORD, max_tokens=8)
    huge = {"type": "array", "maxItems": 10**6, "items": {"type": "integer"}}
    with pytest.raises(SchemaError, match="too large"):
        stream_generate(RANDOM, TOKENIZER, "x", schema=huge)


def test_an_object_of_which_nothing_is_said_may_hold_anything() -> None:
    """`{"type": "object"}` used to mean the empty object, so JSON mode never said a thing."""
    found = [
        json.loads(generate(RANDOM, TOKENIZER, "x", schema={"type": "object"}, seed=i, steps=2))
        for i in range(8)
    ]
    assert all(isinstance(value, dict) for value in found)
    assert any(found)
    empty = {"type": "object", "additionalProperties": False}
    assert generate(RANDOM, TOKENIZER, "x", schema=empty, seed=0, steps=2) == "{}"


def nested(levels: int, schema: Any) -> Any:
    for _ in range(levels):
        members = {"a": {"type": "null"}, "b": schema, "c": {"type": "null"}}
        schema = {"type": "object", "properties": members}
    return schema


def lists(levels: int) -> Any:
    schema: Any = {"type": "null"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema, "minItems": 1}
    return schema


def chain(links: int, end: Any) -> Any:
    named = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(links)}
    return {"$defs": {**named, f"d{links}": end}, "$ref": "#/$defs/d0"}


def doubling(levels: int) -> Any:
    named = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(levels)}
    return {"$defs": {**named, f"d{levels}": {"type": "null"}}, "$ref": "#/$defs/d0"}


def itself() -> Any:
    schema: dict[str, Any] = {"type": "array"}
    schema["items"] = schema
    return schema


WORDS = [f"w{i}" for i in range(2000)]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string", "minLength": 10**9}, "200,000 states"),
        ({"type": "string", "minLength": 1e300}, "200,000 states"),
        ({"type": "array", "items": {"type": "null"}, "maxItems": 10**9}, "200,000 states"),
        (doubling(60), "200,000 parts"),
        (doubling(17), "200,000 parts"),
        (nested(40, {"type": "null"}), "200,000 parts"),
        ({"type": "object", "properties": {f"p{i}": True for i in range(2000)}}, "200,000 parts"),
        (lists(400), "nested too deeply"),
        (chain(1000, {"type": "null"}), "nested too deeply: over 128 levels"),
        (chain(100_000, {"type": "null"}), "over 20,000 values"),
        (itself(), "nested too deeply"),
        ({"enum": list(range(100_000))}, "over 20,000 values"),
        ({"anyOf": [{"enum": WORDS}] * 1000}, "over 20,000 values"),
        ({"$defs": {"e": {"enum": WORDS}}, "anyOf": [{"$ref": "#/$defs/e"}] * 1000}, "parts"),
        ({"enum": WORDS, "anyOf": [{"const": i} for i in range(1000)]}, "anyOf is not supported"),
        ({"anyOf": [{"exclusiveMinimum": -1.2345e-300, "maximum": 1e14}] * 3000}, "parts"),
        ({"title": "x" * 10**6}, "over 200,000 characters"),
        ({"properties": {"x" * 10**6: True}}, "over 200,000 characters"),
        ({"const": "x" * 30_000}, "over 20,000 characters follow each other"),
        ({"type": "object", "required": ["a"] * 15_000}, "required must be a list of distinct"),
        ({"type": "integer", "minimum": 10**5000}, "number of over 309 digits"),
        ({"const": [{"a": -(10**5000)}]}, "number of over 309 digits"),
        ({"type": "integer", "minimum": float("inf")}, "holds inf, which is no number"),
        ({"type": "number", "maximum": float("nan")}, "holds nan, which is no number"),
        ({"const": float("nan")}, "holds nan, which is no number"),
        ({"enum": [[{"a": float("-inf")}]]}, "holds -inf, which is no number"),
        ({"enum": [{1: 2}]}, "a name that is no text"),
        ({"enum": [b"x"]}, "holds a bytes"),
    ],
)
def test_a_schema_cannot_take_all_memory_or_time(schema: Any, message: str) -> None:
    """Each took minutes, gigabytes, wrote what is no JSON, or ended with a traceback."""
    began = time.monotonic()
    with pytest.raises(SchemaError, match=message) as caught:
        compile_schema(schema, Vocabulary(RANDOM, TOKENIZER))
    assert time.monotonic() - began < 30
    assert len(str(caught.value)) < 200


def test_the_largest_schemas_still_compile() -> None:
    """Comparing the values of an enum with the enum itself took time with their square."""
    vocabulary = Vocabulary(RANDOM, TOKENIZER)
    began = time.monotonic()
    for schema, states in (
        ({"enum": list(range(9000)), "type": "integer", "minimum": 3}, 8997),
        (chain(120, {"type": "null"}), 1),
        (doubling(12), 2**12),
        ({"properties": {f"p{i}": {"type": "null"} for i in range(40)}}, 41),
    ):
        assert compile_schema(schema, vocabulary).states > states
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("name", ["enum", "const"])
@pytest.mark.parametrize(
    ("word", "rule"),
    [
        ("pattern", "^(a+)+$"),
        ("format", "regex"),
        ("uniqueItems", True),
        ("allOf", [{"pattern": "^(a+)+$"}]),
        ("anyOf", [{"pattern": "^(a+)+$"}]),
        ("not", {"pattern": "^(a+)+$"}),
        ("properties", {"a": {"pattern": "^(a+)+$"}}),
        ("patternProperties", {"^(a+)+$": True}),
        ("propertyNames", {"pattern": "^(a+)+$"}),
        ("items", {"pattern": "^(a+)+$"}),
        ("contains", {"pattern": "^(a+)+$"}),
        ("additionalProperties", {"pattern": "^(a+)+$"}),
    ],
)
def test_a_schema_beside_enum_reaches_no_regular_expression(
    name: str, word: str, rule: Any
) -> None:
    """All keywords beside enum were given to a library: one pattern hung the server for good."""
    text = "a" * 22 + "!"
    listed = [text, {text: text, "a": text}, [text]]
    schema = {name: listed if name == "enum" else listed[0], word: rule}
    with pytest.raises(SchemaError, match=f"#: {word} is not supported beside"):
        parse_schema(schema)


def test_values_that_other_keywords_exclude_are_not_written() -> None:
    machines = {
        json.dumps(schema): compile_schema(schema, Vocabulary(RANDOM, TOKENIZER))
        for schema in (
            {"enum": ["a", 1, True, 2.5, None], "type": "integer"},
            {"enum": [0, 1, 2, "x"], "type": "number", "exclusiveMinimum": 0, "maximum": 1},
            {"enum": ["1", 1, "22"], "type": ["integer", "string"], "maxLength": 0},
            {"enum": [1, [1], []], "minItems": 1, "maxLength": 5, "maximum": 1, "const": 1},
        )
    }
    end = [TOKENIZER.token_id("<turn|>")]
    for text, machine in machines.items():
        for value in ("1", "0", "2.5", "true", "null", '"a"', '"1"', '"22"', "[]", "[1]"):
            accepted = machine.accepts(TOKENIZER.encode(value) + end)
            assert accepted == (value == "1"), (text, value)


@pytest.fixture
def asked() -> Iterator[tuple[str, list[str]]]:
    """A server of JSON on this machine: its address, and the paths it was asked for."""
    paths: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"type": "string"}')

        def log_message(self, *given: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/x", paths
        server.shutdown()
        thread.join()


ELSEWHERE = ["$ref", "$dynamicRef", "$recursiveRef", "$schema", "$id", "$anchor", "$dynamicAnchor"]


@pytest.mark.parametrize("word", ELSEWHERE)
def test_nothing_outside_of_a_schema_is_asked_for(
    word: str, asked: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reference beside enum was fetched: addresses of the server's network, and files.

    Whether a value of a local file was among those listed could be told from the answer.
    """
    address, paths = asked
    secret = tmp_path / "secret.json"
    secret.write_text('{"a": {"const": "secret"}}')
    opened: list[Any] = []
    urlopen = urllib.request.urlopen
    monkeypatch.setattr(
        "urllib.request.urlopen", lambda *given: (opened.append(given), urlopen(*given))[1]
    )
    vocabulary = Vocabulary(RANDOM, TOKENIZER)
    for target in (address, f"{secret.as_uri()}#/a", "//127.0.0.1/x", "other.json#/a", "#there"):
        hostile = {word: target}
        inside = [
            {"type": "object", "properties": {"a": hostile}},
            {"type": "array", "items": {"anyOf": [True, {"enum": ["secret"], **hostile}]}},
            {"$defs": {"a": {"const": "secret", **hostile}}, "$ref": "#/$defs/a"},
        ]
        top = [hostile, {"enum": ["secret", "x"], **hostile}, {"const": 1, **hostile}]
        # At the top $id is only a name: see the next test.
        for schema in inside if word == "$id" else inside + top:
            with pytest.raises(SchemaError, match=re.escape(word)):
                compiled(schema, vocabulary)
        for schema in (
            {"const": {"a": "secret"}, "properties": {"a": hostile}},
            {"enum": [["secret"]], "items": hostile},
        ):
            with pytest.raises(SchemaError, match=r"(properties|items) is not supported"):
                compiled(schema, vocabulary)
    assert not opened
    assert not paths


def test_the_address_that_names_a_schema_is_not_asked_for(
    asked: tuple[str, list[str]],
) -> None:
    """Published schemas have one at the top; the check of a document must not follow it."""
    address, paths = asked
    schema = {
        "$id": address,
        "$schema": "http://json-schema.org/draft-07/schema#",
        "definitions": {"a": {"enum": ["yes"]}, "unread": {"$ref": address}},
        "properties": {"$ref": {"$ref": "#/definitions/a"}, "$schema": {"const": address}},
        "required": ["$ref", "$schema"],
    }
    document = json.loads(generate(RANDOM, TOKENIZER, "x", schema=schema, steps=1))
    assert document == {"$ref": "yes", "$schema": address}
    assert not paths


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"$schema": ["x"]}, "\\$schema must be one of"),
        ({"$schema": "http://127.0.0.1/schema"}, "\\$schema must be one of"),
        ({"items": {"$schema": "http://json-schema.org/draft-07/schema#"}}, "inside of a schema"),
        ({"items": {"$id": "a"}}, "\\$id inside of a schema"),
        ({"$id": 1}, "\\$id must be a text"),
        ({"type": []}, "type must be one of"),
        ({"type": ["null", "null"]}, "type must be one of"),
        ({"type": [["null"]]}, "type must be one of"),
        ({"enum": "ab"}, "enum must be a list"),
        ({"anyOf": []}, "anyOf must be a list of schemas"),
        ({"anyOf": [1]}, "anyOf must be a list of schemas"),
        ({"properties": {"a": 1}}, "properties must be an object of schemas"),
        ({"items": [{"type": "null"}]}, "items must be a schema"),
        ({"minLength": -1}, "minLength must be a whole number"),
        ({"minLength": True}, "minLength must be a whole number"),
        ({"maxItems": 1.5}, "maxItems must be a whole number"),
        ({"minimum": "3"}, "minimum must be a number"),
        ({"exclusiveMinimum": True}, "exclusiveMinimum must be a number; true and false"),
        ({"enum": [1], "exclusiveMinimum": True}, "exclusiveMinimum must be a number"),
        ({"$ref": 1}, "\\$ref must be a text"),
        ({"$ref": "#"}, "contains itself"),
        ({"properties": {"a": {"$ref": "#/properties"}, "b": True}}, "\\$ref must be|not supp"),
        ({"title": "x", "properties": {"a": {"$ref": "#/title"}}}, "#/title must be a schema"),
        ({"properties": {"\ud800": {"pattern": "x"}}}, r"#/properties/\\ud800: pattern is"),
        ({"\ud800" * 500: 1}, r"\\ud800.* is not supported"),
        ({"$ref": "#/\n\ud800"}, r"there is no #/\\n\\ud800"),
        ({"required": ["\x1b]52;c;eA\x07" * 99]}, r"required \\x1b.*\.\.\. is not among"),
    ],
)
def test_what_is_invalid_is_one_short_sentence(schema: Any, message: str) -> None:
    """Lists for $schema and lone surrogates were answered with 500, items as a list ignored."""
    with pytest.raises(SchemaError, match=message) as caught:
        parse_schema(schema)
    assert len(str(caught.value)) < 200
    assert str(caught.value).isprintable()


def test_files_that_python_cannot_read_are_one_sentence(tmp_path: Path) -> None:
    """Numbers of over 4,300 digits and deep lists ended with a traceback."""
    file = tmp_path / "schema.json"
    for text, message in (
        ('{"minimum": %s}' % ("1" * 5000), "is not JSON"),
        ("[" * 200_000, "nested too deeply"),
    ):
        file.write_text(text)
        with pytest.raises(SchemaError, match=message):
            read_schema(file)


def test_compiling_stops_at_its_deadline_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow schema was compiled to its end, long after whoever sent it had left."""
    looks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: float(next(looks)))
    monkeypatch.setattr("mlx_diffgemma.diffusion.automaton.time", clock)
    monkeypatch.setattr("mlx_diffgemma.diffusion.automaton.COMPILE_SECONDS", 1e9)
    monkeypatch.setattr("mlx_diffgemma.text.schema.COMPILE_SECONDS", 1e9)
    vocabulary = Vocabulary(RANDOM, TOKENIZER)
    schema = {
        "properties": {
            "listed": {"enum": list(range(100)), "type": "integer"},
            "long": {"type": "string", "maxLength": 500},
            "items": {"type": "array", "items": {"type": "number"}, "maxItems": 50},
        }
    }
    compile_schema(schema, vocabulary)
    needed = next(looks)
    assert needed > 300
    for share in range(0, needed - 2, needed // 20):
        looks = itertools.count()
        with pytest.raises(SchemaError, match=f"compiling the schema took longer than {share} sec"):
            compile_schema(schema, vocabulary, float(share))
        assert next(looks) <= share + 3


def test_a_deadline_that_has_passed_refuses_any_schema() -> None:
    late = time.monotonic()
    with pytest.raises(SchemaError, match="compiling the schema took longer than 0 seconds"):
        compiled({"type": "null"}, Vocabulary(RANDOM, TOKENIZER), late)
    with pytest.raises(SchemaError, match="compiling the schema took longer than 0 seconds"):
        parse_schema({"type": "null"}, late)


def test_a_document_is_checked_and_the_check_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of a finished document ran on the thread of all, for as long as it took."""
    options = [{"type": "array", "items": {"const": i}} for i in range(100)]
    schema = {"$defs": {"a": {"anyOf": options}}, "type": "array", "items": {"$ref": "#/$defs/a"}}
    slow = compiled(schema, Vocabulary(RANDOM, TOKENIZER))
    slow.check("[[1],[7,7]]")
    for written, message in (("[[1,2]]", "is not valid"), ("[", "is not JSON")):
        with pytest.raises(SchemaError, match=message):
            slow.check(written)
    monkeypatch.setattr("mlx_diffgemma.text.schema_check.CHECK_SECONDS", 0.2)
    began = time.monotonic()
    slow.check(json.dumps([[99] * 20] * 5000))
    assert time.monotonic() - began < 5


def test_what_no_document_can_have_is_not_read() -> None:
    loop = {"items": {"$ref": "#/items"}, "maxItems": 0}
    for schema in (loop, {"maxItems": 0.0, "items": {"properties": 1}}):
        compiled(schema, Vocabulary(RANDOM, TOKENIZER)).check("[]")


def test_long_strings_share_the_tokens_that_they_are_made_of() -> None:
    """Each of a schema's long strings sorted and kept the whole vocabulary anew."""
    vocabulary = Vocabulary(RANDOM, TOKENIZER)
    first, second = (vocabulary.json_characters(0, most) for most in (600, 700))
    assert isinstance(first, Repeat)
    assert isinstance(second, Repeat)
    assert first.part is second.part
