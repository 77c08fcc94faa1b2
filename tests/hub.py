"""A small hub on loopback, which can be made to fail in the ways that the real one does."""

import hashlib
import importlib
import json
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mlx_diffgemma.checkpoint import hub as asking

COMMIT = "c" * 40

# What becomes of a request for (method, file, first byte): None answers it.
Fault = Callable[[str, str, int], str | int | None]


def no_fault(method: str, file: str, first: int) -> None:
    return None


@dataclass
class Hub:
    """One repository, org/model, whose files are those of a directory.

    `fault` may return a status, "drop" (the answer ends in its midst), "reset" (and the connection
    too), "wrong" (other bytes), "relabel" (another type in a header) or "stall" (no answer until
    `release` is set).
    """

    directory: Path
    url: str = ""
    fault: Fault = no_fault
    sent: dict[str, int] = field(default_factory=dict)  # bytes by file
    release: threading.Event = field(default_factory=threading.Event)
    commit: str = COMMIT
    asked: list[str] = field(default_factory=list)  # revisions

    def environment(self, home: Path) -> dict[str, str]:
        """What a process needs to ask this hub, with a cache of its own and no token."""
        return {
            **os.environ,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        }

    def listed(self) -> list[dict[str, Any]]:
        return _listed(self.directory)

    def about(self, revision: str) -> dict[str, Any]:
        commit = revision if re.fullmatch("[0-9a-f]{40}", revision) else self.commit
        siblings = []
        for each in self.listed():
            sibling = {"rfilename": each["path"], "size": each["size"], "blobId": each["oid"]}
            if "lfs" in each:
                sibling["lfs"] = {**each["lfs"], "sha256": each["lfs"]["oid"]}
            siblings.append(sibling)
        return {"id": "org/model", "sha": commit, "siblings": siblings}


@cache
def _listed(directory: Path) -> list[dict[str, Any]]:
    """The files as the hub lists them: weights are large files, the others are git's."""
    found = []
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
        each: dict[str, Any] = {"path": path.name, "size": len(data), "oid": blob}
        if path.suffix == ".safetensors":
            sha256 = hashlib.sha256(data).hexdigest()
            each["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 130}
        found.append(each)
    return found


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if match := re.fullmatch(r"/api/models/org/model(?:/revision/(\w+))?", path):
            self.hub.asked.append(match[1] or "main")
            self._answer_json(self.hub.about(match[1] or "main"), "about")
        elif re.fullmatch(r"/api/models/org/model/tree/\w+", path):
            files = [{"type": "file", **each} for each in self.hub.listed()]
            self._answer_json(files, "tree")
        elif match := re.fullmatch(r"/org/model/resolve/\w+/(.+)", path):
            self._answer_file(match[1])
        else:
            self._fail(404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        names = re.findall(r"[\w.-]+\.(?:safetensors|json|jinja|md|model)", body)
        files = [{"type": "file", **e} for e in self.hub.listed() if e["path"] in names]
        self._answer_json(files, "paths")

    def _answer_json(self, value: object, what: str) -> None:
        fault = self.hub.fault(self.command, what, 0)
        if isinstance(fault, int):
            return self._fail(fault)
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        return None

    def _answer_file(self, name: str) -> None:
        (file,) = [each for each in self.hub.listed() if each["path"] == name] or [None]
        if file is None:
            return self._fail(404)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = 0, file["size"] - 1
        if asked:
            first, last = int(asked[1]), min(last, int(asked[2] or last))
        fault = self.hub.fault(self.command, name, first)
        if isinstance(fault, int):
            return self._fail(fault)
        if fault == "stall":
            self.hub.release.wait(60)
        with (self.hub.directory / name).open("rb") as stored:
            stored.seek(first)
            part = stored.read(last + 1 - first)
        self.send_response(206 if asked else 200)
        self.send_header("X-Repo-Commit", self.hub.commit)
        self.send_header("ETag", f'"{file["lfs"]["oid"] if "lfs" in file else file["oid"]}"')
        self.send_header("Content-Length", str(len(part)))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{file['size']}")
        self.end_headers()
        if self.command == "HEAD":
            return None
        if fault in ("drop", "reset"):
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            if fault == "reset":
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            return None
        if fault == "relabel":
            part = part.replace(b'"BF16"', b'"F16" ', 1)
        if fault == "wrong":
            part = part[:-1] + bytes([part[-1] ^ 1])
        self.wfile.write(part)
        self.hub.sent[name] = self.hub.sent.get(name, 0) + len(part)
        return None

    def _fail(self, status: int) -> None:
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        if status == 429:
            self.send_header("Retry-After", "0")
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def hub_of(directory: Path) -> Iterator[Hub]:
    """A hub that serves the files of a directory as org/model."""
    hub = Hub(directory)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.release.set()
        server.shutdown()
        server.server_close()


@contextmanager
def asked_here(directory: Path, cache: Path, patch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process asks, without waiting long, with a cache of its own."""
    sleep = time.sleep
    patch.setattr(time, "sleep", lambda seconds: sleep(seconds / 50))
    patch.setattr(asking, "PATIENCE", 3.0)
    patch.setenv("NO_PROXY", "127.0.0.1")
    constants: Any = importlib.import_module("huggingface_hub.constants")
    with hub_of(directory) as hub:
        patch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        yield hub
