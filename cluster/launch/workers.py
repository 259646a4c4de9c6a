"""Workers of a run over several starts: whoever lives is kept, the dead are replaced.

    seat     place of a rank: its node and GPU, and the worker that has it
    trainer  one of Ray Train: starts the workers of the seats of a node, or its spares, and
             replaces the dead; each node has its own, so that a lost one leaves the others whole
    spare    a worker without a seat that has imported all it needs, and takes the place of a dead
             one on its node; when Ray Train has replaced that one, the new worker is a spare

A worker that Ray starts anew takes seconds of CPU time to import torch and DALI; a spare, none.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from cluster.launch.channel import Channel
from cluster.launch.placement import Placement, WorkerLocation
from cluster.launch.session import make_session_folder
from cluster.launch.worker import (
    Membership,
    Registration,
    WorkerJob,
    begin_training,
    end_process,
    expose_gpus,
    wait_for_end,
)

SPARES_AFTER = 10.0
"""Seconds after a start before spares are started: until then they would slow it."""
ANSWER_TIMEOUT = 5.0
"""Seconds in which a worker that waits for a seat must answer."""
END_TIMEOUT = 10.0
"""Seconds that Ray Train's controller may take to end."""
MEMORY = "memory"
"""Ray's resource of which each worker reserves some bytes, as many as its trainer's number: by
these the placement group of a trainer that was killed is found again."""


@dataclass(frozen=True)
class _Trainer:
    """Trainer of a node."""

    node: str
    """Ray's id of its node."""
    handle: Any
    """Result of `start_trainer`."""
    has_spares: bool
    """True if its workers are the node's spares."""


