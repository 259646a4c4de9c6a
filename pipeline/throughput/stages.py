"""Each stage of the stream alone, on what the stage before it gave, beside its limit.

    fetch      a shard from the store into the cache on this node      (sets in a store only)
    storage    an image's bytes from the disk, or from the page cache
    checksum   CRC-32 of them
    feed       order, draws, views: what Python does
    decode     JPEG -> the 224x224 crop                                (not of raw images)
    normalise  crop of raw images, mirror, mean and colour, float, CHW
    copy       host -> device                                          (GPU only)
    hand-over  tensors for torch

The first four run in one thread, one after the other. The pixels are made by DALI's threads.

How the stream that is measured is set, and its parts opened one by one.

What the reading thread of a stream does, alone: from memory, and from the disk.

What a store gives: shards fetched as the stream fetches them, into a cache that is empty.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from torch.utils.dlpack import from_dlpack

from pipeline.batches import Stream
from pipeline.dataset.images import SIZE, Encoding
from pipeline.dataset.manifest import Manifest, Shard
from pipeline.remote.dataset import Dataset, is_remote, open_dataset
from pipeline.stream.augment import CROP
from pipeline.stream.config import StreamConfig
from pipeline.stream.decode import (
    Decoder,
    DecoderInput,
    decode_crops,
    normalize,
    open_pipeline,
)
from pipeline.stream.loader import BatchReader, EncodedBatch
from pipeline.stream.timing import Spent
from pipeline.throughput import hardware
from pipeline.throughput.clock import Load, Rate, Row, measured, row
from pipeline.throughput.hardware import in_threads
from pipeline.tools.files import drop_page_cache


@dataclass(frozen=True, kw_only=True)
class Setting(StreamConfig):
    """The stream that is measured: its dataset, its settings, its cores."""

    data: str
    """Folder or address of the dataset."""
    threads: int = len(os.sched_getaffinity(0))
    """Host threads that decode."""
    cores: int = len(os.sched_getaffinity(0))
    """Number of cores that the stream may keep busy."""

    @classmethod
    def of(cls, data: str, config: StreamConfig, **changes: Any) -> Setting:
        """Return the setting of a stream that a config describes; `changes` are fields."""
        return cls(data=data, **{**vars(config), **changes})

    def but(self, **changes: Any) -> Setting:
        """The same with some of it changed."""
        return replace(self, **changes)

    @property
    def remote(self) -> bool:
        """Whether the data set is in a store."""
        return is_remote(self.data)

    def stream(self, position: int = 0, ledger: Path | None = None) -> Stream:
        """Open the stream.

        Raises:
            DuetError: as `Stream` does.
        """
        return Stream(self.data, self, position=position, ledger=ledger)


class Parts(BatchReader):
    """The parts of a stream of some setting, to be measured one by one."""

    def __init__(self, setting: Setting, dataset: Dataset) -> None:
        """Open them; `opened` closes them as well."""
        super().__init__(dataset, setting)
        self.setting = setting
        self.encoding: Encoding = self.storage.encoding

    @property
    def bytes_each(self) -> float:
        """Bytes of a stored image, on average, tar headers included."""
        shards = self.storage.shards
        return sum(shard.bytes for shard in shards) / len(self.storage)

    def loaded(self, batches: int, position: int = 0) -> list[EncodedBatch]:
        """The first batches from a position, read and kept."""
        return list(itertools.islice(self.read_batches(position), batches))

    def touch(self, pictures: int) -> None:
        """Bring the first images of the stream into memory: a clock then sees no disk."""
        count = min(pictures, len(self.storage)) // self.setting.batch_size + 1
        for loaded in itertools.islice(self.read_batches(0), count):
            self.recycle(loaded)

    def decoder(
        self, feeds: list[DecoderInput], threads: int, load: float | None = None
    ) -> Decoder:
        """A decoder that is given the same feeds again and again.

        `load` is another hardware-decoder load than the setting's.
        """
        load = self.setting.hw_decoder_load if load is None else load
        setting = self.setting.but(threads=threads, hw_decoder_load=load)
        return Decoder(itertools.cycle(feeds).__next__, setting, self.encoding)


@contextmanager
def opened(setting: Setting) -> Iterator[Parts]:
    """Open the parts of a stream.

    Raises:
        DuetError: as `Stream` does.
    """
    with closing(
        open_dataset(setting.data, cache=setting.cache, cache_size=setting.cache_size)
    ) as dataset:
        parts = Parts(setting, dataset)
        try:
            yield parts
        finally:
            parts.storage.close()


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the reading thread does, alone: seconds an image, in windows of some batches."""

    windows: tuple[Spent, ...]
    """Means over the images of a window each."""
    cpu: float
    """Cores kept busy."""
    others: float
    each: tuple[float, ...]
    """Seconds of each batch."""

    def rate(self, *names: str) -> Rate:
        """Images a second of some of its parts, or of all."""
        parts = names or Spent._fields
        return Rate(
            tuple(1 / max(1e-12, sum(getattr(one, name) for name in parts))
                  for one in self.windows),
            self.cpu, self.others,
        )  # fmt: skip

    @property
    def seconds(self) -> Spent:
        """Seconds an image: the median of each part."""
        return Spent(*(float(np.median(part)) for part in zip(*self.windows, strict=True)))


