"""Grain's `MapDataset` of an ArrayRecord file, decoded by Pillow in worker processes, one a core.

The transformations of its page "Dataset basics": shuffle, repeat, `map`, `batch`, then
`mp_prefetch` for work that Python does. How bytes become floats: `peers.work.Floats`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import grain
import torch
from array_record.python.array_record_module import ArrayRecordWriter

from peers.grain_crops import Repeated, crop_record
from peers.work import Floats, Work, stored

BUFFER = 2
"""Batches in advance of each worker, as torch has; Grain's default of 500 batches took 17 GB."""


def prepare(work: Work) -> None:
    """Write the records."""
    writer = ArrayRecordWriter(str(work.folder / "records"), "group_size:1,uncompressed")
    for jpeg in stored(work):
        writer.write(jpeg)
    writer.close()


def batches(work: Work) -> Iterator[torch.Tensor]:
    """Yield batches without end."""
    yield from _floats(work, _iterate(work, work.passes * work.samples))


def prepare_resume(work: Work, samples: int) -> Any:
    """Return the state of an iterator in the middle of an epoch.

    It counts batches of each worker: that of a short way, with other numbers.
    """
    prepare(work)
    way = _iterate(work, work.samples)
    for _ in range(work.cores):
        next(way)
    state = way.get_state()
    way.close()
    middle = samples // 2 // work.batch_size // work.cores
    return state | {"iterators_in_use_states": [{"next_index": middle}] * work.cores}


def resume(work: Work, samples: int, state: Any) -> Iterator[torch.Tensor]:
    """Yield batches from a state on."""
    way = _iterate(work, samples)
    way.set_state(state)
    yield from _floats(work, way)


def _iterate(work: Work, samples: int) -> Any:
    """Return an iterator over the records, again and again until an epoch has `samples`."""
    records = grain.sources.ArrayRecordDataSource([str(work.folder / "records")])
    return iter(
        grain.MapDataset.source(Repeated(records, samples))
        .seed(1)
        .shuffle()
        .repeat()
        .map(partial(crop_record, work.crop))
        .batch(work.batch_size, drop_remainder=True)
        .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=BUFFER))
        .mp_prefetch(
            grain.multiprocessing.MultiprocessingOptions(
                num_workers=work.cores, per_worker_buffer_size=BUFFER
            )
        )
    )


def _floats(work: Work, crops: Iterator[Any]) -> Iterator[torch.Tensor]:
    floats = Floats(work.mean)
    return (floats(torch.from_numpy(one)) for one in crops)
