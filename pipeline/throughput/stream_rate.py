"""Rates of whole streams: ours, with its waits and queues; a store; raw images; DALI's reader.

DALI's own WebDataset reader is the yardstick: it runs on the same shards with the same graph.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.batches import Stream
from pipeline.dataset.manifest import Manifest
from pipeline.remote.dataset import is_streamed
from pipeline.stream.loader import EncodedBatch
from pipeline.stream.timing import WaitTimes
from pipeline.throughput.clock import FEWEST, CpuLoad, Rate, measure_until_steady
from pipeline.throughput.dali_reader import DaliReader
from pipeline.throughput.stages import Setting, open_parts
from pipeline.tools.errors import UsageError
from pipeline.tools.progress import Progress

WARM_UP = 8
"""Batches before the clock starts."""
READY = 0.0005
"""Longest wait of `next`, in seconds, for pixels that count as ready."""


@dataclass(frozen=True)
class TakenBatch:
    """A batch taken from the stream: its time, and the waits for it."""

    at: float
    """Seconds since the clock was started."""
    read: int
    """Batches read and not yet decoded, 0..prefetch."""
    waited: WaitTimes
    """Seconds waited for this batch, by stage."""

    @property
    def decoded(self) -> bool:
        """True if its pixels were ready when it was taken."""
        return self.waited.decode < READY


@dataclass(frozen=True, kw_only=True)
class StreamRate:
    """Rate and queues of a stream whose batches nobody computes on."""

    rate: Rate
    """Images per second."""
    batches: tuple[TakenBatch, ...]
    """Every batch, in order."""
    prefetch: int
    """Most batches in each queue."""

    @property
    def read_full(self) -> float:
        """Share of the batches, 0..1, taken while the queue of read batches was full."""
        return sum(one.read >= self.prefetch for one in self.batches) / max(1, len(self.batches))

    @property
    def read_empty(self) -> float:
        """Share of the batches, 0..1, taken while that queue was empty."""
        return sum(one.read == 0 for one in self.batches) / max(1, len(self.batches))


class MeasuredStream:
    """A stream that is measured a window at a time."""

    def __init__(self, stream: Stream, setting: Setting) -> None:
        """Start the clock."""
        self._stream, self._setting = stream, setting
        self.batches: list[TakenBatch] = []
        self._begun = time.perf_counter()

    def measure_window(self, seconds: float, batches: int = 1) -> float:
        """Take batches for `seconds`, and at least `batches`; return the images per second."""
        start, done = time.perf_counter(), 0
        while done < batches or time.perf_counter() - start < seconds:
            before = self._stream.waits.copy()
            next(self._stream)
            done += 1
            at, waited = time.perf_counter() - self._begun, self._stream.waits.since(before)
            self.batches.append(TakenBatch(at, self._stream.read_ahead, waited))
        self._setting.synchronize()
        return done * self._setting.batch_size / (time.perf_counter() - start)


@contextmanager
def open_measured_stream(setting: Setting) -> Iterator[MeasuredStream]:
    """Open a stream and take its warm-up batches; it is closed after the block."""
    with setting.open_stream() as stream:
        for _ in itertools.islice(stream, WARM_UP):
            pass
        setting.synchronize()
        yield MeasuredStream(stream, setting)


def measure_stream(setting: Setting, seconds: float) -> StreamRate:
    """Measure the stream for `seconds`, and longer while its windows do not agree."""
    with open_measured_stream(setting) as run:
        rate = measure_until_steady(lambda: run.measure_window(seconds / FEWEST))
        return StreamRate(rate=rate, batches=tuple(run.batches), prefetch=setting.prefetch)


FETCH_AHEAD = 4
"""Shards requested beyond the one waited for, as the block shuffle does."""
FETCH_WARM_UP = 4
"""Shards that arrive before the clock starts: as many as are downloaded at a time."""


@dataclass(frozen=True, kw_only=True)
class FetchRate:
    """Download throughput of a store."""

    alone: float
    """Bytes per second of one shard alone, connecting included."""
    together: float
    """Bytes per second of several shards at a time, as an epoch reads them."""
    shards: int
    """Number of shards downloaded while the clock ran."""
    cpu: float
    """Cores kept busy by this process."""
    others: float
    """Share of the machine's CPUs, 0..1, kept busy by other processes."""


