"""SPDL's `DistributedRandomSampler` and a pipeline in threads.

An epoch's order follows from the seed that `shuffle` is given before it ("regardless of history",
its docstring), so that a trainer that counts its epochs resumes at their borders. Nothing in its
docs saves a place within an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from spdl.pipeline import PipelineBuilder
from spdl.source import DistributedRandomSampler

from torture.consumer import Setup
from torture.crops import random_crop
from torture.images import SAMPLES, stored, write_shards


def prepare(folder: Path) -> None:
    """Write every image into a file of its own."""
    write_shards(folder / "tars")
    for number, jpeg in stored(folder / "tars"):
        (folder / f"{number:06}.jpg").write_bytes(jpeg)


class Images:
    """A pipeline for each epoch over one sampler."""

    def __init__(self, setup: Setup, states: Sequence[Any]) -> None:
        self._setup = setup
        self._sampler = DistributedRandomSampler(
            SAMPLES,
            rank=setup.rank,
            world_size=setup.world,
            seed=setup.seed,
            ddp_drop_last_distributed_round=False,
        )

    def epoch(self, epoch: int) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        """Yield the epoch."""
        setup = self._setup
        self._sampler.shuffle(seed=1000 * setup.seed + epoch)
        pipeline = (
            PipelineBuilder()
            .add_source(self._sampler)
            .pipe(self._crop, concurrency=setup.workers, output_order="input")
            .aggregate(setup.local_batch)
            .add_sink(setup.prefetch)
            .build(num_threads=setup.workers)
        )
        with pipeline.auto_stop():
            for batch in pipeline:
                yield [number for number, _ in batch], np.stack([crop for _, crop in batch])

    def _crop(self, number: int) -> tuple[int, np.ndarray]:
        jpeg = (self._setup.folder / f"{number:06}.jpg").read_bytes()
        return int(number), random_crop(jpeg).numpy()

    def state(self) -> Any:
        """Return nothing: the trainer's count of epochs is all."""

    def close(self) -> None:
        """Do nothing: threads end with their epoch."""


open_loader = Images
