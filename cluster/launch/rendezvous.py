"""Rendezvous of workers that all run on this machine, on 127.0.0.1 as all that Ray starts there.

torch's TCPStore listens on every interface, whatever its host name says, but accepts a socket that
is bound already; gloo and NCCL accept the interface by an environment variable.

Importing this imports Ray, which reads then whether it may listen on other interfaces: whoever
starts a Ray sets `session.OWN` first.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from ray.train.torch import TorchTrainer
from ray.train.torch.config import TorchConfig, _set_torch_distributed_env_vars, _TorchBackend

HOST = "127.0.0.1"
TCPStore: Any = dist.TCPStore  # type: ignore[attr-defined]
UNUSED = ("DatasetsCallback", "PlacementGroupCleanerCallback")
"""Callbacks of Ray Train by the name of their class, which are internal to it."""
_stores: list[Any] = []
"""Store of rank 0: it must live as long as the process group."""


class LoopbackTrainer(TorchTrainer):
    """TorchTrainer without two actors of Ray Train, of four and a half CPU seconds each.

    One serves Ray Data's datasets; Duet has none. The other frees the room of a controller that was
    killed; a Ray of our own ends with the command.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [one for one in callbacks if type(one).__name__ not in UNUSED]


class LoopbackConfig(TorchConfig):
    """TorchConfig for workers that all run on this machine."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """Backend that Ray Train calls before and after the training."""
        return LoopbackBackend


class LoopbackBackend(_TorchBackend):
    """Sets up torch.distributed as Ray's own backend does, but listens on loopback."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Have every worker join the process group."""
        import ray

        size, timeout_s = len(worker_group), backend_config.timeout_s
        port = worker_group.execute_single(0, start_store, size, timeout_s)
        worker_group.execute(_set_torch_distributed_env_vars)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, join_process_group, rank, size, port, backend_config.backend, timeout_s
                )
                for rank in range(size)
            ]
        )


def start_store(size: int, timeout_s: int) -> int:
    """Start a store for `size` workers in this process; returns its port."""
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
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")
    timeout = timedelta(seconds=timeout_s)
    store = TCPStore(HOST, port, size, is_master=False, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
