"""Checks of values by the library jsonschema, which gets the supported keywords and a clock."""

import json
from collections.abc import Callable
from typing import Any

from ..diffusion.automaton import Deadline, PatternTimeout
from .schema_keywords import CHECKED, Schema, SchemaError, shown

# Seconds to check a finished document. It is valid by construction: what is not checked by then
# would only tell of a defect of the pattern, and other requests wait for the same thread.
CHECK_SECONDS = 0.5


def validators(deadline: Deadline) -> Callable[[Schema], Any]:
    """Return a function that makes the validator of a schema of only the keywords in `CHECKED`.

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

    keywords: Any = {word: timed(known.VALIDATORS[word]) for word in CHECKED}
    kind = jsonschema.validators.create(
        meta_schema={}, validators=keywords, type_checker=known.TYPE_CHECKER
    )
    return lambda schema: kind(schema, registry=Registry())


def check_document(schema: Schema, document: str) -> None:
    """Check a finished document against a schema, as far as `CHECK_SECONDS` go.

    Raises:
        SchemaError: it is not JSON, or not valid: a defect of the pattern that it was written by.
    """
    try:
        validator = validators(Deadline.within(CHECK_SECONDS))(schema)
        problem = next(validator.iter_errors(json.loads(document)), None)
    except ValueError as error:
        raise SchemaError(f"the document is not JSON: {error}") from None
    except PatternTimeout:
        return
    if problem is not None:
        raise SchemaError(f"the document is not valid: {shown(problem.message)}")
