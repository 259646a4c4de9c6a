"""What Ray Train calls in every worker: find the mesh, then train as if there were no Ray.

The workers' rendezvous on a Ray of our own, on 127.0.0.1 as all that Ray itself starts there.

torch's TCPStore, by which Ray Train has the workers find each other, listens on every interface,
whatever its host name says. It takes a socket that is bound already, though; and gloo and NCCL take
the interface that they are told.
"""

from __future__ import annotations

import os
import platform
import re
import socket
import traceback
from contextlib import closing, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from ray.train.torch.config import TorchConfig, _set_torch_distributed_env_vars, _TorchBackend

from cluster.config import Config
from cluster.launch.channel import DriverAddress, DriverWatch
from cluster.launch.placement import Placement, WorkerLocation, group_ranks, list_workers
from cluster.run.events import Failed, Placed
from pipeline.tools.errors import DuetError, SetupError

HOST = "127.0.0.1"
TCPStore: Any = dist.TCPStore  # type: ignore[attr-defined]
_held: list[Any] = []
"""The store of rank 0: it must live as long as the process group."""


class LoopbackConfig(TorchConfig):
    """TorchConfig for workers that are all on this machine."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What Ray Train calls before and after the training."""
        return LoopbackBackend


class LoopbackBackend(_TorchBackend):
    """Sets up torch.distributed as Ray's own does, but for where it listens."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Have every worker join."""
        import ray

        size, patience = len(worker_group), backend_config.timeout_s
        port = worker_group.execute_single(0, start_store, size, patience)
        worker_group.execute(_set_torch_distributed_env_vars)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, join_process_group, rank, size, port, backend_config.backend, patience
                )
                for rank in range(size)
            ]
        )


def start_store(size: int, timeout_s: int) -> int:
    """Keep a store for `size` workers in this process; returns its port."""
    with socket.socket() as listening:
        listening.bind((HOST, 0))
        listening.listen(size)
        port = int(listening.getsockname()[1])
        store = TCPStore(
            HOST, port, size, is_master=True, wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s), master_listen_fd=listening.detach(),
        )  # fmt: skip
    _held[:] = [store]
    return port


def join_process_group(rank: int, size: int, port: int, backend: str, timeout_s: int) -> None:
    """Begin torch.distributed in this worker."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # as Ray's own does
    patience = timedelta(seconds=timeout_s)
    store = TCPStore(HOST, port, size, is_master=False, timeout=patience)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)


FAKE_GPUS = "DUET_FAKE_GPUS"
"""Set on a cluster that only pretends to have GPUs: its workers compute on CPUs."""


@dataclass(frozen=True, kw_only=True)
class WorkerJob:
    """What a worker is sent."""

    config: Config
    data: str
    run: Path
    plan: Placement
    driver: DriverAddress
    measure: bool = False
    """Do not train, but say where the time goes."""


def run_worker(loop_config: dict[str, Any]) -> None:
    """Ray Train calls this in every worker."""
    from cluster.run.exporters import PrometheusGauges
    from cluster.run.folder import lock_leader, write_machine
    from cluster.run.sync import open_mirror
    from cluster.training.loop import train

    job: WorkerJob = loop_config["job"]
    where = "a worker"
    with closing(DriverWatch(job.driver)) as watch:
        try:
            mesh, workers = find_mesh(job.plan, job.config)
            where = str(mesh)
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
                        mirror.restore()  # another node than the last leader's
                    write_machine(job.run, mesh.world_size)
                    job.driver.tell(Placed(tuple(workers)))
                train(
                    job.config, job.data, job.run, mesh, job.driver.tell,
                    is_stopping=watch.is_stopping,
                    publish=[PrometheusGauges(job.run.name, mesh)],
                )  # fmt: skip
        except Exception as error:
            job.driver.tell_now(describe_failure(error, where))
            raise


def prepare_folder(job: WorkerJob) -> None:
    """Make sure that RUN is where this worker can write.

    Raises:
        SetupError: it is not on this node, and there is no store to do without it.
    """
    if job.run.is_dir():
        return
    if not job.config.store:
        raise SetupError(
            f"{job.run} is not on node {platform.node()}; name a --run on storage that all nodes "
            "share, or a --store s3://..."
        )
    job.run.mkdir(parents=True, exist_ok=True)


def find_mesh(plan: Placement, config: Config) -> Any:
    """This worker's mesh, from where the workers were really started, and the table of all.

    Raises:
        SetupError: the columns of a replica do not share a node, or there is no GPU here.
    """
    import ray
    import torch.distributed as dist

    from cluster.mesh import create_mesh

    gpus = [int(number) for number in ray.get_gpu_ids()] if plan.gpus else []
    mine = WorkerLocation(
        ray.get_runtime_context().get_node_id(), platform.node(), gpus[0] if gpus else None
    )
    started: list[WorkerLocation] = [mine] * dist.get_world_size()
    dist.all_gather_object(started, mine)
    found = group_ranks(started, plan.size)
    patience = timedelta(seconds=config.collective_timeout)
    mesh = create_mesh(found, _device(plan), plan.cpus, patience)
    return mesh, list_workers(started, found, config.design.columns)


def _device(plan: Placement) -> Any:
    import torch
    from ray.train.torch import get_device

    if not plan.gpus or os.environ.get(FAKE_GPUS):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SetupError(
            f"node {platform.node()} offers GPUs to Ray, but its torch {torch.__version__} sees "
            "none; install a CUDA build and driver there, or use --device cpu"
        )
    device = get_device()
    torch.cuda.set_device(device)
    return device


LOST = re.compile(r"gloo|nccl|socket|store|timed? ?out|connection", re.IGNORECASE)
GONE = re.compile(r"Connection [a-z ]*(?:reset|closed|refused)[a-z ]*|Broken pipe", re.IGNORECASE)
LATE = re.compile(r"timed? ?out", re.IGNORECASE)


def _lost(error: Exception) -> str:
    """What an error of torch.distributed means to whoever only sees that a worker is missing."""
    text = str(error)
    if not isinstance(error, RuntimeError) or not LOST.search(text):
        return ""
    if found := GONE.search(text):
        return f"lost another worker ({found[0].strip()})"
    return "another worker does not answer (frozen?)" if LATE.search(text) else ""


def describe_failure(error: Exception, where: str) -> Failed:
    """A worker's exception as an event."""
    known = isinstance(error, DuetError)
    text = str(error) if known else _lost(error) or f"{type(error).__name__}: {error}"
    return Failed(
        text=text.strip().splitlines()[0],
        trace="".join(traceback.format_exception(error)),
        worker=where,
        exit_code=error.exit_code if isinstance(error, DuetError) else 1,
        final=known,
    )
