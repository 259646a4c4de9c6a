"""DALI's `readers.webdataset` on the same shards with the graph of our stream; a thread a core.

A resized crop is drawn by DALI's own `decoders.image_random_crop`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from peers.work import Work
from pipeline.stream.config import StreamConfig
from pipeline.throughput.dali_reader import DaliReader


def prepare(work: Work) -> None:
    """Do nothing: it reads the shards as they are."""


def batches(work: Work) -> Iterator[torch.Tensor]:
    """Yield batches without end."""
    config = StreamConfig(
        batch_size=work.batch_size, device=work.device, threads=work.cores, crop=work.crop
    )
    reader = DaliReader(work.data, config)
    while True:
        yield next(reader)
