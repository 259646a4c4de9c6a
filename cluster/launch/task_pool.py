"""Pool of Ray tasks that pack images on all nodes of a cluster; nodes may die meanwhile.

Ray itself retries nothing here: how a job is retried depends on what has died, and how often.
"""

from __future__ import annotations

import platform
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cluster.launch.session import ray_session
from pipeline.packing.build import library_versions
from pipeline.remote.filesystem import is_remote
from pipeline.remote.target import WORK, Target
from pipeline.tools.errors import DuetError, SetupError
from pipeline.tools.processes import make_careful
from pipeline.tools.watchdog import end_process_on_hang

TASKS_PER_CPU = 2
"""Tasks submitted for each CPU: one runs, the next starts when it ends."""
DEATHS = 3
"""Deaths of a job's process after which the build fails; the last attempt was careful."""
LOST_NODES = 20
"""Deaths of a job's node after which the build fails."""
CPU_TIMEOUT = 600.0
"""Seconds without any CPU in the cluster after which the build fails."""
POLL_SECONDS = 5.0
"""Seconds between reads of the cluster's size: nodes come and go."""

J = TypeVar("J")
R = TypeVar("R")


@dataclass(frozen=True)
class TaskAttempt:
    """Attempt at a job, with the number of failed attempts before it."""

    job: Any
    deaths: int = 0
    lost_nodes: int = 0

    def again(self, node_died: bool) -> TaskAttempt:
        """Return the next attempt, after a death of the node or of the process alone.

        Raises:
            DuetError: too many attempts have failed.
        """
        deaths, lost = self.deaths + (not node_died), self.lost_nodes + node_died
        if deaths == DEATHS or lost == LOST_NODES:
            raise DuetError(
                "a packing process died again and again (out of memory?); run the same command "
                "again, with fewer --workers"
            )
        careful = deaths == DEATHS - 1
        return TaskAttempt(make_careful(self.job) if careful else self.job, deaths, lost)


class RayPool:
    """A `Pool` of tasks of a Ray cluster; a context manager.

    It attaches to Ray, or starts one, when it gets the first job.
    """

    def __init__(self, workers: int = 0) -> None:
        """Create a pool of at most `workers` tasks at a time; 0: as many as the cluster can use."""
        self._workers = workers
        self._libraries = library_versions()
        self._mark = f"{WORK}/cluster.{secrets.token_hex(8)}"
        self._running: dict[Any, TaskAttempt] = {}
        self._stack = ExitStack()
        self._do: Any = None
        self._cpus, self._counted, self._seen = 0, float("-inf"), 0.0

    def run(self, task: Callable[[J], R], jobs: Iterable[J]) -> Iterator[R]:
        """Run `task`, a function of a module that all nodes have, on every job; see `Pool`.

        Raises:
            SetupError: there is no Ray, a node lacks OUT, a source or the libraries, or all nodes
                are gone.
        """
        try:
            for job in jobs:
                if self._do is None:
                    self._start(job)
                while len(self._running) >= self._find_limit():
                    yield from self._collect(task)
                self._submit(task, TaskAttempt(job))
            while self._running:
                yield from self._collect(task)
        finally:
            self._cancel()

    def _start(self, job: Any) -> None:
        """Attach to Ray or start one, and create a marker file in OUT that all nodes must see."""
        self._stack.enter_context(ray_session(self._workers))
        import ray

        target: Target = job.target
        with target.create(self._mark) as file:
            file.write(platform.node().encode())
        self._stack.callback(_remove_mark, target, self._mark)
        self._do = ray.remote(num_cpus=1, max_retries=0, scheduling_strategy="SPREAD")(run_job)
        self._seen = time.monotonic()

    def _submit(self, task: Callable[[J], Any], attempt: TaskAttempt) -> None:
        done = self._do.remote(task, attempt.job, self._mark, self._libraries)
        self._running[done] = attempt

    def _collect(self, task: Callable[[J], R]) -> Iterator[R]:
        """Yield the results that have arrived, and submit jobs whose process died again."""
        import ray
        from ray.exceptions import (
            NodeDiedError,
            OutOfMemoryError,
            RayError,
            RayTaskError,
            WorkerCrashedError,
        )

        waited = list(self._running)
        if not ray.wait(waited, timeout=POLL_SECONDS)[0]:
            self._find_limit()
            return
        for done in ray.wait(waited, num_returns=len(waited), timeout=0)[0]:
            attempt = self._running.pop(done)
            try:
                result: R = ray.get(done)
            except RayTaskError as error:
                if isinstance(error.cause, (RayError, ImportError)):
                    raise _build_node_error(error.cause) from error
                raise error.cause from error
            except (WorkerCrashedError, OutOfMemoryError, NodeDiedError) as error:
                self._submit(task, attempt.again(isinstance(error, NodeDiedError)))
            except RayError as error:
                raise _build_node_error(error) from error
            else:
                yield result

    def _find_limit(self) -> int:
        """Return how many tasks may be submitted at present.

        Raises:
            SetupError: the cluster has had no CPU for too long.
        """
        import ray

        now = time.monotonic()
        if now - self._counted >= POLL_SECONDS:
            self._cpus, self._counted = int(ray.cluster_resources().get("CPU", 0)), now
            if self._cpus:
                self._seen = now
            elif now - self._seen > CPU_TIMEOUT:
                raise SetupError(
                    f"the cluster has had no CPU for {CPU_TIMEOUT / 60:.0f} minutes; start a node, "
                    "and run the same command again"
                )
        return self._workers or TASKS_PER_CPU * max(1, self._cpus)

    def _cancel(self) -> None:
        """Cancel the running tasks."""
        if not self._running:
            return
        import ray

        for done in self._running:
            with suppress(Exception):  # Ray itself may have failed
                ray.cancel(done)
        self._running.clear()

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._cancel()
        self._stack.close()


