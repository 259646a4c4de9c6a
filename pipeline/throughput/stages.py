"""Each stage of the stream measured alone, on the output of the stage before, beside its limit.

    storage    bytes of an image from the disk, or from the page cache
    checksum   their CRC-32
    feed       order, random draws, views: the Python part
    decode     JPEG -> crop                                            (not of raw images)
    normalise  crop of raw images, mirror, mean and color, float, CHW
    copy       host -> device                                          (GPU only)
    hand-over  tensors for torch

The first three run in one thread, one after the other; DALI's threads make the pixels.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.batches import Stream
from pipeline.dataset.images import Encoding
from pipeline.dataset.manifest import Manifest
from pipeline.remote.dataset import open_dataset
from pipeline.remote.local import Dataset
from pipeline.stream import operators as dali
from pipeline.stream.config import StreamConfig
from pipeline.stream.decode import (
    Decoder,
    decode_crops,
    normalize_crops,
    open_pipeline,
    run_on_current_stream,
)
from pipeline.stream.loader import BatchReader, EncodedBatch
from pipeline.stream.timing import Spent
from pipeline.stream.transfer import to_device, to_tensor
from pipeline.throughput import hardware
from pipeline.throughput.clock import CpuLoad, Rate, StageRow, count_items, make_row, measure
from pipeline.throughput.hardware import format_count
from pipeline.tools.files import drop_page_cache
from pipeline.tools.units import cpu_count


@dataclass(frozen=True, kw_only=True)
class Setting(StreamConfig):
    """The stream that is measured: its dataset, its settings, its cores."""

    data: str
    """Folder or address of the dataset."""
    threads: int = cpu_count()
    """Host threads that decode."""
    cores: int = cpu_count()
    """Number of cores that the stream may keep busy."""

    @classmethod
    def of(cls, data: str, config: StreamConfig, **changes: Any) -> Setting:
        """Return the setting of a stream that a config describes; `changes` are fields."""
        return cls(data=data, **{**vars(config), **changes})

    def fit_crop(self) -> Setting:
        """Return the setting with a crop for which all images of the data set have room.

        Raises:
            DuetError: as `open_dataset` does.
        """
        with closing(self.open_dataset()) as dataset:
            side = Manifest.load(dataset.folder).side
        if side is None:
            return replace(self, crop="resized")
        return replace(self, size=min(*self.image_size, side))

    def open_dataset(self, cache: str | os.PathLike[str] | None = None) -> Dataset:
        """Open the data set in the version that is measured, through another cache if one is given.

        Raises:
            DuetError: as `open_dataset` does.
        """
        version = self.segments[-1].version if isinstance(self.version, tuple) else self.version
        return open_dataset(
            self.data, version=version, cache=cache or self.cache, cache_size=self.cache_size
        )

    def open_stream(self, ledger: Path | None = None) -> Stream:
        """Open the stream.

        Raises:
            DuetError: as `Stream` does.
        """
        return Stream.from_config(self.data, replace(self, position=0, ledger=ledger))

    def synchronize(self) -> None:
        """Wait for the GPU, if the stream runs on one."""
        if self.device == "gpu":
            torch.cuda.synchronize()


class Parts(BatchReader):
    """The parts of a stream of some setting, to be measured one by one."""

    def __init__(self, setting: Setting, dataset: Dataset) -> None:
        """Open them, as `BatchReader` does."""
        super().__init__([dataset], setting)
        self.dataset = dataset
        self.setting = setting
        self.encoding: Encoding = self.shard_reader.encoding

    @property
    def crop_bytes(self) -> int:
        """Bytes of a crop, uint8."""
        return 3 * math.prod(self.setting.image_size)

    @property
    def bytes_each(self) -> float:
        """Bytes of a stored image, on average, tar headers included."""
        shards = self.shard_reader.shards
        return sum(shard.bytes for shard in shards) / len(self.shard_reader)

    def load_batches(self, batches: int) -> list[EncodedBatch]:
        """Read the first batches and keep them."""
        return list(itertools.islice(self.read_batches(0), batches))

    def touch(self, images: int) -> None:
        """Read the first images of the stream into the page cache, so that no disk is measured."""
        count = min(images, len(self.shard_reader)) // self.setting.batch_size + 1
        for loaded in itertools.islice(self.read_batches(0), count):
            self.recycle(loaded)

    def open_decoder(self, loaded: Sequence[EncodedBatch], **changes: Any) -> Decoder:
        """Return a decoder of the same batches again and again; `changes` are of the setting."""
        feeds = itertools.cycle([one.input for one in loaded])
        return Decoder(feeds.__next__, replace(self.setting, **changes), self.encoding)


@contextmanager
def open_parts(setting: Setting) -> Iterator[Parts]:
    """Open the parts of a stream.

    Raises:
        DuetError: as `Stream` does.
    """
    with (
        closing(setting.open_dataset()) as dataset,
        closing(Parts(setting, dataset)) as parts,
    ):
        yield parts


WINDOWS = 5
"""Windows of a measurement of the reading thread."""


@dataclass(frozen=True, kw_only=True)
class ReaderRate:
    """The reading thread alone: seconds per image, in windows of some batches."""

    windows: tuple[Spent, ...]
    """Seconds per image by stage, the mean of each window."""
    cpu: float
    """Cores kept busy by this process."""
    others: float
    """Share of the machine's CPUs, 0..1, kept busy by other processes."""
    each: tuple[float, ...]
    """Seconds of each batch."""

    def rate(self, *names: str) -> Rate:
        """Return the images per second of some stages in sequence, or of all."""
        parts = names or Spent._fields
        seconds = (sum(getattr(one, name) for name in parts) for one in self.windows)
        return Rate(tuple(1 / max(1e-12, each) for each in seconds), self.cpu, self.others)

    @property
    def seconds(self) -> Spent:
        """Seconds per image: the median of each stage over the windows."""
        return Spent(*(float(np.median(part)) for part in zip(*self.windows, strict=True)))


