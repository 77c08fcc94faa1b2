"""Types of Python and classes of Pydantic in the place of a JSON Schema."""

import json
import subprocess
import sys
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field
from random_model import untrained

from mlx_diffgemma import SchemaError, Tokenizer, generate
from mlx_diffgemma.checkpoint.load import EMBEDDED
from mlx_diffgemma.text.schema_types import schema_of

TOKENIZER = Tokenizer.from_directory(EMBEDDED)
MODEL = untrained(TOKENIZER.vocab_size, 64, seed=0)


class Fruit(Enum):
    PEAR = "pear"
    PLUM = "plum"


class Record(BaseModel):
    fruit: Fruit
    count: int = Field(ge=0, le=99)
    note: str | None = Field(max_length=6)


@dataclass
class Point:
    x: bool
    y: bool


def test_an_answer_is_an_object_of_the_class_whatever_the_model() -> None:
    for seed in range(3):
        answer = generate(MODEL, TOKENIZER, "x", schema=Record, seed=seed, max_tokens=64)
        record = Record.model_validate_json(answer)
        assert list(json.loads(answer)) == ["fruit", "count", "note"]
        assert record.count <= 99


@pytest.mark.parametrize(
    ("kind", "fits"),
    [
        (bool, lambda value: type(value) is bool),
        (Literal["yes", "no"], lambda value: value in ("yes", "no")),
        (bool | None, lambda value: value in (True, False, None)),
        (Point, lambda value: set(value) == {"x", "y"}),
        (Fruit, lambda value: value in ("pear", "plum")),
    ],
)
def test_types(kind: Any, fits: Any) -> None:
    assert fits(json.loads(generate(MODEL, TOKENIZER, "x", schema=kind, seed=0, max_tokens=32)))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (type, "is no type with a JSON Schema"),
        (object(), "is no type with a JSON Schema"),
        (dict[str, int], "additionalProperties"),
        ("int", "a schema is a JSON object"),
        (5, "a schema is a JSON object"),
        ([int], "a schema is a JSON object"),
    ],
)
def test_what_has_no_schema_is_refused_in_a_sentence(given: Any, said: str) -> None:
    with pytest.raises(SchemaError, match=said) as raised:
        generate(MODEL, TOKENIZER, "x", schema=given)
    assert "\n" not in str(raised.value)


def test_pydantic_is_imported_for_types_alone() -> None:
    script = (
        "import sys; from mlx_diffgemma import generate, load\n"
        "generate(*load(), 'x', steps=1, schema={'enum': [1]})\n"
        "print('pydantic' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_without_pydantic_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydantic", None)
    assert schema_of({"enum": [1]}) == {"enum": [1]}
    with pytest.raises(SchemaError, match=r"pip install 'mlx-diffgemma\[schema\]'"):
        schema_of(int)
