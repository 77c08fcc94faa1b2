"""What holds on all routes of the application: those that there are, and those that will be."""

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from servers import Server, fronting, serving, writing

from mlx_diffgemma.server import app
from mlx_diffgemma.server.app import make_app
from mlx_diffgemma.server.invalid import mistake

NO_MODEL: Any = SimpleNamespace(name="x", aliases=(), model=SimpleNamespace(sight=None))

NO_THREAD: Any = SimpleNamespace(workers=[NO_MODEL])

DOCUMENT = make_app(NO_THREAD).openapi()

ROUTES = [
    (method.upper(), path.replace("{name}", "tiny").replace("{identity}", "resp_1"))
    for path, methods in DOCUMENT["paths"].items()
    for method in methods
] + [("GET", "/"), ("GET", "/page/app.js"), ("GET", "/openapi.json")]

OPEN = ("/", "/health", "/page/app.js")  # without a key

JSON = {"Content-Type": "application/json"}

CLIENT = httpx.Client(timeout=60)

KEY = {"Authorization": "Bearer s3cret"}


@pytest.fixture(scope="module", params=["alone", "behind a front"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server, and what stands before one that checks the same."""
    settings: Any = {"api_key": "s3cret", "most_bytes": 1000}
    with serving(writing("Fine."), **settings) as running:
        if request.param == "alone":
            yield running
            return
        # It cannot know that the model sees no pictures.
        with fronting(f"127.0.0.1:{running.port}", **settings, picture_bytes=0) as front:
            yield front


def ask(server: Server, method: str, path: str, **given: Any) -> httpx.Response:
    headers = {**JSON, **KEY, **given.pop("headers", {})}
    content = given.pop("content", b"{}" if method == "POST" else None)
    return CLIENT.request(method, server.url + path, headers=headers, content=content)


def refused(reply: httpx.Response, status: int) -> None:
    """It is an error in the form that the route's clients know, and nothing of the answer."""
    assert reply.status_code == status, reply.text[:300]
    error = reply.json()["error"]
    told = error if isinstance(error, str) else error["message"]
    assert told
    assert "\n" not in told


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_checks_that_every_route_has(server: Server, method: str, path: str) -> None:
    """Host, origin, site, key; of bodies their kind, size and JSON."""
    refused(ask(server, method, path, headers={"Host": "evil.example"}), 403)
    refused(ask(server, method, path, headers={"Origin": "https://evil.example"}), 403)
    for site in ("cross-site", "same-site"):
        foreign = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors"}
        refused(ask(server, method, path, headers=foreign), 403)
    keyless = ask(server, method, path, headers={"Authorization": "Bearer s3cre"})
    if path in OPEN:
        assert keyless.status_code == 200
    else:
        refused(keyless, 401)
    own = {"Authorization": "", "x-api-key": "s3cret", "Origin": server.url}
    assert ask(server, method, path, headers=own).status_code in (200, 400, 404)
    refused(ask(server, "PATCH", path), 405)
    if method != "POST":
        return
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        refused(ask(server, method, path, headers={"Content-Type": kind}), 415)
    refused(ask(server, method, path, headers={"Content-Encoding": "zstd"}), 415)
    refused(ask(server, method, path, content=b'{"x": "%s"}' % (b"x" * 1000)), 413)
    refused(ask(server, method, path, content=iter([b"x" * 600] * 2)), 413)
    for body in (b"", b"[", b"\xff", b'{"a": 1, "a": 1}', b"[]", b"3", b'"x"', b"null", b"[" * 900):
        refused(ask(server, method, path, content=body), 400)
    refused(ask(server, method, path, content=b'{"model": 5, "messages": 5, "prompt": {}}'), 400)


def lists_of(path: str) -> list[str]:
    """The fields of a route's body that may be lists."""
    body = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    name = body["schema"]["$ref"].rsplit("/", 1)[1]
    fields = DOCUMENT["components"]["schemas"][name]["properties"]
    return [each for each, kinds in fields.items() if '"array"' in json.dumps(kinds)]


@pytest.mark.parametrize("path", [path for method, path in ROUTES if method == "POST"])
def test_a_list_of_mistakes_is_read_up_to_the_first(
    fine: Server, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Each of 16,000 wrong messages was written down, for seconds in which nobody was answered."""
    counts: list[int] = []

    def noted(errors: Any, body: Any) -> Any:
        counts.append(len(errors))
        return mistake(errors, body)

    monkeypatch.setattr(app, "mistake", noted)
    fields = lists_of(path)
    for field in fields:
        for entry in ({"role": 5, "type": 5, "content": [[]] * 20}, [[]], 0.5):
            reply = fine.post(path, {field: [entry] * 500})
            assert reply.status_code == 400
            assert len(reply.text) < 1000
    assert len(counts) == 3 * len(fields)
    assert max(counts, default=0) <= 12
