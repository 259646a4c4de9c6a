"""The whole stream: its rate, what it waits for inside, and which queue is empty or full.

What raw images would give: some of the set's own, packed raw and streamed for real.

The rate of the stream alone, or of DALI's own WebDataset reader, as the yardstick.

The first batches are left out; the rate is the median over equal windows, with the slowest and
the fastest beside it. DALI's reader runs on the same shards with the same graph.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from pipeline.remote.dataset import open_dataset
from pipeline.stream.decode import NativeReader
from pipeline.stream.loader import EncodedBatch
from pipeline.stream.timing import WaitTimes
from pipeline.throughput.clock import FEWEST, Load, Rate, until_steady
from pipeline.throughput.stages import Setting, opened
from pipeline.tools.errors import UsageError
from pipeline.tools.progress import Progress

WARM_UP = 8
"""Batches before the clock starts."""
READY = 0.0005
"""Seconds for which `next` may wait for pixels that count as ready."""


@dataclass(frozen=True)
class Asking:
    """One batch, as its taker saw it."""

    at: float
    """Seconds since the clock was started."""
    read: int
    """Batches that lay read, and not yet decoded, 0..prefetch."""
    waited: WaitTimes
    """Seconds, for this batch."""

    @property
    def decoded(self) -> bool:
        """Whether its pixels were ready."""
        return self.waited.decode < READY


@dataclass(frozen=True, kw_only=True)
class Whole:
    """The stream with nothing behind it that computes."""

    rate: Rate
    """Images a second."""
    asked: tuple[Asking, ...]
    """Every batch, in order."""
    prefetch: int
    """Batches that may be ahead at each place."""

    @property
    def waits(self) -> WaitTimes:
        """Seconds waited in all."""
        total = WaitTimes()
        for asking in self.asked:
            for name, value in vars(asking.waited).items():
                setattr(total, name, getattr(total, name) + value)
        return total

    @property
    def read_full(self) -> float:
        """Share of the batches, 0..1, at which the queue of read ones was full."""
        return sum(one.read >= self.prefetch for one in self.asked) / max(1, len(self.asked))

    @property
    def read_empty(self) -> float:
        """Share of the batches, 0..1, at which it was empty."""
        return sum(one.read == 0 for one in self.asked) / max(1, len(self.asked))


class Run:
    """A stream that is measured a window at a time."""

    def __init__(self, setting: Setting, position: int = 0) -> None:
        """Open it, and leave the warm-up behind."""
        self._stream = setting.stream(position)
        self._size = setting.batch_size
        self._settle: Callable[[], None] = (
            torch.cuda.synchronize if setting.device == "gpu" else lambda: None
        )
        self.asked: list[Asking] = []
        self._begun = 0.0
        try:
            for _ in islice(self._stream, WARM_UP):
                pass
        except BaseException:
            self._stream.close()
            raise
        self._settle()
        self._begun = time.perf_counter()

    def window(self, seconds: float, batches: int = 1) -> float:
        """Take batches for some seconds, and at least so many; return the images a second."""
        start, done = time.perf_counter(), 0
        while done < batches or time.perf_counter() - start < seconds:
            before = self._stream.waits.copy()
            next(self._stream)
            done += 1
            self.asked.append(
                Asking(
                    time.perf_counter() - self._begun, self._stream.read_ahead,
                    self._stream.waits.since(before),
                )
            )  # fmt: skip
        self._settle()
        return done * self._size / (time.perf_counter() - start)

    def close(self) -> None:
        """Close the stream."""
        self._stream.close()


@contextmanager
def running(setting: Setting, position: int = 0) -> Iterator[Run]:
    """A `Run`, closed after the block."""
    run = Run(setting, position)
    try:
        yield run
    finally:
        run.close()


def whole(setting: Setting, seconds: float) -> Whole:
    """Measure the stream, `seconds` in all if its windows agree, longer if they do not."""
    with running(setting) as run:
        rate = until_steady(lambda: run.window(seconds / FEWEST))
        return Whole(rate=rate, asked=tuple(run.asked), prefetch=setting.prefetch)


PICTURES = 1024
"""Raw ones take 197 kB each: a fifth of a gigabyte, which no processor cache holds."""


def measure_raw(
    setting: Setting, loaded: Sequence[EncodedBatch], seconds: float
) -> tuple[Rate, float]:
    """Pack images raw in a temporary folder, and run the stream on them.

    Returns:
        images a second, all of them in the page cache, and the bytes of an image.

    Raises:
        OSError, subprocess.CalledProcessError: there is no room for them.
    """
    with tempfile.TemporaryDirectory(prefix="duet-raw-") as scratch:
        source, packed = Path(scratch) / "jpegs", Path(scratch) / "packed"
        unpack(loaded, source, PICTURES)
        subprocess.run(
            [sys.executable, "-m", "pipeline.build_shards", str(packed), "--train", str(source),
             "--encoding", "raw", "--samples-per-shard", "256"],
            check=True, capture_output=True,
        )  # fmt: skip
        raw = setting.but(data=str(packed), split="train", shuffle="full", cache=None)
        with opened(raw) as parts:
            # Their first epoch copies them out of the files, the next ones do not (`ShardReader`).
            epoch = -(-len(parts.storage) // raw.batch_size)
            with running(raw) as run:
                run.window(0, epoch)
                load = Load()
                rates = tuple(run.window(seconds / 5) for _ in range(5))
            return Rate(rates, load.cores(), load.others()), parts.bytes_each


def unpack(batches: Iterable[EncodedBatch], folder: Path, most: int) -> None:
    """Write up to `most` JPEGs of some batches as files, in a folder for each class."""
    written = 0
    for batch in batches:
        for number, label, picture in zip(
            batch.ids.tolist(), batch.labels.tolist(), batch.input.images, strict=True
        ):
            path = folder / str(label) / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture.tobytes())
            if (written := written + 1) >= most:
                return


def measure_rate(
    setting: Setting, *, reader: str, windows: int, batches: int, ledger: Path | None = None
) -> list[float]:
    """Return the img/s of each window, after a warm-up that is not counted.

    Args:
        setting: of the stream.
        reader: `stream` is ours, `native` is DALI's.
        windows: of time.
        batches: in each of them.
        ledger: folder for a ledger.

    Raises:
        UsageError: DALI's reader and a set in a store.
    """
    rates = []
    source = _native(setting) if reader == "native" else _stream(setting, ledger)
    with closing(source):
        for _ in itertools.islice(source, WARM_UP):
            pass
        pictures = batches * setting.batch_size
        with Progress("measuring", total=windows * pictures, unit="img") as progress:
            for _ in range(windows):
                start = time.perf_counter()
                for _ in itertools.islice(source, batches):
                    pass
                if setting.device == "gpu":
                    torch.cuda.synchronize()
                rates.append(pictures / (time.perf_counter() - start))
                progress.advance(pictures)
    return rates


def _stream(setting: Setting, ledger: Path | None) -> Generator[torch.Tensor]:
    with setting.stream(ledger=ledger) as stream:
        for batch in stream:
            yield batch.images


def _native(setting: Setting) -> Generator[torch.Tensor]:
    if setting.remote:
        raise UsageError(f"--reader native reads local folders only, not {setting.data}")
    reader = NativeReader(open_dataset(setting.data).folder, setting)
    while True:
        yield next(reader)


def main(
    setting: Setting, *, reader: str, windows: int, batches: int, ledger: Path | None,
    as_json: bool,
) -> int:  # fmt: skip
    """Measure and say the rate."""
    rates = measure_rate(setting, reader=reader, windows=windows, batches=batches, ledger=ledger)
    median, low, high = statistics.median(rates), min(rates), max(rates)
    if as_json:
        facts = {
            "reader": reader,
            "device": setting.device,
            "threads": setting.threads,
            "batch_size": setting.batch_size,
            "img_s": round(median, 1),
            "windows": [round(rate, 1) for rate in rates],
        }
        sys.stdout.write(json.dumps(facts) + "\n")
    sys.stderr.write(
        f"{reader} reader, {setting.device}, {setting.threads} threads, batch "
        f"{setting.batch_size}: {median:,.0f} img/s (windows {low:,.0f} to {high:,.0f})\n"
    )
    return 0
