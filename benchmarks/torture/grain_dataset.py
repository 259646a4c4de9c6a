"""Grain: a `MapDataset` of ArrayRecord files, `mp_prefetch`, `get_state` and `set_state`.

Its page "Dataset basics" (Checkpointing) and "Transformations": `random_map` gives each sample a
generator of its own, from seed, epoch and sample. For another world size, `ElasticIterator` of
`grain.experimental`, which batches and shards itself and drops the last, short batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from grain.experimental import ElasticIterator

from torture.consumer import Setup
from torture.grain_crops import crop_record
from torture.images import SAMPLES, SHARDS, stored, write_shards


def prepare(folder: Path) -> None:
    """Write an ArrayRecord file for each tar; a record is number and JPEG."""
    write_shards(folder / "tars")
    samples = list(stored(folder / "tars"))
    for shard, numbers in enumerate(np.array_split(np.arange(SAMPLES), SHARDS)):
        writer = ArrayRecordWriter(
            str(folder / f"{shard:03}.arrayrecord"), "group_size:1,uncompressed"
        )
        for number in numbers:
            writer.write(int(samples[number][0]).to_bytes(4, "little") + samples[number][1])
        writer.close()


def _shuffle(setup: Setup) -> grain.MapDataset:
    files = sorted(str(path) for path in setup.folder.glob("*.arrayrecord"))
    return (
        grain.MapDataset.source(grain.sources.ArrayRecordDataSource(files))
        .seed(setup.seed)
        .shuffle()
    )


def _workers(setup: Setup) -> grain.multiprocessing.MultiprocessingOptions:
    return grain.multiprocessing.MultiprocessingOptions(
        num_workers=setup.workers, per_worker_buffer_size=setup.prefetch
    )


class Images:
    """An iterator over all epochs, cut into epochs by their number of batches."""

    def __init__(self, setup: Setup, states: Sequence[Any]) -> None:
        batches = _shuffle(setup)[setup.rank :: setup.world].random_map(crop_record)
        batches = batches.batch(setup.local_batch, drop_remainder=False)
        self._length = len(batches)
        prefetched = batches.repeat(setup.epochs).to_iter_dataset().mp_prefetch(_workers(setup))
        self._batches = iter(prefetched)
        self._taken = 0
        if states:
            state = states[setup.rank]
            self._taken = state["taken"]
            self._batches.set_state(state["grain"])

    def epoch(self, epoch: int) -> Iterator[tuple[Sequence[int], np.ndarray]]:
        """Yield the rest of the epoch."""
        while self._taken < (epoch + 1) * self._length:
            batch = next(self._batches)
            self._taken += 1
            yield batch["id"], batch["pixels"]

    def state(self) -> Any:
        """Return the state of the iterator, and the batches that the trainer took."""
        return {"grain": self._batches.get_state(), "taken": self._taken}

    def close(self) -> None:
        """End the workers."""
        self._batches.close()


class ElasticImages(Images):
    """The iterator for any world; its state is one number."""

    def __init__(self, setup: Setup, states: Sequence[Any]) -> None:
        samples = _shuffle(setup).random_map(crop_record)
        self._length = len(samples) // setup.batch
        self._batches = iter(
            ElasticIterator(
                samples.repeat(setup.epochs),
                setup.batch,
                grain.sharding.ShardOptions(setup.rank, setup.world),
                multiprocessing_options=_workers(setup),
            )
        )
        self._taken = 0
        if states:
            self._taken = states[0]["taken"]
            self._batches.set_state(states[0]["grain"])


def open_loader(setup: Setup, states: Sequence[Any]) -> Images:
    """Return the iterator that its docs have for the case."""
    return (ElasticImages if setup.elastic else Images)(setup, states)
