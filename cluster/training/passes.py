"""Forward and backward pass of a batch: launched one operation at a time, or as CUDA graphs.

Needs torch and `model` alone, as the benchmarks on a machine without anything else do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.training.precision import autocast
from model.metrics import count_top1_errors

if TYPE_CHECKING:
    from model.alexnet import AlexNet
    from model.column_threads import ColumnThreads
    from model.optimizer import Sgd2012


WARM_UP = 3
"""Forward and backward passes before a recording."""
Inputs: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Images, labels and weights of a micro-batch."""


def compute_logits(net: Callable[[Tensor], Any], images: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the logits, float32 [b, classes], of floating images [b, 3, h, w], in a dtype."""
    with autocast(dtype, images.device):
        logits: Tensor = net(images)
    return logits.float()


class Passes:
    """Forward and backward pass of a micro-batch, operation by operation.

    Args:
        net: network, whose position is set before each forward pass.
        optimizer: holds the parameters.
        dtype: data type that layers compute in.
        call: function that computes the logits, if not the network: a compiled form.
    """

    def __init__(
        self, net: AlexNet, optimizer: Sgd2012, dtype: torch.dtype,
        call: Callable[[Tensor], Any] | None = None,
    ) -> None:  # fmt: skip
        self.net, self.optimizer, self.dtype = net, optimizer, dtype
        self._call = call or net
        self._loss: Tensor | None = None

    def zero_grad(self) -> None:
        """Drop the gradients of the step before."""
        self.optimizer.zero_grad()

    def infer(self, images: Tensor) -> Tensor:
        """Compute the logits, float32 [b, classes], of floating images [b, 3, h, w]."""
        return compute_logits(self._call, images, self.dtype)

    def forward(self, images: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Compute the loss of a micro-batch.

        Args:
            images: floating [b, 3, h, w].
            labels: int64 [b].
            weights: float32 [b], weight of each image in the error.

        Returns:
            float64 [2]: mean loss and top-1 error.
        """
        logits = self.infer(images)
        self._loss = F.cross_entropy(logits, labels)
        wrong = count_top1_errors(logits.detach(), labels, weights)
        return torch.stack((self._loss.detach(), wrong / len(labels)))

    def backward(self, share: float) -> None:
        """Add the gradient of `share` times the loss of the last forward pass."""
        if self._loss is None:
            raise RuntimeError("a backward pass follows a forward pass")
        loss, self._loss = self._loss, None
        loss.backward(torch.full_like(loss, share))  # one operation; a product would take three

    def take_statistics(self) -> Tensor | None:
        """Return the statistics of batch normalization since the last call; see `AlexNet`."""
        return self.net.take_statistics()


class ColumnPasses(Passes):
    """Forward and backward pass of both columns in this process, as a pair computes them.

    Args:
        columns: the columns, a thread each.
        optimizer, dtype: as in `Passes`.
    """

    def __init__(self, columns: ColumnThreads, optimizer: Sgd2012, dtype: torch.dtype) -> None:
        super().__init__(columns.net, optimizer, dtype)
        self._columns = columns
        self._own = {column: Passes(column, optimizer, dtype) for column in columns.columns}

    def infer(self, images: Tensor) -> Tensor:
        """Compute the logits in both columns; return those of column a, which are the same."""
        return self._columns.run(lambda column: self._own[column].infer(images))[0]

    def forward(self, images: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Compute the loss in both columns; return column a's, which is the same."""
        return self._columns.run(lambda column: self._own[column].forward(images, labels, weights))[
            0
        ]

    def backward(self, share: float) -> None:
        """Add the gradients to the parameters of the columns."""
        self._columns.run(lambda column: self._own[column].backward(share))


class Graph(Protocol):
    """Recorded work of a GPU."""

    def warm_up(self, work: Callable[[], object]) -> None:
        """Do `work` some times, so that all that it needs is compiled, chosen and allocated."""

    def capture(self, work: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Record what `work` launches, without computing it; return the tensors it will write."""

    def replay(self) -> None:
        """Launch the recorded work again: it reads and writes the same memory."""


class CudaGraph:
    """Graph of a CUDA device, recorded on a stream of its own as torch's notes on CUDA ask.

    Work that ran on the default stream before leaves traces, in autograd and in cuDNN, that a
    capture cannot have: the warm-up is on the stream of the capture, too.
    """

    def __init__(self, before: CudaGraph | None = None) -> None:
        """Create an empty graph.

        Args:
            before: graph that is always replayed before this one: they share memory.
        """
        self._graph = torch.cuda.CUDAGraph()
        self._stream: torch.cuda.Stream = before._stream if before else torch.cuda.Stream()
        # Not `before._graph.pool()`, which there is only after its capture.
        self._pool: Any = before._pool if before else torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], object]) -> None:
        """Do the work on the stream of the capture."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP):
                work()
        torch.cuda.current_stream().wait_stream(self._stream)

    def capture(self, work: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Record the work."""
        current = torch.cuda.current_stream()
        # By default a call of another thread, such as DALI's for memory, would end the capture.
        capture = torch.cuda.graph(
            self._graph, self._pool, self._stream, capture_error_mode="thread_local"
        )
        try:
            with capture:
                return work()
        finally:
            torch.cuda.set_stream(current)  # a capture that failed leaves its own in place

    def replay(self) -> None:
        """Launch the recorded work on the current stream."""
        self._graph.replay()


class GraphedPasses(Passes):
    """Forward and backward pass of whole batches of one shape, each recorded as a graph.

    A replay takes one launch instead of some hundred. Inputs are copied into the memory that the
    graph reads; results, gradients and statistics lie in memory that it writes, the same in each
    step. The two passes are apart so that the host can read the loss while the backward pass runs.
    Learning rates are no part of them, and the position is a tensor of the network.

    Recording computes no step: the batch must still be computed by `forward` and `backward`.

    Args:
        eager: passes to record.
        inputs: images, labels and weights that give the shapes; the warm-up computes with them.
        make_graph: `CudaGraph`, or what stands in for it.
    """

    def __init__(
        self, eager: Passes, inputs: Inputs, make_graph: Callable[..., Graph] = CudaGraph
    ) -> None:
        super().__init__(eager.net, eager.optimizer, eager.dtype, eager._call)
        self._inputs = tuple(one.clone() for one in inputs)
        self._forward = make_graph()
        self._backward = make_graph(self._forward)
        self._forward.warm_up(lambda: (self._record_forward(), self._record_backward()))
        super().zero_grad()
        self._values, *statistics = self._forward.capture(self._record_forward)
        self._statistics = statistics[0] if statistics else None
        gradients = self._backward.capture(self._record_backward)
        self._gradients = list(zip(self._with_gradient(), gradients, strict=True))

    def _record_forward(self) -> list[Tensor]:
        values = super().forward(*self._inputs)
        statistics = super().take_statistics()
        return [values] if statistics is None else [values, statistics]

    def _record_backward(self) -> list[Tensor]:
        super().zero_grad()  # so that a replay writes the gradients and does not add to them
        super().backward(1.0)
        return [grad for one in self._with_gradient() if (grad := one.grad) is not None]

    def _with_gradient(self) -> list[Tensor]:
        return [parameter for parameter in self.net.parameters() if parameter.grad is not None]

    def fits(self, inputs: Inputs) -> bool:
        """Return whether a batch has the shapes and types that were recorded."""
        return all(
            (one.shape, one.dtype) == (kept.shape, kept.dtype)
            for one, kept in zip(inputs, self._inputs, strict=True)
        )

    def zero_grad(self) -> None:
        """Do nothing: the recorded backward pass overwrites the gradients."""

    def forward(self, images: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Replay the forward pass; the result is valid until the next one."""
        for kept, given in zip(self._inputs, (images, labels, weights), strict=True):
            kept.copy_(given, non_blocking=True)
        self._forward.replay()
        return self._values

    def backward(self, share: float) -> None:
        """Replay the backward pass; `share` is 1, the whole batch."""
        self._backward.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient

    def take_statistics(self) -> Tensor | None:
        """Return the statistics of batch normalization in the last forward pass."""
        return self._statistics
