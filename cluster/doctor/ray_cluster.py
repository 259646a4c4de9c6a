"""Checks of Ray: address, token and job server; then of the cluster that RAY_ADDRESS names.

`judge` looks from this machine without joining the cluster. `judge_nodes` joins it in a process of
its own (`ray_probe`) and judges whether the job fits, and what each node sees.
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
from cluster.doctor.finding import GB, Finding, fail, ok, warn
from cluster.doctor.hardware import MIN_FILES, MIN_SHARED
from cluster.doctor.job import checkpoint_bytes, judge_room
from cluster.doctor.ray_probe import list_releases
from cluster.launch.placement import Node
from pipeline.remote.filesystem import hide_credentials, is_remote
from pipeline.tools.errors import summarize_error

CONNECT_SECONDS = 5
"""Timeout of a connection to a port."""
NODE_SECONDS = 90
"""Timeout of joining the cluster and asking its nodes."""
GCS_PORT = 6379
REPOSITORY = Path(__file__).resolve().parent.parent.parent


def judge(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Judge token, job server and address, without joining the cluster."""
    address = environment.get("RAY_ADDRESS", "")
    jobs = environment.get("RAY_API_SERVER_ADDRESS", "")
    yield from judge_token(environment, is_client=bool(address or jobs))
    if jobs:
        yield judge_job_server(jobs)
    if not address:
        yield ok(
            "Ray", "RAY_ADDRESS is not set: a training starts a Ray of its own and ends it; it "
            "listens on loopback only (RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, which it sets)",
        )  # fmt: skip
        yield from judge_old_address(find_address_file(), try_connection)
        return
    yield judge_address(address)


def judge_token(environment: Mapping[str, str], is_client: bool) -> Iterator[Finding]:
    """Judge the token that protects a cluster.

    Args:
        environment: variables.
        is_client: this machine connects to a cluster, rather than to a Ray of its own.
    """
    mode = environment.get("RAY_AUTH_MODE", "")
    given = environment.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")
    path = Path(given).expanduser()
    if mode == "disabled":
        if is_client:
            yield warn("token", "RAY_AUTH_MODE=disabled: whoever reaches the cluster's ports runs "
                       "any code on it", "RAY_AUTH_MODE=token, on all nodes")  # fmt: skip
        return
    if environment.get("RAY_AUTH_TOKEN"):
        if is_client and mode != "token":
            yield _warn_unused_token(mode)
        else:
            yield ok("token", "in RAY_AUTH_TOKEN")
    elif not path.exists():
        if mode == "token":
            yield fail("token", f"RAY_AUTH_MODE=token, and no {path}",
                       f"ray get-auth-token --generate > /dev/null; chmod 600 {path}   # or copy "
                       "the cluster's there")  # fmt: skip
    elif stat.S_IMODE(path.stat().st_mode) & 0o077:
        yield warn("token", f"{path} can be read by others", f"chmod 600 {path}")
    elif is_client and mode != "token":
        yield _warn_unused_token(mode)
    else:
        yield ok("token", f"{path}, for its owner only")


def _warn_unused_token(mode: str) -> Finding:
    return warn("token", f"there is one, and RAY_AUTH_MODE is {mode or 'not set'}: clients of a "
                "cluster do not look for it", "export RAY_AUTH_MODE=token")  # fmt: skip


def judge_job_server(address: str) -> Finding:
    """Judge whether jobs can be submitted to an address."""
    mend = "export RAY_API_SERVER_ADDRESS=http://HEAD:8265, or a tunnel: ssh -L 8265:localhost:8265"
    if not address.startswith(("http://", "https://")):
        return fail("job server", f"RAY_API_SERVER_ADDRESS={address} is no http://", mend)
    try:
        with urllib.request.urlopen(
            f"{address.rstrip('/')}/api/version", timeout=CONNECT_SECONDS
        ) as answer:
            answer.read()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):  # it is there, and asks for the token
            return ok("job server", f"{address} answers, and asks for the token")
        return fail("job server", f"{address} says {error.code}", mend)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return fail("job server", f"{address} does not answer ({reason})", mend)
    return ok("job server", f"{address} answers")


