"""`serve --workers`: which servers stand behind one address."""

import ipaddress
import re
import socket
import sys
from dataclasses import dataclass
from typing import Annotated

import typer

from .terminal import fail

# Workers behind one address.
MOST_WORKERS = 64

# Files that a process may have open, where the system allows so many: each request is two
# connections, and macOS begins with 256.
FILES = 4096

_NAME = re.compile(r"(?!-)[a-z\d._-]{1,253}")

_OWN = ("localhost", "127.0.0.1", "::1", "0.0.0.0", "::")


@dataclass(frozen=True)
class Front:
    """Which servers answer instead of a model of this one."""

    workers: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT,...",
            help="Load no model: be one address before these servers.",
        ),
    ] = None

    def __post_init__(self) -> None:
        # Ranks would meet first, to share a model.
        if self.workers is not None and "--shard" in sys.argv:
            fail("--workers does not go with --shard: workers may be started with it", code=2)

    def addresses(self, host: str, port: int) -> list[str]:
        """Read the workers of a server that listens itself on `host` and `port`.

        Raises:
            SystemExit: one is no address, stands there twice, or is this server itself.
        """
        found: list[str] = []
        for each in (self.workers or "").split(","):
            name, number = _address(each.strip())
            if number == port and name in (*_OWN, host.lower(), *_names()):
                fail(f"--workers: {each.strip()} is this server itself", code=2)
            address = f"[{name}]:{number}" if ":" in name else f"{name}:{number}"
            if address in found:
                fail(f"--workers: {each.strip()} stands there twice", code=2)
            found.append(address)
        if len(found) > MOST_WORKERS:
            fail(f"--workers takes {MOST_WORKERS} at most, not {len(found)}", code=2)
        return found


def _address(given: str) -> tuple[str, int]:
    """Host and port of a worker; `localhost` is 127.0.0.1."""
    name, _, digits = given.lower().rpartition(":")
    number = int(digits) if re.fullmatch(r"[0-9]{1,5}", digits) else 0
    if name.startswith("[") and name.endswith("]") and _is_ipv6(name[1:-1]):
        name = str(ipaddress.IPv6Address(name[1:-1]))
    elif not _NAME.fullmatch(name):
        number = 0
    if not 0 < number < 1 << 16:
        fail(f"--workers takes HOST:PORT,HOST:PORT,..., and {given!r} is no HOST:PORT", code=2)
    return "127.0.0.1" if name == "localhost" else name, number


def _is_ipv6(name: str) -> bool:
    try:
        return ipaddress.IPv6Address(name).scope_id is None
    except ValueError:
        return False


def _names() -> tuple[str, str]:
    """Names of this machine."""
    own = socket.gethostname().lower()
    return own, f"{own.removesuffix('.local')}.local"


def allow_connections() -> None:
    """Let this process have as many connections as it may need."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
