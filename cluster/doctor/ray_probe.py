"""Process that joins the cluster and runs a task on every node; started by `ray_cluster`.

A driver that the cluster refuses may hang, or end without an exception that could be caught: in a
process of its own it can be killed. It reads a request in JSON from stdin, and writes the answer
into the file that is its argument.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

PACKAGES = {
    **{name: name for name in ("torch", "ray", "webdataset", "numpy", "safetensors", "fsspec")},
    "nvidia-dali-cuda120": "DALI",
    "nvidia-dali-cuda130": "DALI",
}
"""Distributions whose releases must be the same on all nodes -> their names in the answer. Nodes
may have DALI, and torch, for different releases of CUDA."""
STORE_SECONDS = 15
NODE_SECONDS = 40
"""Timeout of all nodes together: a worker process has to start on each."""


def look(request: dict[str, Any]) -> dict[str, Any]:
    """Collect facts on a node. Uses only the standard library: the node may have nothing else.

    Args:
        request: `run` (a folder, or empty), `mark` (name of a file in there), `data` (a folder or
            empty), `address` (of a data set in a store, or empty), `code` (this repository, or
            empty).
    """
    found: dict[str, Any] = {"releases": list_releases()}
    if request["run"]:
        run = Path(request["run"])
        found["run"] = (run / request["mark"]).exists()
        found["disk"] = shutil.disk_usage(run).free if run.is_dir() else 0
        try:  # only beside the driver's mark: the probe must not create the folder
            if found["run"]:
                own = f"{request['mark']}.{os.urandom(6).hex()}"
                (run / own).touch(exist_ok=False)
                found["own"] = own
        except OSError as error:
            found["cannot_write"] = error.strerror
    if request["data"]:
        found["data"] = (Path(request["data"]) / "manifest.json").exists()
    if request["code"]:
        found["code"] = (Path(request["code"]) / "cluster" / "train.py").exists()
    if request["address"]:
        found["address"] = try_store(request["address"])
    found["devices"] = len(list(Path("/dev").glob("nvidia[0-9]*")))
    found["files"] = os.sysconf("SC_OPEN_MAX")
    found["shared"] = shutil.disk_usage(shm).free if (shm := Path("/dev/shm")).is_dir() else 0
    return found


def try_store(address: str) -> str:
    """Ask a store for a data set's manifest, on a node; return the error, empty if that works."""
    errors: list[str] = []

    def call() -> None:
        try:
            import fsspec

            open_address: Any = fsspec.core.url_to_fs
            with suppress(ImportError):  # as the workers do, where this repository is
                from pipeline.remote import filesystem

                open_address = filesystem.open_filesystem
            system, root = open_address(address)
            system.info(f"{root.rstrip('/')}/manifest.json")
            errors.append("")
        except BaseException as error:
            errors.append(f"{type(error).__name__}: {error}".split("\n")[0])

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(STORE_SECONDS)
    return errors[0] if errors else f"no answer for {STORE_SECONDS} s"


def list_releases() -> dict[str, str]:
    """Return the releases of Python and of the packages on this machine."""
    found = {"Python": platform.python_version()}
    for name, label in PACKAGES.items():
        with suppress(importlib.metadata.PackageNotFoundError):
            found[label] = importlib.metadata.version(name).split("+")[0]
    return found


def ask_nodes(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Run `look` on every node.

    Returns:
        for each node its `id`, `name` and `gpus`, and `answer`, or `why` there is none.
    """
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from cluster.launch.placement import name_nodes

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # nodes may lack this repository
    task = ray.remote(num_cpus=0, max_retries=0)(look)
    pending, nodes, known = [], [], ray.nodes()
    names = name_nodes(known)
    for node in known:
        if node["Alive"]:
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            gpus = int(node["Resources"].get("GPU", 0))
            name = names[node["NodeID"]]
            nodes.append({"id": node["NodeID"], "name": name, "gpus": gpus})
            pending.append(task.options(scheduling_strategy=where).remote(request))
    done, _ = ray.wait(pending, num_returns=len(pending), timeout=NODE_SECONDS)
    for entry, answer in zip(nodes, pending, strict=True):
        if answer not in done:
            entry["why"] = f"no answer for {NODE_SECONDS} s"
            continue
        try:
            entry["answer"] = ray.get(answer)
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            entry["why"] = (lines or [type(error).__name__])[-1]
    return nodes


def main(request: dict[str, Any], out: Path) -> None:
    """Join the cluster, ask its nodes, and write the answer, or why that failed, into a file."""
    from dataclasses import asdict

    from cluster.launch.placement import list_nodes
    from cluster.launch.session import ray_session
    from pipeline.tools.errors import DuetError

    start = time.monotonic()
    try:
        with ray_session(1):
            seconds = time.monotonic() - start
            room = [asdict(node) for node in list_nodes()]
            answer = {"seconds": seconds, "room": room, "nodes": ask_nodes(request)}
            out.write_text(json.dumps(answer), encoding="utf-8")
    except DuetError as error:
        cause = error.__cause__
        lines = [line.strip() for line in str(cause or error).splitlines() if line.strip()]
        out.write_text(json.dumps({"why": " ".join(lines)[:600]}), encoding="utf-8")


if __name__ == "__main__":
    from cluster.doctor.ray_probe import main as imported  # not __main__, for what is pickled

    imported(json.load(sys.stdin), Path(sys.argv[1]))
