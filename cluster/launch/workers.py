"""Workers of a run over several starts: whoever lives is kept, the dead are replaced.

    seat     one worker's share of a node: a placement group of Ray, held from start to start
    spare    a worker without a seat that has imported all it needs, and takes the place of a dead
             one on its node

A worker that Ray starts anew takes seconds of CPU time to import torch and DALI; a spare, none.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from cluster.launch.channel import Channel
from cluster.launch.placement import Placement, WorkerLocation
from cluster.launch.worker import Membership, TrainWorker, WorkerJob, expose_gpus

SPARES_AFTER = 10.0
"""Seconds after a start before spares are started: until then they would slow it."""


@dataclass(eq=False)
class _Actor:
    """A worker process, with or without a seat."""

    handle: Any
    warm: Any
    """Reference to what `TrainWorker.warm` returns."""
    process: int = 0
    """Its process id; 0: not known yet."""

    def has_ended(self) -> bool:
        """Return whether the process is known to have ended."""
        import ray
        from ray.exceptions import RayError

        if not is_warm(self):
            return False
        try:
            ray.get(self.warm)
        except RayError:
            return True
        self.warm = self.handle.warm.remote()  # imports are done: it answers at once
        return False


@dataclass(eq=False)
class _Seat:
    """Resources of a worker on a node, and the worker."""

    node: str
    resources: tuple[int, int]
    """CPUs and GPUs."""
    group: Any
    """Ray's placement group of one bundle."""
    actor: _Actor | None = None
    location: WorkerLocation | None = None
    """Node and GPU, once a worker was here."""


