"""Which worker is which column of which replica, and on which node: pure functions.

A replica is one copy of the network. It is held by a pair of workers, one per column, that
share a node; or, without pairing, by one worker with both columns.

    job rank   0  1  2  3          rank = replica * 2 + column
    replica    0  0  1  1          so the two halves of a replica's batch lie side by side
    column     a  b  a  b
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import SetupError


@dataclass(frozen=True, kw_only=True)
class Node:
    """One machine of the cluster: its id, name for people, logical CPUs and GPUs."""

    id: str
    name: str
    cpus: float
    gpus: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where the workers go: node ids in rank order, and what each worker gets."""

    nodes: tuple[str, ...]
    cpus: int
    """Cores of each worker, at least 1."""
    gpus: int
    """GPUs of each worker, 0 or 1."""
    size: int
    """Workers per replica, 2 or 1."""


def plan(nodes: Sequence[Node], *, replicas: int, size: int, gpu: bool) -> Plan:
    """Give every replica a node that has room for all of its workers.

    Args:
        nodes: the living machines.
        replicas: copies of the network.
        size: workers per replica, 2 (a pair) or 1.
        gpu: a GPU for each worker; otherwise at least one CPU for each.

    Raises:
        SetupError: there is not enough room; says what is there and what is missing.
    """
    kind = "GPU" if gpu else "CPU"
    room = {node.id: int(node.gpus if gpu else node.cpus) // size for node in nodes}
    if sum(room.values()) < replicas:
        there = ", ".join(f"{node.name}: {node.gpus if gpu else node.cpus:g}" for node in nodes)
        raise SetupError(
            f"{replicas} replica(s) of {size} worker(s) need {replicas * size} {kind}s, "
            f"{size} of them on one node each time; the cluster has {kind}s {there or 'none'}; "
            f"{_way_out(gpu, any(node.gpus for node in nodes), size)}"
        )
    used: dict[str, int] = {}
    # The roomiest node first, and each one filled before the next: least goes over the wire.
    for node in sorted(nodes, key=lambda node: -room[node.id]):
        take = min(room[node.id], replicas - sum(used.values()))
        if take:
            used[node.id] = take
    cpus = min(node.cpus // (used[node.id] * size) for node in nodes if node.id in used)
    order = tuple(name for name, pairs in used.items() for _ in range(pairs * size))
    return Plan(nodes=order, cpus=max(1, int(cpus)), gpus=int(gpu), size=size)


def _way_out(gpu: bool, any_gpu: bool, size: int) -> str:
    if not gpu:
        return "lower --replicas or add nodes"
    one = "--columns-per-worker 2 (both columns on one GPU), " if any_gpu and size == 2 else ""
    return f"use {one}fewer --replicas or --device cpu"


def seats(nodes: Sequence[str], size: int) -> tuple[tuple[int, ...], ...]:
    """Group the ranks that were really started into replicas whose workers share a node.

    Args:
        nodes: node id of every rank.
        size: workers per replica, 1 or 2.

    Returns:
        for each replica its ranks in column order.

    Raises:
        SetupError: the ranks of a node cannot be grouped; shows where every rank is.
    """
    by_node: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        by_node.setdefault(node, []).append(rank)
    if any(len(ranks) % size for ranks in by_node.values()):
        table = "; ".join(f"{node[:12]}: ranks {ranks}" for node, ranks in by_node.items())
        raise SetupError(
            f"columns a and b of a replica must share a node, but the workers are on {table}"
        )
    return tuple(
        sorted(
            tuple(ranks[i : i + size])
            for ranks in by_node.values()
            for i in range(0, len(ranks), size)
        )
    )
