"""Random disturbances of a training on a simulated cluster: kills, freezes, drains, stops."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.helpers.ray_cluster import Simulated
from tests.helpers.training_processes import REPOSITORY, processes, train_processes

LAYOUTS = (("1", "2"), ("1", "1"), ("2", "2"), ("1:2", "1"), ("1:4", "2"), ("1:4", "1"))
"""Replicas and columns per worker."""


class Driver:
    """The training command, started as a process or as a job, again and again."""

    def __init__(self, cluster: Simulated, words: list[str], log: Path, seed: int) -> None:
        self._cluster, self._words, self._log = cluster, words, log
        self._process: subprocess.Popen[bytes] | None = None
        self._job: str | None = None
        self._jobs = 0
        self._random = random.Random(seed)
        self.starts = 0
        self.layouts: Counter[str] = Counter()

    def start(self, as_job: bool) -> None:
        """Start the command, with a layout drawn at random, as a process, or submit it as a job."""
        self.starts += 1
        replicas, columns = self._random.choice(LAYOUTS)
        self.layouts[f"{replicas} replicas, {columns} columns per worker"] += 1
        layout = ["--replicas", replicas, "--columns-per-worker", columns]
        train = ["-m", "cluster.train", *self._words, *layout]
        with self._log.open("ab") as log:
            if as_job:
                self._jobs += 1
                self._job = f"soak-{self._jobs}"
                self._ray("submit", "--no-wait", "--submission-id", self._job, "--working-dir",
                          str(REPOSITORY), "--", "python", *train)  # fmt: skip
            else:
                self._process = subprocess.Popen(
                    [sys.executable, *train],
                    stdout=log,
                    stderr=log,
                    cwd=REPOSITORY,
                    env=self._cluster.environment,
                    start_new_session=True,  # so that Ctrl-C can be sent to all of it
                )

    def _ray(self, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "job", *words],
            env=self._cluster.environment
            | {"RAY_API_SERVER_ADDRESS": f"http://{self._cluster.dashboard}"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.stdout + done.stderr

    @property
    def is_job(self) -> bool:
        """True while the command runs as a job."""
        return self._job is not None

    def code(self) -> int | None:
        """Exit code of the command (1 for any failure of a job); None while it runs."""
        if self._job is not None:
            address = f"http://{self._cluster.dashboard}/api/jobs/{self._job}"
            with urllib.request.urlopen(address, timeout=30) as answer:
                status = json.load(answer)["status"]
            if status in ("SUCCEEDED", "FAILED", "STOPPED"):
                self._end_job()
            return {"SUCCEEDED": 0, "FAILED": 1, "STOPPED": 1}.get(status)
        assert self._process is not None
        return self._process.poll()

    def _end_job(self) -> None:
        assert self._job is not None
        with self._log.open("a") as log:
            log.write(self._ray("logs", self._job))
        self._job = None

    def pid(self) -> int | None:
        """Process id of the driver, the Python process of the command."""
        if self._job is None:
            return self._process.pid if self._process else None
        found = processes(self._cluster.mark, "cluster.train")
        return max(found) if found else None

    def stop_job(self) -> None:
        """Stop the job by `ray job stop`."""
        if self._job is not None:
            self._ray("stop", "--no-wait", self._job)


class Disturbed:
    """The run that is disturbed, and what has been done to it."""

    def __init__(self, seed: int, cluster: Simulated, driver: Driver, folder: Path) -> None:
        self.random = random.Random(seed)
        self._nodes = len(cluster.nodes)
        self.cluster, self.driver, self.folder = cluster, driver, folder
        self.done: Counter[str] = Counter()
        self._later: list[tuple[float, Callable[[], object]]] = []
        self._start = time.monotonic()

    def step(self) -> int:
        """The last step that has a row."""
        with suppress(OSError), (self.folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            for row in reversed(file.read().splitlines()):
                with suppress(ValueError, KeyError):  # the last may be half written
                    return int(json.loads(row)["step"])
        return 0

    def say(self, what: str) -> None:
        """A line of the log."""
        print(f"{time.monotonic() - self._start:7.1f} s  step {self.step():>4}  {what}", flush=True)

    def later(self, seconds: float, what: Callable[[], object]) -> None:
        """Do something after some time."""
        self._later.append((time.monotonic() + seconds, what))

    def tick(self) -> None:
        """Do what is due."""
        due = [entry for entry in self._later if entry[0] <= time.monotonic()]
        for entry in due:
            self._later.remove(entry)
            entry[1]()

    def settle(self) -> None:
        """Do all that was to be done later."""
        for _, what in self._later:
            what()
        self._later.clear()

    def workers(self) -> list[int]:
        """Ids of the training workers."""
        return train_processes(self.cluster.mark)

    def disturb(self) -> None:
        """Do one of the things below, at random."""
        kinds = [self.worker, self.worker, self.freeze, self.driver_killed, self.interrupted,
                 self.terminated, self.stopped, self.drained, self.node, self.node]  # fmt: skip
        while not (what := self.random.choice(kinds)()):
            time.sleep(0.2)
        self.done[what.split(":")[0]] += 1
        self.say(what)

    def worker(self) -> str:
        """kill -9 of a worker: a leader, a column's partner, inside a collective or out of it."""
        if not (found := self.workers()):
            return ""
        pid = self.random.choice(found)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return f"worker killed: {found.index(pid) + 1} of {len(found)}"

    def freeze(self) -> str:
        """SIGSTOP of a worker."""
        if not (found := self.workers()):
            return ""
        with suppress(ProcessLookupError):
            os.kill(self.random.choice(found), signal.SIGSTOP)
        return "worker frozen"

    def driver_killed(self) -> str:
        """kill -9 of the driver."""
        return self._signal(signal.SIGKILL, "driver killed")

    def terminated(self) -> str:
        """SIGTERM to the driver."""
        return self._signal(signal.SIGTERM, "driver terminated")

    def interrupted(self) -> str:
        """Ctrl-C."""
        return "" if self.driver.is_job else self._signal(signal.SIGINT, "Ctrl-C", group=True)

    def _signal(self, number: signal.Signals, what: str, group: bool = False) -> str:
        pid = self.driver.pid()
        if pid is None:
            return ""
        with suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(pid, number)
        return f"{what}{': a job' if self.driver.is_job else ''}"

    def stopped(self) -> str:
        """`ray job stop`."""
        if not self.driver.is_job:
            return ""
        self.driver.stop_job()
        return "job stopped"

    def node(self) -> str:
        """The loss of a node; another one comes after a while."""
        if len(self.cluster.nodes) < 2:
            return ""
        number = self.random.choice(list(self.cluster.nodes))
        spare = len(self.cluster.nodes) > 2
        self.cluster.kill(number)
        self.later(self.random.uniform(5, 40), self._new_node)
        return f"node killed: {'a spare is there' if spare else 'no spare'}"

    def drained(self) -> str:
        """The notice that a node will go, and then its loss."""
        if len(self.cluster.nodes) < 2:
            return ""
        number = self.random.choice(list(self.cluster.nodes))
        self.cluster.drain(number, 20)

        def goes() -> None:
            if number in self.cluster.nodes:
                self.cluster.kill(number)

        self.later(20, goes)
        self.later(self.random.uniform(22, 40), self._new_node)
        return "node drained"

    def _new_node(self) -> None:
        if len(self.cluster.nodes) < self._nodes:
            self.cluster.add(2)

    def full_disk(self) -> None:
        """No file of a worker may grow beyond some size for a while (EFBIG, as ENOSPC)."""
        size = self.random.choice([20_000, 1_000_000])  # rows as well, or checkpoints only
        pids = self.workers()
        for pid in pids:
            with suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        def room() -> None:
            for pid in pids:
                with suppress(ProcessLookupError):
                    free = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, free)

        self.later(self.random.uniform(1, 4), room)
        self.done["disk full"] += 1
        self.say(f"disk full: no file beyond {size:,} bytes")

    def vanished_disk(self) -> None:
        """The folder of the checkpoints is gone for a while."""
        there, away = self.folder / "checkpoints", self.folder / "checkpoints.away"
        if not there.exists():
            return
        there.rename(away)

        def back() -> None:
            away.rename(there)

        self.later(self.random.uniform(1, 3), back)
        self.done["disk vanished"] += 1
        self.say("disk vanished")
