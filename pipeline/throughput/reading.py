"""What the reading thread of a stream does, alone: from memory, and from the disk."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

import numpy as np

from pipeline.page_cache import forget
from pipeline.stream.timing import Spent
from pipeline.throughput.clock import Load, Rate
from pipeline.throughput.setting import Parts


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the reading thread does, alone: seconds a picture, in windows of some batches."""

    windows: tuple[Spent, ...]
    """Means over the pictures of a window each."""
    cpu: float
    """Cores kept busy."""
    others: float
    each: tuple[float, ...]
    """Seconds of each batch."""

    def rate(self, *names: str) -> Rate:
        """Pictures a second of some of its parts, or of all."""
        parts = names or Spent._fields
        return Rate(
            tuple(1 / max(1e-12, sum(getattr(one, name) for name in parts))
                  for one in self.windows),
            self.cpu, self.others,
        )  # fmt: skip

    @property
    def seconds(self) -> Spent:
        """Seconds a picture: the median of each part."""
        return Spent(*(float(np.median(part)) for part in zip(*self.windows, strict=True)))


def reading(parts: Parts, seconds: float, batches: int, windows: int = 5) -> Reading:
    """Read the first batches of the stream, round and round, and nothing else."""
    reader, size = parts.reader(), parts.setting.batch_size
    source = itertools.chain.from_iterable(
        itertools.islice(reader.batches(0), batches) for _ in itertools.repeat(None)
    )
    reader.give_back(next(source))
    found: list[Spent] = []
    each: list[float] = []
    load = Load()
    while len(found) < windows:
        spent, count, start = Spent(), 0, time.perf_counter()
        while time.perf_counter() - start < seconds / windows:
            loaded = next(source)
            reader.give_back(loaded)
            spent, count = spent.plus(loaded.spent), count + size
            each.append(loaded.spent.total)
        found.append(spent.scaled(spent.total / count))
    return Reading(windows=tuple(found), cpu=load.cores(), others=load.others(), each=tuple(each))


def reading_cold(parts: Parts, batches: int, windows: int = 5) -> tuple[Reading, float]:
    """Read batches of which nothing is in memory.

    Returns:
        what it took, and the share of their shards that stayed in memory although the kernel was
        asked to let it go (a file system in memory, pages that others map).
    """
    slots = parts.order.slots(0, batches * parts.setting.batch_size)
    sizes = np.cumsum([shard.samples for shard in parts.storage.shards])
    numbers = np.unique(np.searchsorted(sizes, slots.ids, side="right"))
    kept = total = 0
    for number in numbers.tolist():
        with parts.dataset.open(parts.storage.shards[number]) as file:
            kept += forget(file.fileno())
            total += parts.storage.shards[number].bytes
    reader = parts.reader()
    load, found = Load(), list[Spent]()
    each: list[float] = []
    some = max(1, batches // windows)
    source = itertools.islice(reader.batches(0), windows * some)
    while window := list(itertools.islice(source, some)):
        spent = Spent()
        for loaded in window:
            spent = spent.plus(loaded.spent)
            each.append(loaded.spent.total)
            reader.give_back(loaded)
        found.append(spent.scaled(spent.total / (some * parts.setting.batch_size)))
    reading = Reading(
        windows=tuple(found), cpu=load.cores(), others=load.others(), each=tuple(each)
    )
    return reading, kept / max(1, total)
