"""Process group of the workers: they meet at the address by which Ray knows the node of rank 0.

torch's TCPStore listens on every interface, whatever its host name says, but accepts a socket that
is bound already; gloo and NCCL accept the interface by an environment variable. Before they try,
each node tries to connect to each other one: gloo itself would wait for minutes, and then not say
for whom. The nodes of a Ray on loopback meet on 127.0.0.1.

Only the functions that a worker calls import torch: the driver does without its five CPU seconds.
"""

from __future__ import annotations

import errno
import gc
import os
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from cluster.launch.failure import COLOR
from cluster.launch.interfaces import GLOO, NCCL, choose_interface, list_addresses
from cluster.launch.placement import get_node_name
from cluster.run.events import Failed
from pipeline.tools.errors import DuetError, SetupError, summarize_error

Execute = Callable[..., Any]
"""Calls a function in the process of a rank, as `Workers.execute` does."""
LEAVE_TIMEOUT = 5.0
"""Seconds that a worker has to leave the process group."""
CONNECT_TIMEOUT = 10.0
"""Seconds that a connection between two nodes may take to be made."""
_stores: list[Any] = []
"""Store of rank 0: it must live as long as the process group."""
_doors: list[socket.socket] = []
"""Socket to which other nodes try to connect."""


@dataclass(frozen=True)
class Endpoint:
    """Node of a worker, and the address at which others reach the worker."""

    node: str
    """Ray's id of the node."""
    name: str
    """Name of the node."""
    address: str


def meet(execute: Execute, size: int, backend: str, timeout_s: int) -> None:
    """Have every worker join a new process group.

    Args:
        execute: calls a function in the process of a rank.
        size: number of workers.
        backend: backend of torch.distributed.
        timeout_s: timeout of a collective operation in seconds.

    Raises:
        ConnectionError, RayError: they did not meet, or a worker has died.
    """
    import ray

    found: list[Endpoint] = ray.get([execute(rank, find_endpoint) for rank in range(size)])
    check_paths(execute, found)
    address = found[0].address
    where = (address, ray.get(execute(0, start_store, address, size, timeout_s)))
    joined = [
        execute(rank, join_process_group, rank, size, where, backend, timeout_s, found[rank])
        for rank in range(size)
    ]
    ray.get(joined)


def describe_start(error: Exception) -> Failed:
    """Return the event for workers that did not meet; Ray wraps the error of a worker."""
    from ray.exceptions import RayTaskError

    cause = error.cause if isinstance(error, RayTaskError) else error
    return Failed(
        text=summarize_error(cause),
        trace=COLOR.sub("", str(error)),
        worker="the workers did not meet",
        exit_code=SetupError.exit_code,
        final=isinstance(cause, DuetError),
    )


def check_paths(execute: Execute, found: Sequence[Endpoint]) -> None:
    """Have one worker of each node connect to one of each other node.

    Args:
        execute: calls a function in the process of a rank.
        found: endpoint of each rank.

    Raises:
        ConnectionError: a node cannot reach another; names both.
    """
    import ray

    first = {endpoint.node: rank for rank, endpoint in reversed(list(enumerate(found)))}
    ranks = sorted(first.values())
    if len(ranks) == 1:
        return
    doors = ray.get([execute(rank, open_door, found[rank].address, len(ranks)) for rank in ranks])
    tried = ray.get([execute(rank, try_doors, doors) for rank in ranks])
    ray.get([execute(rank, close_door) for rank in ranks])
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


def listen(address: str, count: int) -> socket.socket:
    """Listen at an address of this node for `count` connections, at a free port.

    A node behind a translation of addresses does not have the one by which others know it: there
    it is every address of the node.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, 0), family=family, backlog=count)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        return socket.create_server(("", 0), family=family, backlog=count)


def open_door(address: str, count: int) -> tuple[str, int]:
    """Listen for `count` connections until `close_door`; returns address and port."""
    _doors[:] = [listen(address, count)]
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

    with listen(address, size) as listening:
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
    """Leave the process group of this worker; a process that cannot ends, and is replaced.

    gloo closes its connections, by which others learn of a failure, when nothing refers to it.
    """
    import torch.distributed as dist

    gc.collect()  # of nets, graphs and exceptions that refer to each other
    if dist.is_initialized():
        leaving = threading.Thread(target=dist.destroy_process_group, daemon=True)
        leaving.start()
        leaving.join(LEAVE_TIMEOUT)
        if leaving.is_alive():
            os._exit(1)
    _stores.clear()
