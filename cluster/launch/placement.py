"""Placement of replicas and columns on nodes, and the free resources of the cluster's nodes.

A replica is one copy of the network, held by a pair of workers, one per column, that share a node
and have neighbouring GPUs; or, without pairing, by one worker with both columns. `place_run`
decides which, at each start.

    job rank   0  1  2  3          rank = replica * 2 + column
    replica    0  0  1  1          so the halves of a replica's batch are adjacent
    column     a  b  a  b
"""

from __future__ import annotations

import os
import platform
import socket
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from cluster.config import Config
from cluster.run.events import Worker
from model.summary import FLOAT32_BYTES, build_table, sum_rows
from pipeline.tools.errors import SetupError
from pipeline.tools.text import human_bytes
from pipeline.tools.units import cpu_count


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node of the cluster: Ray's id, host name, and free resources."""

    id: str
    name: str
    cpus: float
    """Logical CPUs that no other job holds."""
    gpus: float
    """GPUs that no other job holds."""
    busy_cpus: float = 0
    busy_gpus: float = 0

    def count_replicas(self, size: int, gpu: bool) -> int:
        """Return how many replicas of `size` workers fit; each needs a CPU, and a GPU if `gpu`."""
        cpus, gpus = int(self.cpus) // size, int(self.gpus) // size
        return min(cpus, gpus) if gpu else cpus


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Node of each worker in rank order, and the resources of each worker."""

    nodes: tuple[str, ...]
    cpus: int
    """CPU cores of each worker, at least 1."""
    gpus: int
    """GPUs of each worker, 0 or 1."""
    size: int
    """Workers per replica, 2 or 1."""

    @property
    def replicas(self) -> int:
        """Copies of the network."""
        return len(self.nodes) // self.size


class NoRoom(SetupError):
    """The cluster has no room for the job at present."""


CLASSES = 1000
"""Number of classes assumed where it is not known."""
PARAMETER_COPIES = 3
"""float32 numbers for each parameter: value, gradient and velocity."""
PROCESS_BYTES = 0.7e9
"""Memory of a worker before any image: torch, DALI, Ray (measured: 0.61 to 0.65 GB resident)."""


@dataclass(frozen=True)
class WorkerMemory:
    """Bytes of parameters and activations in a worker, without those of its process.

    The paper's M = X(W + B + A + Z), with gradient and velocity for each W and B; all in float32,
    so that it is an upper bound in bfloat16.
    """

    parameters: int
    image: int
    """Bytes of the activations of an image, and of their gradients."""

    def count_bytes(self, images: int) -> int:
        """Return the bytes for so many images at once."""
        return self.parameters + images * self.image


def estimate_memory(config: Config, classes: int | None, size: int) -> WorkerMemory:
    """Estimate the memory of a worker.

    Args:
        config: settings of the run.
        classes: number of classes; None: not known.
        size: workers of a replica, 2 or 1.
    """
    rows = build_table(classes or CLASSES, config.design)
    if size == 2:
        rows = [row for row in rows if row.column == "a"]  # b's are as large
    sums = sum_rows(rows)
    copies = PARAMETER_COPIES
    if config.exact:  # a sum of 1, 2, 4, ... micro-batches each, and a gradient to update with
        most = config.replica_sizes[0]
        copies += (config.batch_size // (most * config.microbatch_size(most))).bit_length()
    return WorkerMemory(FLOAT32_BYTES * copies * sums.parameters, FLOAT32_BYTES * 2 * sums.neurons)


def place_workers(
    nodes: Sequence[Node], *, sizes: Sequence[int], size: int, gpu: bool
) -> Placement:
    """Place every replica on a node that has room for all of its workers.

    Args:
        nodes: live nodes.
        sizes: acceptable numbers of replicas, ascending; the largest that fits is placed.
        size: workers per replica, 2 (a pair) or 1.
        gpu: whether each worker needs a GPU and a CPU, or a CPU only.

    Raises:
        NoRoom: even the smallest does not fit; names the free resources, the missing ones, and
            the largest job that would fit.
    """
    room = {node.id: node.count_replicas(size, gpu) for node in nodes}
    fitting = [count for count in sizes if count <= sum(room.values())]
    if not fitting:
        raise NoRoom(_explain_no_room(nodes, sizes[0], size, gpu))
    used: dict[str, int] = {}
    # The largest node first, and each one filled before the next: least network traffic.
    for node in sorted(nodes, key=lambda node: -room[node.id]):
        take = min(room[node.id], fitting[-1] - sum(used.values()))
        if take:
            used[node.id] = take
    cpus = min(node.cpus // (used[node.id] * size) for node in nodes if node.id in used)
    order = tuple(name for name, pairs in used.items() for _ in range(pairs * size))
    return Placement(nodes=order, cpus=max(1, int(cpus)), gpus=int(gpu), size=size)


def place_run(config: Config, nodes: Sequence[Node], gpu: bool) -> Placement:
    """Place the replicas of a run on the live nodes; `gpu`: each worker needs one.

    Raises:
        NoRoom: as `place_workers` does.
    """
    size = choose_size(config, nodes, gpu)
    return place_workers(nodes, sizes=config.replica_sizes, size=size, gpu=gpu)


def choose_size(config: Config, nodes: Sequence[Node], gpu: bool) -> int:
    """Return the workers of a replica: 2 (a pair), or 1 that holds all columns."""
    columns = config.columns_per_worker
    if columns == "auto":
        has_pair = any(node.gpus + node.busy_gpus >= 2 for node in nodes)
        is_whole = not config.design.is_cut_by_columns
        columns = 2 if is_whole or (gpu and not has_pair) else 1
    return 1 if columns == 2 or config.design.columns == 1 else 2


def describe_layout(config: Config, placement: Placement) -> str:
    """Return a line about both columns on one GPU, if that was not asked for; else ""."""
    if config.columns_per_worker != "auto" or config.design.columns == 1 or placement.size == 2:
        return ""
    if placement.replicas == 1:
        return "one GPU here: both columns on it"
    return "no node has two GPUs: both columns on each"


def check_this_machine(config: Config, gpus: int) -> tuple[int, str]:
    """Check, before a run starts a Ray of its own, whether this machine has room for its workers.

    Args:
        config: settings of the run.
        gpus: GPUs of this machine.

    Returns:
        CPUs that this Ray must offer, and a warning; "" if there is nothing to warn of.

    Raises:
        NoRoom: it has too few GPUs, or too little memory for the processes alone.
    """
    sizes, gpu, cores = config.replica_sizes, uses_gpus(config, gpus > 0), cpu_count()
    node = Node(id="", name=platform.node(), cpus=cores, gpus=gpus)
    size = choose_size(config, [node], gpu)
    # Of CPUs, no more than there must be.
    offered = (sizes[-1] if gpu else sizes[0]) * size
    placement = place_run(config, [replace(node, cpus=max(cores, offered))], gpu)
    workers = len(placement.nodes)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if workers * PROCESS_BYTES > memory:
        raise NoRoom(
            f"{workers} workers need {human_bytes(workers * PROCESS_BYTES)} of memory before any "
            f"image, and {node.name} has {human_bytes(memory)}; use --replicas "
            f"{max(1, int(memory / PROCESS_BYTES) // size)} or fewer, or more nodes"
        )
    return offered, "" if gpu else describe_crowd(workers, cores, size)


def describe_crowd(workers: int, cores: int, size: int) -> str:
    """Return a warning if workers have to share cores; "" if each has one of its own."""
    if workers <= cores:
        return ""
    ways = ["--columns-per-worker 2"] * (size == 2) + ["fewer --replicas"] * (workers > size)
    what = f"{workers} workers take turns on {cores} core{'s' * (cores > 1)}"
    return f"{what}, each with its own copy of the data pipeline; use {' or '.join(ways)}"


def _explain_no_room(nodes: Sequence[Node], replicas: int, size: int, gpu: bool) -> str:
    kind = "GPU" if gpu else "CPU"
    together = f", {size} of them on one node each time" if size > 1 else ""
    there = ", ".join(_format_free(node, gpu) for node in nodes)
    fits = sum(node.count_replicas(size, gpu) for node in nodes)
    most = f"{fits} replica{'s' * (fits > 1)} would fit" if fits else "not even one would fit"
    ways = [f"--replicas {fits}"] if fits else []
    if gpu and size == 2 and sum(node.count_replicas(1, True) for node in nodes) > fits:
        ways.append("--columns-per-worker 2 (both columns on one GPU)")
    ways += ["--device cpu", "more nodes"] if gpu else ["more nodes"]
    return (
        f"{replicas} replica{'s' * (replicas > 1)} of {size} worker{'s' * (size > 1)} "
        f"need{'s' * (replicas == 1)} {replicas * size} {kind}{'s' * (replicas * size > 1)}"
        f"{together}; free are {there or 'no nodes'}; {most}; "
        f"use {' or '.join(ways)}"
    )


def _format_free(node: Node, gpu: bool) -> str:
    kind, free, busy = ("CPU", node.cpus, node.busy_cpus)
    if gpu:
        kind, free, busy = ("GPU", node.gpus, node.busy_gpus)
    others = f" ({busy:g} more in use)" if busy else ""
    # The CPUs may limit a node with GPUs: each worker needs one.
    cpus = f" and {node.cpus:g} CPUs" if gpu and node.cpus < node.gpus else ""
    return f"{node.name}: {free:g} {kind}s{others}{cpus}"


@dataclass(frozen=True)
class WorkerLocation:
    """Node and GPU on which a worker was started."""

    node: str
    """Ray's id of its node."""
    name: str
    """Host name of its node."""
    gpu: int | str | None = None
    """Number of its GPU on that node, or the id by which CUDA_VISIBLE_DEVICES names it."""
    gpu_index: int = 0
    """Index of its GPU among those of that node (`find_gpu_index`)."""


