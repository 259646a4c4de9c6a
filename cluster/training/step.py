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
from cluster.training.passes import Graph, GraphedPasses, Inputs, Passes
from model.timing import HostCopy

if TYPE_CHECKING:
    from model.alexnet import AlexNet
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
        average: averages the gradients over the replicas; None: one replica.
        mean: averages a tensor over the replicas; may work in place.
        graph: `CudaGraph` on a CUDA device, with the whole network and the whole batch in this
            process: passes are recorded in the first step, and replayed in all. None: never.
        warn: receives a line if they cannot be, and the step goes on without.
        call: function that computes the logits, if not the network: a compiled form.
    """

    def __init__(
        self, net: AlexNet, optimizer: Sgd2012, dtype: torch.dtype, *, microbatch: int = 0,
        average: GradientAverage | None = None, mean: Callable[[Tensor], Tensor] | None = None,
        graph: Callable[..., Graph] | None = None, warn: Callable[[str], object] = lambda _: None,
        call: Callable[[Tensor], Any] | None = None,
    ) -> None:  # fmt: skip
        self.net, self.optimizer = net, optimizer
        self._microbatch = microbatch
        self._average = average or GradientAverage(net, ProcessMesh())
        self._mean = mean or (lambda values: values)
        self._passes = Passes(net, optimizer, dtype, call)
        self._graph, self._warn = graph, warn

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
            float32 [3] on the device: mean loss and top-1 error of the share, and the number of its
            images that replace damaged ones; `mean` of them.
        """
        values = self._compute_gradients(batch, position, check)
        self._average.finish()
        # The last collective calls come before the update: none leaves a process half updated.
        values = self._mean(values)
        if (statistics := self._passes.take_statistics()) is not None:
            statistics = self._mean(statistics)
        self.optimizer.step(rates)
        self.net.update_running_stats(statistics)
        return values

    def _compute_gradients(self, batch: ReplicaBatch, position: int, check: Check) -> Tensor:
        """Compute the gradient of the mean loss, one micro-batch after the other."""
        own = len(batch.labels)
        most = self._microbatch or own
        values = torch.zeros(2, device=batch.images.device)
        passes = self._choose_passes(batch, position)
        passes.zero_grad()
        for row, part in batch.split(most):
            self.net.set_position(position + row)
            share = len(part.labels) / own
            found = passes.forward(*part.inputs)
            on_host = HostCopy(found)  # before the backward pass: it is read while that runs
            with self._average.hold(row + most < own):
                passes.backward(share)
            check(on_host, part.images)
            values += found * share
        return torch.cat((values, batch.replaced.sum()[None]))

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