def judge_address(address: str) -> Finding:
    """Judge whether RAY_ADDRESS is well formed, and whether a process listens there."""
    if address.startswith(("http://", "https://")):
        return fail("RAY_ADDRESS", f"{address} is a job server's address",
                    f"export RAY_API_SERVER_ADDRESS={address}; unset RAY_ADDRESS")  # fmt: skip
    if address.startswith("ray://"):
        return fail("RAY_ADDRESS", f"{address} is for Ray's client, which Ray Train does not "
                    "support", "ray job submit, or RAY_ADDRESS=HEAD:6379 on the head")  # fmt: skip
    if address in ("auto", "local"):
        return ok("RAY_ADDRESS", address)
    host, port = _split_address(address)
    if not port:
        return fail("RAY_ADDRESS", f"{address} has no port",
                    f"export RAY_ADDRESS={host}:{GCS_PORT}")  # fmt: skip
    if error := try_connection(address):
        mend = "ray start --head --dashboard-host 127.0.0.1   # on the head; then export "
        mend += f"RAY_ADDRESS=HEAD:{GCS_PORT}; or unset RAY_ADDRESS"
        return fail("RAY_ADDRESS", f"{address} does not answer ({error})", mend)
    return ok("RAY_ADDRESS", f"{address} answers")


def try_connection(address: str) -> str:
    """Connect to HOST:PORT; return the error message, empty if that works."""
    host, port = _split_address(address)
    try:
        with socket.create_connection((host, port), CONNECT_SECONDS):
            return ""
    except (OSError, OverflowError) as error:
        return getattr(error, "strerror", None) or summarize_error(error)


