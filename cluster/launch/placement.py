"""Which worker is which column of which replica, and on which node: pure functions.

A replica is one copy of the network. It is held by a pair of workers, one per column, that
share a node and have neighbouring GPUs; or, without pairing, by one worker with both columns.

    job rank   0  1  2  3          rank = replica * 2 + column
    replica    0  0  1  1          so the two halves of a replica's batch lie side by side
    column     a  b  a  b

The machines of the cluster as they are now: what is free, and what is about to go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.config import Config
from cluster.run.events import Worker
from pipeline.tools.errors import SetupError


@dataclass(frozen=True, kw_only=True)
class Node:
    """One machine of the cluster: its id, name for people, and what is free on it."""

    id: str
    name: str
    cpus: float
    """Logical CPUs that no other job holds."""
    gpus: float
    """GPUs that no other job holds."""
    busy_cpus: float = 0
    busy_gpus: float = 0

    def room(self, size: int, gpu: bool) -> int:
        """Replicas of `size` workers that fit; a worker needs a CPU, and a GPU if `gpu`."""
        cpus, gpus = int(self.cpus) // size, int(self.gpus) // size
        return min(cpus, gpus) if gpu else cpus


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the workers go: node ids in rank order, and what each worker gets."""

    nodes: tuple[str, ...]
    cpus: int
    """Cores of each worker, at least 1."""
    gpus: int
    """GPUs of each worker, 0 or 1."""
    size: int
    """Workers per replica, 2 or 1."""

    @property
    def replicas(self) -> int:
        """Copies of the network."""
        return len(self.nodes) // self.size


class NoRoom(SetupError):
    """The cluster cannot hold the job as it is now."""


