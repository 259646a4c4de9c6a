"""Averages gradients over the replicas while the backward pass still runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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

    def __init__(
        self, net: nn.Module, mesh: ProcessMesh, message_bytes: int = MESSAGE_BYTES
    ) -> None:
        self._peers, self._replicas, self._device = mesh.peers, mesh.replicas, mesh.device
        self.waits = Stopwatch()
        """Spans that an update waited for the other replicas or the network."""
        parameters = [p for p in reversed(list(net.parameters())) if p.requires_grad]
        self._messages = _group_parameters(parameters, message_bytes) if self._peers else []
        self._of = {p: message for message in self._messages for p in message.parameters}
        self._next = 0
        self._held = False
        self._hooks = [p.register_post_accumulate_grad_hook(self._ready) for p in self._of]

    @contextmanager
    def hold(self, holds: bool = True) -> Iterator[None]:
        """Let gradients accumulate in the block and start no all-reduce (if `holds`)."""
        self._held = holds
        try:
            yield
        finally:
            self._held = False

    def _ready(self, parameter: nn.Parameter) -> None:
        if self._held:
            return
        message = self._of[parameter]
        if parameter in message.ready:
            raise RuntimeError(
                "a second backward pass before finish(): its gradients would be lost"
            )
        message.ready.add(parameter)
        # The same order on every replica, whatever the order in which autograd finishes.
        while self._next < len(self._messages) and self._messages[self._next].is_complete:
            self._messages[self._next].start(self._peers)
            self._next += 1

    def finish(self) -> None:
        """Wait until every gradient of the last backward pass is the mean.

        Parameters that took no part keep their gradient, on all replicas alike.
        """
        for message in self._messages[self._next :]:
            message.start(self._peers)
        if self._messages:
            with self.waits.running(self._device):
                for message in self._messages:
                    message.finish(self._replicas)
        self._next = 0

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> GradientAverage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(eq=False)
class _Message:
    """Gradients that are reduced together."""

    parameters: list[nn.Parameter]
    ready: set[nn.Parameter] = field(default_factory=set)
    """Parameters whose gradient is computed."""
    _parts: list[Tensor] = field(default_factory=list)
    _sum: Tensor | None = None
    _work: Any = None

    @property
    def is_complete(self) -> bool:
        return len(self.ready) == len(self.parameters)

    def start(self, group: dist.ProcessGroup | None) -> None:
        """Start the all-reduce of the gradients that are ready."""
        gradients = [p.grad for p in self.parameters if p in self.ready and p.grad is not None]
        if not gradients:
            return
        self._parts = [_flatten(gradient) for gradient in gradients]
        self._sum = self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts)
        self._work = dist.all_reduce(self._sum, group=group, async_op=True)

    def finish(self, replicas: int) -> None:
        """Wait for the all-reduce and write the means into the gradients."""
        if self._work is not None and self._sum is not None:
            self._work.wait()
            self._sum /= replicas
            if len(self._parts) > 1:
                means = self._sum.split([part.numel() for part in self._parts])
                torch._foreach_copy_(self._parts, list(means))
        self.ready.clear()
        self._parts, self._sum, self._work = [], None, None


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