def _split_address(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return (host.strip("[]"), int(port)) if host and port.isdecimal() else (address, 0)


def find_address_file() -> Path:
    """Path of the file in which `ray start` stores the address for `ray` commands without one."""
    return Path(os.environ.get("RAY_TMPDIR") or "/tmp", "ray", "ray_current_cluster")


def judge_old_address(path: Path, connect: Callable[[str], str]) -> Iterator[Finding]:
    """Judge an address file that a stopped head may have left; `connect` is `try_connection`."""
    try:
        address = path.read_text(encoding="utf-8").strip()
    except OSError:
        return
    if address and (error := connect(address)):
        yield warn("old cluster", f"{path} names {address}, which does not answer ({error}): bare "
                   "`ray` commands try it; trainings do not", f"rm {path}")  # fmt: skip


def judge_nodes(config: Config | None, data: str, run: Path | None) -> Iterator[Finding]:
    """Join the cluster; judge its free resources and each of its nodes."""
    folder = None
    if run is not None and run.is_dir() and not (config and is_remote(config.store)):
        folder = run.resolve()
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
        answer = run_probe(request)
        marks = {path.name for path in folder.glob(f"{mark}*")} if folder is not None else set()
    finally:
        if folder is not None:
            for path in folder.glob(f"{mark}*"):
                path.unlink(missing_ok=True)
    if "why" in answer:
        yield fail(
            "Ray", f"{os.environ['RAY_ADDRESS']}: {answer['why']}", suggest_mend(answer["why"])
        )
        return
    room = [Node(**node) for node in answer["room"]]
    free = ", ".join(f"{n.name}: {n.cpus:g} CPUs, {n.gpus:g} GPUs" for n in room)
    yield ok("Ray", f"joined in {answer['seconds']:.1f} s; free are {free}")
    if config is not None:
        yield judge_room(config, room)
    need = checkpoint_bytes(config, None) if folder else 0
    for node in answer["nodes"]:
        yield judge_node(node, list_releases(), request, marks, need)


def run_probe(request: dict[str, str]) -> dict[str, Any]:
    """Start `ray_probe`, which joins the cluster and asks its nodes; return its answer.

    Returns:
        `seconds`, `room` and `nodes`; or `why`, the reason for a failure.
    """
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
            return {"why": f"no answer for {NODE_SECONDS} s"}
        if out.exists():
            answer: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
            return answer
        return {"why": find_error(done.stderr) or f"the driver ended with code {done.returncode}"}


def find_error(text: str) -> str:
    """The last line of an output that names an error; else its last line, or nothing."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line]
    return (errors or lines or [""])[-1][:300]


def suggest_mend(why: str) -> str:
    """What to do about a process that could not join the cluster."""
    low = why.lower()
    if "version mismatch" in low:
        return (
            "the same Python on both sides, and pip install -c constraints.txt 'ray[default,train]'"
        )
    # "Failed to connect" is all that Ray says of a token that is not the cluster's.
    if (
        "failed to connect" in low
        or "token" in low
        or "authenticat" in low
        or "unauthorized" in low
    ):
        return (
            "export RAY_AUTH_MODE=token; the head's ~/.ray/auth_token belongs here, too, mode 600; "
            "`ray status` on the head says whether it is well"
        )
    return "ray status   # on the head; or unset RAY_ADDRESS"


def judge_node(
    node: dict[str, Any], own: dict[str, str], request: dict[str, str], marks: set[str], need: int
) -> Finding:
    """Judge the answer of a node.

    Args:
        node: one of the `nodes` of `ray_probe.ask_nodes`.
        own: releases of the packages on this machine.
        request: that the node answered.
        marks: names of the marker files in the run's folder, as this machine sees them.
        need: bytes of a checkpoint.
    """
    name = f"node {node['name']} ({node['id'][:6]})"
    if "why" in node:
        return fail(name, node["why"], f"ray logs raylet.err --node-id {node['id']}")
    has = node["answer"]
    if differences := compare_releases(own, has["releases"]):
        return fail(name, differences, "pip install -c constraints.txt -e . the same on all nodes")
    storage = "on storage that all nodes mount"
    if has.get("run") is False:
        return fail(name, f"does not see {request['run']}", f"a --run {storage}, or --store "
                    "s3://bucket/folder")  # fmt: skip
    if "cannot_write" in has:
        return fail(name, f"cannot write in {request['run']} ({has['cannot_write']})",
                    f"chown it to the user that runs Ray there; or a --run {storage}")  # fmt: skip
    if "own" in has and has["own"] not in marks:
        return fail(name, f"what it writes in {request['run']} does not arrive here",
                    f"a --run {storage}")  # fmt: skip
    if has.get("data") is False:
        return fail(name, f"does not see {request['data']}", f"a --data {storage}, or its address "
                    "in a store")  # fmt: skip
    if has.get("address"):
        text = hide_credentials(f"{request['address']}: {has['address']}")
        return fail(name, text, "the store's credentials in that node's environment, or "
                    "ray job submit --runtime-env-json '{\"env_vars\": {...}}'")  # fmt: skip
    return _find_weakness(name, node, has, need) or ok(name, _describe_access(has))


def compare_releases(own: dict[str, str], theirs: dict[str, str]) -> str:
    """Packages whose releases differ, in words; empty if none does."""
    return "; ".join(
        f"{package} {theirs.get(package, 'is missing')}, here {release}"
        for package, release in own.items()
        if theirs.get(package) != release
    )


def _find_weakness(
    name: str, node: dict[str, Any], has: dict[str, Any], need: int
) -> Finding | None:
    """A warning about a node on which the training can run; None if there is nothing to mend."""
    gpus = node["gpus"]
    if has["devices"] < gpus and not os.environ.get("DUET_FAKE_GPUS"):
        return warn(name, f"Ray was started with {gpus} GPUs, and there are {has['devices']}",
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
    if has["files"] < MIN_FILES:
        return warn(
            name, f"{has['files']} open files", "ulimit -n 65536   # there, before ray start"
        )
    if has["shared"] < MIN_SHARED:
        return warn(name, f"{has['shared'] / GB:.1f} GB of /dev/shm free", "--shm-size=8g there")
    return None


def _describe_access(has: dict[str, Any]) -> str:
    data = has.get("data") or has.get("address") == ""
    places = [what for what, there in (("RUN", has.get("run")), ("DATA", data)) if there]
    sees = f", sees {' and '.join(places)}" if places else ""
    return f"same packages{sees}"
