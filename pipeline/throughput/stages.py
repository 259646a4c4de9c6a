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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from torch.utils.dlpack import from_dlpack

from pipeline.dataset.images import SIZE
from pipeline.dataset.manifest import Shard
from pipeline.stream.augment import CROP
from pipeline.stream.decode import decoded, gpu_of, normalised
from pipeline.stream.loader import Loaded
from pipeline.throughput import hardware
from pipeline.throughput.clock import Rate, measured
from pipeline.throughput.machine import in_threads
from pipeline.throughput.reading import Reading, reading, reading_cold
from pipeline.throughput.row import Row, row
from pipeline.throughput.setting import Parts

T = TypeVar("T")

KEPT = 8
"""Batches that a stage is fed with in turn."""
COLD = 0.5
"""Share of the pages that may be in memory before a disk is not called cold."""
CROPPED = 3 * CROP * CROP
"""Bytes of a crop, uint8."""


def pixels(
    parts: Parts, loaded: Sequence[Loaded], threads: int, load: float | None = None
) -> Callable[[], int]:
    """All that DALI does, decoding and normalising, with `threads` threads and nothing beside.

    `load` is another hardware-decoder load than the setting's.

    Returns:
        what makes a batch, for `measured` and `in_turn`.
    """
    decoder = parts.decoder([one.feed for one in loaded], threads, load)
    size = parts.setting.batch_size

    def step() -> int:
        decoder.run()
        return size

    return step


def pixel_seconds(parts: Parts, loaded: Sequence[Loaded], batches: int) -> list[float]:
    """Seconds from one batch of pixels to the next, DALI alone."""
    decoder = parts.decoder([one.feed for one in loaded], parts.setting.threads)
    settle, found = settling(parts), []
    for _ in range(batches + 2 * parts.setting.prefetch):
        start = time.perf_counter()
        decoder.run()
        settle()
        found.append(time.perf_counter() - start)
    return found[2 * parts.setting.prefetch :]


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

    return measured(step, seconds, settle=settling(parts))


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
    loaded: tuple[Loaded, ...]
    """Batches to feed DALI with."""
    disk: float
    """Bytes a second of files read end to end; 0: this machine does not let go of the pages."""


def alone(parts: Parts, seconds: float, batches: int) -> Alone:
    """Measure every stage and its limit, about `seconds` each."""
    cold, kept = reading_cold(parts, min(batches, 60))
    paths = [parts.dataset.shard(shard) for shard in _some_here(parts)]
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


def _pixel_stages(parts: Parts, loaded: Sequence[Loaded], seconds: float) -> Iterator[Row]:
    setting, each = parts.setting, parts.bytes_each
    gpu = setting.device == "gpu"
    jpegs = [picture for one in loaded for picture in one.feed.pictures]
    if parts.encoding == "jpeg":
        if gpu:
            limit = hardware.nvjpeg(
                jpegs, setting.batch_size, setting.threads, setting.hw_decoder_load, seconds / 2
            )
        else:
            limit = hardware.libjpeg(jpegs, setting.threads, seconds / 2)
        yield row(
            "decode", decode(parts, loaded, seconds), each + CROPPED, limit=limit.median,
            against="nvJPEG of whole pictures, nothing else" if gpu
            else f"bare libjpeg-turbo, whole pictures, {in_threads(setting.threads)}",
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
