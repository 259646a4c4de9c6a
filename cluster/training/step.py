"""One step of the training: forward passes, backward passes, update.

The training loop and the benchmarks make their steps with it. Needs torch and `model` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cluster.mesh import ProcessMesh
from cluster.training.gradients import GradientAverage
from cluster.training.passes import ColumnPasses, Graph, GraphedPasses, Inputs, Passes
from model.timing import HostCopy

if TYPE_CHECKING:
    from model.alexnet import AlexNet
    from model.column_threads import ColumnThreads
    from model.optimizer import Sgd2012
    from model.schedule import Rates

Check = Callable[[HostCopy, Tensor], object]
"""Receives loss and error of a micro-batch on their way to the host, and its images."""


@dataclass(frozen=True)
class ReplicaBatch:
    """The batch of a replica, both halves."""

    images: Tensor
    """Floating [b, 3, h, w] on the device of this process; valid until the next batch is taken."""
    labels: Tensor
    """int64 [b]."""
    weights: Tensor
    """float32 [b], loss weight: 0 for padding, else 1."""
    replaced: Tensor
    """float32 [b], 1 for samples that replace damaged ones."""
    position: int
    """Number of samples consumed by the whole job after this batch."""

    @property
    def inputs(self) -> Inputs:
        """Images, labels and weights."""
        return self.images, self.labels, self.weights

    def split(self, most: int) -> Iterator[tuple[int, ReplicaBatch]]:
        """Yield micro-batches of at most `most` images, each with its first row."""
        for row in range(0, len(self.labels), most):
            part = slice(row, row + most)
            yield row, replace(
                self, images=self.images[part], labels=self.labels[part],
                weights=self.weights[part], replaced=self.replaced[part],
            )  # fmt: skip


def read_loss(values: HostCopy, images: Tensor) -> None:
    """Wait for the forward pass, as the training loop does."""
    values.read()


class TrainStep:
    """Step of the training on one replica's batch.

        step = TrainStep(net, Sgd2012(net.named_parameters()), torch.bfloat16, graph=CudaGraph)
        values = step(batch, position, Rates(0.01, 0.02))

    The host reads the loss when backward passes are launched and the weights are not yet updated:
    it waits for the forward pass only, and a GPU computes on meanwhile.

    Args:
        net: network, in training mode.
        optimizer: updates its parameters.
        dtype: data type that layers compute in.
        microbatch: most images computed at once, the gradients added up; 0: the whole batch.
        mesh: replicas to average over.
        average: averages the gradients over the replicas; None: one replica. A `GradientTree`
            makes the step exact: the same bits for any number of replicas.
        columns: the columns of the network, if they are to be computed as a pair computes them.
        graph: `CudaGraph` on a CUDA device, with the whole network and the whole batch in this
            process: passes are recorded in the first step, and replayed in all. None: never.
        warn: receives a line if they cannot be, and the step goes on without.
        call: function that computes the logits, if not the network: a compiled form.
    """

    def __init__(
        self, net: AlexNet, optimizer: Sgd2012, dtype: torch.dtype, *, microbatch: int = 0,
        mesh: ProcessMesh | None = None, average: GradientAverage | None = None,
        columns: ColumnThreads | None = None,
        graph: Callable[..., Graph] | None = None, warn: Callable[[str], object] = lambda _: None,
        call: Callable[[Tensor], Any] | None = None,
    ) -> None:  # fmt: skip
        self.net, self.optimizer = net, optimizer
        self._microbatch = microbatch
        self._mesh = mesh or ProcessMesh()
        self._average = average or GradientAverage(net, ProcessMesh())
        self._passes = (
            ColumnPasses(columns, optimizer, dtype) if columns
            else Passes(net, optimizer, dtype, call)
        )  # fmt: skip
        self._graph, self._warn = graph, warn
        self.waits = self._average.waits
        """Spans that updates waited for the other replicas or the network."""

    def __call__(
        self, batch: ReplicaBatch, position: int, rates: Rates, check: Check = read_loss
    ) -> Tensor:
        """Make a step.

        Args:
            batch: share of the batch that this replica computes.
            position: samples that the whole job consumed before its first row.
            rates: learning rates.
            check: called for each micro-batch, when its backward pass is launched and the weights
                are still those that produced the loss; may raise.

        Returns:
            float64 [3] on the device: mean loss and top-1 error of the batch of all replicas, and
            the number of its images that replace damaged ones.
        """
        values = self._compute_gradients(batch, position, check)
        self._average.finish()
        # The last collective calls come before the update: none leaves a process half updated.
        # Summed in the order of the batch, whoever computed which part.
        values = self._mesh.gather_replicas(values).flatten(0, 1).sum(0)
        if (statistics := self._passes.take_statistics()) is not None:
            statistics = self._mesh.mean(statistics)
        self.optimizer.step(rates)
        self.net.update_running_stats(statistics)
        return values

    @torch.no_grad()
    def infer(self, images: Tensor) -> Tensor:
        """Compute the logits, float32 [b, classes], of images, as the steps compute them.

        Args:
            images: floating [b, 3, h, w], the share of a batch.
        """
        if not self._average.is_exact:
            return self._passes.infer(images)
        return torch.cat(
            [self._passes.infer(part) for part in images.split(self._microbatch or len(images))]
        )

    def _compute_gradients(self, batch: ReplicaBatch, position: int, check: Check) -> Tensor:
        """Compute the gradient of the mean loss, one micro-batch after the other.

        Returns:
            float64 [micro-batches, 3], whose sum over all replicas is what `__call__` returns.
        """
        own = len(batch.labels)
        most = self._microbatch or own
        found = []
        passes = self._choose_passes(batch, position)
        passes.zero_grad()
        for row, part in batch.split(most):
            self.net.set_position(position + row)
            share = len(part.labels) / own
            values = passes.forward(*part.inputs)
            on_host = HostCopy(values)  # before the backward pass: it is read while that runs
            with self._average.hold(row + most < own):
                passes.backward(share * self._average.share)
            check(on_host, part.images)
            parts = values * (share / self._mesh.replicas), part.replaced.sum()[None]
            found.append(torch.cat(parts))
        return torch.stack(found)

    def _choose_passes(self, batch: ReplicaBatch, position: int) -> Passes:
        """Return the passes for a batch; recorded ones, if they can be."""
        passes = self._passes
        if isinstance(passes, GraphedPasses):
            if not passes.fits(batch.inputs):
                self._launch_singly(passes, "a batch has another shape than those before")
        elif self._graph is not None:
            self.net.set_position(position)  # forward passes need one; the warm-up is some
            try:
                self._passes = GraphedPasses(passes, batch.inputs, self._graph)
            except Exception as error:
                self._launch_singly(passes, _describe_cause(error))
        return self._passes

    def _launch_singly(self, passes: Passes, reason: str) -> None:
        """Compute without graphs from now on."""
        self._graph = None
        self._passes = Passes(passes.net, passes.optimizer, passes.dtype, passes._call)
        self._passes.take_statistics()  # of an unfinished recording
        self._warn(f"steps are launched one operation at a time, without a CUDA graph ({reason})")


def _describe_cause(error: BaseException) -> str:
    """Describe the first error: those of a capture that it broke off follow it."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
