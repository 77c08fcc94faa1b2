"""Ordinary clients beside attackers: nobody may wait, get another's answer, or bring it down.

    python scripts/stress_server.py [--seconds 90] [--clients 8] [--attackers 4] [--workers]

Starts a server with the Sudoku checkpoint. Attackers send what has hurt a server before: `attacks`
has all of it. Afterwards every request is asked again, alone, with its seed: the texts must be the
same. Exits 1 where one is not, where /health took longer than a second, memory grew by more than
`MOST_GROWTH`, an answer was of the server's making (5xx) or no JSON, or a schema fetched something.

Where the machine has other work, /health waits for that, too: `--health 5` allows five seconds.

With --workers all of them ask one address before two servers, of which one is killed in the middle,
and started again. Only what that one had under way may be lost, and has to be told so.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import httpx
import openai

SUDOKU = Path(__file__).parents[1] / "tests" / "data" / "sudoku6"
MOST_GROWTH = 300  # MB from the first answer to the end: what Python's allocator keeps of bodies
LONG = 3_900_000  # characters; bodies may have four million bytes
PATIENCE = 20  # seconds after which an attacker goes away
CHAT = "/v1/chat/completions"


MODEL = ("-m", str(SUDOKU), "--max-batch", "8")
LOST = "the worker that had this request is lost"  # as a client is told


class Server:
    """A server's process and address, and what is to be said of it at the end."""

    def __init__(self, *arguments: str, port: int = 0) -> None:
        command = [sys.executable, "-m", "mlx_diffgemma", "serve", "--port", str(port), *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr
        lines = (re.search(r"running on (http://\S+)", line) for line in self.process.stderr)
        self.url = next(found[1] for found in lines if found)
        self.port = int(self.url.rsplit(":", 1)[1])
        self.said: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            if not line.startswith("INFO"):
                self.said.append(line)

    def end(self) -> None:
        """Stop the process, if it has not ended."""
        self.process.terminate()
        self.process.wait(30)

    def memory(self) -> float:
        """MB that are in memory."""
        shown = subprocess.check_output(["ps", "-o", "rss=", "-p", str(self.process.pid)])
        return int(shown) / 1024


Lost = tuple[float, float]  # when a request was asked, and when it was told to be lost


class Two:
    """Two workers, of which the first is killed and started again, and one address before them."""

    def __init__(self) -> None:
        self._workers = [Server(*MODEL), Server(*MODEL)]
        self._addresses = [f"127.0.0.1:{each.port}" for each in self._workers]
        self.front = Server("--workers", ",".join(self._addresses))
        self.killed = 0.0  # when
        self.under_way = 0  # requests of the one that was killed

    @property
    def all(self) -> list[Server]:
        """All that run."""
        return [self.front, *self._workers]

    def replace(self, after: float) -> None:
        """Kill the first worker, and start another at its address five seconds later."""
        time.sleep(after)
        self._workers[0].process.send_signal(signal.SIGSTOP)  # none of them ends meanwhile
        self.under_way = self._count()
        self._workers[0].process.kill()
        self.killed = time.monotonic()
        self._workers[0].process.wait()
        time.sleep(5)
        self._workers[0] = Server(*MODEL, port=self._workers[0].port)

    def _count(self) -> int:
        text = httpx.get(f"{self.front.url}/metrics", timeout=60).text
        counted = re.search(rf'under_way{{worker="{self._addresses[0]}"}} (\d+)', text)
        assert counted
        return int(counted[1])

    def problems(self, lost: list[Lost]) -> list[str]:
        """What went wrong, where these requests were lost."""
        texts = [httpx.get(f"{each.url}/metrics", timeout=60).text for each in self.all]
        print(*re.findall(r"^diffgemma_(front_\w+ \d+)$", texts[0], re.M), sep=", ")
        counted = [re.findall(r"^diffgemma_answered_total\S* (\d+)$", text, re.M) for text in texts]
        print(f"{self.under_way} requests were with the first worker just before it was killed;")
        print(f"{len(lost)} clients that waited were told that theirs is lost")
        print(f"its successor has answered {counted[1][0]} since, the other {counted[2][0]} in all")
        found = [
            f"lost: asked {began - self.killed:.2f} s and told {ended - self.killed:.2f} s after"
            for began, ended in lost
            if not began < self.killed < ended < self.killed + 10
        ]
        if not int(counted[1][0]):
            found.append("the worker that came back was not used")
        return found


# Ordinary clients -------------------------------------------------------------------------------


Asked = tuple[str, int]  # prompt and seed


class Clients:
    """Solve Sudokus until the time is over, half of them as streams."""

    def __init__(self, server: Server, count: int):
        self._client = openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="x", max_retries=0, timeout=300
        )
        lines = (SUDOKU / "puzzles.txt").read_text().splitlines()[1:]
        self._puzzles = [line.split()[0] for line in lines]
        self._count = count
        self.answers: list[tuple[Asked, str]] = []
        self.problems: list[str] = []
        self.longest = 0.0
        self.refused = 0
        self.lost: list[Lost] = []

    def ask(self, asked: Asked, stream: bool = False) -> str:
        """The answer's text."""
        request: dict[str, Any] = {
            "model": "x",
            "messages": [{"role": "user", "content": asked[0]}],
            "seed": asked[1],
        }
        if not stream:
            done = self._client.chat.completions.create(**request)
            return done.choices[0].message.content or ""
        chunks = self._client.chat.completions.create(**request, stream=True)
        return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)

    def talk(self, first: int, ends: float) -> None:
        """As one client, until then."""
        turn = 0
        while time.monotonic() < ends:
            cells = self._puzzles[(first + turn * self._count) % len(self._puzzles)]
            asked = "\n".join(cells[i : i + 6] for i in range(0, 36, 6)), turn
            began = time.monotonic()
            try:
                self.answers.append((asked, self.ask(asked, stream=bool(turn % 2))))
            except openai.RateLimitError:
                self.refused += 1
                time.sleep(1)
            except openai.OpenAIError as error:
                if LOST in str(error):
                    self.lost.append((began, time.monotonic()))
                else:
                    self.problems.append(f"an ordinary client: {error}")
            self.longest = max(self.longest, time.monotonic() - began)
            turn += 1

    def others(self) -> int:
        """How many answers are not what the same request gets alone."""
        return sum(self.ask(asked) != text for asked, text in self.answers)


