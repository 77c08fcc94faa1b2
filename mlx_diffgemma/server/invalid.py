"""Says which field of a body is wrong, and why, from what pydantic found."""

from collections.abc import Sequence
from typing import Any

# Mistakes of a body that are looked at; a hostile one may have one for each of its values.
MOST_ERRORS = 100


def mistake(errors: Sequence[Any], body: object) -> tuple[str, str | None]:
    """Tell of the first mistake in a body, in a sentence, and name its field.

    A field that may be of several kinds has an error for each. The deepest one is told, as its kind
    fits best; of several at one place, those that say more than that the kind is wrong.
    """
    places = [(_place(each, body), each) for each in errors[:MOST_ERRORS]]
    where = places[0][0]
    for place, _ in places:
        if len(place) > len(where) and place[: len(where)] == where:
            where = place
    found = [each for place, each in places if place == where]
    found = [each for each in found if not each["type"].endswith("_type")] or found
    reasons = " or ".join(dict.fromkeys(map(_reason, found)))
    name = _name(where)
    return f"{name or 'the body'}: {reasons}", name or None


def _place(error: Any, body: object) -> list[str | int]:
    """Find where an error is, without the names of kinds that pydantic puts between."""
    place: list[str | int] = []
    value: Any = body
    parts = error["loc"][1:]
    for i, part in enumerate(parts, 1):
        named = isinstance(value, dict) and part in value
        if named or (isinstance(value, list) and isinstance(part, int) and part < len(value)):
            value = value[part]
        elif error["type"] != "missing" or i < len(parts):
            continue
        place.append(part)
    return place


def _name(place: Sequence[str | int]) -> str:
    """Write a place as programs do: `messages[0].content`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return "".join(parts).removeprefix(".")


def _reason(error: Any) -> str:
    if error["type"] == "missing":
        return "it is missing"
    if error["type"] in ("model_type", "model_attributes_type"):
        return "it should be a JSON object"
    return str(error["msg"]).replace("Input", "it").replace("dictionary", "JSON object")
