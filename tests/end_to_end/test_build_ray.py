"""Packing on a Ray of several nodes, one of which goes away."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest

from pipeline.options import BuildConfig
from pipeline.packing import plan
from pipeline.packing.build import build
from pipeline.packing.chunks import ChunkError, pack_chunk
from pipeline.packing.shards import write_shard
from pipeline.remote.target import FolderTarget, Target
from pipeline.sources import Container
from pipeline.tools.errors import DataError, DuetError, SetupError
from pipeline.tools.files import PARTIAL
from pipeline.tools.processes import Crash, call_isolated
from tests.helpers.build_targets import Here
from tests.helpers.images import folder_per_class
from tests.helpers.training_processes import end_processes

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster() -> Iterator[SimpleNamespace]:
    """Three nodes of a CPU each on loopback, and this process as their driver."""
    mark = f"DUET_TEST={uuid.uuid4()}"
    interrupt = signal.getsignal(signal.SIGINT)
    terminate = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*mark.split("="))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        from ray.cluster_utils import Cluster

        from cluster.launch import task_pool
        from cluster.launch.session import ray_session

        nodes = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
        )
        try:
            others = [nodes.add_node(num_cpus=1) for _ in range(2)]
            patch.setenv("RAY_ADDRESS", nodes.address)
            with ray_session(0):
                # One driver for all tests: its workers need not start again for each.
                patch.setattr(task_pool, "ray_session", lambda *_, **__: contextlib.nullcontext())
                yield SimpleNamespace(
                    mark=mark,
                    nodes=nodes,
                    others=others,
                    pool=task_pool.RayPool,
                    attempt=task_pool.TaskAttempt,
                )
        finally:
            nodes.shutdown()
            end_processes(mark)
            signal.signal(signal.SIGINT, interrupt)
            signal.signal(signal.SIGTERM, terminate)


@dataclass(frozen=True)
class Job:
    target: Target
    value: int
    careful: bool = False
    containers: tuple[Container, ...] = ()


@dataclass(frozen=True)
class Unshared(FolderTarget):
    """A folder that only the driver sees."""

    def size(self, name: str) -> int | None:
        return None


def squared(job: Job) -> int:
    return job.value**2


def disk_full(job: Job) -> None:
    raise OSError(28, "No space left on device", "/full/disk")


def damaged(job: Job) -> None:
    raise ChunkError(job.value)


def refused(job: Job) -> None:
    raise DataError("one line")


def dies(job: Job) -> str:
    if not job.careful:
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def dies_always(job: Job) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def forks(job: Job) -> tuple[int, str]:
    try:
        call_isolated(os.abort)
    except Crash as crash:
        return call_isolated(pow, job.value, 2), str(crash)
    return 0, "did not crash"


def lacks_a_package(job: Job) -> None:
    importlib.import_module("no_such_package")


def sleeps(job: Job) -> None:
    for _ in range(100 * job.value):
        time.sleep(0.01)


def test_results_errors_and_deaths_come_to_the_driver(cluster, tmp_path, monkeypatch):
    from cluster.launch import task_pool

    job = Job(FolderTarget(str(tmp_path)), 7)
    taken = []

    def many() -> Iterator[Job]:
        for value in range(100):
            taken.append(value)
            yield replace(job, value=value)

    with cluster.pool() as pool:
        found = pool.run(squared, many())
        first = next(found)
        assert len(taken) <= 1 + 3 * task_pool.TASKS_PER_CPU  # and not all hundred
        assert sorted([first, *found]) == [value**2 for value in range(100)]
        assert list(pool.run(forks, [job])) == [(49, "SIGABRT")]
        assert list(pool.run(dies, [job])) == ["alive"]
        with pytest.raises(DuetError, match="died again and again") as raised:
            list(pool.run(dies_always, [job]))
        assert "\n" not in str(raised.value)
        with pytest.raises(OSError, match="No space left on device on node ") as full:
            list(pool.run(disk_full, [job]))
        assert (full.value.errno, full.value.filename) == (28, "/full/disk")
        with pytest.raises(ChunkError) as chunk:
            list(pool.run(damaged, [job]))
        assert chunk.value.numbers[0] == 7
        with pytest.raises(DataError, match=r"^one line$"):
            list(pool.run(refused, [job]))
        with pytest.raises(SetupError, match=r"cannot pack .No module named 'no_such_package'.; "):
            list(pool.run(lacks_a_package, [job]))
        gone = replace(job, containers=(Container("tar", "/nowhere/a.tar"),))
        with pytest.raises(SetupError, match=r"source /nowhere/a\.tar is not on node "):
            list(pool.run(squared, [gone]))
        began = time.monotonic()
        with contextlib.suppress(DataError):
            for _ in pool.run(sleeps, [replace(job, value=0), *[replace(job, value=60)] * 3]):
                raise DataError("the driver has enough")
        assert list(pool.run(squared, [job])) == [49]  # what slept was ended
        assert time.monotonic() - began < 30
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]  # no mark is left


def test_a_node_that_is_unlike_the_driver_is_named(cluster, tmp_path, monkeypatch):
    with (
        cluster.pool() as pool,
        pytest.raises(SetupError, match="is not the folder of this build; name an OUT on storage"),
    ):
        list(pool.run(squared, [Job(Unshared(str(tmp_path)), 1)]))
    monkeypatch.setattr(
        "cluster.launch.task_pool.library_versions", lambda: {"pillow": "0.1", "torch": "0.2"}
    )
    with cluster.pool() as pool, pytest.raises(SetupError, match=r"the driver 0\.[12]: their by"):
        list(pool.run(squared, [Job(FolderTarget(str(tmp_path)), 1)]))


@dataclass(frozen=True)
class Slow(FolderTarget):
    """A folder in which it shows how a worker dies while it writes."""

    @contextlib.contextmanager
    def create(self, name: str, *, durable: bool = True) -> Iterator[IO[bytes]]:
        with super().create(name, durable=durable) as file:
            yield file
            time.sleep(0.4 * name.endswith((".bin", ".tar")))


class Killing:
    """A pool during whose work something is killed, once for each task, when it can be."""

    def __init__(self, pool: Any, kills: dict[Callable, Callable[[], bool]]) -> None:
        self.pool, self.left = pool, kills

    def run(self, task: Callable, jobs: Iterable) -> Iterator:
        for result in self.pool.run(task, jobs):
            if task in self.left and self.left[task]():
                del self.left[task]
            yield result


def test_the_bytes_are_those_of_a_local_build_though_a_node_and_a_worker_die(
    cluster, tmp_path, monkeypatch
):
    image_folder = folder_per_class(tmp_path / "pictures", 150)
    monkeypatch.setattr(plan, "SMALLEST_CHUNK", 8)
    options = BuildConfig(
        out=str(tmp_path / "local"),
        train=str(image_folder),
        holdout=0.1,
        samples_per_shard=30,
        workers=1,
    )
    build(options, pool=Here())
    again: list[bool] = []
    real = cluster.attempt.again
    monkeypatch.setattr(
        cluster.attempt,
        "again",
        lambda self, node_died: again.append(node_died) or real(self, node_died),
    )

    def writing(ending: str) -> list[int]:
        """The processes that write such a file at this moment."""
        found = Path(out.address).rglob(f"*{ending}.*{PARTIAL}")
        return [int(path.name.removesuffix(PARTIAL).rpartition(".")[2]) for path in found]

    def kill_node() -> bool:
        for node in cluster.others:
            (raylet,) = node.all_processes["raylet"]
            if workers := [pid for pid in writing(".bin") if parent(pid) == raylet.process.pid]:
                for pid in (raylet.process.pid, *workers):  # all at once, as with a machine
                    os.kill(pid, signal.SIGKILL)
                cluster.nodes.remove_node(node, allow_graceful=False)
                cluster.others.remove(node)
                return True
        return False

    def kill_worker() -> bool:
        for pid in writing(".tar"):
            os.kill(pid, signal.SIGKILL)
            return True
        return False

    out = Slow(str(tmp_path / "ray"))
    with cluster.pool() as pool:
        killing = Killing(pool, {pack_chunk: kill_node, write_shard: kill_worker})
        build(replace(options, out=out.address), out, killing)
    assert killing.left == {}
    assert len(again) >= 2  # both left work behind
    local = FolderTarget(options.out)
    assert sorted(os.listdir(out.address)) == sorted(local.list_files())
    for name in local.list_files():
        assert out.read(name) == local.read(name), name


def parent(pid: int) -> int:
    """The process that started this one; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