def watch(url: str, ends: float, told: "Queue[tuple[float, int]]") -> None:
    """Poll /health until then, from a process of its own: the longest wait, and how many polls."""
    longest, count = 0.0, 0
    with httpx.Client(timeout=60) as client:
        while time.time() < ends:
            began = time.monotonic()
            assert client.get(f"{url}/health").json()["status"] == "ok"
            longest = max(longest, time.monotonic() - began)
            count += 1
            time.sleep(0.1)
    told.put((longest, count))


# Attackers --------------------------------------------------------------------------------------


def schemas(listener: int) -> dict[str, Any]:
    """Schemas that hung a server, kept it busy, or made it ask elsewhere."""
    there = f"http://127.0.0.1:{listener}/schema"
    twice = {
        f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} if i < 17 else {"type": "null"}
        for i in range(18)
    }
    chain = {f"r{i}": {"$ref": f"#/$defs/r{i + 1}"} for i in range(80_000)}
    nested: dict[str, Any] = {"type": "null"}
    for _ in range(15):
        nested = {"anyOf": [nested, nested]}
    return {
        "regex bomb beside enum": {"enum": ["a" * 40 + "!"], "pattern": "^(a+)+$"},
        "regex bomb beside const": {"const": "a" * 40 + "!", "pattern": "^(a+)+$"},
        "$dynamicRef elsewhere": {"enum": ["x"], "$dynamicRef": there},
        "$recursiveRef elsewhere": {"enum": ["x"], "$recursiveRef": there},
        "$ref elsewhere": {"$ref": there},
        "$schema elsewhere": {"$schema": there, "enum": ["x"]},
        "$id elsewhere": {"$id": there, "enum": ["x"], "$dynamicRef": "#/a"},
        "enum beside anyOf": {
            "enum": [f"v{i}" for i in range(2000)],
            "anyOf": [{"const": f"v{i}"} for i in range(1000)],
        },
        "100,000 options": {"enum": [f"option {i}" for i in range(100_000)]},
        "5,000 options": {"enum": [f"option {i}" for i in range(5000)]},
        "anyOf doubled": {"$ref": "#/$defs/d0", "$defs": twice},
        "anyOf nested": nested,
        "chain of references": {"$ref": "#/$defs/r0", "$defs": {**chain, "r80000": True}},
        "a long string": {"type": "string", "maxLength": 3000},
        "NaN": {"const": float("nan")},
    }


