"""Worker: a process that Ray Train starts; it trains as if there were no Ray."""

from __future__ import annotations

import gc
import os
import signal
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from queue import Empty, Queue
from typing import TYPE_CHECKING, Any

from cluster.config import Config
from cluster.launch.channel import DriverAddress, DriverWatch
from cluster.launch.failure import WorkerGpu, describe_failure, is_lost_worker
from cluster.launch.gpus import GpuFault, describe_fault, find_gpu_fault, gather_gpu_state
from cluster.launch.placement import (
    Placement,
    WorkerLocation,
    estimate_memory,
    find_gpu_index,
    get_node_name,
    group_ranks,
    list_workers,
    read_gpu,
)
from cluster.launch.rendezvous import leave_process_group
from cluster.run.console import format_device
from cluster.run.events import Placed
from cluster.run.folder import RunIdentity
from pipeline.tools.errors import SetupError
from pipeline.tools.watchdog import end_process_on_hang

if TYPE_CHECKING:
    import torch

    from cluster.checkpoint.memory import Memory

FAKE_GPUS = "DUET_FAKE_GPUS"
"""Variable of a cluster with simulated GPUs: its workers compute on CPUs."""
END_EVERY = 1.0
"""Seconds of a wait for the end of a training: between two, Ray Train asks how the worker is."""


@dataclass(frozen=True, kw_only=True)
class WorkerJob:
    """Arguments of a worker."""

    config: Config
    data: str
    run: Path
    placement: Placement
    driver: DriverAddress
    identity: RunIdentity
    measure: bool = False
    """Measure where the time of a step goes instead of training."""


@dataclass(frozen=True, kw_only=True)
class Membership:
    """Place of a worker in the process group of one start."""

    rank: int
    size: int
    """Workers in the group."""
    gpu: int | str | None
    """Its GPU."""
    visible: str
    """GPUs of all workers on its node, as CUDA_VISIBLE_DEVICES names them; "" without GPUs."""


class TrainWorker:
    """Process that trains, hosted by a worker of Ray Train; it outlives the failures of others.

    Between two trainings it keeps what is slow to make: its imports, CUDA's context, and after a
    failure of another worker the weights (`cluster.checkpoint.memory`).
    """

    def __init__(self) -> None:
        end_process_on_hang()
        self._memory: Any = None
        """`cluster.checkpoint.memory.Memory`, from the first training on."""
        self._jobs: Queue[tuple[WorkerJob, Membership]] = Queue()
        self._ends: Queue[bool | Exception] = Queue()

    def serve(self) -> None:
        """Train, job after job; the process is killed when there are no more."""
        while True:
            job, member = self._jobs.get()
            try:
                end: bool | Exception = self._train(job, member)
            except Exception as error:
                end = error
            self._ends.put(end)

    def begin(self, job: WorkerJob, member: Membership) -> None:
        """Have `serve` train in the process group that this worker has joined, and leave it."""
        self._jobs.put((job, member))

    def wait_for_end(self) -> bool | None:
        """Wait a moment for the end of a training.

        Returns:
            True if it ended as it should; False if another worker was lost, and this one can join
            the next group; None if it goes on.

        Raises:
            Exception: the one that ended it.
        """
        try:
            end = self._ends.get(timeout=END_EVERY)
        except Empty:
            return None
        if isinstance(end, Exception):
            raise end
        return end

    def _train(self, job: WorkerJob, member: Membership) -> bool:
        from cluster.checkpoint.memory import Memory

        self._memory = self._memory or Memory()
        watch = DriverWatch(job.driver)
        try:
            with closing(watch):
                return run_worker(job, member, watch, self._memory)
        finally:
            leave_process_group()


@dataclass(frozen=True, kw_only=True)
class Registration:
    """Worker that is ready, or has failed to be."""

    trainer: int
    """Number of the trainer that started it."""
    rank: int
    """Its rank in that trainer."""
    handle: Any
    """Ray's handle of its actor, which is Ray Train's."""
    location: WorkerLocation
    process: int
    """Its process id."""
    error: Exception | None = None
    """Error of its imports."""


_hosted = TrainWorker()
"""Worker of this process: its train function serves, and calls from the driver reach it."""


def host_worker(settings: dict[str, Any]) -> None:
    """Train function that Ray Train runs in a thread of each worker, until it kills the process.

    Imports all that a training needs, registers at the driver, and serves.

    Args:
        settings: "driver", a `DriverAddress`; "trainer", the number of the trainer.
    """
    import ray
    from ray.train import get_context

    node = ray.get_runtime_context().get_node_id()
    ready = Registration(
        trainer=settings["trainer"],
        rank=get_context().get_world_rank(),
        handle=ray.get_runtime_context().current_actor,
        location=WorkerLocation(node, get_node_name(node), read_gpu(ray.get_gpu_ids())),
        process=os.getpid(),
    )
    driver: DriverAddress = settings["driver"]
    try:
        import cluster.run.exporters
        import cluster.training.loop  # noqa: F401 - torch: seconds
        from pipeline.stream.operators import import_dali

        with suppress(SetupError):  # the training says it, with what to do
            import_dali()
    except Exception as error:
        driver.register(replace(ready, error=error))
        raise
    gc.freeze()  # collections of later need not look at what was imported
    driver.register(ready)
    _hosted.serve()


