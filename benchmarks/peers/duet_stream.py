"""Ours: `pipeline.batches.Stream` as it comes, every check on.

It adds the paper's PCA colour, which no other loader here does; the shift is part of the mean that
is subtracted anyway.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from peers.work import Work
from pipeline.batches import Stream


def prepare(work: Work) -> None:
    """Do nothing: it reads the shards as they are."""


def batches(work: Work) -> Iterator[torch.Tensor]:
    """Yield batches without end."""
    with Stream(
        work.data, batch_size=work.batch_size, device=work.device, crop=work.crop
    ) as stream:
        for batch in stream:
            yield batch.images
