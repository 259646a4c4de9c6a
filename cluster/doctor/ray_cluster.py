"""Ray as this machine sees it: address, token, job server. What the nodes see: `ray_nodes`."""

from __future__ import annotations

import os
import socket
import stat
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from cluster.doctor.finding import Finding, fail, first_line, ok, warn

SECONDS = 5
"""For which a port may take to answer."""
START = "ray start --head --dashboard-host 127.0.0.1   # on the head"
GCS_PORT = 6379


def judge(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Yield what there is to say, short of joining the cluster."""
    address = environment.get("RAY_ADDRESS", "")
    jobs = environment.get("RAY_API_SERVER_ADDRESS", "")
    yield from token(environment, clients=bool(address or jobs))
    if jobs:
        yield dashboard(jobs)
    if not address:
        yield ok(
            "Ray", "RAY_ADDRESS is not set: a training starts a Ray of its own and ends it; it "
            "listens on loopback only (RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, which it sets)",
        )  # fmt: skip
        yield from stale(address_file(), answers)
        return
    yield reachable(address)


def token(environment: Mapping[str, str], clients: bool) -> Iterator[Finding]:
    """Judge the token that guards a cluster.

    Args:
        environment: variables.
        clients: this machine talks to a cluster, rather than to a Ray of its own.
    """
    mode = environment.get("RAY_AUTH_MODE", "")
    given = environment.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")
    path = Path(given).expanduser()
    if mode == "disabled":
        if clients:
            yield warn("token", "RAY_AUTH_MODE=disabled: whoever reaches the cluster's ports runs "
                       "what he likes on it", "RAY_AUTH_MODE=token, on all nodes")  # fmt: skip
        return
    if environment.get("RAY_AUTH_TOKEN"):
        if clients and mode != "token":
            yield _not_looked_for(mode)
        else:
            yield ok("token", "in RAY_AUTH_TOKEN")
    elif not path.exists():
        if mode == "token":
            yield fail("token", f"RAY_AUTH_MODE=token, and no {path}",
                       f"ray get-auth-token --generate > /dev/null; chmod 600 {path}   # or copy "
                       "the cluster's there")  # fmt: skip
    elif stat.S_IMODE(path.stat().st_mode) & 0o077:
        yield warn("token", f"{path} can be read by others", f"chmod 600 {path}")
    elif clients and mode != "token":
        yield _not_looked_for(mode)
    else:
        yield ok("token", f"{path}, for its owner only")


def _not_looked_for(mode: str) -> Finding:
    return warn("token", f"there is one, and RAY_AUTH_MODE is {mode or 'not set'}: clients of a "
                "cluster do not look for it", "export RAY_AUTH_MODE=token")  # fmt: skip


def dashboard(address: str) -> Finding:
    """Look whether jobs can be submitted there."""
    mend = "export RAY_API_SERVER_ADDRESS=http://HEAD:8265, or a tunnel: ssh -L 8265:localhost:8265"
    if not address.startswith(("http://", "https://")):
        return fail("job server", f"RAY_API_SERVER_ADDRESS={address} is no http://", mend)
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=SECONDS) as got:
            got.read()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):  # it is there, and asks for the token
            return ok("job server", f"{address} answers, and asks for the token")
        return fail("job server", f"{address} says {error.code}", mend)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return fail("job server", f"{address} does not answer ({reason})", mend)
    return ok("job server", f"{address} answers")


def reachable(address: str) -> Finding:
    """Look whether something listens where RAY_ADDRESS says."""
    start = f"{START}; then export RAY_ADDRESS=HEAD:{GCS_PORT}; or unset RAY_ADDRESS"
    if address.startswith(("http://", "https://")):
        return fail("RAY_ADDRESS", f"{address} is a job server's address",
                    f"export RAY_API_SERVER_ADDRESS={address}; unset RAY_ADDRESS")  # fmt: skip
    if address.startswith("ray://"):
        return fail("RAY_ADDRESS", f"{address} is for Ray's client, which Ray Train does not do "
                    "with", "ray job submit, or RAY_ADDRESS=HEAD:6379 on the head")  # fmt: skip
    if address in ("auto", "local"):
        return ok("RAY_ADDRESS", address)
    host, port = _split(address)
    if not port:
        return fail("RAY_ADDRESS", f"{address} has no port",
                    f"export RAY_ADDRESS={host}:{GCS_PORT}")  # fmt: skip
    why = answers(address)
    if why:
        return fail("RAY_ADDRESS", f"{address} does not answer ({why})", start)
    return ok("RAY_ADDRESS", f"{address} answers")


def answers(address: str) -> str:
    """Why nothing answers at HOST:PORT; empty if something does."""
    host, port = _split(address)
    try:
        with socket.create_connection((host, port), SECONDS):
            return ""
    except (OSError, OverflowError) as error:
        return getattr(error, "strerror", None) or first_line(error)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return (host.strip("[]"), int(port)) if host and port.isdecimal() else (address, 0)


def address_file() -> Path:
    """Where `ray start` leaves the address that a `ray` command without any takes."""
    return Path(os.environ.get("RAY_TMPDIR") or "/tmp", "ray", "ray_current_cluster")


def stale(path: Path, silent: Callable[[str], str]) -> Iterator[Finding]:
    """Judge an address that a stopped head may have left behind; `silent` is `answers`."""
    try:
        address = path.read_text(encoding="utf-8").strip()
    except OSError:
        return
    if address and (why := silent(address)):
        yield warn("old cluster", f"{path} names {address}, which does not answer ({why}): bare "
                   "`ray` commands try it; trainings do not", f"rm {path}")  # fmt: skip
