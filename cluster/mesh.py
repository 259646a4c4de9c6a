"""Rank, column and replica of this process, and its process groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class ProcessMesh:
    """Position of this process in the job; `ProcessMesh()`: a single process, both columns."""

    columns: tuple[int, ...] = (0, 1)
    """Columns this process holds: (0, 1), (0,) or (1,)."""
    replica: int = 0
    replicas: int = 1
    device: torch.device = CPU
    cores: int = 1
    """CPU cores this process should keep busy."""
    pair: dist.ProcessGroup | None = None
    """Group of the two columns of this replica; None when this process holds both."""
    image_group: dist.ProcessGroup | None = None
    """Second group of the same two: exchanges the next batch while the pair computes."""
    peers: dist.ProcessGroup | None = None
    """Group of the same column(s) of all replicas; None when there is one replica."""
    order: tuple[int, ...] = (0,)
    """Ranks of torch.distributed in job order: the first is the leader's."""

    @property
    def size(self) -> int:
        """Processes per replica, 1 or 2."""
        return 2 if self.pair else 1

    @property
    def rank(self) -> int:
        """Rank in the job; selects the slice of the global batch that this process decodes."""
        return self.replica * self.size + (self.columns[0] if self.pair else 0)

    @property
    def world_size(self) -> int:
        """Processes in the job."""
        return self.replicas * self.size

    @property
    def is_leader(self) -> bool:
        """True if this process writes the files of the run; one of the job does."""
        return self.rank == 0

    def broadcast(self, value: T) -> T:
        """Return the leader's value on every process; all of them call this together."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=self.order[0], device=CPU)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Return every process's value, in job order; all of them call this together."""
        if self.world_size == 1:
            return [value]
        found: list[T | None] = [None] * self.world_size
        dist.all_gather_object(found, value)
        return [found[rank] for rank in self.order]  # type: ignore[misc]

    def reduce_max(self, *values: int) -> Callable[[], list[int]]:
        """Start to compute the maximum of each value over all processes, which call this together.

        Returns:
            function that waits for the maxima.
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
        """Average over the replicas, in place; both columns of a replica hold the same values."""
        if self.peers:
            dist.all_reduce(values, group=self.peers)
            values /= self.replicas
        return values

    def gather_replicas(self, values: Tensor) -> Tensor:
        """Return the values [n] of all replicas, [replicas, n], in their order, on each of them."""
        if not self.peers:
            return values[None]
        table = values.new_zeros(self.replicas, *values.shape)
        table[self.replica] = values
        dist.all_reduce(table, group=self.peers)  # zeros are added: exact in any order
        return table

    def sum_in_pairs(self, values: Tensor) -> Tensor:
        """Sum over the replicas, a power of two, in place: neighbors first, then sums of two, ...

        So the sum of 4 has the bits of (a + b) + (c + d), and is one that a single process can
        form, too. At each distance a replica sends half of what it still has to sum, and sums the
        other half; then the sums go the same way back. That is the traffic of a ring (Rabenseifner,
        "Optimization of collective reduction operations", 2004).

        Args:
            values: contiguous [n]; replicas call this together, in the same order.
        """
        start, end, distance = 0, len(values), 1
        halves: list[tuple[int, slice, slice]] = []
        while distance < self.replicas:
            middle = (start + end) // 2
            own, other = slice(start, middle), slice(middle, end)
            if self.replica & distance:
                own, other = other, own
            received = torch.empty_like(values[own])
            self._swap(self.replica ^ distance, values[other], received)
            values[own] += received
            halves.append((self.replica ^ distance, own, other))
            start, end, distance = own.start, own.stop, 2 * distance
        for replica, own, other in reversed(halves):
            self._swap(replica, values[own], values[other])
        return values

    def _swap(self, replica: int, sent: Tensor, received: Tensor) -> None:
        """Exchange contiguous tensors with the same columns of another replica."""
        peer = self.order[replica * self.size + (self.columns[0] if self.pair else 0)]
        operations = [
            dist.P2POp(kind, tensor, peer, self.peers)
            for kind, tensor in ((dist.isend, sent), (dist.irecv, received))
            if len(tensor)
        ]
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()

    @property
    def peer_name(self) -> str:
        """Name of the only other process of the job; "another worker" if there are several."""
        if self.world_size != 2:
            return "another worker"
        if self.pair:
            return str(replace(self, columns=(1 - self.columns[0],)))
        return str(replace(self, replica=1 - self.replica))

    def __str__(self) -> str:
        columns = " and ".join("ab"[column] for column in self.columns)
        return f"replica {self.replica}, column{'s' * (len(self.columns) - 1)} {columns}"


def create_mesh(
    replicas: Sequence[Sequence[int]],
    device: torch.device,
    cores: int,
    timeout: timedelta | None = None,
) -> ProcessMesh:
    """Create this process's mesh in an initialised torch.distributed job; all processes call it.

    Args:
        replicas: for each replica its ranks in column order (`placement.group_ranks`).
        device: device of this process.
        cores: CPU cores of this process.
        timeout: time that a collective may take; None: torch's default.
    """
    me, size = dist.get_rank(), len(replicas[0])
    replica = next(index for index, ranks in enumerate(replicas) if me in ranks)
    pair = image_group = peers = None
    # Every rank must create every group, in the same order, also those it is not a member of.
    if size == 2:
        for ranks in replicas:
            groups = [dist.new_group(list(ranks), timeout=timeout) for _ in range(2)]
            if me in ranks:
                pair, image_group = groups
    if len(replicas) > 1:
        for column in range(size):
            ranks = [replica_ranks[column] for replica_ranks in replicas]
            group = dist.new_group(ranks, timeout=timeout)
            peers = group if me in ranks else peers
    return ProcessMesh(
        columns=(replicas[replica].index(me),) if size == 2 else (0, 1),
        replica=replica,
        replicas=len(replicas),
        device=device,
        cores=cores,
        pair=pair,
        image_group=image_group,
        peers=peers,
        order=tuple(rank for ranks in replicas for rank in ranks),
    )