def measure_reading(parts: Parts, seconds: float, batches: int) -> ReaderRate:
    """Read the first batches of the stream in a loop, and do nothing else."""
    source = itertools.chain.from_iterable(
        itertools.islice(parts.read_batches(0), batches) for _ in itertools.repeat(None)
    )
    parts.recycle(next(source))

    def window() -> Iterator[EncodedBatch]:
        start = time.perf_counter()
        while time.perf_counter() - start < seconds / WINDOWS:
            yield next(source)

    return _read_windows(parts, (window() for _ in range(WINDOWS)))


def _read_windows(parts: Parts, windows: Iterable[Iterable[EncodedBatch]]) -> ReaderRate:
    found, each, load = list[Spent](), list[float](), CpuLoad()
    for window in windows:
        spent, count = Spent(), 0
        for loaded in window:
            parts.recycle(loaded)
            spent, count = spent.add(loaded.spent), count + parts.setting.batch_size
            each.append(loaded.spent.total)
        found.append(spent.scale_to(spent.total / count))
    return ReaderRate(
        windows=tuple(found), cpu=load.cores(), others=load.others(), each=tuple(each)
    )


def measure_cold_reading(parts: Parts, batches: int) -> tuple[ReaderRate, float]:
    """Read batches after dropping their shards from the page cache.

    Returns:
        the rate, and the share of the shards' bytes that stayed in memory nevertheless (a file
        system in memory, pages that other processes map).
    """
    slots = parts.order.list_slots(0, batches * parts.setting.batch_size)
    sizes = np.cumsum([shard.samples for shard in parts.shard_reader.shards])
    numbers = np.unique(np.searchsorted(sizes, slots.ids, side="right"))
    kept = total = 0
    for number in numbers.tolist():
        with parts.dataset.open(parts.shard_reader.shards[number]) as file:
            kept += drop_page_cache(file.fileno())
            total += parts.shard_reader.shards[number].bytes
    source, some = parts.read_batches(0), max(1, batches // WINDOWS)
    windows = (list(itertools.islice(source, some)) for _ in range(WINDOWS))
    return _read_windows(parts, windows), kept / max(1, total)


KEPT = 8
"""Batches that a stage gets in turn."""
COLD = 0.5
"""Share of the pages in memory from which on a reading is not called cold."""


def make_pixel_step(
    parts: Parts, loaded: Sequence[EncodedBatch], **changes: Any
) -> Callable[[], int]:
    """Return a function that makes a batch of pixels with DALI; `changes` are of the setting.

    The function returns the images of a batch, as `measure` and `measure_in_turn` expect.
    """
    return count_items(parts.open_decoder(loaded, **changes).run, parts.setting.batch_size)


def measure_pixel_seconds(
    parts: Parts, loaded: Sequence[EncodedBatch], batches: int
) -> list[float]:
    """Measure the seconds from one batch of pixels to the next, DALI alone."""
    decoder, found = parts.open_decoder(loaded), []
    for _ in range(batches + 2 * parts.setting.prefetch):
        start = time.perf_counter()
        if decoder.run().images.is_cuda:  # for this batch alone: DALI makes the next ones meanwhile
            torch.cuda.current_stream().synchronize()
        found.append(time.perf_counter() - start)
    return found[2 * parts.setting.prefetch :]


def measure_decoding(parts: Parts, loaded: Sequence[EncodedBatch], seconds: float) -> Rate:
    """Measure JPEG -> crop, uint8."""
    kinds = {"images": (dali.types.UINT8, 1)}
    if parts.setting.crop == "resized":
        kinds["region"] = dali.types.INT32, 1
    else:
        kinds |= dict.fromkeys("xy", (dali.types.FLOAT, 0))
    dtypes, dimensions = zip(*kinds.values(), strict=True)
    with open_pipeline(parts.setting) as pipe:
        nodes = dali.fn.external_source(
            source=[[getattr(one.input, name) for name in kinds] for one in loaded], cycle=True,
            num_outputs=len(kinds), batch=True, dtype=list(dtypes), ndim=list(dimensions),
            no_copy=True,
        )  # fmt: skip
        known = dict(zip(kinds, nodes, strict=True))
        pipe.set_outputs(
            decode_crops(
                parts.setting, *(known.get(name) for name in ("images", "x", "y", "region"))
            )
        )
    return _measure_pipeline(parts, pipe, seconds)


def measure_normalizing(parts: Parts, loaded: Sequence[EncodedBatch], seconds: float) -> Rate:
    """Measure crop -> pixels of the stream: [3, 224, 224], float32 or, on a GPU, float16."""
    size, raw = parts.setting.batch_size, parts.encoding == "raw"
    draws = np.random.default_rng(0)
    crop = parts.setting.image_size
    shape = (parts.shard_reader.manifest.mean_side,) * 2 if raw else crop
    where = {"crop_pos_x": 0.5, "crop_pos_y": 0.5, "crop": crop} if raw else None
    feeds = [
        (list(draws.integers(0, 256, (size, *shape, 3), np.uint8)), one.input.flip,
         one.input.mean)
        for one in loaded[:4]
    ]  # fmt: skip
    with open_pipeline(parts.setting) as pipe:
        images, flip, mean = dali.fn.external_source(
            source=feeds, cycle=True, num_outputs=3, batch=True,
            dtype=[dali.types.UINT8, dali.types.INT32, dali.types.FLOAT], ndim=[3, 0, 1],
            layout=["HWC", "", ""], no_copy=True,
        )  # fmt: skip
        if parts.setting.device == "gpu":
            images = images.gpu()
        pipe.set_outputs(normalize_crops(parts.setting, images, flip, mean, crop=where))
    return _measure_pipeline(parts, pipe, seconds)


def measure_hand_over(parts: Parts, loaded: Sequence[EncodedBatch], seconds: float) -> Rate:
    """Measure the conversion of decoded pixels, ids and labels to torch tensors."""
    size = parts.setting.batch_size
    gpu = parts.setting.device == "gpu"
    # On a GPU the pixels are copied once.
    pixels = np.zeros((size, parts.crop_bytes if gpu else 1), np.float16)
    with open_pipeline(parts.setting) as pipe:
        ready = dali.fn.external_source(source=lambda: pixels, dtype=dali.types.FLOAT16, ndim=1)
        pipe.set_outputs(ready.gpu() if gpu else ready)
    pipe.build()
    output = run_on_current_stream(pipe)
    one = loaded[0]

    def step() -> int:
        images = to_tensor(output, pipe.device_id)
        to_device(torch.from_numpy(one.labels), images.device)
        to_device(torch.from_numpy(one.weights), images.device)
        torch.from_numpy(one.ids), torch.from_numpy(one.ids != one.due)
        return size

    return measure(step, seconds, parts.setting.synchronize)


def _measure_pipeline(parts: Parts, pipe: dali.Pipeline, seconds: float) -> Rate:
    pipe.build()
    for _ in range(parts.setting.prefetch):
        run_on_current_stream(pipe)
    step = count_items(partial(run_on_current_stream, pipe), parts.setting.batch_size)
    return measure(step, seconds, parts.setting.synchronize)


@dataclass(frozen=True, kw_only=True)
class StageRates:
    """Rates of all stages alone, and the figures that predictions start from."""

    stages: tuple[StageRow, ...]
    warm: ReaderRate
    cold: ReaderRate | None
    """None where the page cache cannot be dropped."""
    loaded: tuple[EncodedBatch, ...]
    """Batches for DALI."""
    disk: float
    """Bytes per second of files read end to end; 0 where the page cache cannot be dropped."""


def measure_stages(parts: Parts, seconds: float, batches: int) -> StageRates:
    """Measure every stage and its limit, about `seconds` each."""
    cold, kept = measure_cold_reading(parts, min(batches, 60))
    locate = parts.dataset.locate_shard  # of a data set in a store, only the shards in the cache
    here = (shard for shard in parts.shard_reader.shards if locate(shard).is_file())
    paths = [parts.dataset.fetch_shard(shard) for shard in itertools.islice(here, 16)]
    disk, left = hardware.measure_disk(paths)
    disk = disk if left < COLD else 0.0
    each, warm = parts.bytes_each, measure_reading(parts, seconds, batches)
    loaded, rows = tuple(parts.load_batches(KEPT)), list[StageRow]()
    if kept < COLD:
        rows.append(make_row(
            "storage, cold", cold.rate(), each,
            limit=disk / each or None, against="disk, files end to end",
            note="with checksum and feed, during which the kernel reads ahead",
        ))  # fmt: skip
    rows += [*_reader_stages(parts, warm, paths, seconds), *_pixel_stages(parts, loaded, seconds)]
    return StageRates(stages=tuple(rows), warm=warm, cold=cold if kept < COLD else None,
                      loaded=loaded, disk=disk)  # fmt: skip


def _reader_stages(
    parts: Parts, warm: ReaderRate, paths: Sequence[Path], seconds: float
) -> Iterator[StageRow]:
    each = parts.bytes_each
    if not parts.shard_reader.maps:  # of mapped ones the checksum is the first to read them
        yield make_row(
            "storage, page cache", warm.rate("storage"), each,
            limit=hardware.measure_page_cache(paths, seconds / 2).best / each,
            against="page cache, end to end, one thread",
        )  # fmt: skip
    yield make_row(
        "checksum", warm.rate("checksum"), each,
        limit=hardware.measure_checksum(round(each), seconds / 2).best / each,
        against="CRC-32 alone, one thread",
    )  # fmt: skip
    yield make_row("feed", warm.rate("feed", "fetch"), 0, note="order, draws and views, in Python")


def _pixel_stages(
    parts: Parts, loaded: Sequence[EncodedBatch], seconds: float
) -> Iterator[StageRow]:
    setting, each, half = parts.setting, parts.bytes_each, seconds / 2
    gpu = setting.device == "gpu"
    threads = format_count(setting.threads, "thread")
    if parts.encoding == "jpeg":
        jpegs = [image for one in loaded for image in one.input.images]
        if gpu:
            limit = hardware.measure_nvjpeg(
                jpegs, setting.batch_size, setting.threads, setting.hw_decoder_load, half
            )
        else:
            limit = hardware.measure_libjpeg(jpegs, setting.threads, half)
        yield make_row(
            "decode", measure_decoding(parts, loaded, seconds), each + parts.crop_bytes,
            limit=limit.best,
            against="nvJPEG of whole images, nothing else" if gpu
            else f"bare libjpeg-turbo, whole images, {threads}",
        )  # fmt: skip
    moved = parts.crop_bytes * (1 + (2 if gpu else 4))
    memory = (hardware.measure_device_memory(half) if gpu
              else hardware.measure_memory(setting.threads, half))  # fmt: skip
    yield make_row(
        "normalise", measure_normalizing(parts, loaded, seconds), moved,
        limit=memory.best / moved,
        against="GPU memory, copied" if gpu else f"memory, copied by {threads}",
        note="with the copy to the GPU" if gpu else "",
    )  # fmt: skip
    if gpu:
        across = each if parts.encoding == "jpeg" else 3 * parts.shard_reader.manifest.mean_side**2
        yield make_row(
            "copy to the GPU", measure_copying(parts, loaded, seconds), across,
            limit=hardware.measure_upload(half).best / across,
            against="PCIe, pinned blocks of 64 MiB",
        )  # fmt: skip
    yield make_row("hand-over", measure_hand_over(parts, loaded, half), 0,
              note="tensors of what is ready; "
                   + ("the GPU copies them once" if gpu else "nothing is copied"))  # fmt: skip


def measure_copying(parts: Parts, loaded: Sequence[EncodedBatch], seconds: float) -> Rate:
    """Measure the copy of a batch's stored bytes to the GPU."""
    raw = parts.encoding == "raw"
    with open_pipeline(parts.setting) as pipe:
        stored = dali.fn.external_source(
            source=[one.input.images for one in loaded], cycle=True, batch=True,
            dtype=dali.types.UINT8, ndim=3 if raw else 1, layout="HWC" if raw else "", no_copy=True,
        )  # fmt: skip
        pipe.set_outputs(stored.gpu())
    return _measure_pipeline(parts, pipe, seconds)
