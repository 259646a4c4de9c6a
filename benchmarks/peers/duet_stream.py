"""Ours: `pipeline.batches.Stream` as it comes, every check on.

It adds the paper's PCA colour, which no other loader here does; the shift is part of the mean that
is subtracted anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from order import make_dataset

from peers.work import Work
from pipeline.batches import Stream


def prepare(work: Work) -> None:
    """Do nothing: it reads the shards as they are."""


def batches(work: Work) -> Iterator[torch.Tensor]:
    """Yield batches without end."""
    yield from _stream(work, work.data, 0)


def prepare_resume(work: Work, samples: int) -> int:
    """Make a set of so many samples; return the position in the middle of its first epoch."""
    make_dataset(work.data, work.folder / "large", samples)
    return samples // 2


def resume(work: Work, samples: int, state: int) -> Iterator[torch.Tensor]:
    """Yield batches from a position on."""
    yield from _stream(work, work.folder / "large", state)


def _stream(work: Work, data: Path, position: int) -> Iterator[torch.Tensor]:
    with Stream(
        data,
        batch_size=work.batch_size,
        device=work.device,
        crop=work.crop,
        position=position,
    ) as stream:
        for batch in stream:
            yield batch.images
