"""Worker: an actor of Ray that joins a process group, then trains as if there were no Ray."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
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

if TYPE_CHECKING:
    import torch

    from cluster.checkpoint.memory import Memory

FAKE_GPUS = "DUET_FAKE_GPUS"
"""Variable of a cluster with simulated GPUs: its workers compute on CPUs."""


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
    """Process that trains, an actor of Ray; it outlives the failures of others.

    Between two calls of `train` it keeps what is slow to make: its imports, CUDA's context, and
    after a failure of another worker the weights (`cluster.checkpoint.memory`).
    """

    def __init__(self) -> None:
        # Of a terminal: the driver gets it, too, and requests that the workers save.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._memory: Any = None
        """`cluster.checkpoint.memory.Memory`, from the first training on."""

    def warm(self) -> tuple[WorkerLocation, int]:
        """Import all that a training needs; return node and GPU of this worker, and its process."""
        import ray

        import cluster.run.exporters
        import cluster.training.loop  # noqa: F401 - torch: seconds
        from pipeline.stream.operators import import_dali

        with suppress(SetupError):  # the training says it, with what to do
            import_dali()
        gc.freeze()  # collections of later need not look at what was imported
        node = ray.get_runtime_context().get_node_id()
        location = WorkerLocation(node, get_node_name(node), read_gpu(ray.get_gpu_ids()))
        return location, os.getpid()

    def execute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in this process."""
        return function(*arguments)

    def train(self, job: WorkerJob, member: Membership) -> bool:
        """Train in the process group that this worker has joined, and leave it.

        Returns:
            True if the training ended as it should; False if another worker was lost, and this one
            can join the next group.
        """
        from cluster.checkpoint.memory import Memory

        self._memory = self._memory or Memory()
        watch = DriverWatch(job.driver)
        try:
            with closing(watch):
                return run_worker(job, member, watch, self._memory)
        finally:
            leave_process_group()

    def end_process(self, process: int) -> None:
        """Kill another worker of this node, which may be frozen."""
        with suppress(OSError):
            if Path(f"/proc/{process}/cmdline").read_bytes().startswith(b"ray::"):
                os.kill(process, signal.SIGKILL)


def expose_gpus(visible: str) -> None:
    """Have this process see some GPUs; before it uses one."""
    os.environ["CUDA_VISIBLE_DEVICES"] = visible


def run_worker(job: WorkerJob, member: Membership, watch: DriverWatch, memory: Memory) -> bool:
    """Train in this worker; see `TrainWorker.train`."""
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
        is_fixed=config.exact or config.design.norm == "batch",
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
