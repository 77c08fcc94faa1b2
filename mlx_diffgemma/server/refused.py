"""Tells errors in the form that a route's clients can read; OpenAI's, unless it is another's."""

from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as Http
from starlette.responses import JSONResponse, Response

if TYPE_CHECKING:  # what stands before several servers imports no MLX
    from ..diffusion.prompt_cache import ContextError

# Seconds that a refused client is asked to wait.
RETRY_AFTER = 2

# Characters of an error's message, which may quote what was sent.
MOST_MESSAGE = 1000

# Characters of a field's name, which may have been sent, too.
MOST_PARAM = 200

# What any route may answer instead, for the OpenAPI document.
RESPONSES: dict[int | str, dict[str, Any]] = {
    code: {"description": text}
    for code, text in (
        (400, "refused"),
        (401, "no key"),
        (403, "another host, or a page of another origin"),
        (404, "nothing has this name"),
        (408, "the body came too slowly"),
        (413, "too large"),
        (415, "not JSON"),
        (429, "busy"),
        (503, "stopping, or the model cannot be loaded"),
        (504, "too slow"),
    )
}


def streamed(media: str = "text/event-stream") -> dict[int | str, dict[str, Any]]:
    """Give what a route may answer that streams where it is asked to, for the document."""
    return {**RESPONSES, 200: {"content": {media: {}}}}


class Refused(Exception):
    """Says that a request is answered with an error status."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param


def beyond_context(error: "ContextError", path: str) -> Refused:
    """Refuse a prompt that does not fit, as the route's clients know it.

    Anthropic's tell it by this sentence alone: coding agents then shorten what was said, and
    without it ask the same again.
    """
    said = str(error)
    if path.startswith("/v1/messages") and error.tokens is not None:
        said = f"prompt is too long: {error.tokens} tokens > {error.most} maximum"
    return Refused(400, said, "context_length_exceeded")


def stopping() -> Refused:
    """Refuse a request that the server's end cuts off."""
    return Refused(503, "the server is shutting down", "stopping")


def error_body(
    status: int, message: str, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """Write an error as clients of OpenAI expect it; `param` names the field that is wrong."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    message = shortened(message, MOST_MESSAGE)
    param = None if param is None else shortened(param, MOST_PARAM)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


# What Anthropic calls errors of a status; of others, over 500 its own and below the request's.
_ANTHROPICS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def told(path: str, error: Refused) -> dict[str, Any]:
    """Write an error as the clients of a route expect it, by the route's path."""
    message = shortened(error.message, MOST_MESSAGE)
    if path.startswith("/v1/messages"):
        kind = "invalid_request_error" if error.status < 500 else "api_error"
        facts = {"type": _ANTHROPICS.get(error.status, kind), "message": message}
        return {"type": "error", "error": facts}
    if path.startswith("/api/"):  # Ollama's
        return {"error": message}
    return error_body(error.status, message, error.code, error.param)


def refusal(error: Refused, path: str) -> Response:
    """Answer a route with a refusal; one for a full queue says when to come again."""
    body = told(path, error)
    headers = {"Retry-After": str(RETRY_AFTER)} if error.status == 429 else None
    return JSONResponse(body, error.status, headers)


def tell_errors(app: Starlette) -> None:
    """Have an application tell what goes wrong in the form of the route's clients."""

    async def refused(http: Http, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return refusal(error, http.url.path)

    async def http_error(http: Http, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        response = refusal(Refused(error.status_code, str(error.detail)), http.url.path)
        response.headers.update(error.headers or {})
        return response

    async def defect(http: Http, error: Exception) -> Response:
        # The connection ends with it: say so, or the client's next request is lost.
        response = refusal(Refused(500, "a defect of the server"), http.url.path)
        response.headers["Connection"] = "close"
        return response

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, defect)


def shortened(text: str, most: int) -> str:
    """Cut a text to at most so many characters; what is cut says so."""
    return text if len(text) <= most else text[: most - 3] + "..."
