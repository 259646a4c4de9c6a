"""Checks of Ray: address, token and job server; then of the cluster that RAY_ADDRESS names.

`judge` looks from this machine without joining the cluster. `judge_nodes` joins it in a process of
its own (`ray_probe`) and judges whether the job fits, and what each node sees.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.config import Config
from cluster.doctor.finding import Finding, fail, ok, warn
from cluster.doctor.hardware import MIN_FILES, MIN_SHARED
from cluster.doctor.job import checkpoint_bytes, judge_room
from cluster.doctor.ray_probe import list_releases
from cluster.launch.placement import Node, choose_size
from cluster.launch.session import (
    CONNECT_SECONDS,
    IN_JOB,
    REPOSITORY,
    examine_address,
    suggest_mend,
    try_connection,
)
from pipeline.remote.filesystem import is_remote
from pipeline.tools.files import read_text
from pipeline.tools.jsonl import parse_json
from pipeline.tools.text import hide_credentials, human_bytes

UPLOAD = 100 * 2**20
"""Bytes that a job server takes at most."""
UPLOADED = (".py", ".j2", ".css", ".c", ".inc", ".toml")
"""Endings of the files in the packages that `.rayignore` lets through."""
NODE_SECONDS = 90
"""Timeout of joining the cluster and asking its nodes."""


def judge(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Judge token, job server and address, without joining the cluster."""
    address = environment.get("RAY_ADDRESS", "")
    jobs = environment.get("RAY_API_SERVER_ADDRESS", "")
    yield from judge_token(environment, is_client=bool(address or jobs))
    if jobs:
        yield judge_job_server(jobs)
        yield judge_upload(REPOSITORY)
    if address:
        yield judge_address(address)
        return
    text = "RAY_ADDRESS is not set: a training starts a Ray of its own and ends it; it listens on "
    yield ok("Ray", f"{text}loopback only (RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, which it sets)")
    # Where `ray start` stores the address for `ray` commands without one.
    folder = environment.get("RAY_TMPDIR") or "/tmp"
    yield from judge_old_address(Path(folder, "ray", "ray_current_cluster"))


def judge_token(environment: Mapping[str, str], is_client: bool) -> Iterator[Finding]:
    """Judge the token that protects a cluster.

    Args:
        environment: variables.
        is_client: this machine connects to a cluster, rather than to a Ray of its own.
    """
    mode = environment.get("RAY_AUTH_MODE", "")
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    in_variable = bool(environment.get("RAY_AUTH_TOKEN"))
    if mode == "disabled":
        if is_client:
            text = "RAY_AUTH_MODE=disabled: whoever reaches the cluster's ports runs any code on it"
            yield warn("token", text, "RAY_AUTH_MODE=token, on all nodes")
    elif not in_variable and not path.exists():
        if mode == "token":
            mend = f"ray get-auth-token --generate > /dev/null; chmod 600 {path}   # or copy "
            yield fail("token", f"RAY_AUTH_MODE=token, and no {path}", f"{mend}the cluster's there")
    elif not in_variable and stat.S_IMODE(path.stat().st_mode) & 0o077:
        yield warn("token", f"{path} can be read by others", f"chmod 600 {path}")
    elif is_client and mode != "token":
        text = f"there is one, and RAY_AUTH_MODE is {mode or 'not set'}: clients of a cluster do "
        yield warn("token", f"{text}not look for it", "export RAY_AUTH_MODE=token")
    else:
        yield ok("token", "in RAY_AUTH_TOKEN" if in_variable else f"{path}, for its owner only")


def judge_job_server(address: str) -> Finding:
    """Judge whether jobs can be submitted to an address."""
    mend = "export RAY_API_SERVER_ADDRESS=http://HEAD:8265, or a tunnel: ssh -L 8265:localhost:8265"
    if not address.startswith(("http://", "https://")):
        return fail("job server", f"RAY_API_SERVER_ADDRESS={address} is no http://", mend)
    version = f"{address.rstrip('/')}/api/version"
    try:
        with urllib.request.urlopen(version, timeout=CONNECT_SECONDS) as answer:
            answer.read()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):  # it is there, and asks for the token
            return ok("job server", f"{address} answers, and asks for the token")
        return fail("job server", f"{address} says {error.code}", mend)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return fail("job server", f"{address} does not answer ({reason})", mend)
    return ok("job server", f"{address} answers")


def judge_upload(root: Path) -> Finding:
    """Judge the size of what `ray job submit --working-dir .` sends from a checkout."""
    sizes = {
        path: path.stat().st_size
        for package in ("pipeline", "model", "cluster")
        for path in (root / package).rglob("*")
        if path.suffix in UPLOADED and path.is_file()
    }
    total = sum(sizes.values())
    if total < UPLOAD:
        return ok("upload", f"{human_bytes(total)} of code go with a job")
    largest = max(sizes, key=lambda path: sizes[path])
    text = f"{human_bytes(total)} would go with a job, more than a job server takes; the largest "
    text += f"file is {largest} ({human_bytes(sizes[largest])})"
    return fail("upload", text, "move it out of the packages, or name it in .rayignore")


def judge_address(address: str) -> Finding:
    """Judge whether RAY_ADDRESS is well formed, and whether a process listens there."""
    if found := examine_address(address):
        return fail("RAY_ADDRESS", *found)
    is_word = address in ("auto", "local")
    return ok("RAY_ADDRESS", address if is_word else f"{address} answers")


def judge_old_address(path: Path) -> Iterator[Finding]:
    """Judge an address file that a stopped head may have left."""
    address = read_text(path)
    if address and (error := try_connection(address)):
        text = f"{path} names {address}, which does not answer ({error})"
        mend = f"rm {path}"
        yield warn("old cluster", f"{text}: bare `ray` commands try it; trainings do not", mend)


