"""Joins the cluster and has every node look around; a process of its own, run by `ray_nodes`.

A driver that the cluster does not want may hang, or end without an exception that could be caught:
whoever waits for this process is safe from both. Reads a request in JSON on stdin, writes the
answer into the file that is its argument.
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
from pathlib import Path
from typing import Any

PACKAGES = {
    **{name: name for name in ("torch", "ray", "webdataset", "numpy", "safetensors", "fsspec")},
    "nvidia-dali-cuda120": "DALI",
    "nvidia-dali-cuda130": "DALI",
}
"""Distributions whose releases must be the same on all nodes, and what they are called here: nodes
may have DALI, and torch, for different CUDAs."""
STORE_SECONDS = 15
NODE_SECONDS = 40
"""For which the nodes may take to answer, all together: a worker process has to start on each."""


def look(request: dict[str, Any]) -> dict[str, Any]:
    """What a node sees; runs there. With nothing but Python's own library: it may have no more.

    Args:
        request: `run` (a folder, or empty), `mark` (name of a file in there), `data` (a folder or
            empty), `address` (of a data set in a store, or empty), `code` (this repository, or
            empty).
    """
    found: dict[str, Any] = {"releases": releases()}
    if request["run"]:
        run = Path(request["run"])
        found["run"] = (run / request["mark"]).exists()
        found["disk"] = shutil.disk_usage(run).free if run.is_dir() else 0
        try:  # only beside the driver's mark: a folder must not come into being here
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
        found["address"] = reach(request["address"])
    found["devices"] = len(list(Path("/dev").glob("nvidia[0-9]*")))
    found["files"] = os.sysconf("SC_OPEN_MAX")
    found["shared"] = shutil.disk_usage(shm).free if (shm := Path("/dev/shm")).is_dir() else 0
    return found


def reach(address: str) -> str:
    """Ask a store for a set's manifest: why it does not give it, or nothing; runs on a node."""
    said: list[str] = []

    def call() -> None:
        try:
            import fsspec

            system, root = fsspec.core.url_to_fs(address)
            system.info(f"{root.rstrip('/')}/manifest.json")
            said.append("")
        except BaseException as error:
            said.append(f"{type(error).__name__}: {error}".split("\n")[0])

    asking = threading.Thread(target=call, daemon=True)
    asking.start()
    asking.join(STORE_SECONDS)
    return said[0] if said else f"no answer for {STORE_SECONDS} s"


def releases() -> dict[str, str]:
    """Of Python and the packages."""
    found = {"Python": platform.python_version()}
    for name, called in PACKAGES.items():
        try:
            found[called] = importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def ask(request: dict[str, Any]) -> dict[str, Any]:
    """Have every node look: what it says, or why it did not, with its name, id and resources."""
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # nodes may lack this repository
    task = ray.remote(num_cpus=0, max_retries=0)(look)
    pending, nodes = {}, []
    for node in ray.nodes():
        if node["Alive"]:
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            told = {"id": node["NodeID"], "name": node["NodeManagerHostname"]}
            told["gpus"] = int(node["Resources"].get("GPU", 0))
            nodes.append(told)
            pending[node["NodeID"]] = task.options(scheduling_strategy=where).remote(request)
    done, _ = ray.wait(list(pending.values()), num_returns=len(pending), timeout=NODE_SECONDS)
    for told in nodes:
        answer = pending[told["id"]]
        if answer not in done:
            told["why"] = f"no answer for {NODE_SECONDS} s"
            continue
        try:
            told["answer"] = ray.get(answer)
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            told["why"] = (lines or [type(error).__name__])[-1]
    return {"nodes": nodes}


def main(request: dict[str, Any], out: Path) -> None:
    """Join, ask, and write down what there is to say; also why it could not be asked."""
    from dataclasses import asdict

    from cluster.launch.placement import list_nodes
    from cluster.launch.session import ray_session
    from pipeline.tools.errors import DuetError

    start = time.monotonic()
    try:
        with ray_session(1, preload=None):
            answer = {
                "seconds": time.monotonic() - start,
                "room": [asdict(n) for n in list_nodes()],
            }
            answer |= ask(request)
            out.write_text(json.dumps(answer), encoding="utf-8")
    except DuetError as error:
        cause = error.__cause__
        lines = [line.strip() for line in str(cause or error).splitlines() if line.strip()]
        out.write_text(json.dumps({"why": " ".join(lines)[:600]}), encoding="utf-8")


if __name__ == "__main__":
    from cluster.doctor.ray_probe import main as imported  # not __main__, for what is pickled

    imported(json.load(sys.stdin), Path(sys.argv[1]))
