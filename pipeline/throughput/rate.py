"""How many pictures a second the stream gives on this machine.

    python -m pipeline.throughput DATA [--device cpu|gpu] [--reader stream|native]

The first batches are left out; the rate is the median over equal windows, with the slowest and
the fastest beside it. `--reader native` measures DALI's own WebDataset reader on the same shards
with the same graph, as the yardstick.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from pipeline.asked import MOST_THREADS
from pipeline.batches import Stream
from pipeline.dataset import is_remote, open_dataset, parse_size
from pipeline.errors import UsageError, run
from pipeline.native import NativeReader
from pipeline.order import Shuffle
from pipeline.progress import Progress

WARM_UP = 8
"""Batches before the clock starts."""


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Measure the stream without a trainer behind it."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Data set: a folder, or an address such as s3://bucket/folder."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Where pictures are decoded and left."""
    reader: Literal["stream", "native"] = "stream"
    """`stream` is ours, `native` is DALI's own WebDataset reader on the same shards."""
    split: str = "train"
    """Split to read."""
    shuffle: Shuffle = "full"
    """Order of the stream: full or block."""
    window: int = 16
    """Shards in a window of the block shuffle."""
    ledger: Path | None = None
    """Folder for a ledger, to see what writing one costs."""
    cache: str | None = None
    """Folder for the shards of a remote set; default: duet in the user's cache folder."""
    cache_size: str = "100GB"
    """Most bytes in it."""
    batch_size: int = 128
    """Pictures in a batch."""
    threads: int = len(os.sched_getaffinity(0))
    """Host threads that decode."""
    windows: int = 5
    """Windows of time; the median of their rates is the result."""
    batches: int = 40
    """Batches in each of them."""
    json: bool = False
    """Print one JSON object on stdout."""


def measure(options: Throughput) -> list[float]:
    """Return the img/s of each window, after a warm-up that is not counted."""
    for name in ("batch_size", "threads", "windows", "batches", "window"):
        if (value := getattr(options, name)) < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if options.threads > MOST_THREADS:
        raise UsageError(f"--threads is {options.threads}; it must be at most {MOST_THREADS}")
    rates = []
    with closing(_batches(options)) as batches:
        for _ in itertools.islice(batches, WARM_UP):
            pass
        pictures = options.batches * options.batch_size
        with Progress("measuring", total=options.windows * pictures, unit="img") as progress:
            for _ in range(options.windows):
                start = time.perf_counter()
                for _ in itertools.islice(batches, options.batches):
                    pass
                if options.device == "gpu":
                    torch.cuda.synchronize()
                rates.append(pictures / (time.perf_counter() - start))
                progress.advance(pictures)
    return rates


def _batches(options: Throughput) -> Generator[torch.Tensor]:
    if options.reader == "native":
        yield from _native(options)
    stream = Stream(
        options.data,
        split=options.split,
        batch_size=options.batch_size,
        device=options.device,
        threads=options.threads,
        shuffle=options.shuffle,
        window=options.window,
        ledger=options.ledger,
        cache=options.cache,
        cache_size=parse_size(options.cache_size),
    )
    with stream:
        for batch in stream:
            yield batch.images


def _native(options: Throughput) -> Generator[torch.Tensor]:
    if is_remote(options.data):
        raise UsageError(f"--reader native reads local folders only, not {options.data}")
    reader = NativeReader(
        open_dataset(options.data).folder,
        split=options.split,
        batch_size=options.batch_size,
        device=options.device,
        threads=options.threads,
    )
    while True:
        yield next(reader)


def main() -> int:
    """Measure and say the rate."""
    options = tyro.cli(Throughput, prog="python -m pipeline.throughput", description=__doc__)
    rates = measure(options)
    median, low, high = statistics.median(rates), min(rates), max(rates)
    if options.json:
        facts = {
            "reader": options.reader,
            "device": options.device,
            "threads": options.threads,
            "batch_size": options.batch_size,
            "img_s": round(median, 1),
            "windows": [round(rate, 1) for rate in rates],
        }
        sys.stdout.write(json.dumps(facts) + "\n")
    sys.stderr.write(
        f"{options.reader} reader, {options.device}, {options.threads} threads, batch "
        f"{options.batch_size}: {median:,.0f} img/s (windows {low:,.0f} to {high:,.0f})\n"
    )
    return 0


if __name__ == "__main__":
    run(main)
