"""Process group of the workers: they meet at the address by which Ray knows the node of rank 0.

torch's TCPStore listens on every interface, whatever its host name says, but accepts a socket that
is bound already; gloo and NCCL accept the interface by an environment variable. Before they try,
each node tries to connect to each other one: gloo itself would wait for minutes, and then not say
for whom. The nodes of a Ray on loopback meet on 127.0.0.1.

Importing this imports Ray, which reads then whether it may listen on other interfaces: whoever
starts a Ray sets `session.OWN` first. Only the functions that a worker calls import torch: driver
and controller do without its five CPU seconds.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ray.exceptions import GetTimeoutError, RayTaskError
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from cluster.launch.channel import DriverAddress
from cluster.launch.failure import COLOR
from cluster.launch.interfaces import GLOO, NCCL, choose_interface, list_addresses
from cluster.launch.placement import get_node_name
from cluster.run.events import Failed
from pipeline.tools.errors import DuetError, SetupError, summarize_error

SHUTDOWN_TIMEOUT = 5.0
"""Seconds that workers have to leave the process group."""
CONNECT_TIMEOUT = 10.0
"""Seconds that a connection between two nodes may take to be made."""
UNUSED = ("DatasetsCallback", "PlacementGroupCleanerCallback")
"""Callbacks of Ray Train by the name of their class, which are internal to it."""
_stores: list[Any] = []
"""Store of rank 0: it must live as long as the process group."""
_doors: list[socket.socket] = []
"""Socket to which other nodes try to connect."""


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
class RendezvousConfig(BackendConfig):
    """Process group of the workers."""

    backend: str = "gloo"
    """Backend of torch.distributed."""
    timeout_s: int = 300
    """Timeout of a collective operation in seconds."""
    driver: DriverAddress | None = None
    """Gets the cause if the workers do not meet."""

    @property
    def backend_cls(self) -> type[Backend]:
        """Backend that Ray Train calls before and after the training."""
        return RendezvousBackend


@dataclass(frozen=True)
class Endpoint:
    """Node of a worker, and the address at which others reach the worker."""

    node: str
    """Ray's id of the node."""
    name: str
    """Name of the node."""
    address: str


class RendezvousBackend(Backend):
    """Sets up torch.distributed as Ray's TorchTrainer does, by the interfaces that Ray uses."""

    share_cuda_visible_devices = True
    """A worker sees the GPUs of all, as the transport between neighbors needs it."""

    def on_start(self, worker_group: Any, backend_config: RendezvousConfig) -> None:
        """Have every worker join the process group.

        Raises:
            Exception: they did not meet; the driver knows why, and the workers are ended: Ray
                Train itself would keep them, and what they hold, as long as the driver lives.
        """
        try:
            self._join(worker_group, backend_config)
        except Exception as error:
            if backend_config.driver is not None:
                backend_config.driver.tell_now(describe_start(error))
            worker_group.abort()
            raise

    def _join(self, worker_group: Any, config: RendezvousConfig) -> None:
        import ray

        size = len(worker_group)
        found: list[Endpoint] = worker_group.execute(find_endpoint)
        check_paths(worker_group, found)
        where = found[0].address
        port = worker_group.execute_single(0, start_store, where, size, config.timeout_s)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, join_process_group, rank, size, (where, port), config.backend,
                    config.timeout_s, found[rank],
                )
                for rank in range(size)
            ]
        )  # fmt: skip

    def on_shutdown(self, worker_group: Any, backend_config: RendezvousConfig) -> None:
        """Have every worker leave the process group; one that hangs is ended by Ray."""
        import ray

        with suppress(GetTimeoutError):
            ray.get(worker_group.execute_async(leave_process_group), timeout=SHUTDOWN_TIMEOUT)