def place_workers(
    nodes: Sequence[Node], *, sizes: Sequence[int], size: int, gpu: bool
) -> Placement:
    """Give every replica a node that has room for all of its workers.

    Args:
        nodes: the living machines.
        sizes: numbers of replicas that would do, ascending; the largest that fits is taken.
        size: workers per replica, 2 (a pair) or 1.
        gpu: a GPU for each worker, and at least one CPU; otherwise at least one CPU for each.

    Raises:
        NoRoom: even the smallest does not fit; says what is there, what is missing, and the
            largest job that would fit.
    """
    room = {node.id: node.room(size, gpu) for node in nodes}
    fitting = [count for count in sizes if count <= sum(room.values())]
    if not fitting:
        raise NoRoom(_refusal(nodes, sizes[0], size, gpu))
    used: dict[str, int] = {}
    # The roomiest node first, and each one filled before the next: least goes over the wire.
    for node in sorted(nodes, key=lambda node: -room[node.id]):
        take = min(room[node.id], fitting[-1] - sum(used.values()))
        if take:
            used[node.id] = take
    cpus = min(node.cpus // (used[node.id] * size) for node in nodes if node.id in used)
    order = tuple(name for name, pairs in used.items() for _ in range(pairs * size))
    return Placement(nodes=order, cpus=max(1, int(cpus)), gpus=int(gpu), size=size)


def _refusal(nodes: Sequence[Node], replicas: int, size: int, gpu: bool) -> str:
    kind = "GPU" if gpu else "CPU"
    together = f", {size} of them on one node each time" if size > 1 else ""
    there = ", ".join(_free(node, gpu) for node in nodes)
    fits = sum(node.room(size, gpu) for node in nodes)
    most = f"{fits} replica{'s' * (fits > 1)} would fit" if fits else "not even one would fit"
    return (
        f"{replicas} replica{'s' * (replicas > 1)} of {size} worker{'s' * (size > 1)} need "
        f"{replicas * size} {kind}s{together}; free are {there or 'no nodes'}; {most}; "
        f"{_way_out(nodes, fits, size, gpu)}"
    )


def _free(node: Node, gpu: bool) -> str:
    free, busy = (node.gpus, node.busy_gpus) if gpu else (node.cpus, node.busy_cpus)
    kind = "GPU" if gpu else "CPU"
    others = f" ({busy:g} more in use)" if busy else ""
    # What holds a node with GPUs back may be its CPUs: each worker needs one.
    cpus = f" and {node.cpus:g} CPUs" if gpu and node.cpus < node.gpus else ""
    return f"{node.name}: {free:g} {kind}s{others}{cpus}"


def _way_out(nodes: Iterable[Node], fits: int, size: int, gpu: bool) -> str:
    ways = [f"--replicas {fits}"] if fits else []
    if gpu:
        if size == 2 and sum(node.room(1, True) for node in nodes) > fits:
            ways.append("--columns-per-worker 2 (both columns on one GPU)")
        ways.append("--device cpu")
    return f"use {' or '.join([*ways, 'more nodes'])}"


@dataclass(frozen=True)
class WorkerLocation:
    """Where a worker was really started."""

    node: str
    """Id of its node."""
    name: str
    """Name of its node, for people."""
    gpu: int | None = None
    """Number of its GPU on that node."""


def group_ranks(started: Sequence[WorkerLocation], size: int) -> tuple[tuple[int, ...], ...]:
    """Group the ranks that were really started into replicas whose workers share a node.

    On a node the workers are paired in the order of their GPUs, so that pairs are neighbours.

    Args:
        started: of every rank of torch.distributed.
        size: workers per replica, 1 or 2.

    Returns:
        for each replica its ranks in column order.

    Raises:
        SetupError: the ranks of a node cannot be grouped; shows where every rank is.
    """
    by_node: dict[str, list[int]] = {}
    for rank, seat in enumerate(started):
        by_node.setdefault(seat.node, []).append(rank)
    if any(len(ranks) % size for ranks in by_node.values()):
        table = "; ".join(f"{started[r[0]].name}: ranks {r}" for r in by_node.values())
        raise SetupError(
            f"columns a and b of a replica must share a node, but the workers are on {table}"
        )
    found = []
    for ranks in by_node.values():
        ranks.sort(key=lambda rank: (started[rank].gpu or 0, rank))
        found += [tuple(ranks[i : i + size]) for i in range(0, len(ranks), size)]
    return tuple(sorted(found, key=min))


def list_workers(
    started: Sequence[WorkerLocation], found: Sequence[Sequence[int]], columns: int
) -> list[Worker]:
    """Return the workers in job order.

    Args:
        started: of every rank of torch.distributed.
        found: `group_ranks` of them.
        columns: of the network, 1 or 2.
    """
    alone = "a and b" if columns == 2 else "a"
    rows = [
        (replica, "ab"[column] if len(ranks) == 2 else alone, started[rank])
        for replica, ranks in enumerate(found)
        for column, rank in enumerate(ranks)
    ]
    return [
        Worker(rank, replica, column, seat.name, seat.gpu)
        for rank, (replica, column, seat) in enumerate(rows)
    ]


def list_nodes(mine: Placement | None = None) -> list[Node]:
    """Return the nodes that live and are not being drained, with what is free on them.

    Args:
        mine: workers of this job that run now; what they hold counts as free.
    """
    import ray

    free, leaving = read_free_resources(), find_draining_nodes()
    held = Counter(mine.nodes) if mine else Counter[str]()
    nodes = []
    for node in ray.nodes():
        identity, has = node["NodeID"], node["Resources"]
        if not node["Alive"] or identity in leaving or identity not in free:
            continue
        now = {name: free[identity].get(name, 0.0) for name in ("CPU", "GPU")}
        if mine:  # some of it may be free again already
            now["CPU"] = min(has.get("CPU", 0.0), now["CPU"] + held[identity] * mine.cpus)
            now["GPU"] = min(has.get("GPU", 0.0), now["GPU"] + held[identity] * mine.gpus)
        nodes.append(
            Node(
                id=identity,
                name=node["NodeManagerHostname"],
                cpus=now["CPU"],
                gpus=now["GPU"],
                busy_cpus=max(0.0, has.get("CPU", 0.0) - now["CPU"]),
                busy_gpus=max(0.0, has.get("GPU", 0.0) - now["GPU"]),
            )
        )
    return nodes


def has_gpus() -> bool:
    """Whether any living node has a GPU, free or not."""
    import ray

    return any(node["Alive"] and node["Resources"].get("GPU") for node in ray.nodes())


def uses_gpus(config: Config) -> bool:
    """Whether the workers of a run are to have GPUs, as things stand now."""
    return config.device == "gpu" or (config.device == "auto" and has_gpus())


def get_node_name(identity: str) -> str:
    """Return the name of a node, for people."""
    import ray

    names = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
    return str(names.get(identity, identity[:12]))


# Ray has no public way to ask for what is free on each node, nor for the nodes that are about to
# go: its own training and serving libraries use these two (2.60; pyproject holds the minor).


def read_free_resources() -> Mapping[str, Mapping[str, float]]:
    """Free resources of each node."""
    from ray._private.state import available_resources_per_node

    found: dict[str, dict[str, float]] = available_resources_per_node()
    return found


def find_draining_nodes() -> set[str]:
    """Ids of the nodes that are being drained: preempted, or taken down by the autoscaler."""
    from ray._private.state import state

    found: dict[str, Any] = state.get_draining_nodes()
    return set(found)
