"""The workers' rendezvous on a Ray of our own, on 127.0.0.1 as all that Ray itself starts there.

torch's TCPStore, by which Ray Train has the workers find each other, listens on every interface,
whatever its host name says. It takes a socket that is bound already, though; and gloo and NCCL take
the interface that they are told.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from ray.train.torch.config import TorchConfig, _set_torch_distributed_env_vars, _TorchBackend

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
        port = worker_group.execute_single(0, hold_store, size, patience)
        worker_group.execute(_set_torch_distributed_env_vars)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, join, rank, size, port, backend_config.backend, patience
                )
                for rank in range(size)
            ]
        )


def hold_store(size: int, timeout_s: int) -> int:
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


def join(rank: int, size: int, port: int, backend: str, timeout_s: int) -> None:
    """Begin torch.distributed in this worker."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # as Ray's own does
    patience = timedelta(seconds=timeout_s)
    store = TCPStore(HOST, port, size, is_master=False, timeout=patience)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
