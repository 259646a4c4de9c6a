"""The cluster that RAY_ADDRESS names: reachable, guarded by a token, and what every node sees."""

from __future__ import annotations

import os
import platform
import secrets
import stat
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import Config
from cluster.doctor.finding import Finding, fail, ok, warn
from pipeline.errors import DuetError

TOKEN = Path("~/.ray/auth_token")
NODE_SECONDS = 60
"""For which a node may take to answer."""
START = "ray start --head --dashboard-host 127.0.0.1   # then export RAY_ADDRESS"


@dataclass(frozen=True, kw_only=True)
class Node:
    """What a node says of itself."""

    name: str
    run: bool | None
    """Whether it sees the mark in RUN; None: there was none to look for."""
    data: bool | None
    releases: dict[str, str]
    """Of Python, torch, DALI and webdataset there."""
    gpus: int
    """That Ray has for it."""


def judge(config: Config | None, data: str, run: Path | None) -> Iterator[Finding]:
    """Yield what there is to say of Ray here and of its cluster."""
    yield from token(TOKEN.expanduser(), os.environ.get("RAY_AUTH_MODE", ""))
    address = os.environ.get("RAY_ADDRESS", "")
    jobs = os.environ.get("RAY_API_SERVER_ADDRESS", "")
    if jobs:
        yield dashboard(jobs)
    if not address:
        yield ok(
            "Ray", "RAY_ADDRESS is not set: a training starts its own, on loopback only "
            "(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0)",
        )  # fmt: skip
        return
    yield from _cluster(address, config, data, run)


def token(path: Path, mode: str) -> Iterator[Finding]:
    """Judge the token that guards a cluster."""
    if not path.exists():
        if mode == "token" and "RAY_AUTH_TOKEN" not in os.environ:
            yield fail(
                "token", f"RAY_AUTH_MODE=token, and no {path}", "ray get-auth-token --generate"
            )
        return
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        yield warn("token", f"{path} can be read by others", f"chmod 600 {path}")
    elif mode != "token":
        yield warn(
            "token", f"there is one, and RAY_AUTH_MODE is {mode or 'not set'}: clients of a "
            "cluster do not look for it", "export RAY_AUTH_MODE=token",
        )  # fmt: skip
    else:
        yield ok("token", f"{path}, for its owner only")


def dashboard(address: str) -> Finding:
    """Look whether jobs can be submitted there."""
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=5) as answer:
            answer.read()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):  # it is there, and asks for the token
            return ok("job server", f"{address}, guarded")
        return fail("job server", f"{address} says {error.code}", START)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return fail("job server", f"{address} does not answer ({reason})", START)
    return ok("job server", address)


def _cluster(address: str, config: Config | None, data: str, run: Path | None) -> Iterator[Finding]:
    from cluster.nodes import has_gpus, living
    from cluster.ray_session import session
    from cluster.topology import plan

    try:
        with session(1, ahead=None):
            nodes = living()
            there = ", ".join(f"{n.name}: {n.cpus:g} CPUs, {n.gpus:g} GPUs free" for n in nodes)
            yield ok("Ray", f"{address}: {there}")
            if config is not None:
                gpu = config.device == "gpu" or (config.device == "auto" and has_gpus())
                try:
                    found = plan(
                        nodes, sizes=config.replica_sizes, size=config.size, gpu=gpu
                    )  # fmt: skip
                    yield ok("room", f"for {found.replicas} replica(s) of {config.size} worker(s)")
                except DuetError as error:
                    yield fail("room", str(error), "fewer --replicas, or more nodes")
            mark = _mark(run)
            try:
                answers = ask(data, mark)
            finally:
                if mark is not None:
                    mark.unlink(missing_ok=True)
            yield from nodes_agree(answers, releases(), run, data)
    except DuetError as error:
        mend = "check RAY_AUTH_MODE=token and the token, or unset RAY_ADDRESS"
        yield fail("Ray", str(error), mend)


def _mark(run: Path | None) -> Path | None:
    """Leave a file in RUN that every node should see."""
    if run is None or not run.is_dir():
        return None
    path = run.resolve() / f".doctor.{secrets.token_hex(8)}"
    path.write_bytes(b"")
    return path


def ask(data: str, mark: Path | None) -> dict[str, Node | str]:
    """Have every node look: what it says, or why it did not, by its name and id."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from pipeline.dataset import is_remote

    folder = str(Path(data).resolve()) if data and not is_remote(data) else ""
    pending: dict[str, Any] = {}
    for node in ray.nodes():
        if node["Alive"]:
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(num_cpus=0)(look).options(scheduling_strategy=where)
            gpus = int(node["Resources"].get("GPU", 0))
            name = f"{node['NodeManagerHostname']} ({node['NodeID'][:6]})"
            pending[name] = task.remote(str(mark) if mark else "", folder, gpus)
    answers: dict[str, Node | str] = {}
    for name, task in pending.items():
        try:
            answers[name] = ray.get(task, timeout=NODE_SECONDS)
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            answers[name] = (lines or [type(error).__name__])[-1]
    return answers


def look(mark: str, data: str, gpus: int) -> Node:
    """What a node sees; runs there."""
    return Node(
        name=platform.node(),
        run=Path(mark).exists() if mark else None,
        data=(Path(data) / "manifest.json").exists() if data else None,
        releases=releases(),
        gpus=gpus,
    )


def releases() -> dict[str, str]:
    """What must be the same on all nodes."""
    import importlib.metadata

    found = {"Python": platform.python_version()}
    for name in ("torch", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "webdataset", "ray"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def nodes_agree(
    answers: dict[str, Node | str], mine: dict[str, str], run: Path | None, data: str
) -> Iterator[Finding]:
    """Judge what the nodes have said."""
    for name, node in answers.items():
        if isinstance(node, str):
            mend = "each needs this project's packages; see that node's logs"
            yield fail(f"node {name}", node, mend)
            continue
        differ = [
            f"{package} {node.releases.get(package, 'missing')}, here {release}"
            for package, release in mine.items()
            if node.releases.get(package) != release
        ]
        if differ:
            mend = "pip install -c constraints.txt the same on all"
            yield fail(f"node {name}", "; ".join(differ), mend)
        elif node.run is False:
            mend = "a --run on storage that all nodes share, or --store s3://bucket/folder"
            yield fail(f"node {name}", f"does not see {run}", mend)
        elif node.data is False:
            mend = "a --data on storage that all nodes share, or its address in a store"
            yield fail(f"node {name}", f"does not see {data}", mend)
        elif node.gpus % 2:
            mend = "--columns-per-worker 2 uses it, or start its Ray with an even --num-gpus"
            yield warn(f"node {name}", f"{node.gpus} GPUs: one has no partner", mend)
        else:
            seen = " and ".join(
                what for what, there in (("RUN", node.run), ("DATA", node.data)) if there
            )
            yield ok(f"node {name}", f"same packages{f', sees {seen}' if seen else ''}")
