"""Serves the page: a few files that a browser needs, with a policy that lets it fetch no others."""

from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as Http
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FILES = Path(__file__).parent.parent / "data" / "page"

# Where the files of the page are, which anybody may have: they hold nothing of anybody's.
PREFIX = "/page/"

# Scripts and styles are the page's own files. What a model writes cannot run, load an image, submit
# a form or be framed; text becomes HTML through DOMPurify and nothing else.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types dompurify",
    )
)

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked for again each time, and sent again where it has changed
}


class PageFiles(StaticFiles):
    """Sends files of one folder, each with `HEADERS`."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Answer with a file, or that the browser has it already."""
        try:
            response = await super().get_response(path, scope)
        except ValueError:  # a null byte, with which an older starlette asks the file system
            raise HTTPException(404) from None
        response.headers.update(HEADERS)
        return response


def add_page(app: Starlette) -> None:
    """Add the page at `/`, and its files under `PREFIX`."""
    files = PageFiles(directory=FILES)

    async def page(http: Http) -> Response:
        return await files.get_response("index.html", http.scope)

    app.add_route("/", page, include_in_schema=False)
    app.mount(PREFIX.rstrip("/"), files)