def judge_nodes(config: Config | None, data: str, run: Path | None) -> Iterator[Finding]:
    """Join the cluster; judge its free resources and each of its nodes."""
    folder = None
    if run is not None and run.is_dir() and not (config and is_remote(config.store)):
        folder = run.resolve()
    mark = f".doctor.{secrets.token_hex(8)}"
    in_job = IN_JOB in os.environ
    request = {
        "run": str(folder or ""),
        "mark": mark,
        "data": str(Path(data).resolve()) if data and not is_remote(data) else "",
        "address": data if is_remote(data) else "",
        "code": "" if in_job else str(REPOSITORY),
    }
    marks: set[str] = set()
    try:
        if folder is not None:
            (folder / mark).touch()
        answer = run_probe(request)
    finally:
        if folder is not None:
            for path in folder.glob(f"{mark}*"):
                marks.add(path.name)
                path.unlink(missing_ok=True)
    if "why" in answer:
        why = answer["why"]
        yield fail("Ray", f"{os.environ['RAY_ADDRESS']}: {why}", suggest_mend(why))
        return
    room = [Node(**node) for node in answer["room"]]
    free = ", ".join(f"{n.name}: {n.cpus:g} CPUs, {n.gpus:g} GPUs" for n in room)
    yield ok("Ray", f"joined in {answer['seconds']:.1f} s; free are {free}")
    if config is not None:
        yield judge_room(config, room)
    need = checkpoint_bytes(config, None) if folder else 0
    size = choose_size(config or Config(), room, True)
    for node in answer["nodes"]:
        yield judge_node(node, list_releases(), request, marks, need, size)


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
            answer: dict[str, Any] = parse_json(out.read_text(encoding="utf-8"))
            return answer
        return {"why": find_error(done.stderr) or f"the driver ended with code {done.returncode}"}


def find_error(text: str) -> str:
    """Return the last line of an output that names an error; else its last line, or nothing."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line]
    return (errors or lines or [""])[-1][:300]


def judge_node(
    node: dict[str, Any], own: dict[str, str], request: dict[str, str], marks: set[str],
    need: int, size: int,
) -> Finding:  # fmt: skip
    """Judge the answer of a node.

    Args:
        node: one of the `nodes` of `ray_probe.ask_nodes`.
        own: releases of the packages on this machine.
        request: request that the node answered.
        marks: names of the marker files in the run's folder, as this machine sees them.
        need: bytes of a checkpoint.
        size: workers of a replica on GPUs, 2 or 1.
    """
    name = f"node {node['name']} ({node['id'][:6]})"
    if "why" in node:
        return fail(name, node["why"], f"ray logs raylet.err --node-id {node['id']}")
    has = node["answer"]
    theirs = {package: has["releases"].get(package, "is missing") for package in own}
    if theirs != own:
        differences = (f"{n} {theirs[n]}, here {own[n]}" for n in own if theirs[n] != own[n])
        mend = "pip install -c constraints.txt -e . the same on all nodes"
        return fail(name, "; ".join(differences), mend)
    run, data, storage = request["run"], request["data"], "on storage that all nodes mount"
    if has.get("run") is False:
        mend = f"a --run {storage}, or --store s3://bucket/folder"
        return fail(name, f"does not see {run}", mend)
    if "cannot_write" in has:
        mend = f"chown it to the user that runs Ray there; or a --run {storage}"
        return fail(name, f"cannot write in {run} ({has['cannot_write']})", mend)
    if "own" in has and has["own"] not in marks:
        return fail(name, f"what it writes in {run} does not arrive here", f"a --run {storage}")
    if has.get("data") is False:
        mend = f"a --data {storage}, or its address in a store"
        return fail(name, f"does not see {data}", mend)
    if has.get("address"):
        text = hide_credentials(f"{request['address']}: {has['address']}")
        mend = "the store's credentials in that node's environment, or ray job submit "
        return fail(name, text, mend + "--runtime-env-json '{\"env_vars\": {...}}'")
    if weakness := _find_weakness(node, has, need, size):
        return warn(name, *weakness)
    places = ["RUN"] if has.get("run") else []
    places += ["DATA"] if has.get("data") or has.get("address") == "" else []
    sees = f", sees {' and '.join(places)}" if places else ""
    return ok(name, f"same packages{sees}")


def _find_weakness(
    node: dict[str, Any], has: dict[str, Any], need: int, size: int
) -> tuple[str, str] | None:
    """Return a weakness of a node where the training can run, and its remedy; None: no weakness."""
    gpus, devices = node["gpus"], has["devices"]
    if devices < gpus and not os.environ.get("DUET_FAKE_GPUS"):
        text = f"Ray was started with {gpus} GPUs, and there are {devices}"
        return text, f"ray start --num-gpus {devices} there"
    if has.get("code") is False:
        mend = "ray job submit --working-dir . -- python -m cluster.train ..."
        return "does not have this repository; workers need it", mend
    if gpus % size:
        mend = "--columns-per-worker 2 uses it, or start its Ray with an even --num-gpus"
        return f"{gpus} GPUs: one has no partner", mend
    if has.get("disk", need) < need:
        free = human_bytes(has["disk"])
        return f"{free} free in RUN, a checkpoint takes {human_bytes(need)}", "make room there"
    if has["files"] < MIN_FILES:
        return f"{has['files']} open files", "ulimit -n 65536   # there, before ray start"
    if has["shared"] < MIN_SHARED:
        return f"{human_bytes(has['shared'])} of /dev/shm free", "--shm-size=8g there"
    return None
