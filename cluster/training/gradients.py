"""Averages gradients over the replicas while the backward pass still runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from threading import Lock
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.mesh import ProcessMesh
from model.timing import Stopwatch

# A gradient of at least so many bytes is a message of its own, reduced in place; smaller ones are
# copied together until they are as large. In the full network fc6 alone is 75 MB of a column's 114:
# only conv1 and conv2, 0.7 MB, remain for the end of the backward pass.
MESSAGE_BYTES = 2**20


class GradientAverage:
    """Replaces the gradients of a backward pass by their means over the replicas.

    The all-reduce of a gradient starts as soon as it is computed, from the last layer to the first,
    while the layers below still compute; `finish` waits for the last. One replica: no operation.

        average = GradientAverage(net, mesh)
        loss.backward()
        average.finish()
        optimizer.step()

    Gradients of several backward passes add up, and only the last pass reduces them:

        with average.hold():
            loss_of_a_part.backward()
        loss_of_the_last_part.backward()
        average.finish()

    All replicas must run the same backward pass. The grouping of gradients into messages depends on
    the network alone, so sums have the same bits in every run and after every restart. torch's
    DistributedDataParallel regroups its buckets after the first step, which changes the order of
    summation for three replicas or more: a resumed run would differ from an undisturbed one.

    Gloo and NCCL match the operations of a group by their order; this class starts them in the
    order of its messages, and `ProcessMesh.mean` may follow before or after `finish`.

    Args:
        net: its parameters get hooks, until `close`; those without a gradient are skipped.
        mesh: mesh of this process.
        message_bytes: least size of a message, in bytes.
    """

    is_exact = False
    """True if the gradients have the same bits for any number of replicas."""
    share = 1.0
    """Factor on the gradients of a replica's mean loss, which a backward pass must apply."""

    def __init__(
        self, net: nn.Module, mesh: ProcessMesh, message_bytes: int = MESSAGE_BYTES
    ) -> None:
        self._mesh = mesh
        self.waits = Stopwatch()
        """Spans that an update waited for the other replicas or the network."""
        parameters = [p for p in reversed(list(net.parameters())) if p.requires_grad]
        self._watch(parameters if mesh.peers else [], message_bytes)

    def _watch(self, parameters: Sequence[nn.Parameter], message_bytes: int) -> None:
        self._messages = _group_parameters(parameters, message_bytes) if self._mesh.peers else []
        self._of = {p: message for message in self._messages for p in message.parameters}
        self._next = 0
        self._held = False
        self._hooks = [p.register_post_accumulate_grad_hook(self._ready) for p in parameters]

    @contextmanager
    def hold(self, holds: bool = True) -> Iterator[None]:
        """Let gradients accumulate in the block and start no all-reduce (if `holds`)."""
        self._held = holds
        try:
            yield
        finally:
            self._held = False

    def _ready(self, parameter: nn.Parameter) -> None:
        if not self._held:
            self._send(parameter)

    def _send(self, parameter: nn.Parameter) -> None:
        """Start the messages that are complete now that a parameter has its gradient."""
        message = self._of[parameter]
        if parameter in message.ready:
            raise RuntimeError(
                "a second backward pass before finish(): its gradients would be lost"
            )
        message.ready.add(parameter)
        # The same order on every replica, whatever the order in which autograd finishes.
        while self._next < len(self._messages) and self._messages[self._next].is_complete:
            self._messages[self._next].start(self._reduce)
            self._next += 1

    def _reduce(self, values: Tensor) -> Callable[[], object]:
        """Start to average [n] over the replicas, in place; the result waits for it."""
        work: Any = dist.all_reduce(values, group=self._mesh.peers, async_op=True)

        def wait() -> None:
            work.wait()
            values.div_(self._mesh.replicas)

        return wait

    def finish(self) -> None:
        """Wait until every gradient of the last backward pass is the mean.

        Parameters that took no part keep their gradient, on all replicas alike.
        """
        for message in self._messages[self._next :]:
            message.start(self._reduce)
        if self._messages:
            with self.waits.running(self._mesh.device):
                for message in self._messages:
                    message.finish()
        self._next = 0

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> GradientAverage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class GradientTree(GradientAverage):
    """Replaces the gradients of all micro-batches of a batch by their sums over a balanced tree.

    The micro-batches are its leaves: their number is the same for any number of replicas, a power
    of two. A replica sums its subtree in the order in which its leaves come, and the replicas sum
    the rest by `ProcessMesh.sum_in_pairs`. So a sum has the same bits however many replicas there
    are. The gradients of a pass are those of its part of the mean loss over the whole batch.

    A replica of 8 leaves holds up to 4 gradients at a time, where plain accumulation holds 2.

    Args:
        net: network whose parameters get the sums as gradients.
        mesh, message_bytes: as in `GradientAverage`.
        columns: the columns of the network, if backward passes give the gradients of their
            parameters; see `ColumnThreads`.
    """

    is_exact = True

    def __init__(
        self, net: nn.Module, mesh: ProcessMesh, message_bytes: int = MESSAGE_BYTES,
        columns: Sequence[nn.Module] = (),
    ) -> None:  # fmt: skip
        self._mesh = mesh
        self.waits = Stopwatch()
        self.share = 1 / mesh.replicas
        self._whole: dict[nn.Parameter, tuple[Tensor, list[nn.Parameter]]] = {}
        """Gradient of each parameter, and the parameters of the columns that make it up."""
        self._leaves: dict[nn.Parameter, _Leaves] = {}
        of_columns = zip(*(column.parameters() for column in columns), strict=True)
        for parameter, own in reversed(list(zip_longest(net.parameters(), of_columns))):
            if not parameter.requires_grad:
                continue
            if own is None:
                self._leaves[parameter] = _Leaves()
                continue
            gradient = torch.empty_like(parameter)
            self._whole[parameter] = gradient, list(own)
            for one, place in zip(own, gradient.chunk(len(own)), strict=True):
                self._leaves[one] = _Leaves(place)
        self._lock = Lock()  # columns compute in threads
        self._thread = ThreadPoolExecutor(1, "gradients")
        self._stream = torch.cuda.Stream() if mesh.device.type == "cuda" else None
        self._watch(list(self._leaves), message_bytes)

    def _ready(self, parameter: nn.Parameter) -> None:
        if parameter.grad is None:
            return
        gradient, parameter.grad = parameter.grad, None
        total = self._leaves[parameter].add(gradient, is_last=not self._held)
        if total is not None:
            parameter.grad = total
            if self._mesh.peers:
                with self._lock:
                    self._send(parameter)

    def _reduce(self, values: Tensor) -> Callable[[], object]:
        if self._stream is None:
            return self._thread.submit(self._mesh.sum_in_pairs, values).result
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._mesh.sum_in_pairs(values)
        values.record_stream(stream)
        return lambda: torch.cuda.current_stream().wait_stream(stream)

    def finish(self) -> None:
        """Wait until every gradient is the sum over the tree."""
        super().finish()
        for parameter, (gradient, of_columns) in self._whole.items():
            if all(one.grad is not None for one in of_columns):
                parameter.grad = gradient
            for one in of_columns:
                one.grad = None

    def close(self) -> None:
        """Remove the hooks; the thread, which may wait for a dead replica, ends by itself."""
        super().close()
        self._thread.shutdown(wait=False, cancel_futures=True)