def measure_fetching(setting: Setting, seconds: float) -> FetchRate | None:
    """Download shards for some seconds into a cache that is then deleted.

    Returns:
        None if the data set has too few shards to measure.

    Raises:
        StoreError: the store does not answer.
    """
    with (
        tempfile.TemporaryDirectory(prefix="duet-fetch-") as cache,
        closing(setting.open_dataset(cache)) as dataset,
    ):
        folder = dataset.folder
        shards = Manifest.load(folder).split(setting.split, folder).shards
        if len(shards) < FETCH_WARM_UP + 4:
            return None
        start = time.perf_counter()
        dataset.fetch_shard(shards[0])
        alone = shards[0].bytes / (time.perf_counter() - start)
        done = begun = 0.0
        fetched, load = 0, CpuLoad()
        for number, shard in enumerate(shards[1:], 1):
            dataset.prefetch(shards[number : number + 1 + FETCH_AHEAD])
            dataset.fetch_shard(shard)
            if number == FETCH_WARM_UP:
                begun, load = time.perf_counter(), CpuLoad()
            elif number > FETCH_WARM_UP:
                done, fetched = done + shard.bytes, fetched + 1
                if fetched >= 2 and time.perf_counter() - begun > seconds:
                    break
        took = time.perf_counter() - begun
        return FetchRate(alone=alone, together=done / took, shards=fetched,
                        cpu=load.cores(), others=load.others())  # fmt: skip


RAW_IMAGES = 1024
"""Images packed raw: 197 kB each, a fifth of a gigabyte in all, which no processor cache holds."""


def measure_raw(
    setting: Setting, loaded: Sequence[EncodedBatch], side: int, seconds: float
) -> tuple[Rate, float]:
    """Pack images raw, squares of `side` pixels, in a temporary folder, and run the stream on them.

    Returns:
        images per second, read from the page cache, and the bytes of an image.

    Raises:
        OSError, subprocess.CalledProcessError: the disk has no room for them.
    """
    with tempfile.TemporaryDirectory(prefix="duet-raw-") as scratch:
        source, packed = Path(scratch) / "jpegs", Path(scratch) / "packed"
        unpack_images(loaded, source, RAW_IMAGES)
        subprocess.run(
            [sys.executable, "-m", "pipeline.build_shards", str(packed), "--train", str(source),
             "--encoding", "raw", "--samples-per-shard", "256", "--size", str(side)],
            check=True, capture_output=True,
        )  # fmt: skip
        raw = replace(setting, data=str(packed), split="train", shuffle="full", cache=None)
        with open_parts(raw) as parts:
            # `ShardReader` copies an image on its first read and maps it from its second read on.
            epoch = -(-len(parts.shard_reader) // raw.batch_size)
            with open_measured_stream(raw) as run:
                run.measure_window(0, epoch)
                rate = measure_until_steady(lambda: run.measure_window(seconds / FEWEST), FEWEST)
            return rate, parts.bytes_each


def unpack_images(batches: Iterable[EncodedBatch], folder: Path, most: int) -> None:
    """Write up to `most` JPEGs of some batches as files, a folder for each class."""
    written = 0
    for batch in batches:
        for number, label, image in zip(
            batch.ids.tolist(), batch.labels.tolist(), batch.input.images, strict=True
        ):
            path = folder / str(label) / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image.tobytes())
            if (written := written + 1) >= most:
                return


def measure_rate(
    setting: Setting, *, reader: str, windows: int, batches: int, ledger: Path | None = None
) -> list[float]:
    """Return the images per second of each window, after a warm-up that is not counted.

    Args:
        setting: settings of the stream.
        reader: `stream` is ours, `native` is DALI's.
        windows: number of windows.
        batches: batches in each window.
        ledger: folder for a ledger.

    Raises:
        UsageError: DALI's reader cannot read a data set in a store.
    """
    rates = []
    with ExitStack() as stack:
        source: Iterator[object]
        if reader == "native":
            if is_streamed(setting.data):
                raise UsageError(f"--reader native reads local shards only, not {setting.data}")
            native = DaliReader(setting.open_dataset().folder, setting)
            source = map(next, itertools.repeat(native))
        else:
            source = stack.enter_context(setting.open_stream(ledger))
        for _ in itertools.islice(source, WARM_UP):
            pass
        images = batches * setting.batch_size
        with Progress("measuring", total=windows * images, unit="img") as progress:
            for _ in range(windows):
                start = time.perf_counter()
                for _ in itertools.islice(source, batches):
                    pass
                setting.synchronize()
                rates.append(images / (time.perf_counter() - start))
                progress.advance(images)
    return rates