def begin_training(job: WorkerJob, member: Membership) -> None:
    """Call `TrainWorker.begin` of this process."""
    _hosted.begin(job, member)


def wait_for_end() -> bool | None:
    """Call `TrainWorker.wait_for_end` of this process."""
    return _hosted.wait_for_end()


def end_process(process: int) -> None:
    """Kill another worker of this node, which may be frozen."""
    with suppress(OSError):
        if Path(f"/proc/{process}/cmdline").read_bytes().startswith(b"ray::"):
            os.kill(process, signal.SIGKILL)


def expose_gpus(visible: str) -> None:
    """Have this process see some GPUs; before it uses one."""
    os.environ["CUDA_VISIBLE_DEVICES"] = visible


def run_worker(job: WorkerJob, member: Membership, watch: DriverWatch, memory: Memory) -> bool:
    """Train in this worker; see `TrainWorker.wait_for_end`."""
    from cluster.run.exporters import PrometheusGauges
    from cluster.run.folder import lock_leader, write_machine
    from cluster.run.sync import open_mirror
    from cluster.training.loop import train
    from cluster.training.precision import compute_dtype

    name, peer = "a worker", "another worker"
    try:
        mesh, workers = find_mesh(job.placement, job.config, member)
        name, peer = str(mesh), mesh.peer_name
        if job.measure:
            from cluster.training.profiler import measure

            if mesh.is_leader:
                job.driver.tell(Placed(tuple(workers)))
            measure(job.config, job.data, mesh, job.driver.tell)
            return True
        prepare_folder(job)
        with lock_leader(job.run) if mesh.is_leader else nullcontext():
            if mesh.is_leader:
                if mirror := open_mirror(job.run, job.config.store):
                    mirror.restore()  # the last leader may have been on another node
                dtype = compute_dtype(job.config.dtype, mesh.device)
                write_machine(job.run, mesh.world_size, dtype)
                job.driver.tell(Placed(tuple(workers)))
            train(
                job.config, job.data, job.run, mesh, job.driver.tell,
                identity=job.identity, is_stopping=watch.is_stopping,
                publish=[PrometheusGauges(job.run.name, mesh)], memory=memory,
            )  # fmt: skip
        return True
    except Exception as error:
        gpu = describe_gpu(job, member, watch.steps)
        job.driver.tell_now(describe_failure(error, name, gpu, peer))
        if is_lost_worker(error):
            return False
        raise


def describe_gpu(job: WorkerJob, member: Membership, steps: int) -> WorkerGpu | None:
    """Describe this worker's GPU for a message about its failure; None: it has none.

    Args:
        job: arguments of the worker.
        member: place of the worker.
        steps: steps made since the start, with the one that failed.
    """
    import ray

    placement, config = job.placement, job.config
    if not placement.gpus:
        return None
    return WorkerGpu(
        name=format_device(member.gpu),
        node=get_node_name(),
        node_id=ray.get_runtime_context().get_node_id(),
        images=config.microbatch_size(placement.replicas),
        memory=estimate_memory(config, None, placement.size),
        steps=steps,
        is_fixed=config.exact or config.design.has_batch_norm,
    )


def prepare_folder(job: WorkerJob) -> None:
    """Make sure that this worker can write to RUN; with a store it may be local to the node.

    Raises:
        SetupError: RUN is not on this node, and there is no store.
    """
    if job.run.is_dir():
        return
    if not job.config.store:
        raise SetupError(
            f"{job.run} is not on node {get_node_name()}; name a --run on storage that all nodes "
            "share, or a --store s3://..."
        )
    job.run.mkdir(parents=True, exist_ok=True)


def find_mesh(placement: Placement, config: Config, member: Membership) -> Any:
    """Create this worker's mesh from the nodes where the workers were started; lists them all.

    Raises:
        SetupError: the columns of a replica do not share a node, or there is no GPU here.
    """
    import ray
    import torch.distributed as dist

    from cluster.mesh import create_mesh

    index = find_gpu_index(member.gpu, member.visible)
    here = ray.get_runtime_context().get_node_id()
    mine = WorkerLocation(here, get_node_name(here), member.gpu, index)
    started: list[WorkerLocation] = [mine] * dist.get_world_size()
    dist.all_gather_object(started, mine)
    found = group_ranks(started, placement.size)
    timeout = timedelta(seconds=config.collective_timeout)
    mesh = create_mesh(found, _choose_device(placement, member), placement.cpus, timeout)
    return mesh, list_workers(started, found, config.design.columns)


def _choose_device(placement: Placement, member: Membership) -> torch.device:
    import torch

    if not placement.gpus or os.environ.get(FAKE_GPUS):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        fault = find_gpu_fault(gather_gpu_state())
        why = describe_fault(fault or GpuFault("no driver", "install one there"))
        raise SetupError(
            f"node {get_node_name()} offers GPUs to Ray, but its torch {torch.__version__} sees "
            f"none: {why}"
        )
    device = torch.device("cuda", member.visible.split(",").index(str(member.gpu)))
    torch.cuda.set_device(device)
    return device