def reading(parts: Parts, seconds: float, batches: int, windows: int = 5) -> Reading:
    """Read the first batches of the stream, round and round, and nothing else."""
    size = parts.setting.batch_size
    source = itertools.chain.from_iterable(
        itertools.islice(parts.read_batches(0), batches) for _ in itertools.repeat(None)
    )
    parts.recycle(next(source))
    found: list[Spent] = []
    each: list[float] = []
    load = Load()
    while len(found) < windows:
        spent, count, start = Spent(), 0, time.perf_counter()
        while time.perf_counter() - start < seconds / windows:
            loaded = next(source)
            parts.recycle(loaded)
            spent, count = spent.add(loaded.spent), count + size
            each.append(loaded.spent.total)
        found.append(spent.scale_to(spent.total / count))
    return Reading(windows=tuple(found), cpu=load.cores(), others=load.others(), each=tuple(each))


def reading_cold(parts: Parts, batches: int, windows: int = 5) -> tuple[Reading, float]:
    """Read batches of which nothing is in memory.

    Returns:
        what it took, and the share of their shards that stayed in memory although the kernel was
        asked to let it go (a file system in memory, pages that others map).
    """
    slots = parts.order.list_slots(0, batches * parts.setting.batch_size)
    sizes = np.cumsum([shard.samples for shard in parts.storage.shards])
    numbers = np.unique(np.searchsorted(sizes, slots.ids, side="right"))
    kept = total = 0
    for number in numbers.tolist():
        with parts.dataset.open(parts.storage.shards[number]) as file:
            kept += drop_page_cache(file.fileno())
            total += parts.storage.shards[number].bytes
    load, found = Load(), list[Spent]()
    each: list[float] = []
    some = max(1, batches // windows)
    source = itertools.islice(parts.read_batches(0), windows * some)
    while window := list(itertools.islice(source, some)):
        spent = Spent()
        for loaded in window:
            spent = spent.add(loaded.spent)
            each.append(loaded.spent.total)
            parts.recycle(loaded)
        found.append(spent.scale_to(spent.total / (some * parts.setting.batch_size)))
    reading = Reading(
        windows=tuple(found), cpu=load.cores(), others=load.others(), each=tuple(each)
    )
    return reading, kept / max(1, total)


TOGETHER = 4
"""Shards that are wished for beyond the one waited for, as a window of the block shuffle does."""
BEGIN = 4
"""Shards that arrive before the clock starts: as many as are under way at a time."""


@dataclass(frozen=True, kw_only=True)
class Fetching:
    """How shards arrive."""

    alone: float
    """Bytes a second of one shard with nothing beside it, connecting included."""
    together: float
    """Bytes a second of several at a time: what an epoch gets."""
    shards: int
    """That were fetched."""
    cpu: float
    """Cores that it kept busy."""
    others: float


def fetching(setting: Setting, seconds: float) -> Fetching | None:
    """Fetch shards for some seconds; nothing is kept.

    Returns:
        None for a set of too few shards to tell.

    Raises:
        StoreError: the store does not answer.
    """
    with (
        tempfile.TemporaryDirectory(prefix="duet-fetch-") as cache,
        closing(open_dataset(setting.data, cache=cache, cache_size=setting.cache_size)) as dataset,
    ):
        manifest = Manifest.load(dataset.folder)
        shards = manifest.split(setting.split, dataset.folder).shards
        if len(shards) < BEGIN + 4:
            return None
        start = time.perf_counter()
        dataset.fetch_shard(shards[0])
        alone = shards[0].bytes / (time.perf_counter() - start)
        done = begun = 0.0
        fetched, load = 0, Load()
        for number, shard in enumerate(islice(shards, 1, None)):
            dataset.prefetch(shards[1 + number : 2 + number + TOGETHER])
            dataset.fetch_shard(shard)
            if number + 1 == BEGIN:
                begun, load = time.perf_counter(), Load()
            elif number + 1 > BEGIN:
                done, fetched = done + shard.bytes, fetched + 1
                if fetched >= 2 and time.perf_counter() - begun > seconds:
                    break
        took = time.perf_counter() - begun
        return Fetching(alone=alone, together=done / took, shards=fetched,
                        cpu=load.cores(), others=load.others())  # fmt: skip


T = TypeVar("T")

KEPT = 8
"""Batches that a stage is fed with in turn."""
COLD = 0.5
"""Share of the pages that may be in memory before a disk is not called cold."""
CROPPED = 3 * CROP * CROP
"""Bytes of a crop, uint8."""


def pixels(
    parts: Parts, loaded: Sequence[EncodedBatch], threads: int, load: float | None = None
) -> Callable[[], int]:
    """All that DALI does, decoding and normalising, with `threads` threads and nothing beside.

    `load` is another hardware-decoder load than the setting's.

    Returns:
        what makes a batch, for `measured` and `in_turn`.
    """
    decoder = parts.decoder([one.input for one in loaded], threads, load)
    size = parts.setting.batch_size

    def step() -> int:
        decoder.run()
        return size

    return step


def pixel_seconds(parts: Parts, loaded: Sequence[EncodedBatch], batches: int) -> list[float]:
    """Seconds from one batch of pixels to the next, DALI alone."""
    decoder = parts.decoder([one.input for one in loaded], parts.setting.threads)
    settle, found = settling(parts), []
    for _ in range(batches + 2 * parts.setting.prefetch):
        start = time.perf_counter()
        decoder.run()
        settle()
        found.append(time.perf_counter() - start)
    return found[2 * parts.setting.prefetch :]


def decode(parts: Parts, loaded: Sequence[EncodedBatch], seconds: float) -> Rate:
    """JPEGs to crops, uint8."""
    setting = parts.setting
    pipe = open_pipeline(parts.setting)
    with pipe:
        jpegs, x, y = fn.external_source(
            source=_again([one.input[:3] for one in loaded]), num_outputs=3,
            batch=True, dtype=[types.UINT8, types.FLOAT, types.FLOAT], ndim=[1, 0, 0],
            no_copy=True,
        )  # fmt: skip
        pipe.set_outputs(decode_crops(setting, jpegs, x, y))
    return _timed(parts, pipe, seconds)


def normalise(parts: Parts, loaded: Sequence[EncodedBatch], seconds: float) -> Rate:
    """Crops to the pixels of the stream: [3, 224, 224], float32 or, on a GPU, float16."""
    size, raw = parts.setting.batch_size, parts.encoding == "raw"
    draws = np.random.default_rng(0)
    side = SIZE if raw else CROP
    where = {"crop_pos_x": 0.5, "crop_pos_y": 0.5, "crop": (CROP, CROP)} if raw else None
    crops = [
        list(draws.integers(0, 256, (size, side, side, 3), np.uint8))
        for _ in range(min(4, len(loaded)))
    ]
    feeds = [
        (crop, one.input.flip, one.input.mean) for crop, one in zip(crops, loaded, strict=False)
    ]
    pipe = open_pipeline(parts.setting)
    with pipe:
        pictures, flip, mean = fn.external_source(
            source=_again(feeds), num_outputs=3, batch=True,
            dtype=[types.UINT8, types.INT32, types.FLOAT], ndim=[3, 0, 1], layout=["HWC", "", ""],
            no_copy=True,
        )  # fmt: skip
        if parts.setting.device == "gpu":
            pictures = pictures.gpu()
        pipe.set_outputs(normalize(parts.setting, pictures, flip, mean, crop=where))
    return _timed(parts, pipe, seconds)


def hand_over(parts: Parts, loaded: Sequence[EncodedBatch], seconds: float) -> Rate:
    """Pixels that are ready, and ids and labels, to torch."""
    size = parts.setting.batch_size
    gpu = parts.setting.device == "gpu"
    pipe = open_pipeline(parts.setting)
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

    return measured(step, seconds, settle=settling(parts))


def _again(feeds: Sequence[T]) -> Callable[[], T]:
    """A source that gives the same in turn, for ever."""
    turns = itertools.cycle(feeds)
    return lambda: next(turns)


def _timed(parts: Parts, pipe: Pipeline, seconds: float) -> Rate:
    pipe.build()
    size = parts.setting.batch_size

    def step() -> int:
        pipe.run()
        return size

    for _ in range(parts.setting.prefetch):
        step()
    return measured(step, seconds, settle=settling(parts))


def settling(parts: Parts) -> Callable[[], None]:
    """What waits for a GPU, if there is one."""
    return torch.cuda.synchronize if parts.setting.device == "gpu" else lambda: None


@dataclass(frozen=True, kw_only=True)
class Alone:
    """All stages alone, and the figures that a prediction starts from."""

    stages: tuple[Row, ...]
    warm: Reading
    cold: Reading | None
    """None: this machine does not let go of the pages."""
    loaded: tuple[EncodedBatch, ...]
    """Batches to feed DALI with."""
    disk: float
    """Bytes a second of files read end to end; 0: this machine does not let go of the pages."""


def alone(parts: Parts, seconds: float, batches: int) -> Alone:
    """Measure every stage and its limit, about `seconds` each."""
    cold, kept = reading_cold(parts, min(batches, 60))
    paths = [parts.dataset.fetch_shard(shard) for shard in _some_here(parts)]
    disk, left = hardware.disk(paths)
    warm = reading(parts, seconds, batches)
    loaded = tuple(parts.loaded(KEPT))
    found = Alone(
        stages=(), warm=warm, cold=cold if kept < COLD else None, loaded=loaded,
        disk=disk if left < COLD else 0.0,
    )  # fmt: skip
    stages = itertools.chain(
        _reader_stages(parts, found, paths, seconds), _pixel_stages(parts, loaded, seconds)
    )
    return replace(found, stages=tuple(stages))


def _reader_stages(
    parts: Parts, found: Alone, paths: Sequence[Path], seconds: float
) -> Iterator[Row]:
    each, warm, cold = parts.bytes_each, found.warm, found.cold
    if cold is not None:
        yield row(
            "storage, cold", cold.rate(), each,
            limit=found.disk / each or None, against="disk, files end to end",
            note="with checksum and feed, which the kernel reads ahead under",
        )  # fmt: skip
    if parts.encoding == "jpeg":  # raw ones are mapped: the checksum is the first to read them
        yield row(
            "storage, page cache", warm.rate("storage"), each,
            limit=hardware.page_cache(paths, seconds / 2).median / each,
            against="page cache, end to end, one thread",
        )  # fmt: skip
    yield row(
        "checksum", warm.rate("checksum"), each,
        limit=hardware.checksum(round(each), seconds / 2).median / each,
        against="CRC-32 alone, one thread",
    )  # fmt: skip
    yield row("feed", warm.rate("feed", "fetch"), 0, note="order, draws and views, in Python")


def _some_here(parts: Parts) -> Sequence[Shard]:
    """Some shards, of a set in a store those that are in the cache."""
    shards = parts.storage.shards
    here = [shard for shard in shards if (Path(parts.dataset.folder) / shard.name).is_file()]
    return here[:16]


def _pixel_stages(parts: Parts, loaded: Sequence[EncodedBatch], seconds: float) -> Iterator[Row]:
    setting, each = parts.setting, parts.bytes_each
    gpu = setting.device == "gpu"
    jpegs = [picture for one in loaded for picture in one.input.images]
    if parts.encoding == "jpeg":
        if gpu:
            limit = hardware.nvjpeg(
                jpegs, setting.batch_size, setting.threads, setting.hw_decoder_load, seconds / 2
            )
        else:
            limit = hardware.libjpeg(jpegs, setting.threads, seconds / 2)
        yield row(
            "decode", decode(parts, loaded, seconds), each + CROPPED, limit=limit.median,
            against="nvJPEG of whole images, nothing else" if gpu
            else f"bare libjpeg-turbo, whole images, {in_threads(setting.threads)}",
        )  # fmt: skip
    moved = CROPPED * (1 + (2 if gpu else 4))
    half = seconds / 2
    memory = hardware.device_memory(half) if gpu else hardware.memory(setting.threads, half)
    yield row(
        "normalise", normalise(parts, loaded, seconds), moved,
        limit=memory.median / moved,
        against="GPU memory, copied" if gpu else f"memory, copied by {in_threads(setting.threads)}",
        note="with the copy to the GPU" if gpu else "",
    )  # fmt: skip
    if gpu:
        across = each if parts.encoding == "jpeg" else SIZE * SIZE * 3
        yield row(
            "copy to the GPU", copied(parts, loaded, seconds), across,
            limit=hardware.to_device(half).median / across, against="PCIe, pinned blocks of 64 MiB",
        )  # fmt: skip
    yield row("hand-over", hand_over(parts, loaded, half), 0,
              note="tensors of what is ready; nothing is copied")  # fmt: skip


def copied(parts: Parts, loaded: Sequence[EncodedBatch], seconds: float) -> Rate:
    """Stored bytes of a batch, from where they lie to the GPU."""
    pipe = open_pipeline(parts.setting)
    raw = parts.encoding == "raw"
    feeds = [one.input.images for one in loaded]
    with pipe:
        stored = fn.external_source(
            source=_again(feeds), batch=True, dtype=types.UINT8, ndim=3 if raw else 1,
            layout="HWC" if raw else "", no_copy=True,
        )  # fmt: skip
        pipe.set_outputs(stored.gpu())
    return _timed(parts, pipe, seconds)