def describe_start(error: Exception) -> Failed:
    """Return the event for workers that did not meet; Ray wraps the error of a worker."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return Failed(
        text=summarize_error(cause),
        trace=COLOR.sub("", str(error)),
        worker="the workers did not meet",
        exit_code=SetupError.exit_code,
        final=isinstance(cause, DuetError),
    )


def check_paths(worker_group: Any, found: Sequence[Endpoint]) -> None:
    """Have one worker of each node connect to one of each other node.

    Args:
        worker_group: workers of Ray Train.
        found: endpoint of each rank.

    Raises:
        ConnectionError: a node cannot reach another; names both.
    """
    import ray

    first = {endpoint.node: rank for rank, endpoint in reversed(list(enumerate(found)))}
    ranks = sorted(first.values())
    if len(ranks) == 1:
        return
    doors = ray.get(
        [
            worker_group.execute_single_async(rank, open_door, found[rank].address, len(ranks))
            for rank in ranks
        ]
    )
    tried = ray.get([worker_group.execute_single_async(rank, try_doors, doors) for rank in ranks])
    ray.get([worker_group.execute_single_async(rank, close_door) for rank in ranks])
    failed = [
        (found[here], found[there], why)
        for here, answers in zip(ranks, tried, strict=True)
        for there, why in zip(ranks, answers, strict=True)
        if why
    ]
    if failed:
        raise ConnectionError(describe_paths(failed))


def describe_paths(failed: Sequence[tuple[Endpoint, Endpoint, str]]) -> str:
    """Return a line about nodes that cannot reach each other: from, to, and why, of each."""
    here, there, why = failed[0]
    more = f", and {len(failed) - 1} more such paths" if len(failed) > 1 else ""
    return (
        f"node {here.name} cannot reach node {there.name} at {there.address} ({why}){more}; open "
        f"all ports between the nodes, or name the interface of their common network by {GLOO} "
        f"and {NCCL} on each node before `ray start`"
    )


def find_endpoint() -> Endpoint:
    """Choose the interface of this worker, and return where it is.

    Raises:
        SetupError: the user chose one that this node does not have.
    """
    import ray

    here = ray.get_runtime_context().get_node_id()
    name = get_node_name(here)
    (known,) = (node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == here)
    try:
        return Endpoint(here, name, choose_interface(known, list_addresses()))
    except ValueError as error:
        raise SetupError(f"node {name} has {error}; unset it there, or name one of these") from None


def open_door(address: str, count: int) -> tuple[str, int]:
    """Listen for `count` connections; returns address and port."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    _doors[:] = [socket.create_server((address, 0), family=family, backlog=count)]
    return address, int(_doors[0].getsockname()[1])


def try_doors(doors: Sequence[tuple[str, int]]) -> list[str]:
    """Connect to each address and port; return why that failed, "" where it did not."""
    from concurrent.futures import ThreadPoolExecutor

    def try_door(door: tuple[str, int]) -> str:
        try:
            socket.create_connection(door, CONNECT_TIMEOUT).close()
        except OSError as error:
            return error.strerror or str(error)
        return ""

    with ThreadPoolExecutor(len(doors)) as pool:
        return list(pool.map(try_door, doors))


def close_door() -> None:
    """Stop to listen."""
    _doors.pop().close()


def start_store(address: str, size: int, timeout_s: int) -> int:
    """Start a store for `size` workers in this process; returns its port."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family, backlog=size) as listening:
        port = int(listening.getsockname()[1])
        store = TCPStore(
            address, port, size, is_master=True, wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s), master_listen_fd=listening.detach(),
        )  # fmt: skip
    _stores[:] = [store]
    return port


def join_process_group(
    rank: int, size: int, where: tuple[str, int], backend: str, timeout_s: int, own: Endpoint
) -> None:
    """Initialise torch.distributed in this worker.

    Raises:
        ConnectionError: it does not reach the others.
    """
    import torch.distributed as dist

    timeout = timedelta(seconds=timeout_s)
    try:
        store = dist.TCPStore(*where, size, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except RuntimeError as error:
        raise ConnectionError(
            f"rank {rank} on node {own.name} does not reach the others from {own.address} "
            f"({summarize_error(error)})"
        ) from error


def leave_process_group() -> None:
    """Leave the process group of this worker, unless it is alone in it."""
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()
