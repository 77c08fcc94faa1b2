"""Documents that follow a schema every time, also from a model that knows nothing."""

import json
import time
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from random_model import untrained

from mlx_diffgemma import DiffusionGemma, Tokenizer, generate, stream_generate
from mlx_diffgemma.generation import Committed, Done, generate_tokens
from mlx_diffgemma.loading import EMBEDDED
from mlx_diffgemma.sampler import SeededDraws
from mlx_diffgemma.schema import (
    SchemaError,
    _ranges,
    compile_schema,
    compiled,
    parse_schema,
    schema_starts,
)
from mlx_diffgemma.vocabulary import Vocabulary

TOKENIZER = Tokenizer.from_directory(EMBEDDED)
MODELS = [untrained(TOKENIZER.vocab_size, 64, seed=seed) for seed in range(4)]
RANDOM = MODELS[0]

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


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(SCHEMAS, st.sampled_from(MODELS), st.integers(0, 2**31))
def test_a_thousand_random_schemas_give_a_thousand_valid_documents(
    schema: Any, model: DiffusionGemma, seed: int
) -> None:
    shortest = compile_schema(schema, Vocabulary(RANDOM, TOKENIZER)).shortest
    assume(shortest <= RANDOM.generation.max_new_tokens)
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
    start = schema_starts(
        RANDOM, schema, 5, RANDOM.generation, SeededDraws(0, RANDOM.config.vocab_size)
    )([])
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
    starts = schema_starts(model, parsed, 3, config, draws)
    run = list(generate_tokens(model, [5, 6, 7], config, draws, starts=starts))
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
        numbers = [int("".join(d)) for c in _ranges(low, high, width) for d in product(*c)]
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


TWICE = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(60)}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string", "minLength": 10**9}, "too large"),
        ({"$defs": {**TWICE, "d60": {"type": "null"}}, "$ref": "#/$defs/d0"}, "too large"),
        (nested(40, {"type": "null"}), "too large"),
        ({"type": "object", "properties": {f"p{i}": True for i in range(2000)}}, "too large"),
        (lists(400), "nested too deeply"),
        ({"type": "integer", "minimum": float("inf")}, "holds inf, which is no number"),
        ({"type": "number", "maximum": float("nan")}, "holds nan, which is no number"),
    ],
    ids=["states", "references", "options", "members", "depth", "infinity", "nan"],
)
def test_a_schema_cannot_take_all_memory_or_time(schema: Any, message: str) -> None:
    """Each took minutes, gigabytes, or ended with a traceback."""
    began = time.monotonic()
    with pytest.raises(SchemaError, match=message):
        compile_schema(schema, Vocabulary(RANDOM, TOKENIZER))
    assert time.monotonic() - began < 30


