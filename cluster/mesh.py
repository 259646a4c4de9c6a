"""Where this process stands in the job, and the few things the processes say to each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class ProcessMesh:
    """One process of the job. `ProcessMesh()` is a job of one process with both columns."""

    columns: tuple[int, ...] = (0, 1)
    """Columns this process holds: (0, 1), (0,) or (1,)."""
    replica: int = 0
    replicas: int = 1
    device: torch.device = CPU
    cores: int = 1
    """CPU cores this process should keep busy."""
    pair: dist.ProcessGroup | None = None
    """The two columns of this replica; None when both are here."""
    image_group: dist.ProcessGroup | None = None
    """The same two once more: the next batch crosses here while the pair computes."""
    peers: dist.ProcessGroup | None = None
    """The same column(s) of every replica; None when there is one replica."""
    order: tuple[int, ...] = (0,)
    """Ranks of torch.distributed in the order of the job: the first is the leader's."""

    @property
    def size(self) -> int:
        """Processes per replica, 1 or 2."""
        return 2 if self.pair else 1

    @property
    def rank(self) -> int:
        """Rank in the job: which slice of the global batch this process decodes."""
        return self.replica * self.size + (self.columns[0] if self.pair else 0)

    @property
    def world_size(self) -> int:
        """Processes in the job."""
        return self.replicas * self.size

    @property
    def is_leader(self) -> bool:
        """The one process that writes what is written once."""
        return self.rank == 0

    def broadcast(self, value: T) -> T:
        """Return the leader's value on every process."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=self.order[0], device=CPU)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Return every process's value, in job order."""
        if self.world_size == 1:
            return [value]
        found: list[T | None] = [None] * self.world_size
        dist.all_gather_object(found, value)
        return [found[rank] for rank in self.order]  # type: ignore[misc]

    def reduce_max(self, *values: int) -> Callable[[], list[int]]:
        """Begin to find the largest of each value over all processes; all of them call it alike.

        Returns:
            waits for the answer, the same on all processes.
        """
        if self.world_size == 1:
            return lambda: list(values)
        largest = torch.tensor(values)
        work = dist.all_reduce(largest, dist.ReduceOp.MAX, async_op=True)

        def answer() -> list[int]:
            work.wait()
            return largest.tolist()

        return answer

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the replicas, in place; the two columns of a replica hold the same values."""
        if self.peers:
            dist.all_reduce(values, group=self.peers)
            values /= self.replicas
        return values

    def __str__(self) -> str:
        columns = " and ".join("ab"[column] for column in self.columns)
        return f"replica {self.replica}, column{'s' * (len(self.columns) - 1)} {columns}"


def create_mesh(
    seats: Sequence[Sequence[int]],
    device: torch.device,
    cores: int,
    patience: timedelta | None = None,
) -> ProcessMesh:
    """Build this process's `ProcessMesh` in an initialised torch.distributed job; all call it.

    Args:
        seats: for each replica its ranks in column order (`topology.seats`).
        device: of this process.
        cores: CPU cores of this process.
        patience: for which the others may keep this process waiting; None: as torch has it.
    """
    me, size = dist.get_rank(), len(seats[0])
    replica = next(index for index, ranks in enumerate(seats) if me in ranks)
    pair = image_group = peers = None
    # Every rank has to create every group, in the same order, also those it is not in.
    if size == 2:
        for ranks in seats:
            groups = [dist.new_group(list(ranks), timeout=patience) for _ in range(2)]
            if me in ranks:
                pair, image_group = groups
    if len(seats) > 1:
        for column in range(size):
            ranks = [replica_ranks[column] for replica_ranks in seats]
            group = dist.new_group(ranks, timeout=patience)
            peers = group if me in ranks else peers
    return ProcessMesh(
        columns=(seats[replica].index(me),) if size == 2 else (0, 1),
        replica=replica,
        replicas=len(seats),
        device=device,
        cores=cores,
        pair=pair,
        image_group=image_group,
        peers=peers,
        order=tuple(rank for ranks in seats for rank in ranks),
    )
