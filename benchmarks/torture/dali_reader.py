"""DALI's `readers.webdataset` with checkpoints of the pipeline (its page "Checkpointing"), in the
PyTorch iterator, whose `checkpoints` are saved and given to the new pipeline.

Loader workers are its threads. A checkpoint is that of one pipeline: nothing is said about others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

from torture.consumer import Setup
from torture.images import CROP, shards, write_shards

BUFFER = 32
"""Samples in the shuffle buffer."""


def prepare(folder: Path) -> None:
    """Write the tars; DALI makes an index of its own when it opens them."""
    write_shards(folder)


@pipeline_def(enable_checkpointing=True)
def _crops(setup: Setup) -> Any:
    jpegs, numbers = fn.readers.webdataset(
        paths=shards(setup.folder),
        ext=["jpg", "cls"],
        random_shuffle=True,
        initial_fill=BUFFER,
        seed=setup.seed,
        shard_id=setup.rank,
        num_shards=setup.world,
        pad_last_batch=True,
        name="Reader",
    )
    images = fn.decoders.image(jpegs, device="cpu", output_type=types.RGB)
    images = fn.crop_mirror_normalize(
        images,
        crop=(CROP, CROP),
        crop_pos_x=fn.random.uniform(range=(0, 1)),
        crop_pos_y=fn.random.uniform(range=(0, 1)),
        mirror=fn.random.coin_flip(),
        dtype=types.UINT8,
        output_layout="HWC",
    )
    return images, fn.pad(numbers, fill_value=0, axes=(0,), shape=(8,))


class Images:
    """One iterator for all epochs."""

    def __init__(self, setup: Setup, states: Sequence[Any]) -> None:
        crops = _crops(
            setup,
            batch_size=setup.local_batch,
            num_threads=setup.workers,
            prefetch_queue_depth=setup.prefetch,
            device_id=None,
            seed=setup.seed,
            checkpoint=states[setup.rank][0] if states else None,
        )
        self._batches = DALIGenericIterator(
            [crops],
            ["pixels", "numbers"],
            reader_name="Reader",
            auto_reset=True,
            last_batch_policy=LastBatchPolicy.PARTIAL,
        )

    def epoch(self, epoch: int) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        """Yield the rest of the epoch."""
        for (batch,) in self._batches:
            digits = batch["numbers"].numpy().astype(np.uint8)
            ids = [int(bytes(row).rstrip(b"\0")) for row in digits]
            yield ids, batch["pixels"].numpy()

    def state(self) -> Any:
        """Return the checkpoints of the iterator's pipelines."""
        return self._batches.checkpoints()

    def close(self) -> None:
        """Do nothing: threads end with the process."""


open_loader = Images
