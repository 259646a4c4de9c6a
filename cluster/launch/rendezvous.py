"""Ray Train for workers that all run on this machine: fewer actors, and a rendezvous on 127.0.0.1.

torch's TCPStore listens on every interface, whatever its host name says, but accepts a socket that
is bound already; gloo and NCCL accept the interface by an environment variable.

Importing this imports Ray, which reads then whether it may listen on other interfaces: whoever
starts a Ray sets `session.OWN` first. Only the functions that a worker calls import torch: driver
and controller do without its five CPU seconds.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ray.exceptions import GetTimeoutError
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

HOST = "127.0.0.1"
SHUTDOWN_TIMEOUT = 5.0
"""Seconds that workers have to leave the process group."""
UNUSED = ("DatasetsCallback", "PlacementGroupCleanerCallback")
"""Callbacks of Ray Train by the name of their class, which are internal to it."""
_stores: list[Any] = []
"""Store of rank 0: it must live as long as the process group."""


class LoopbackTrainer(DataParallelTrainer):
    """Trainer without three actors of Ray Train, of four CPU seconds each.

    One serves Ray Data's datasets; Duet has none. One frees the room of a controller that was
    killed; a Ray of our own ends with the command. One shares an autoscaler between trainings.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [one for one in callbacks if type(one).__name__ not in UNUSED]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        arguments["scaling_policy"] = LoopbackScalingPolicy(self.scaling_config)
        return super()._initialize_and_run_controller(**arguments)


class LoopbackScalingPolicy(FixedScalingPolicy):
    """Starts the workers without asking an autoscaler for their room: it is there."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Start no actor."""

    def _maybe_send_resource_request(self) -> None:
        pass


@dataclass
class LoopbackConfig(BackendConfig):
    """Process group of workers that all run on this machine."""

    backend: str = "gloo"
    """Backend of torch.distributed."""
    timeout_s: int = 300
    """Timeout of a collective operation in seconds."""

    @property
    def backend_cls(self) -> type[Backend]:
        """Backend that Ray Train calls before and after the training."""
        return LoopbackBackend


class LoopbackBackend(Backend):
    """Sets up torch.distributed as Ray's TorchTrainer does, but listens on loopback."""

    share_cuda_visible_devices = True
    """A worker sees the GPUs of all, as the transport between neighbors needs it."""

    def on_start(self, worker_group: Any, backend_config: LoopbackConfig) -> None:
        """Have every worker join the process group."""
        import ray

        size, timeout_s = len(worker_group), backend_config.timeout_s
        port = worker_group.execute_single(0, start_store, size, timeout_s)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, join_process_group, rank, size, port, backend_config.backend, timeout_s
                )
                for rank in range(size)
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: LoopbackConfig) -> None:
        """Have every worker leave the process group; one that hangs is ended by Ray."""
        import ray

        with suppress(GetTimeoutError):
            ray.get(worker_group.execute_async(leave_process_group), timeout=SHUTDOWN_TIMEOUT)


def start_store(size: int, timeout_s: int) -> int:
    """Start a store for `size` workers in this process; returns its port."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    with socket.socket() as listening:
        listening.bind((HOST, 0))
        listening.listen(size)
        port = int(listening.getsockname()[1])
        store = TCPStore(
            HOST, port, size, is_master=True, wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s), master_listen_fd=listening.detach(),
        )  # fmt: skip
    _stores[:] = [store]
    return port


def join_process_group(rank: int, size: int, port: int, backend: str, timeout_s: int) -> None:
    """Initialise torch.distributed in this worker."""
    import torch.distributed as dist

    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(HOST, port, size, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def leave_process_group() -> None:
    """Leave the process group of this worker, unless it is alone in it."""
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()
