"""webdataset's `WebDataset` and `WebLoader` over our shards, decoded by Pillow.

A worker process a core; shards drawn with replacement, as its
manual advises for training (`resampled=True`), and a shuffle buffer of 1,000 samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import webdataset as wds
from torch.utils.data import default_collate

from peers.work import Floats, Work, pillow_crop, shards

BUFFER = 1000


def prepare(work: Work) -> None:
    """Do nothing: it reads the shards as they are."""


def batches(work: Work) -> Iterator[torch.Tensor]:
    """Yield batches without end."""
    samples = (
        wds.WebDataset([str(path) for path in shards(work)], resampled=True, shardshuffle=False)
        .shuffle(BUFFER)
        .map(partial(_crop, work.crop))
        .batched(work.batch_size, collation_fn=default_collate)
    )
    loader = wds.WebLoader(samples, batch_size=None, num_workers=work.cores)
    yield from map(Floats(work.mean), loader)


def _crop(crop: str, sample: dict[str, Any]) -> torch.Tensor:
    return pillow_crop(sample["jpg"], crop)
