"""Ray as this machine sees it: address, token, job server. What the nodes see: `ray_nodes`.

The cluster that RAY_ADDRESS names: room, and what every node of it sees.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import stat
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.config import Config
from cluster.doctor.finding import GB, Finding, fail, first_line, ok, warn
from cluster.doctor.hardware import FILES, SHARED
from cluster.doctor.job import checkpoint_bytes, judge_room
from cluster.doctor.ray_probe import releases
from cluster.launch.placement import Node
from pipeline.remote.dataset import is_remote
from pipeline.remote.filesystem import hide_credentials

NODE_SECONDS = 90
"""For which joining the cluster and asking its nodes may take."""
REPOSITORY = Path(__file__).resolve().parent.parent.parent


def judge_nodes(config: Config | None, data: str, run: Path | None) -> Iterator[Finding]:
    """Yield what there is to say of the cluster."""
    shared = run is not None and run.is_dir() and not (config and is_remote(config.store))
    folder = run.resolve() if run is not None and shared else None
    mark = f".doctor.{secrets.token_hex(8)}"
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # its code comes with it
    request = {
        "run": str(folder or ""),
        "mark": mark,
        "data": str(Path(data).resolve()) if data and not is_remote(data) else "",
        "address": data if is_remote(data) else "",
        "code": "" if in_job else str(REPOSITORY),
    }
    if folder is not None:
        (folder / mark).write_bytes(b"")
    try:
        answer = asked(request)
        seen = {path.name for path in folder.glob(f"{mark}*")} if folder is not None else set()
    finally:
        if folder is not None:
            for path in folder.glob(f"{mark}*"):
                path.unlink(missing_ok=True)
    if "why" in answer:
        yield fail("Ray", f"{os.environ['RAY_ADDRESS']}: {answer['why']}", mend(answer["why"]))
        return
    room = [Node(**node) for node in answer["room"]]
    free = ", ".join(f"{n.name}: {n.cpus:g} CPUs, {n.gpus:g} GPUs" for n in room)
    yield ok("Ray", f"joined in {answer['seconds']:.1f} s; free are {free}")
    if config is not None:
        yield judge_room(config, room)
    need = checkpoint_bytes(config, None) if folder else 0
    for node in answer["nodes"]:
        yield judge_node(node, releases(), request, seen, need)


def asked(request: dict[str, str]) -> dict[str, Any]:
    """Have a process of its own join the cluster and ask its nodes."""
    with tempfile.TemporaryDirectory(prefix="duet-doctor-") as scratch:
        out = Path(scratch) / "answer"
        command = [sys.executable, "-m", "cluster.doctor.ray_probe", str(out)]
        paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        try:
            done = subprocess.run(
                command, input=json.dumps(request), env=environment, capture_output=True,
                text=True, errors="replace", timeout=NODE_SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"why": f"no answer for {SECONDS} s"}
        if out.exists():
            found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
            return found
        return {"why": last_words(done.stderr) or f"the driver ended with code {done.returncode}"}


def last_words(text: str) -> str:
    """The line of a dying process that says most: the last one that names an error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line]
    return (errors or lines or [""])[-1][:300]


def mend(why: str) -> str:
    """What to do about a driver that could not join."""
    low = why.lower()
    if "version mismatch" in low:
        return (
            "the same Python on both sides, and pip install -c constraints.txt 'ray[default,train]'"
        )
    refused = "failed to connect" in low  # all that Ray says of a token that is not the cluster's
    if refused or "token" in low or "authenticat" in low or "unauthorized" in low:
        return (
            "export RAY_AUTH_MODE=token; the head's ~/.ray/auth_token belongs here, too, mode 600; "
            "`ray status` on the head says whether it is well"
        )
    return "ray status   # on the head; or unset RAY_ADDRESS"


def judge_node(
    node: dict[str, Any], mine: dict[str, str], request: dict[str, str], seen: set[str], need: int
) -> Finding:
    """Judge what a node has said.

    Args:
        node: as `ray_asker.ask` returns it.
        mine: releases here.
        request: what it was asked for.
        seen: names of the marks in the run's folder, as the driver sees them.
        need: free bytes that a checkpoint takes.
    """
    name = f"node {node['name']} ({node['id'][:6]})"
    if "why" in node:
        return fail(name, node["why"], f"ray logs raylet.err --node-id {node['id']}")
    has = node["answer"]
    if told := differing(mine, has["releases"]):
        return fail(name, told, "pip install -c constraints.txt -e . the same on all nodes")
    share = "on storage that all nodes mount"
    if has.get("run") is False:
        return fail(name, f"does not see {request['run']}", f"a --run {share}, or --store "
                    "s3://bucket/folder")  # fmt: skip
    if "cannot_write" in has:
        return fail(name, f"cannot write in {request['run']} ({has['cannot_write']})",
                    f"chown it to the user that runs Ray there; or a --run {share}")  # fmt: skip
    if "own" in has and has["own"] not in seen:
        return fail(name, f"what it writes in {request['run']} does not arrive here",
                    f"a --run {share}")  # fmt: skip
    if has.get("data") is False:
        return fail(name, f"does not see {request['data']}", f"a --data {share}, or its address "
                    "in a store")  # fmt: skip
    if has.get("address"):
        said = hide_credentials(f"{request['address']}: {has['address']}")
        return fail(name, said, "the store's credentials in that node's environment, or "
                    "ray job submit --runtime-env-json '{\"env_vars\": {...}}'")  # fmt: skip
    return _weak_points(name, node, has, need) or ok(name, _sees(has))


def differing(mine: dict[str, str], theirs: dict[str, str]) -> str:
    """Packages whose releases differ, in words; empty if none does."""
    return "; ".join(
        f"{package} {theirs.get(package, 'is missing')}, here {release}"
        for package, release in mine.items()
        if theirs.get(package) != release
    )


def _weak_points(name: str, node: dict[str, Any], has: dict[str, Any], need: int) -> Finding | None:
    gpus, fake = node["gpus"], os.environ.get("DUET_FAKE_GPUS")
    if has["devices"] < gpus and not fake:
        return warn(name, f"Ray was told of {gpus} GPUs, and there are {has['devices']}",
                    f"ray start --num-gpus {has['devices']} there")  # fmt: skip
    if has.get("code") is False:
        return warn(name, "does not have this repository; workers need it",
                    "ray job submit --working-dir . -- python -m cluster.train ...")  # fmt: skip
    if gpus % 2:
        mend = "--columns-per-worker 2 uses it, or start its Ray with an even --num-gpus"
        return warn(name, f"{gpus} GPUs: one has no partner", mend)
    if "disk" in has and has["disk"] < need:
        return warn(name, f"{has['disk'] / GB:.1f} GB free in RUN, a checkpoint takes "
                    f"{need / GB:.1f}", "make room there")  # fmt: skip
    if has["files"] < FILES:
        return warn(
            name, f"{has['files']} open files", "ulimit -n 65536   # there, before ray start"
        )
    if has["shared"] < SHARED:
        return warn(name, f"{has['shared'] / GB:.1f} GB of /dev/shm free", "--shm-size=8g there")
    return None


def _sees(has: dict[str, Any]) -> str:
    data = has.get("data") or has.get("address") == ""
    places = [what for what, there in (("RUN", has.get("run")), ("DATA", data)) if there]
    sees = f", sees {' and '.join(places)}" if places else ""
    return f"same packages{sees}"


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