@dataclass(eq=False)
class _Seat:
    """Place of a rank."""

    trainer: int
    """Number of the trainer that starts its workers."""
    rank: int
    """Its rank there."""
    worker: Registration | None = None
    location: WorkerLocation | None = None
    """Node and GPU that Ray has reserved, once a worker of the seat's own was here."""


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
        self.error: Exception | None = None
        """Error of a worker that cannot start."""
        self._spares_wanted, self._environment = spares, dict(environment)
        self._seats: list[_Seat] = []
        self._members: list[Membership] = []
        self._idle: list[Registration] = []
        """Workers without a seat that are ready."""
        self._trainers: dict[int, _Trainer] = {}
        """Trainers by a number that is never used again."""
        self._count = 0
        """Number of trainers begun."""
        self._channel: Channel | None = None
        self._folders = ExitStack()

    def place(self, placement: Placement) -> None:
        """Hold the seats of a placement: those of nodes where nothing changes, and new ones.

        A Ray Train of spares that has ended takes along its own workers, not those of its node.
        """
        spares = [number for number, one in self._trainers.items() if one.has_spares]
        self._end_trainers([n for n in spares if has_ended(self._trainers[n].handle)])
        held = self._find_lasting(placement)
        self._end_trainers([n for n, one in self._trainers.items() if one.node not in held])
        gpus = {"GPU": float(placement.gpus)} if placement.gpus else {}
        for node, size in Counter(placement.nodes).items():
            if node not in held:
                number = self._begin(node, size, {"CPU": float(placement.cpus)} | gpus)
                held[node] = [_Seat(number, rank) for rank in range(size)]
        self.placement = placement
        self._seats = [held[node].pop(0) for node in placement.nodes]

    def _find_lasting(self, placement: Placement) -> dict[str, list[_Seat]]:
        """Return the seats, in the order of ranks, of each node that another placement leaves."""
        before, wanted = self.placement, Counter(placement.nodes)
        if before is None or (before.cpus, before.gpus) != (placement.cpus, placement.gpus):
            return {}
        held = defaultdict[str, list[_Seat]](list)
        for node, seat in zip(before.nodes, self._seats, strict=True):
            held[node].append(seat)
        own = [one for one in self._trainers.values() if not one.has_spares]
        broken = {one.node for one in own if has_ended(one.handle)}
        return {
            node: seats
            for node, seats in held.items()
            if len(seats) == wanted[node] and node not in broken
        }

    def open_channel(self) -> Channel:
        """Return the channel to the workers, as if it were new."""
        if self._channel is None:
            self._channel = Channel()
        else:
            self._channel.clear()
        return self._channel

    def gather(self) -> bool:
        """Give the seats to workers that are ready; return whether each has one.

        Those of a Ray Train that has ended meanwhile are started anew.
        """
        assert self._channel is not None
        for new in self._channel.take_workers():
            if new.trainer in self._trainers:
                self._register(new)
        for seat in self._seats:
            if seat.worker is None and seat.location is not None:
                self._fill(seat, seat.location.node)
        if not all(seat.worker for seat in self._seats):
            # Where two workers die one after the other, Ray Train finds the second dead while it
            # replaces the first, and ends.
            if self.placement is not None:
                self.place(self.placement)
            return False
        self._members = describe_members([s.location for s in self._seats if s.location])
        for member in self._members:
            if member.visible:
                self.execute(member.rank, expose_gpus, member.visible)
        return True

    def __len__(self) -> int:
        return len(self._seats)

    def execute(self, rank: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in the process of a rank; returns a reference to its value."""
        worker = self._seats[rank].worker
        assert worker is not None
        return worker.handle.execute.remote(function, *arguments)

    def train(self, job: WorkerJob) -> dict[Any, int]:
        """Have all workers train, which have met.

        Returns:
            Ranks by a reference each: its value is None, and then `wait` gives the next.
        """
        return {self.execute(one.rank, begin_training, job, one): one.rank for one in self._members}

    def wait(self, rank: int) -> Any:
        """Return a reference to what `TrainWorker.wait_for_end` of a rank returns."""
        return self.execute(rank, wait_for_end)

    def drop(self, rank: int) -> None:
        """End the worker of a rank, which died, failed or does not answer; its seat is kept."""
        seat = self._seats[rank]
        worker, seat.worker = seat.worker, None
        if worker is not None:
            self._end(worker)

    def get_node(self, rank: int) -> str:
        """Return Ray's id of the node of a rank."""
        assert self.placement is not None
        location = self._seats[rank].location
        return location.node if location else self.placement.nodes[rank]

    def tend_spares(self, seconds: float) -> None:
        """Have the spares started, some seconds after a start; those that die are replaced."""
        if not self._spares_wanted or seconds < SPARES_AFTER:
            return
        assert self.placement is not None
        have = {one.node for one in self._trainers.values() if one.has_spares}
        for node in dict.fromkeys(self.placement.nodes):
            if node not in have:
                self._begin(node, self._spares_wanted, {}, has_spares=True)

    def end(self) -> None:
        """End all workers and give up their seats."""
        self._end_trainers(list(self._trainers))
        self._folders.close()
        self._seats, self.placement, self.error = [], None, None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self.end()
        self._channel = None

    def _begin(
        self, node: str, size: int, resources: dict[str, float], *, has_spares: bool = False
    ) -> int:
        """Have Ray Train start workers on a node; return the number of their trainer."""
        from cluster.launch.trainer import start_trainer

        scratch = self._folders.enter_context(make_session_folder())
        assert self._channel is not None
        self._count += 1
        handle = start_trainer(
            {"driver": self._channel.address, "trainer": self._count},
            node,
            size,
            resources | {MEMORY: float(self._count)},
            self._environment,
            str(scratch),
        )
        self._trainers[self._count] = _Trainer(node, handle, has_spares)
        return self._count

    def _end_trainers(self, numbers: Iterable[int]) -> None:
        """End trainers with their workers, wherever these sit."""
        ended = {number: self._trainers.pop(number) for number in numbers}
        if not ended:
            return
        end_trainers({number: one.handle for number, one in ended.items()})
        gone = [worker for worker in self._idle if worker.trainer in ended]
        self._idle = [worker for worker in self._idle if worker.trainer not in ended]
        for seat in self._seats:
            if seat.worker and seat.worker.trainer in ended:
                gone.append(seat.worker)
                seat.worker = None
        for worker in gone:
            self._end(worker)

    def _register(self, new: Registration) -> None:
        """Note a worker that is ready; the one that it replaces is dead."""
        if new.error is not None:
            self.error = new.error
            return
        who = (new.trainer, new.rank)
        self._idle = [old for old in self._idle if (old.trainer, old.rank) != who]
        self._idle.append(new)
        for rank, seat in enumerate(self._seats):
            if seat.worker and (seat.worker.trainer, seat.worker.rank) == who:
                seat.worker = None  # Ray Train may also have ended it itself, to start all anew
            if (seat.trainer, seat.rank) == who:
                if seat.location not in (None, new.location):
                    self.drop(rank)  # Ray has reserved another GPU than its worker uses
                seat.location = new.location

    def _fill(self, seat: _Seat, node: str) -> None:
        """Give a seat to a worker of its node: its own, or a spare."""
        own = (seat.trainer, seat.rank)
        near = [worker for worker in self._idle if worker.location.node == node]
        for worker in sorted(near, key=lambda one: (one.trainer, one.rank) != own):
            self._idle.remove(worker)
            if does_answer(worker):
                seat.worker = worker
                return
            self._end(worker)

    def _end(self, worker: Registration) -> None:
        """End a process, which may be frozen: then only a signal of its own node does."""
        import ray

        node = worker.location.node
        with suppress(Exception):
            ray.kill(worker.handle)
        with suppress(Exception):
            if node == ray.get_runtime_context().get_node_id():
                end_process(worker.process)
            else:
                near = [seat.worker for seat in self._seats if seat.worker]
                for other in [one for one in [*self._idle, *near] if one.location.node == node][:1]:
                    other.handle.execute.remote(end_process, worker.process)


def does_answer(worker: Registration) -> bool:
    """Return whether a worker that waits lives."""
    import ray
    from ray.exceptions import RayError

    try:
        ray.get(worker.handle.execute.remote(os.getpid), timeout=ANSWER_TIMEOUT)
    except RayError:
        return False
    return True


def has_ended(trainer: Any) -> bool:
    """Return whether Ray Train's controller has ended."""
    import ray

    return bool(ray.wait([trainer.end], timeout=0)[0])


def end_trainers(trainers: Mapping[int, Any]) -> None:
    """End Ray Train's controllers, and with them their workers; free what they had reserved.

    Args:
        trainers: results of `start_trainer` by the number of `MEMORY`'s bytes that each worker has.
    """
    import ray
    from ray import PlacementGroupID
    from ray.util.placement_group import (
        PlacementGroup,
        placement_group_table,
        remove_placement_group,
    )

    with suppress(Exception):  # Ray itself may be gone
        for trainer in trainers.values():
            ray.kill(trainer.controller)
        ends = [trainer.end for trainer in trainers.values()]
        ray.wait(ends, num_returns=len(ends), timeout=END_TIMEOUT)
        job = ray.get_runtime_context().get_job_id()
        for identity, group in placement_group_table().items():
            # The id of what a job has made ends with the job's own.
            is_own = identity.endswith(job) and group["state"] != "REMOVED"
            if is_own and group["bundles"][0].get(MEMORY) in trainers:
                remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(identity)))


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
