"""A Ray cluster on this machine whose nodes only say that they have GPUs.

    with Simulated([2, 2]) as cluster:            # a head, and two nodes of two GPUs
        subprocess.run([...], env=cluster.environment)
        cluster.kill(0)

It runs in a process of its own, so that whoever uses it needs no Ray and may be any thread.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.helpers.training_processes import REPOSITORY, end_processes, marked

CPUS = 4
"""Logical CPUs of a node, as pretended as its GPUs."""


class Simulated:
    """Starts the cluster; every process of it ends with the block."""

    def __init__(self, gpus: list[int], cpus: int = CPUS, **environment: str) -> None:
        """Have a node for each number of GPUs, and a head without any."""
        self._folder = tempfile.mkdtemp(prefix="duet-sim-")  # a short path: Ray's sockets lie in it
        Path(self._folder, "ray").mkdir()
        self.mark, self.environment = marked(
            RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
            RAY_AUTH_MODE="disabled",
            RAY_USAGE_STATS_ENABLED="0",
            RAY_TMPDIR=self._folder,
            DUET_FAKE_GPUS="1",
            PYTHONPATH=str(REPOSITORY),
            **environment,
        )
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.ray_cluster", str(cpus)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=REPOSITORY,
            env=self.environment,
        )
        told = self._answer()
        self.environment["RAY_ADDRESS"] = told["address"]
        self.dashboard: str = told["dashboard"]
        self.nodes: dict[int, str] = {}
        """Ray's ids of the nodes that live, by a number that is never used again."""
        for count in gpus:
            self.add(count)

    def add(self, gpus: int) -> int:
        """Have one more node; returns its number."""
        found = self._ask("add", gpus)
        self.nodes[found["number"]] = found["id"]
        return int(found["number"])

    def kill(self, number: int) -> None:
        """Take a node away, as kill -9 of its raylet does."""
        self._ask("kill", number)
        del self.nodes[number]

    def drain(self, number: int, seconds: int) -> None:
        """Say that a node will be taken away."""
        self._ask("drain", number, seconds)

    def _ask(self, *words: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # Ray may have something to say, too
                return json.loads(line)
        raise RuntimeError("the simulated cluster has ended")

    def close(self) -> None:
        """End all of it."""
        end_processes(self.mark)
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Simulated:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self.close()


def serve(cpus: int) -> None:
    """The process: a line of JSON in, a line out."""
    from ray._raylet import GcsClient
    from ray.cluster_utils import Cluster
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 2,
            "num_gpus": 0,
            "include_dashboard": os.environ.get("DUET_DASHBOARD") == "1",
        },
    )
    say({"address": cluster.address, "dashboard": cluster.webui_url or ""})
    nodes: list[Any] = []
    for line in sys.stdin:
        what, *words = json.loads(line)
        if what == "add":
            nodes.append(cluster.add_node(num_cpus=cpus, num_gpus=words[0]))
            say({"number": len(nodes) - 1, "id": nodes[-1].node_id})
        elif what == "kill":
            cluster.remove_node(nodes[words[0]], allow_graceful=False)
            say({})
        else:
            deadline = int((time.time() + words[1]) * 1000)
            client = GcsClient(address=cluster.gcs_address)
            client.drain_node(
                nodes[words[0]].node_id,
                DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
                "a rehearsal",
                deadline,
            )
            say({})


def say(answer: dict[str, Any]) -> None:
    """Answer."""
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
