"""Gradients become means over the replicas while the backward pass still runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.mesh import ProcessMesh

# Bytes from which a gradient is a message of its own, sent from where it lies; and the bytes after
# which smaller ones, copied together, are off. In the full network fc6 alone is 75 MB of a column's
# 114: what is left for the end of the backward pass is conv1 and conv2, 0.7 MB.
MESSAGE_BYTES = 2**20


class GradientAverage:
    """Replaces the gradients of a backward pass by their means over the replicas.

    A gradient sets off as soon as it is there, from the last layer to the first, while the layers
    below still compute; `finish` waits for the last. With one replica all of this does nothing.

        average = GradientAverage(net, mesh)
        loss.backward()
        average.finish()
        optimiser.step()

    Gradients of several backward passes add up, and only the last one sends them:

        with average.held():
            loss_of_a_part.backward()
        loss_of_the_last_part.backward()
        average.finish()

    All replicas have to pass backward through the same network in the same way. Which gradients
    share a message depends on the network alone, so that sums are the same, bit for bit, in every
    run and after every restart. That is why this is not torch's DistributedDataParallel: it puts
    the messages together anew after the first step, which of three replicas or more changes the
    order of summation, and so a run that went on differs from one that was never cut.

    Gloo and NCCL alike match the operations of a group by their order; this class starts them in
    one order, that of its messages, and `ProcessMesh.mean` may follow before or after `finish`.

    Args:
        net: its parameters get hooks, until `close`; those that take no gradient are left out.
        mesh: of this process.
        message_bytes: least size of a message, in bytes.
    """

    def __init__(
        self, net: nn.Module, mesh: ProcessMesh, message_bytes: int = MESSAGE_BYTES
    ) -> None:
        self._peers, self._replicas = mesh.peers, mesh.replicas
        parameters = [p for p in reversed(list(net.parameters())) if p.requires_grad]
        self._messages = _messages(parameters, message_bytes) if self._peers else []
        self._of = {p: message for message in self._messages for p in message.parameters}
        self._next = 0
        self._held = False
        self._hooks = [p.register_post_accumulate_grad_hook(self._ready) for p in self._of]

    @contextmanager
    def held(self, holds: bool = True) -> Iterator[None]:
        """Let gradients add up in the block, and none set off (if `holds`)."""
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
        # In one order on every replica, in whatever order autograd happens to get there.
        while self._next < len(self._messages) and self._messages[self._next].complete:
            self._start()

    def _start(self) -> None:
        self._messages[self._next].start(self._peers)
        self._next += 1

    def finish(self) -> None:
        """Wait until every gradient of the last backward pass is the mean.

        Parameters that had no part in it keep what they have, on all replicas alike.
        """
        while self._next < len(self._messages):
            self._start()
        for message in self._messages:
            message.finish(self._replicas)
        self._next = 0

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> GradientAverage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self.close()


@dataclass(eq=False)
class _Message:
    """Gradients that travel together."""

    parameters: list[nn.Parameter]
    ready: set[nn.Parameter] = field(default_factory=set)
    """Those whose gradient is there."""
    _parts: list[Tensor] = field(default_factory=list)
    _sum: Tensor | None = None
    _work: Any = None

    @property
    def complete(self) -> bool:
        return len(self.ready) == len(self.parameters)

    def start(self, group: dist.ProcessGroup | None) -> None:
        """Send what is ready."""
        gradients = [p.grad for p in self.parameters if p in self.ready and p.grad is not None]
        if not gradients:
            return
        self._parts = [_flat(gradient) for gradient in gradients]
        self._sum = self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts)
        self._work = dist.all_reduce(self._sum, group=group, async_op=True)

    def finish(self, replicas: int) -> None:
        """Wait, and put the means where the gradients were."""
        if self._work is not None and self._sum is not None:
            self._work.wait()
            self._sum /= replicas
            if len(self._parts) > 1:
                means = self._sum.split([part.numel() for part in self._parts])
                torch._foreach_copy_(self._parts, list(means))
        self.ready.clear()
        self._parts, self._sum, self._work = [], None, None


def _messages(parameters: Iterable[nn.Parameter], least: int) -> list[_Message]:
    """Parameters in the order in which they get their gradients, cut into messages."""
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


def _flat(gradient: Tensor) -> Tensor:
    """The numbers of a gradient in the order of its memory: a view."""
    if gradient.dim() == 4 and gradient.is_contiguous(memory_format=torch.channels_last):
        gradient = gradient.permute(0, 2, 3, 1)
    return gradient.view(-1)
