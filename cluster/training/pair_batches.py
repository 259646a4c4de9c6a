"""Two halves of a batch, decoded by two processes, become the whole batch in both.

The next batch is under way while the network computes on this one. How it crosses depends on
where the pixels are:

    CPU   through memory that both processes map: each column writes its half in mesh. For 128
          float32 images that costs a core 11 ms (measured), where sending them by gloo costs 74.
    GPU   by the collective of `model.exchange`, on a CUDA stream of its own.
"""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.mesh import ProcessMesh
from model.exchange import Exchange
from pipeline.batches import Batch, Stream

# Batch k+1 is written before batch k is computed, while the other column may still be on k-1.
SLOTS = 3


@dataclass(frozen=True)
class ReplicaBatch:
    """The batch of a replica: what the network computes on."""

    images: Tensor
    """[b, 3, h, w], floating, on the device of the mesh. Valid until the next one is asked for."""
    labels: Tensor
    """int64 [b]."""
    weights: Tensor
    """float32 [b], 0 for rows that only pad."""
    replaced: Tensor
    """float32 [b], 1 where another sample stands because the one that is due is damaged."""
    position: int
    """Samples consumed by the whole job after this batch."""

    def parts(self, most: int) -> Iterator[tuple[int, ReplicaBatch]]:
        """Cut it into parts of at most `most` images: (its first row, the part) each."""
        for row in range(0, len(self.labels), most):
            part = slice(row, row + most)
            yield (
                row,
                ReplicaBatch(
                    self.images[part],
                    self.labels[part],
                    self.weights[part],
                    self.replaced[part],
                    self.position,
                ),
            )


PendingBatch = Callable[[], ReplicaBatch]
"""Waits for a batch that is under way."""


class BatchJoin(Protocol):
    """A way to bring the halves together."""

    def start(self, half: Batch) -> PendingBatch:
        """Send the own half off; returns at once."""
        ...

    def close(self) -> None:
        """Let go of memory."""
        ...


class PairBatches:
    """Iterator over whole batches of `stream`, one batch ahead of the network."""

    def __init__(self, stream: Stream, mesh: ProcessMesh, batches: int | None = None) -> None:
        """Start the first; `batches` is how many there will be, unless the stream ends before."""
        self._stream = itertools.islice(stream, batches)
        self.waits = stream.waits
        """What the stream counts; the rest of the time that `next` takes is the way of the halves
        to each other."""
        self._join = create_join(mesh)
        self._next = self._start()

    def _start(self) -> PendingBatch | None:
        half = next(self._stream, None)
        return self._join.start(half) if half is not None else None

    def __iter__(self) -> Iterator[ReplicaBatch]:
        return self

    def __next__(self) -> ReplicaBatch:
        if self._next is None:
            raise StopIteration
        whole = self._next()
        self._next = self._start()
        return whole

    def __enter__(self) -> PairBatches:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._next is not None:
            self._next()  # under way, and never to be used: let it land
        self._join.close()


def create_join(mesh: ProcessMesh) -> BatchJoin:
    """The quickest way to join halves at this mesh."""
    if mesh.pair is None or mesh.image_group is None:
        return NoJoin()
    if mesh.device.type == "cuda":
        return CudaJoin(Exchange(mesh.image_group), mesh.device)
    return SharedMemoryJoin(mesh.image_group)


class NoJoin:
    """Nothing to join: both columns are in this process."""

    def start(self, half: Batch) -> PendingBatch:
        """The half is the whole."""
        replaced = half.replaced.to(half.weights)
        return lambda: ReplicaBatch(half.images, half.labels, half.weights, replaced, half.position)

    def close(self) -> None:
        """Nothing to let go of."""


class CudaJoin:
    """Halves on two GPUs: gathered on a CUDA stream beside the one that computes."""

    def __init__(self, exchange: Exchange, device: torch.device) -> None:
        self._exchange = exchange
        self._stream = torch.cuda.Stream(device)

    def start(self, half: Batch) -> PendingBatch:
        """Launch the exchange; the host does not wait for it."""
        self._stream.wait_stream(torch.cuda.current_stream())
        halves = (half.images, half.labels, half.weights, half.replaced.to(half.weights))
        with torch.cuda.stream(self._stream):
            joined = self._exchange.join_batch(*halves)
        for tensor in halves:
            tensor.record_stream(self._stream)

        def arrive() -> ReplicaBatch:
            torch.cuda.current_stream().wait_stream(self._stream)
            for tensor in joined:
                tensor.record_stream(torch.cuda.current_stream())
            images, labels, weights, replaced = joined
            return ReplicaBatch(images, labels, weights, replaced, half.position)

        return arrive

    def close(self) -> None:
        """Wait for what is under way."""
        self._stream.synchronize()


class SharedMemoryJoin:
    """Halves on one machine's CPUs: each column writes into pages that both map.

    The pages belong to no file (memfd): nothing is left behind however the processes end, and
    the size of /dev/shm does not matter. Labels and weights travel as a message, whose arrival
    says that the other half of the pixels is in mesh.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._index = dist.get_rank(group)
        self._slots: Tensor | None = None
        self._turn = 0

    def start(self, half: Batch) -> PendingBatch:
        """Write the own half and tell the other column."""
        if self._slots is None:
            self._slots = self._map(half.images)
        images = self._slots[self._turn]
        self._turn = (self._turn + 1) % SLOTS
        images.chunk(2)[self._index].copy_(half.images)
        # float64 holds them all exactly
        sent = torch.stack([row.double() for row in (half.labels, half.weights, half.replaced)])
        received = torch.empty_like(sent)
        peer = dist.get_global_rank(self._group, 1 - self._index)
        work = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, peer, self._group),
                dist.P2POp(dist.irecv, received, peer, self._group),
            ]
        )

        def arrive() -> ReplicaBatch:
            for one in work:
                one.wait()
            halves = (sent, received) if self._index == 0 else (received, sent)
            labels, weights, replaced = torch.cat(halves, dim=1)
            return ReplicaBatch(
                images, labels.long(), weights.float(), replaced.float(), half.position
            )

        return arrive

    def _map(self, half: Tensor) -> Tensor:
        """float32 [SLOTS, b, 3, h, w] in pages shared by the pair."""
        shape = (SLOTS, 2 * half.shape[0], *half.shape[1:])
        size = 4 * torch.Size(shape).numel()
        first = dist.get_global_rank(self._group, 0)
        mine = os.memfd_create("duet-images") if self._index == 0 else -1
        path = [f"/proc/{os.getpid()}/fd/{mine}"]
        dist.broadcast_object_list(path, src=first, group=self._group)
        descriptor = os.open(path[0], os.O_RDWR)
        os.ftruncate(descriptor, size)
        memory = mmap.mmap(descriptor, size)
        os.close(descriptor)
        dist.barrier(self._group)
        if mine >= 0:
            os.close(mine)
        return torch.frombuffer(memory, dtype=torch.float32).view(shape)

    def close(self) -> None:
        """Drop the mapping; the pages go when nobody uses them any more."""
        self._slots = None
