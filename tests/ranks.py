"""Ranks on this machine: as `mlx.launch` starts them, or each a process that a test can end."""

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

LAUNCH = [sys.executable, "-c", "from mlx._distributed_utils.launch import main; main()"]
COMMAND = [sys.executable, "-m", "mlx_diffgemma"]
TIMEOUT = 300


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, in a row."""
    while True:
        with ExitStack() as stack, socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            base = first.getsockname()[1]
            try:
                for port in range(base + 1, base + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except (OSError, OverflowError):
                continue
            return list(range(base, base + count))


def launched(count: int, *command: str | Path) -> "subprocess.CompletedProcess[str]":
    """What a command says under `mlx.launch`, whose exit code says nothing."""
    port = free_ports(count)[0]
    options = ["-n", str(count), "--backend", "ring", "--starting-port", str(port), "--"]
    return subprocess.run(
        [*LAUNCH, *options, *map(str, command)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def variables_of(count: int, folder: Path) -> list[dict[str, str]]:
    """What `mlx.launch` sets for each rank."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(count)]))
    return [{"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)} for rank in range(count)]


def started(
    count: int, folder: Path, *command: str | Path, stdin: int | None = None, **environment: str
) -> "list[subprocess.Popen[str]]":
    """The ranks of a command, which nobody ends but the test; rank 0 may have another stdin."""
    variables = variables_of(count, folder)
    return [
        subprocess.Popen(
            list(map(str, command)),
            env={**os.environ, **variables[rank], **environment},
            stdin=subprocess.DEVNULL if rank or stdin is None else stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