def read_gpu(ids: Sequence[int | str]) -> int | str | None:
    """Return the number of the GPU that Ray has assigned to a worker, or its id.

    Args:
        ids: `ray.get_gpu_ids()`; numbers may come as text.
    """
    if not ids:
        return None
    return int(ids[0]) if str(ids[0]).isdecimal() else ids[0]


def find_gpu_index(gpu: int | str | None, visible: str) -> int:
    """Return the index of a GPU on its node.

    Args:
        gpu: result of `read_gpu`.
        visible: CUDA_VISIBLE_DEVICES, which lists the GPUs of all workers that the job has there.
    """
    if isinstance(gpu, str):
        listed = visible.split(",")
        return listed.index(gpu) if gpu in listed else 0
    return gpu or 0


def group_ranks(started: Sequence[WorkerLocation], size: int) -> tuple[tuple[int, ...], ...]:
    """Group ranks, by the nodes they were started on, into replicas whose workers share a node.

    On a node the workers are paired in the order of their GPUs, so that pairs are neighbours.

    Args:
        started: location of every rank of torch.distributed.
        size: workers per replica, 1 or 2.

    Returns:
        for each replica its ranks in column order.

    Raises:
        SetupError: the ranks of a node cannot be grouped; names the node of every rank.
    """
    by_node: dict[str, list[int]] = {}
    for rank, location in enumerate(started):
        by_node.setdefault(location.node, []).append(rank)
    if any(len(ranks) % size for ranks in by_node.values()):
        table = "; ".join(f"{started[r[0]].name}: ranks {r}" for r in by_node.values())
        raise SetupError(
            f"columns a and b of a replica must share a node, but the workers are on {table}"
        )
    found = []
    for ranks in by_node.values():
        ranks.sort(key=lambda rank: (started[rank].gpu_index, rank))
        found += [tuple(ranks[i : i + size]) for i in range(0, len(ranks), size)]
    return tuple(sorted(found, key=min))