def texts() -> dict[str, tuple[str, Any]]:
    """Much text, and little text that means much work."""
    hello = [{"role": "user", "content": "hello"}]
    labels = [f"label {i}" for i in range(300)]
    long = "x" * LONG
    found: dict[str, tuple[str, Any]] = {
        "long prompt": (CHAT, {"messages": [{"role": "user", "content": long}]}),
        "long prompt of spaces": (
            CHAT,
            {"messages": [{"role": "user", "content": "a " * 1900000}]},
        ),
        "long opening": (CHAT, {"messages": hello, "opening": long}),
        "long stop": (CHAT, {"messages": hello, "stop": [long]}),
        "many messages": (CHAT, {"messages": hello * 80_000}),
        "long completion": ("/v1/completions", {"prompt": long}),
        "long prompts": ("/v1/completions", {"prompt": ["x" * 15_000] * 250}),
        "long suffix": ("/v1/completions", {"prompt": "a", "suffix": long}),
        "long canvas": ("/v1/fill", {"canvas": [{"text": long}]}),
        "a million braces": ("/v1/fill", {"template": "{" * 1_000_000 + "{{x}}"}),
        "a million names": ("/v1/fill", {"template": "{{!}}" * 700_000 + "{{x}}"}),
        "1,000 holes": ("/v1/fill", {"template": "{{}} " * 1000, "prompt": "x"}),
        "100,000 options": ("/v1/fill", {"template": "{{a:" + "x|y" * 100_000 + "}}"}),
        "4,000 options": ("/v1/fill", {"template": f"{{{{a:{'|'.join(map(str, range(4000)))}}}}}"}),
        "digits": ("/v1/fill", {"template": "{{a:" + "9" * 5000 + "}}"}),
        "braces to choose in": (
            "/v1/choose",
            {"prompt": "x", "labels": ["a", "b"], "template": "{" * 1_000_000 + "{label}"},
        ),
        "labels": (
            "/v1/choose",
            {"prompt": "x", "labels": labels, "draws": 64, "template": "{label}."},
        ),
        "some labels": ("/v1/choose", {"prompt": "x", "labels": labels[:30], "draws": 64}),
        "long labels": (
            "/v1/choose",
            {"prompt": "x", "labels": ["a" * 1_900_000, "b" * 1_900_000]},
        ),
        "long edit": ("/v1/edit", {"text": long, "instruction": "x"}),
        "edit of a line beside much": (
            "/v1/edit",
            {"text": "1\n" + "x" * 4_000, "instruction": "x", "lines": [1, 1]},
        ),
        "lines to edit": ("/v1/edit", {"text": "\n" * 1_900_000, "instruction": "x"}),
        "1,000 lines to edit": ("/v1/edit", {"text": "12\n" * 1000, "instruction": "x"}),
        "long slot": ("/v1/choose", {"prompt": "x", "labels": {"n" * LONG: ["a", "b"]}}),
    }
    half = "\ud800"
    call = {"id": "1", "type": "function", "function": {"name": half, "arguments": "{}"}}
    for name, path, body in (
        ("content", CHAT, {"messages": [{"role": "user", "content": half}]}),
        ("opening", CHAT, {"messages": hello, "opening": half}),
        ("stop", CHAT, {"messages": hello, "stop": half}),
        ("tool", CHAT, {"messages": [*hello, {"role": "assistant", "tool_calls": [call]}]}),
        ("template", "/v1/fill", {"template": half + "{{x}}"}),
        ("edit", "/v1/edit", {"text": half, "instruction": "x"}),
        ("label", "/v1/choose", {"prompt": "x", "labels": [half, "b"]}),
        ("completion", "/v1/completions", {"prompt": half}),
    ):
        found[f"lone surrogate: {name}"] = path, body
    return found


