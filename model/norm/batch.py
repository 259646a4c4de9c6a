"""Batch normalisation (Ioffe and Szegedy 2015), its running statistics moved once a step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH_MOMENTUM = 0.1
"""Share of a step's statistics in the running ones, as torch has it."""


class BatchNorm(nn.BatchNorm2d):
    """torch's, but that a forward pass notes the statistics, and `settle` moves the running ones.

    torch moves the running ones in each forward pass. Here a step may be several passes, of
    micro-batches and in several replicas: all are averaged, and move them once. So they are the
    same however a batch is shared out, as long as the pictures that are normalised together are.
    What is normalised together is a micro-batch, in the process that computes it: training asks no
    other replica for its statistics.

    Each map has its own numbers, and so two columns in one process are what they are in two.

    Args:
        maps: of the columns here.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, maps: int) -> None:
        super().__init__(maps, momentum=BATCH_MOMENTUM)
        self.num_batches_tracked = None
        self._noted: Tensor | None = None
        self._pictures = 0

    def forward(self, x: Tensor) -> Tensor:
        """[b, maps, h, w]: with the statistics of x in training, else with the running ones."""
        if not self.training:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        noted = torch.zeros_like(torch.stack((self.running_mean, self.running_var)))
        y = F.batch_norm(
            x, noted[0], noted[1], self.weight, self.bias, True, momentum=1.0, eps=self.eps
        )
        noted = noted * len(x)  # not in place: the backward pass keeps it
        self._noted = noted if self._noted is None else self._noted + noted
        self._pictures += len(x)
        return y

    def take(self) -> Tensor | None:
        """Mean and variance of each map, [2, maps], over what was seen since the last call.

        Means over the passes, each with the weight of its pictures; the variance is that within
        a pass (unbiased, as torch has it). None if nothing was seen in training.
        """
        if self._noted is None:
            return None
        found = self._noted / self._pictures
        self._noted, self._pictures = None, 0
        return found

    @torch.no_grad()
    def settle(self, statistics: Tensor) -> None:
        """Move the running statistics towards those of a step, [2, maps]."""
        self.running_mean.lerp_(statistics[0], BATCH_MOMENTUM)
        self.running_var.lerp_(statistics[1], BATCH_MOMENTUM)