def list_workers(
    started: Sequence[WorkerLocation], replicas: Sequence[Sequence[int]], columns: int
) -> list[Worker]:
    """Return the workers in job order.

    Args:
        started: location of every rank of torch.distributed.
        replicas: result of `group_ranks`.
        columns: columns of the network, 1 or 2.
    """
    workers: list[Worker] = []
    for replica, ranks in enumerate(replicas):
        names = ["a", "b"] if len(ranks) == 2 else ["a and b" if columns == 2 else "a"]
        for column, rank in zip(names, ranks, strict=True):
            here = started[rank]
            workers.append(Worker(len(workers), replica, column, here.name, here.gpu))
    return workers


# Ray has no public API for the free resources of each node, nor for draining nodes: `list_nodes`
# and `find_draining_nodes` use private functions, as Ray's own libraries do (2.60; pyproject pins
# the minor version).


def list_nodes(mine: Placement | None = None) -> list[Node]:
    """List the live nodes that are not being drained, with their free resources.

    Args:
        mine: running workers of this job, whose resources count as free.
    """
    import ray
    from ray._private.state import available_resources_per_node

    free, leaving = available_resources_per_node(), find_draining_nodes()
    held = Counter(mine.nodes) if mine else Counter[str]()
    nodes, all_nodes = [], ray.nodes()
    names = name_nodes(all_nodes)
    for node in all_nodes:
        identity = node["NodeID"]
        if not node["Alive"] or identity in leaving or identity not in free:
            continue
        has = {"CPU": 0.0, "GPU": 0.0} | node["Resources"]
        now = {"CPU": 0.0, "GPU": 0.0} | free[identity]
        if mine:  # some of them may be released already
            now["CPU"] = min(has["CPU"], now["CPU"] + held[identity] * mine.cpus)
            now["GPU"] = min(has["GPU"], now["GPU"] + held[identity] * mine.gpus)
        nodes.append(
            Node(
                id=identity,
                name=names[identity],
                cpus=now["CPU"],
                gpus=now["GPU"],
                busy_cpus=max(0.0, has["CPU"] - now["CPU"]),
                busy_gpus=max(0.0, has["GPU"] - now["GPU"]),
            )
        )
    return nodes


