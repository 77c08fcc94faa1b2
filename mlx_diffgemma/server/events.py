"""Writes server-sent events, and errors as one of them."""

import json

from .refused import Refused, error_body


def sse(value: object, kind: str | None = None) -> str:
    """Write a value as a server-sent event, of a kind of its own or of none."""
    head = "" if kind is None else f"event: {kind}\n"
    return f"{head}data: {json.dumps(value, ensure_ascii=False)}\n\n"


def failed_event(error: Refused) -> str:
    """Write an error as an event of OpenAI's stream."""
    return sse(error_body(error.status, error.message, error.code))
