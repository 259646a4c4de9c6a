"""The machines of the cluster as they are now: what is free, and what is about to go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from cluster.config import Config
from cluster.launch.placement import Node, Plan


def living(mine: Plan | None = None) -> list[Node]:
    """Return the nodes that live and are not being drained, with what is free on them.

    Args:
        mine: workers of this job that run now; what they hold counts as free.
    """
    import ray

    free, leaving = available(), draining()
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


def name_of(identity: str) -> str:
    """Return the name of a node, for people."""
    import ray

    names = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
    return str(names.get(identity, identity[:12]))


# Ray has no public way to ask for what is free on each node, nor for the nodes that are about to
# go: its own training and serving libraries use these two (2.60; pyproject holds the minor).


def available() -> Mapping[str, Mapping[str, float]]:
    """Free resources of each node."""
    from ray._private.state import available_resources_per_node

    found: dict[str, dict[str, float]] = available_resources_per_node()
    return found


def draining() -> set[str]:
    """Ids of the nodes that are being drained: preempted, or taken down by the autoscaler."""
    from ray._private.state import state

    found: dict[str, Any] = state.get_draining_nodes()
    return set(found)