def has_gpus() -> bool:
    """Return whether any live node has a GPU, free or not."""
    import ray

    return any(node["Alive"] and node["Resources"].get("GPU") for node in ray.nodes())


def uses_gpus(config: Config, has_gpus: bool) -> bool:
    """Return whether the workers of a run get GPUs; `has_gpus`: any node has one, free or not."""
    return config.device == "gpu" or (config.device == "auto" and has_gpus)


def name_nodes(nodes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the host name of each of `ray.nodes()` by its id, with the address if hosts share it.

    Nodes of one address, as a host has that was started again, need none.
    """
    places = defaultdict[str, set[str]](set)
    for node in nodes:
        places[node["NodeManagerHostname"]].add(node["NodeManagerAddress"])
    names = {}
    for node in nodes:
        name, address = node["NodeManagerHostname"], node["NodeManagerAddress"]
        names[node["NodeID"]] = f"{name} ({address})" if len(places[name]) > 1 else name
    return names


def get_node_name(identity: str = "") -> str:
    """Return the name of a node; without an id, of that of this worker."""
    import ray

    identity = identity or ray.get_runtime_context().get_node_id()
    return name_nodes(ray.nodes()).get(identity, identity[:12])


def find_lost_nodes(placement: Placement) -> frozenset[str]:
    """Return the names of the nodes of a placement that Ray counts as dead."""
    import ray

    nodes = ray.nodes()
    names = name_nodes(nodes)
    dead = {node["NodeID"] for node in nodes if not node["Alive"]}
    return frozenset(names[node] for node in dead & set(placement.nodes))


def describe_holders() -> str:
    """Return which jobs hold room for workers on the cluster; "" if none does."""
    from ray._private.state import jobs
    from ray.util import placement_group_table

    drivers = {job["JobID"]: job for job in jobs()}
    held: dict[str, Counter[str]] = {}
    for identity, group in placement_group_table().items():
        if group["state"] == "CREATED":
            # The id of what a job has made ends with the job's own.
            job = next((name for name in drivers if identity.endswith(name)), "unknown")
            for bundle in group["bundles"].values():
                held.setdefault(job, Counter()).update(bundle)
    parts = []
    for job, resources in held.items():
        driver = drivers.get(job, {})
        what = " and ".join(f"{resources[k]:g} {k}s" for k in ("CPU", "GPU") if resources[k])
        pid, address = driver.get("DriverPid"), driver.get("DriverIPAddress")
        parts.append(f"{what} by job {job}" + f" (process {pid} on {address})" * bool(driver))
    return "; ".join(parts)


def find_draining_nodes() -> set[str]:
    """Return the ids of nodes being drained: preempted, or removed by the autoscaler."""
    from ray._private.state import state

    return set(state.get_draining_nodes())


def find_reachable() -> set[str]:
    """Return Ray's ids of the nodes that answer: Ray takes some seconds to notice a loss."""
    import ray

    found = set()
    for node in ray.nodes():
        with suppress(OSError):
            if node["Alive"]:
                address = (node["NodeManagerAddress"], node["NodeManagerPort"])
                socket.create_connection(address, timeout=2).close()
                found.add(node["NodeID"])
    return found
