"""Entry point of a worker: creates its process mesh, then trains as if there were no Ray."""

from __future__ import annotations

import os
from contextlib import closing, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import Config
from cluster.launch.channel import DriverAddress, DriverWatch
from cluster.launch.failure import WorkerGpu, describe_failure
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
from cluster.run.console import format_device
from cluster.run.events import Placed
from cluster.run.folder import RunIdentity
from pipeline.tools.errors import SetupError

if TYPE_CHECKING:
    import torch

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


def run_worker(loop_config: dict[str, Any]) -> None:
    """Train in this worker; Ray Train calls it."""
    from cluster.run.exporters import PrometheusGauges
    from cluster.run.folder import lock_leader, write_machine
    from cluster.run.sync import open_mirror
    from cluster.training.loop import train
    from cluster.training.precision import compute_dtype

    job: WorkerJob = loop_config["job"]
    name, peer = "a worker", "another worker"
    with closing(DriverWatch(job.driver)) as watch:
        try:
            mesh, workers = find_mesh(job.placement, job.config)
            name, peer = str(mesh), mesh.peer_name
            if job.measure:
                from cluster.training.profiler import measure

                if mesh.is_leader:
                    job.driver.tell(Placed(tuple(workers)))
                measure(job.config, job.data, mesh, job.driver.tell)
                return
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
                    publish=[PrometheusGauges(job.run.name, mesh)],
                )  # fmt: skip
        except Exception as error:
            gpu = describe_gpu(job, watch.steps)
            job.driver.tell_now(describe_failure(error, name, gpu, peer))
            raise


def describe_gpu(job: WorkerJob, steps: int) -> WorkerGpu | None:
    """Describe this worker's GPU for a message about its failure; None: it has none.

    Args:
        job: arguments of the worker.
        steps: steps made since the start, with the one that failed.
    """
    import ray

    placement, config = job.placement, job.config
    if not placement.gpus:
        return None
    return WorkerGpu(
        name=format_device(read_gpu(ray.get_gpu_ids())),
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


def find_mesh(placement: Placement, config: Config) -> Any:
    """Create this worker's mesh from the nodes where the workers were started; lists them all.

    Raises:
        SetupError: the columns of a replica do not share a node, or there is no GPU here.
    """
    import ray
    import torch.distributed as dist

    from cluster.mesh import create_mesh

    gpu = read_gpu(ray.get_gpu_ids()) if placement.gpus else None
    index = find_gpu_index(gpu, os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    here = ray.get_runtime_context().get_node_id()
    mine = WorkerLocation(here, get_node_name(here), gpu, index)
    started: list[WorkerLocation] = [mine] * dist.get_world_size()
    dist.all_gather_object(started, mine)
    found = group_ranks(started, placement.size)
    timeout = timedelta(seconds=config.collective_timeout)
    mesh = create_mesh(found, _choose_device(placement), placement.cpus, timeout)
    return mesh, list_workers(started, found, config.design.columns)


def _choose_device(placement: Placement) -> torch.device:
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
    from ray.train.torch import get_device

    device = get_device()
    torch.cuda.set_device(device)
    return device