class Workers:
    """Seats of a run with their workers, and its spares; needs a Ray as soon as it has a seat."""

    def __init__(self, spares: int, environment: Mapping[str, str]) -> None:
        """Start nothing yet.

        Args:
            spares: number of spares on each node.
            environment: variables of the workers' processes.
        """
        self.placement: Placement | None = None
        """Placement of the seats that are held."""
        self._spares_wanted, self._environment = spares, dict(environment)
        self._seats: list[_Seat] = []
        self._members: list[Membership] = []
        self._channel: Channel | None = None
        self._spares: dict[str, list[_Actor]] = {}
        """Spares by Ray's id of their node."""

    def place(self, placement: Placement) -> None:
        """Hold the seats of a placement, with a worker in each; keeps those that are held."""
        resources, held = (placement.cpus, placement.gpus), self._seats
        self.placement, self._seats = placement, []
        for node in placement.nodes:
            fitting = (s for s in held if (s.node, s.resources) == (node, resources))
            seat = next(fitting, None)
            if seat is not None:
                held.remove(seat)
            self._seats.append(seat or _Seat(node, resources, _reserve(node, resources)))
        for seat in held:
            self._leave(seat)
        for node in set(self._spares) - set(placement.nodes):
            for spare in self._spares.pop(node):
                self._end(spare, node)
        for seat in self._seats:
            seat.actor = seat.actor or self._take_spare(seat) or self._start(seat)

    def open_channel(self) -> Channel:
        """Return the channel to the workers, as if it were new."""
        if self._channel is None:
            self._channel = Channel()
        else:
            self._channel.clear()
        return self._channel

    def warm_up(self) -> list[Any]:
        """Return a reference for each worker, in rank order: it is there when the worker is ready.

        Its value is for `welcome`.
        """
        return [seat.actor.warm for seat in self._seats if seat.actor is not None]

    def welcome(self, warm: list[Any]) -> None:
        """Note who the workers are, and have them see their GPUs.

        Args:
            warm: values of `warm_up`.
        """
        for seat, (location, process) in zip(self._seats, warm, strict=True):
            assert seat.actor is not None
            seat.actor.process = process
            seat.location = seat.location or location  # a spare takes over the GPU of the seat
        self._members = describe_members([s.location for s in self._seats if s.location])
        for member in self._members:
            if member.visible:
                self.execute(member.rank, expose_gpus, member.visible)

    def __len__(self) -> int:
        return len(self._seats)

    def execute(self, rank: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in the process of a rank; returns a reference to its value."""
        actor = self._seats[rank].actor
        assert actor is not None
        return actor.handle.execute.remote(function, *arguments)

    def train(self, job: WorkerJob) -> list[Any]:
        """Have all workers train, which have met.

        Returns:
            References to the ends of `TrainWorker.train`, in rank order.
        """
        return [
            seat.actor.handle.train.remote(job, member)
            for seat, member in zip(self._seats, self._members, strict=True)
            if seat.actor is not None
        ]

    def drop(self, rank: int) -> None:
        """End the worker of a rank, which died, failed or does not answer; its seat is kept."""
        seat = self._seats[rank]
        actor, seat.actor = seat.actor, None
        if actor is not None:
            self._end(actor, seat.node)

    def get_node(self, rank: int) -> str:
        """Return Ray's id of the node of a rank."""
        return self._seats[rank].node

    def tend_spares(self, seconds: float) -> None:
        """Start the spares that are missing, some seconds after a start."""
        if seconds < SPARES_AFTER:
            return
        for node in {seat.node for seat in self._seats}:
            living = [one for one in self._spares.get(node, []) if not one.has_ended()]
            while len(living) < self._spares_wanted:
                living.append(self._start_spare(node))
            self._spares[node] = living

    def close(self) -> None:
        """End all workers and give up their seats."""
        for seat in self._seats:
            self._leave(seat)
        for node, spares in self._spares.items():
            for spare in spares:
                self._end(spare, node)
        self._seats, self._spares, self.placement, self._channel = [], {}, None, None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, seat: _Seat) -> _Actor:
        """Start a worker that holds the resources of its seat."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        cpus, gpus = seat.resources
        where = PlacementGroupSchedulingStrategy(seat.group, placement_group_bundle_index=0)
        return self._create(where, num_cpus=cpus, num_gpus=gpus)

    def _start_spare(self, node: str) -> _Actor:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return self._create(NodeAffinitySchedulingStrategy(node, soft=False), num_cpus=0)

    def _create(self, where: Any, **resources: float) -> _Actor:
        import ray

        create = ray.remote(TrainWorker).options(
            scheduling_strategy=where, runtime_env={"env_vars": self._environment}, **resources
        )
        handle = create.remote()
        return _Actor(handle, handle.warm.remote())

    def _take_spare(self, seat: _Seat) -> _Actor | None:
        """Take a spare for a seat whose GPU is known; the seat's resources stay reserved."""
        if seat.location is None and seat.resources[1]:
            return None
        for spare in list(self._spares.get(seat.node, [])):
            self._spares[seat.node].remove(spare)
            if not spare.has_ended():
                return spare  # if it is not ready, it is nearer to it than a new one
            self._end(spare, seat.node)
        return None

    def _leave(self, seat: _Seat) -> None:
        from ray.util.placement_group import remove_placement_group

        if seat.actor is not None:
            self._end(seat.actor, seat.node)
        with suppress(Exception):  # Ray itself may be gone
            remove_placement_group(seat.group)

    def _end(self, actor: _Actor, node: str) -> None:
        """End a process, which may be frozen: then only a signal of its own node does."""
        import ray

        with suppress(Exception):
            ray.kill(actor.handle)
        with suppress(Exception):
            if actor.process and node == ray.get_runtime_context().get_node_id():
                os.kill(actor.process, signal.SIGKILL)
            elif actor.process:
                near = [seat.actor for seat in self._seats if seat.node == node and seat.actor]
                for other in [*self._spares.get(node, []), *near][:1]:
                    other.handle.end_process.remote(actor.process)


def is_warm(actor: _Actor) -> bool:
    """Return whether a process has answered: it is ready, or has ended."""
    import ray

    return bool(ray.wait([actor.warm], timeout=0)[0])


def _reserve(node: str, resources: tuple[int, int]) -> Any:
    """Reserve the resources of a worker on a node."""
    from ray.util.placement_group import placement_group

    cpus, gpus = resources
    bundle = {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})
    return placement_group([bundle], bundle_label_selector=[{"ray.io/node-id": node}])


def describe_members(locations: list[WorkerLocation]) -> list[Membership]:
    """Return the place of each worker in the process group.

    A worker sees the GPUs of all workers of its node, as the transport between neighbors needs it.

    Args:
        locations: nodes and GPUs of the workers, in rank order.
    """
    visible: dict[str, list[str]] = {}
    for one in locations:
        if one.gpu is not None:
            visible.setdefault(one.node, []).append(str(one.gpu))
    ordered = {
        node: ",".join(sorted(gpus, key=lambda gpu: (len(gpu), gpu)))
        for node, gpus in visible.items()
    }
    return [
        Membership(rank=rank, size=len(locations), gpu=one.gpu, visible=ordered.get(one.node, ""))
        for rank, one in enumerate(locations)
    ]