def attacks(listener: int) -> dict[str, tuple[str, bytes]]:
    """Path and body of each request, by name."""
    found = {name: (path, json.dumps(body).encode()) for name, (path, body) in texts().items()}
    hello = {"messages": [{"role": "user", "content": "hello"}]}
    for name, schema in schemas(listener).items():
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        found[f"schema: {name}"] = CHAT, json.dumps({**hello, "response_format": form}).encode()
    message = json.dumps(hello).encode()[:-1]
    deep = b"[" * 200_000
    found["brackets"] = CHAT, deep
    found["brackets in messages"] = CHAT, b'{"messages": ' + deep
    found["brackets in a schema"] = (
        CHAT,
        message + b', "response_format": {"type": "json_schema", "x": ' + deep + b"}}",
    )
    found["huge seed"] = CHAT, message + b', "seed": ' + b"9" * 5000 + b"}"
    found["huge n"] = CHAT, message + b', "n": 1e400, "max_tokens": -1}'
    found["closed brackets"] = CHAT, message + b', "x": ' + deep + b"]" * 200_000 + b"}"
    return found


class Attackers:
    """Send everything there is, over and over, each in an order of its own."""

    def __init__(self, server: Server, requests: dict[str, tuple[str, bytes]]):
        self._server = server
        self._requests = requests
        self.told: dict[str, Counter[str]] = defaultdict(Counter)
        self.longest: dict[str, float] = defaultdict(float)
        self.lost: list[Lost] = []
        self.problems: list[str] = []

    def attack(self, number: int, ends: float) -> None:
        """As one attacker, until then."""
        rng = random.Random(number)
        special: dict[str, Callable[[random.Random], str]] = {
            "half-open": self._half_open,
            "leaves at once": self._leave,
            "leaves a body behind": self._half_body,
        }
        while time.monotonic() < ends:
            names = [*self._requests, *special, *special]
            rng.shuffle(names)
            for name in names:
                if time.monotonic() > ends:
                    return
                began = time.monotonic()
                told = special[name](rng) if name in special else self._send(name)
                self.told[name][told] += 1
                self.longest[name] = max(self.longest[name], time.monotonic() - began)

    def _send(self, name: str) -> str:
        path, body = self._requests[name]
        began = time.monotonic()
        kind = {"Content-Type": "application/json"}
        try:
            reply = httpx.post(
                f"{self._server.url}{path}", content=body, headers=kind, timeout=PATIENCE
            )
            reply.json()
        except httpx.TimeoutException:
            return "left"
        except httpx.TransportError:  # an answer may come before the whole body has been sent
            return "closed"
        except ValueError:
            self.problems.append(f"{name}: {reply.status_code} is no JSON: {reply.text[:100]}")
            return "no JSON"
        if reply.status_code == 502 and LOST in reply.text:
            self.lost.append((began, time.monotonic()))
        elif reply.status_code >= 500:
            self.problems.append(f"{name}: {reply.status_code} {reply.text[:200]}")
        return str(reply.status_code)

    def _raw(self, data: bytes, seconds: float) -> str:
        try:
            with socket.create_connection(("127.0.0.1", self._server.port), timeout=10) as made:
                made.sendall(data)
                time.sleep(seconds)
        except OSError:
            return "closed"
        return "left"

    def _half_open(self, rng: random.Random) -> str:
        return self._raw(b"POST /v1/fill HTTP/1.1\r\nHost: loc", rng.random() * 3)

    def _whole(self, rng: random.Random) -> bytes:
        path, body = rng.choice(list(self._requests.values()))
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    def _leave(self, rng: random.Random) -> str:
        return self._raw(self._whole(rng), rng.random() / 5)

    def _half_body(self, rng: random.Random) -> str:
        data = self._whole(rng)
        return self._raw(data[: len(data) * 2 // 3], rng.random())


# Everything at once -----------------------------------------------------------------------------


def listening(heard: list[str]) -> int:
    """The port of a listener that notes whoever connects."""
    listener = socket.create_server(("127.0.0.1", 0))

    def listen() -> None:
        while True:
            made, address = listener.accept()
            heard.append(str(address))
            made.close()

    threading.Thread(target=listen, daemon=True).start()
    return listener.getsockname()[1]


def run(arguments: argparse.Namespace, server: Server, two: Two | None) -> list[str]:
    """What went wrong, after everything that is to be told has been printed."""
    heard: list[str] = []
    clients = Clients(server, arguments.clients)
    attackers = Attackers(server, attacks(listening(heard)))
    clients.ask(("1", 0))
    memory = [server.memory()]
    ends = time.monotonic() + arguments.seconds
    spawn = multiprocessing.get_context("spawn")
    told: Queue[tuple[float, int]] = spawn.Queue()
    watcher = spawn.Process(target=watch, args=(server.url, time.time() + arguments.seconds, told))
    watcher.start()
    threads = [
        threading.Thread(target=work, args=(i, ends))
        for work, count in (
            (clients.talk, arguments.clients),
            (attackers.attack, arguments.attackers),
        )
        for i in range(count)
    ]
    if two is not None:
        threads.append(threading.Thread(target=two.replace, args=(arguments.seconds / 3,)))
    for thread in threads:
        thread.start()
    time.sleep(arguments.seconds / 2)
    memory.append(server.memory())
    longest, polls = told.get(timeout=arguments.seconds + 120)
    for thread in [*threads, watcher]:
        thread.join()
    others = clients.others()
    memory.append(server.memory())
    print(
        f"ordinary: {len(clients.answers)} answers, the longest wait {clients.longest:.1f} s,",
        end="",
    )
    print(f" {clients.refused} refused for the queue's length, {others} not what is given alone")
    for name, counts in sorted(attackers.told.items()):
        print(f"  {name}: {dict(counts)}, at most {attackers.longest[name]:.1f} s")
    print(f"/health: {polls} polls, the longest {longest:.3f} s")
    print("memory in MB, start, middle, end:", *(f"{mb:.0f}" for mb in memory))
    print("load of the machine:", *(f"{load:.1f}" for load in os.getloadavg()))
    problems = [*clients.problems, *attackers.problems, *(f"heard from {who}" for who in heard)]
    if two is not None:
        problems += two.problems([*clients.lost, *attackers.lost])
    if others or not clients.answers:
        problems.append(f"{others} of {len(clients.answers)} answers are not what is given alone")
    if longest > arguments.health:
        problems.append(f"/health took {longest:.2f} s")
    if memory[-1] - memory[0] > MOST_GROWTH:
        problems.append(f"memory grew by {memory[-1] - memory[0]:.0f} MB")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--attackers", type=int, default=4)
    parser.add_argument("--health", type=float, default=1, help="seconds that /health may take")
    parser.add_argument("--workers", action="store_true", help="one address before two servers")
    arguments = parser.parse_args()
    two = Two() if arguments.workers else None
    server = Server(*MODEL) if two is None else two.front
    try:
        problems = run(arguments, server, two)
        if any(each.process.poll() is not None for each in (two.all if two else [server])):
            problems.append("a server has ended")
    finally:
        for each in two.all if two else [server]:
            each.end()
    for line in [*dict.fromkeys(problems), *server.said[:20]]:
        print(line.rstrip(), file=sys.stderr)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
