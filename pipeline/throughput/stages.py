"""Each stage of the stream alone, on what the stage before it gave, beside its limit.

    fetch      a shard from the store into the cache on this node      (sets in a store only)
    storage    a picture's bytes from the disk, or from the page cache
    checksum   CRC-32 of them
    feed       order, draws, views: what Python does
    decode     JPEG -> the 224x224 crop                                (not of raw pictures)
    normalise  crop of raw pictures, mirror, mean and colour, float, CHW
    copy       host -> device                                          (GPU only)
    hand-over  tensors for torch

The first four run in one thread, one after the other. The pixels are made by DALI's threads.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from torch.utils.dlpack import from_dlpack

from pipeline.augment import CROP
from pipeline.decode import decoded, gpu_of, normalised
from pipeline.manifest import Shard
from pipeline.page_cache import forget
from pipeline.picture import SIZE
from pipeline.reader import Loaded
from pipeline.throughput import limits
from pipeline.throughput.clock import Load, Rate, measured
from pipeline.throughput.setting import Parts
from pipeline.waits import Spent

T = TypeVar("T")

KEPT = 8
"""Batches that a stage is fed with in turn."""
COLD = 0.5
"""Share of the pages that may be in memory before a disk is not called cold."""
CROPPED = 3 * CROP * CROP
"""Bytes of a crop, uint8."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage, alone."""

    name: str
    rate: Rate
    """Pictures a second."""
    bytes: float
    """Bytes that it reads and writes for a picture."""
    limit: float | None = None
    """Pictures a second that this machine could do at best; None: there is no such figure."""
    against: str = ""
    """What that limit is."""
    note: str = ""

    @property
    def share(self) -> float | None:
        """How much of the limit is reached, 0..1."""
        return self.rate.median / self.limit if self.limit else None


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the reading thread does, alone: seconds a picture, in windows of some batches."""

    windows: tuple[Spent, ...]
    """Means over the pictures of a window each."""
    cpu: float
    """Cores kept busy."""
    others: float

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
    load = Load()
    while len(found) < windows:
        spent, count, start = Spent(), 0, time.perf_counter()
        while time.perf_counter() - start < seconds / windows:
            loaded = next(source)
            reader.give_back(loaded)
            spent, count = spent.plus(loaded.spent), count + size
        found.append(spent.scaled(spent.total / count))
    return Reading(windows=tuple(found), cpu=load.cores(), others=load.others())


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
    load, found = Load(), []
    each = max(1, batches // windows)
    source = itertools.islice(reader.batches(0), windows * each)
    while window := list(itertools.islice(source, each)):
        spent = Spent()
        for loaded in window:
            spent = spent.plus(loaded.spent)
            reader.give_back(loaded)
        found.append(spent.scaled(spent.total / (each * parts.setting.batch_size)))
    reading = Reading(windows=tuple(found), cpu=load.cores(), others=load.others())
    return reading, kept / max(1, total)


def pixels(parts: Parts, loaded: Sequence[Loaded], threads: int, seconds: float) -> Rate:
    """All that DALI does, decoding and normalising, with `threads` threads and nothing beside."""
    decoder = parts.decoder([one.feed for one in loaded], threads)
    size = parts.setting.batch_size

    def step() -> int:
        decoder.run()
        return size

    for _ in range(parts.setting.prefetch):
        step()
    return measured(step, seconds, settle=_settle(parts))


def decode(parts: Parts, loaded: Sequence[Loaded], seconds: float) -> Rate:
    """JPEGs to crops, uint8."""
    setting = parts.setting
    pipe = _pipeline(parts)
    with pipe:
        jpegs, x, y = fn.external_source(
            source=_again([one.feed[:3] for one in loaded]), num_outputs=3,
            batch=True, dtype=[types.UINT8, types.FLOAT, types.FLOAT], ndim=[1, 0, 0],
            no_copy=True,
        )  # fmt: skip
        pipe.set_outputs(
            decoded(jpegs, x, y, setting.device, hw_decoder_load=setting.hw_decoder_load)
        )
    return _timed(parts, pipe, seconds)


def normalise(parts: Parts, loaded: Sequence[Loaded], seconds: float) -> Rate:
    """Crops to the pixels of the stream: [3, 224, 224], float32 or, on a GPU, float16."""
    size, raw = parts.setting.batch_size, parts.encoding == "raw"
    draws = np.random.default_rng(0)
    side = SIZE if raw else CROP
    where = {"crop_pos_x": 0.5, "crop_pos_y": 0.5, "crop": (CROP, CROP)} if raw else None
    crops = [
        list(draws.integers(0, 256, (size, side, side, 3), np.uint8))
        for _ in range(min(4, len(loaded)))
    ]
    feeds = [(crop, one.feed.flip, one.feed.mean) for crop, one in zip(crops, loaded, strict=False)]
    pipe = _pipeline(parts)
    with pipe:
        pictures, flip, mean = fn.external_source(
            source=_again(feeds), num_outputs=3, batch=True,
            dtype=[types.UINT8, types.INT32, types.FLOAT], ndim=[3, 0, 1], layout=["HWC", "", ""],
            no_copy=True,
        )  # fmt: skip
        if parts.setting.device == "gpu":
            pictures = pictures.gpu()
        pipe.set_outputs(normalised(pictures, flip, mean, parts.setting.device, where=where))
    return _timed(parts, pipe, seconds)


def hand_over(parts: Parts, loaded: Sequence[Loaded], seconds: float) -> Rate:
    """Pixels that are ready, and ids and labels, to torch."""
    size = parts.setting.batch_size
    gpu = parts.setting.device == "gpu"
    pipe = _pipeline(parts)
    with pipe:
        ready = fn.external_source(
            source=lambda: np.zeros((size, 1), np.float32), dtype=types.FLOAT, ndim=1
        )
        pipe.set_outputs(ready.gpu() if gpu else ready)
    pipe.build()
    (output,) = pipe.run()
    one = loaded[0]

    def step() -> int:
        from_dlpack(output.as_tensor())
        torch.from_numpy(one.labels).to("cuda" if gpu else "cpu")
        torch.from_numpy(one.weights).to("cuda" if gpu else "cpu")
        torch.from_numpy(one.ids), torch.from_numpy(one.ids != one.due)
        return size

    return measured(step, seconds, settle=_settle(parts))


def _again(feeds: Sequence[T]) -> Callable[[], T]:
    """A source that gives the same in turn, for ever."""
    turns = itertools.cycle(feeds)
    return lambda: next(turns)


def _pipeline(parts: Parts) -> Pipeline:
    setting = parts.setting
    return Pipeline(
        setting.batch_size, setting.threads, gpu_of(setting.device),
        prefetch_queue_depth=setting.prefetch,
    )  # fmt: skip


def _timed(parts: Parts, pipe: Pipeline, seconds: float) -> Rate:
    pipe.build()
    size = parts.setting.batch_size

    def step() -> int:
        pipe.run()
        return size

    for _ in range(parts.setting.prefetch):
        step()
    return measured(step, seconds, settle=_settle(parts))


def _settle(parts: Parts) -> Callable[[], None]:
    return torch.cuda.synchronize if parts.setting.device == "gpu" else lambda: None


@dataclass(frozen=True, kw_only=True)
class Alone:
    """All stages alone, and the figures that a prediction starts from."""

    stages: tuple[Stage, ...]
    warm: Reading
    cold: Reading | None
    """None: this machine does not let go of the pages."""
    loaded: tuple[Loaded, ...]
    """Batches to feed DALI with."""


def alone(parts: Parts, seconds: float, batches: int) -> Alone:
    """Measure every stage and its limit, about `seconds` each."""
    cold, kept = reading_cold(parts, min(batches, 60))
    warm = reading(parts, seconds, batches)
    loaded = tuple(parts.loaded(KEPT))
    return Alone(
        stages=tuple(
            itertools.chain(
                _reader_stages(parts, warm, cold if kept < COLD else None, seconds),
                _pixel_stages(parts, loaded, seconds),
            )
        ),
        warm=warm, cold=cold if kept < COLD else None, loaded=loaded,
    )  # fmt: skip


def _reader_stages(
    parts: Parts, warm: Reading, cold: Reading | None, seconds: float
) -> Iterator[Stage]:
    each = parts.bytes_each
    paths = [parts.dataset.shard(shard) for shard in _some_here(parts)]
    disk, kept = limits.disk(paths)
    if cold is not None:
        yield Stage(
            name="storage, cold", rate=cold.rate(), bytes=each,
            limit=disk / each if kept < COLD else None, against="disk, files end to end",
            note="with checksum and feed, which the kernel reads ahead under",
        )  # fmt: skip
    yield Stage(
        name="storage, page cache", rate=warm.rate("storage"), bytes=each,
        limit=limits.page_cache(paths, seconds / 2).median / each,
        against="page cache, end to end, one thread",
    )  # fmt: skip
    yield Stage(
        name="checksum", rate=warm.rate("checksum"), bytes=each,
        limit=limits.checksum(round(each), seconds / 2).median / each,
        against="CRC-32 alone, one thread",
    )  # fmt: skip
    yield Stage(
        name="feed", rate=warm.rate("feed", "fetch"), bytes=0,
        note="order, draws and views, in Python",
    )  # fmt: skip


def _some_here(parts: Parts) -> Sequence[Shard]:
    """Some shards, of a set in a store those that are in the cache."""
    shards = parts.storage.shards
    here = [shard for shard in shards if (Path(parts.dataset.folder) / shard.name).is_file()]
    return here[:16]


def _pixel_stages(parts: Parts, loaded: Sequence[Loaded], seconds: float) -> Iterator[Stage]:
    setting, each = parts.setting, parts.bytes_each
    gpu = setting.device == "gpu"
    jpegs = [picture for one in loaded for picture in one.feed.pictures]
    if parts.encoding == "jpeg":
        if gpu:
            limit = limits.nvjpeg(
                jpegs, setting.batch_size, setting.threads, setting.hw_decoder_load, seconds / 2
            )
        else:
            limit = limits.libjpeg(jpegs, setting.threads, seconds / 2)
        yield Stage(
            name="decode", rate=decode(parts, loaded, seconds), bytes=each + CROPPED,
            limit=limit.median,
            against="nvJPEG of whole pictures, nothing else" if gpu
            else f"bare libjpeg-turbo, whole pictures, {setting.threads} threads",
        )  # fmt: skip
    moved = CROPPED * (1 + (2 if gpu else 4))
    memory = (limits.device_memory if gpu else lambda s: limits.memory(setting.threads, s))(
        seconds / 2
    )
    yield Stage(
        name="normalise", rate=normalise(parts, loaded, seconds), bytes=moved,
        limit=memory.median / moved,
        against="GPU memory, copied" if gpu else f"memory, copied by {setting.threads} threads",
        note="with the copy to the GPU" if gpu else "",
    )  # fmt: skip
    if gpu:
        across = each if parts.encoding == "jpeg" else SIZE * SIZE * 3
        bus = limits.to_device(seconds / 2)
        yield Stage(
            name="copy to the GPU", rate=copied(parts, loaded, seconds), bytes=across,
            limit=bus.median / across, against="PCIe, pinned blocks of 64 MiB",
        )  # fmt: skip
    yield Stage(name="hand-over", rate=hand_over(parts, loaded, seconds / 2), bytes=0,
                note="tensors of what is ready; nothing is copied")  # fmt: skip


def copied(parts: Parts, loaded: Sequence[Loaded], seconds: float) -> Rate:
    """Stored bytes of a batch, from where they lie to the GPU."""
    pipe = _pipeline(parts)
    raw = parts.encoding == "raw"
    feeds = [one.feed.pictures for one in loaded]
    with pipe:
        stored = fn.external_source(
            source=_again(feeds), batch=True, dtype=types.UINT8, ndim=3 if raw else 1,
            layout="HWC" if raw else "", no_copy=True,
        )  # fmt: skip
        pipe.set_outputs(stored.gpu())
    return _timed(parts, pipe, seconds)