def _build_node_error(error: Exception) -> SetupError:
    """Build a one-line error from Ray's, or from the error of Python that Ray quotes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    quoted = [line for line in lines if line.startswith(("ModuleNotFoundError", "ImportError"))]
    reason = (quoted or lines)[0]
    return SetupError(
        f"a node of the cluster cannot pack ({reason}); each needs a running Ray, and this "
        "project's code and packages"
    )


def _remove_mark(target: Target, mark: str) -> None:
    with suppress(OSError, DuetError):
        target.remove([mark])


_known: set[str] = set()
"""Marker files that this worker process has seen."""


def run_job(task: Callable[[Any], R], job: Any, mark: str, expected: dict[str, str]) -> R:
    """Run a job, in a worker process on any node.

    Raises:
        SetupError: this node lacks OUT or a source, or has other libraries than the driver.
        Exception: from `task`; the message of an `OSError` names the node.
    """
    end_process_on_hang()
    node = platform.node()
    if mark not in _known:
        _check_node(node, job.target, mark, expected)
        _known.add(mark)
    for container in getattr(job, "containers", ()):
        if not is_remote(container.address) and not Path(container.address).exists():
            raise SetupError(
                f"source {container.address} is not on node {node}; put it where all nodes see it"
            )
    try:
        return task(job)
    except DuetError:
        raise
    except OSError as error:
        why = f"{error.strerror or error} on node {node}"
        raise OSError(error.errno, why, error.filename) from error


def _check_node(node: str, target: Target, mark: str, expected: dict[str, str]) -> None:
    if target.size(mark) is None:
        raise SetupError(
            f"{target.address} on node {node} is not the folder of this build; name an OUT on "
            "storage that all nodes share"
        )
    ours = library_versions()
    for name in sorted({*ours, *expected}):
        here, there = ours.get(name, "not installed"), expected.get(name, "not installed")
        if here != there:
            raise SetupError(
                f"node {node} has {name} {here}, the driver {there}: their bytes would "
                "differ; install the same"
            )