@dataclass(eq=False)
class _Leaves:
    """Sums of a parameter's gradients over 1, 2, 4, ... micro-batches, the largest first."""

    place: Tensor | None = None
    """Tensor that the sum over all is written into; None: a new one."""
    sums: list[Tensor] = field(default_factory=list)
    count: int = 0

    def add(self, gradient: Tensor, is_last: bool) -> Tensor | None:
        """Add a leaf; return the sum over all after the last one.

        Raises:
            RuntimeError: the number of leaves is no power of two.
        """
        self.count += 1
        pairs = self.count  # a binary counter: each carry is a sum of two equal subtrees
        while pairs % 2 == 0:
            pairs //= 2
            first = self.sums.pop()
            is_whole = is_last and not self.sums and self.place is not None
            gradient = torch.add(first, gradient, out=self.place if is_whole else first)
        self.sums.append(gradient)
        if not is_last:
            return None
        total, count = self.sums.pop(), self.count
        rest, self.count = len(self.sums), 0
        self.sums.clear()
        if rest:
            raise RuntimeError(f"{count} micro-batches have no balanced tree: no power of two")
        return total if self.place is None or count > 1 else self.place.copy_(total)


@dataclass(eq=False)
class _Message:
    """Gradients that are reduced together."""

    parameters: list[nn.Parameter]
    ready: set[nn.Parameter] = field(default_factory=set)
    """Parameters whose gradient is computed."""
    _parts: list[Tensor] = field(default_factory=list)
    _sum: Tensor | None = None
    _wait: Callable[[], object] | None = None

    @property
    def is_complete(self) -> bool:
        return len(self.ready) == len(self.parameters)

    def start(self, reduce: Callable[[Tensor], Callable[[], object]]) -> None:
        """Start to reduce the gradients that are ready."""
        gradients = [p.grad for p in self.parameters if p in self.ready and p.grad is not None]
        if not gradients:
            return
        self._parts = [_flatten(gradient) for gradient in gradients]
        self._sum = self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts)
        self._wait = reduce(self._sum)

    def finish(self) -> None:
        """Wait for the reduction and write its results into the gradients."""
        if self._wait is not None and self._sum is not None:
            self._wait()
            if len(self._parts) > 1:
                means = self._sum.split([part.numel() for part in self._parts])
                torch._foreach_copy_(self._parts, list(means))
        self.ready.clear()
        self._parts, self._sum, self._wait = [], None, None


def _group_parameters(parameters: Iterable[nn.Parameter], least: int) -> list[_Message]:
    """Group parameters, in the order in which they get their gradients, into messages."""
    messages, small, size = [], _Message([]), 0
    for parameter in parameters:
        if parameter.nbytes >= least:
            messages.append(_Message([parameter]))
            continue
        small.parameters.append(parameter)
        size += parameter.nbytes
        if size >= least:
            messages.append(small)
            small, size = _Message([]), 0
    return [*messages, small] if small.parameters else messages


def _flatten(gradient: Tensor) -> Tensor:
    """Return a flat view of a gradient in memory order."""
    if gradient.dim() == 4 and gradient.is_contiguous(memory_format=torch.channels_last):
        gradient = gradient.permute(0, 2, 3, 1)
    return gradient.view(-1)
