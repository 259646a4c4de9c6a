"""Cost of the sample order and of a restart, and how well each shuffle mixes.

    python benchmarks/order.py DATA [--samples 14000000] [--rounds 3]

Each number of the first two tables is the median over processes of their own, imports not counted.
Sets of any size are made of DATA's images in a temporary folder: thousands of names for a few
shards, and an index that points at the same samples again and again. So the shards lie in the
page cache; from a disk, the first batch takes its reads on top. A stream is opened at random
positions within an epoch, at position 0, and where its first batch lies in two epochs.

The mixing is measured on 1,281 shards of 1,000 samples, as an ideal shuffle would give 1.00:

    displacement    how far a sample moves from its stored place, on average, over N/3
    company         how many of the pairs that share a batch of 128 in epoch 0 share one in epoch 1
                    too, over the 127/(N-1) of chance: how often the same images meet again
    spread          over which part of an epoch the samples of one shard come, on average
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import tyro
from harness.memory import read_memory
from harness.report import Figure, Options, Report, Table, start

from pipeline.batches import Stream
from pipeline.dataset.index import load_index, save_index
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.shards import shard_name
from pipeline.remote.local import LocalDataset
from pipeline.stream.config import Shuffle
from pipeline.stream.order import BlockShuffle, FullShuffle, Order, StoredOrder
from pipeline.tools.errors import UsageError

T = TypeVar("T")

IMAGENET = 1_281
"""Thousands of training images in ILSVRC-2012, and shards of a thousand."""
SHARD = 1_000
"""Samples in a shard."""
BATCH = 128
EPOCH = 37
"""Epoch in which streams are opened."""


@dataclass(frozen=True, kw_only=True)
class OrderOptions(Options):
    """Measure order, restart and mixing."""

    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Folder of a data set, whose images the made sets repeat."""
    samples: int = 14_000_000
    """Size of the large set, in whole thousands."""
    rounds: int = 3
    """Processes for each number."""
    folder: Path | None = None
    """Folder for the temporary one: 24 bytes a sample, 16 at a time."""


@dataclass(frozen=True)
class Cost:
    """Cost of an order."""

    epoch: float
    """Seconds for all ids of an epoch."""
    slots: float
    """Seconds for a batch's slots at a random position, nothing known before."""
    memory: int
    """Bytes by which the process grew at most, for the epoch."""


@dataclass(frozen=True)
class Opening:
    """Cost of the first batch."""

    opened: float
    """Seconds until `Stream(...)` is there."""
    batch: float
    """Seconds until the first batch is there."""
    memory: int
    """Most bytes resident at any time, libraries and the mapped index with the rest."""


@dataclass(frozen=True)
class Parts:
    """Seconds of the parts of an opening, each alone."""

    manifest: float
    """Reading the manifest."""
    shards: float
    """Looking whether each shard is there."""
    index: float
    """Comparing the index with its SHA-256."""
    order: float
    """Choosing the slots of the first batch."""


@dataclass(frozen=True)
class Mixing:
    """Measures of how well an order mixes; see above."""

    displacement: float
    company: float
    spread: float


def make_order(shuffle: str, samples: int) -> Order:
    """Return an order over shards of a thousand: `stored`, `full`, or `block WINDOW`."""
    sizes = [SHARD] * (samples // SHARD)
    if shuffle.startswith("block"):
        return BlockShuffle(sizes, seed=1, window=int(shuffle.split()[1]))
    return FullShuffle(sizes, seed=1) if shuffle == "full" else StoredOrder(sizes)


def random_position(samples: int, number: int) -> int:
    """Return a position within epoch `EPOCH`."""
    return EPOCH * samples + int(np.random.default_rng(number).integers(samples - 100 * BATCH))


def measure_order(shuffle: str, samples: int, number: int) -> Cost:
    """Make an epoch's order piece by piece as a stream does; then a few slots from the start."""
    start = time.perf_counter()
    make_order(shuffle, samples).list_slots(random_position(samples, number), BATCH)
    slots = time.perf_counter() - start
    order, place = make_order(shuffle, samples), 0
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
    before = read_memory("VmRSS")
    start = time.perf_counter()
    while place < samples:
        place += len(order.list_places(0, place, samples - place))
    return Cost(time.perf_counter() - start, slots, read_memory("VmHWM") - before)


def measure_opening(data: Path, position: int, shuffle: Shuffle) -> Opening:
    """Open a stream at a position and take one batch."""
    start = time.perf_counter()
    with Stream(data, batch_size=BATCH, seed=1, position=position, shuffle=shuffle) as stream:
        opened = time.perf_counter() - start
        assert next(stream).position == position + BATCH
        return Opening(opened, time.perf_counter() - start, read_memory("VmHWM"))


def measure_parts(data: Path, position: int) -> Parts:
    """Time the steps of a stream with a full shuffle until its first batch, one after the other."""
    times = [time.perf_counter()]
    manifest = Manifest.load(data)
    split = manifest.splits["train"]
    times.append(time.perf_counter())
    for shard in split.shards:
        LocalDataset(data).fetch_shard(shard)
    times.append(time.perf_counter())
    load_index(data, "train", manifest)
    times.append(time.perf_counter())
    FullShuffle([shard.samples for shard in split.shards], seed=1).list_slots(position, BATCH)
    times.append(time.perf_counter())
    return Parts(*np.diff(times).tolist())


def repeat(rounds: int, function: Callable[..., T], *arguments: Any) -> list[T]:
    """Return what a function gives in fresh processes.

    An argument that is a function is called with the round's number.
    """
    context = multiprocessing.get_context("spawn")
    found = []
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for number in range(rounds):
            given = [value(number) if callable(value) else value for value in arguments]
            found.append(pool.submit(function, *given).result())
    return found


def take_medians(found: list[Any]) -> Any:
    """Return a dataclass of the medians, field by field."""
    columns = zip(*(asdict(one).values() for one in found), strict=True)
    return type(found[0])(*(statistics.median(column) for column in columns))


def make_dataset(data: Path, folder: Path, samples: int) -> Path:
    """Make a set of `samples` out of the first shards of `data`, in a new folder."""
    folder.mkdir()
    manifest = Manifest.load(data)
    split = manifest.splits["train"]
    rows = load_index(data, "train", manifest)
    starts = np.cumsum([0, *(shard.samples for shard in split.shards)])
    used = min(len(split.shards), 16)
    for number in range(used):
        shutil.copyfile(data / split.shards[number].name, folder / f"{number}.copy")
    pieces, shards = [], []
    for number in range(samples // SHARD):
        real = number % used
        piece = np.resize(rows[starts[real] : starts[real + 1]], SHARD)
        piece["shard"] = number
        pieces.append(piece)
        name = shard_name("train", number)
        os.link(folder / f"{real}.copy", folder / name)
        shards.append(replace(split.shards[real], name=name, samples=SHARD))
    digest = save_index(folder, "train", np.concatenate(pieces))
    shutil.copyfile(data / "stats.npz", folder / "stats.npz")
    made = replace(split, shards=tuple(shards), index_sha256=digest)
    replace(manifest, splits={"train": made}).save(folder)
    return folder


def measure_mixing(order: Order) -> Mixing:
    """Measure two epochs of an order."""
    n = order.samples
    places = []
    for epoch in range(2):
        ids = order.list_slots(epoch * n, n).ids
        place = np.empty(n, np.int64)
        place[ids] = np.arange(n)
        places.append(place)
    displacement = np.abs(places[0] - np.arange(n)).mean() / (n / 3)
    batches = [(epoch * n + place) // BATCH for epoch, place in enumerate(places)]
    together = np.unique(batches[0] * (2 * n) + batches[1], return_counts=True)[1]
    met = np.unique(batches[0], return_counts=True)[1]
    again = (together * (together - 1)).sum() / (met * (met - 1)).sum()
    by_shard = places[0].reshape(-1, SHARD)
    spread = (by_shard.max(1) - by_shard.min(1) + 1).mean() / n
    return Mixing(float(displacement), float(again / ((BATCH - 1) / (n - 1))), float(spread))


def measure_openings(options: OrderOptions, folder: Path) -> dict[str, dict[str, list[Any]]]:
    """Measure restarts in sets of a thousand, of ImageNet's size, and of the large one's."""
    found: dict[str, dict[str, list[Any]]] = {}
    for samples in (20 * SHARD, IMAGENET * SHARD, options.samples):
        data = make_dataset(options.data, folder / str(samples), samples)

        def middle(number: int, samples: int = samples) -> int:
            return random_position(samples, number)

        found[f"{samples:,}"] = {
            "full": repeat(options.rounds, measure_opening, data, middle, "full"),
            "full, at 0": repeat(options.rounds, measure_opening, data, 0, "full"),
            "full, border": repeat(
                options.rounds, measure_opening, data, samples - BATCH // 2, "full"
            ),
            "block 16": repeat(options.rounds, measure_opening, data, middle, "block"),
            "parts": repeat(options.rounds, measure_parts, data, middle),
        }
        shutil.rmtree(data)
    return found


def make_tables(
    orders: dict[str, Cost], found: dict[str, dict[str, list[Any]]], mixed: dict[str, Mixing]
) -> dict[str, Table]:
    """Return the tables."""
    costs = [
        (name, f"{one.epoch:.2f}", f"{one.memory / 1e6:.0f}", f"{one.slots:.4f}")
        for name, one in orders.items()
    ]
    openings, notes = [], []
    for samples, rows in found.items():
        for name, one in zip(rows, map(take_medians, rows.values()), strict=True):
            if isinstance(one, Opening):
                cells = f"{one.opened:.2f}", f"{one.batch:.2f}", f"{one.memory / 1e6:.0f}"
                openings.append((samples, name, *cells))
            else:
                each = ", ".join(f"{part} {took:.2f} s" for part, took in asdict(one).items())
                notes.append(f"{samples}, full shuffle, each part alone: {each}.")
    mixing = [
        (name, f"{row.displacement:.3f}", f"{row.company:.2f}", f"{row.spread:.3f}")
        for name, row in mixed.items()
    ]
    head = ("samples", "first batch", "opened, s", "first batch, s", "MB")
    return {
        "order": Table(("order", "an epoch, s", "MB", "slots of a batch, s"), costs),
        "order-openings": Table(head, openings, notes=notes),
        "order-mixing": Table(("shuffle", "displacement", "company", "spread"), mixing),
    }


def report(options: OrderOptions) -> Report:
    """Measure orders, openings and mixing."""
    if options.samples < 20 * SHARD:
        raise UsageError(f"--samples must be at least {20 * SHARD}")
    Manifest.load(options.data)
    orders = {
        shuffle: take_medians(
            repeat(options.rounds, measure_order, shuffle, options.samples, lambda number: number)
        )
        for shuffle in ("full", "block 16")
    }
    with tempfile.TemporaryDirectory(prefix="duet-order-", dir=options.folder) as folder:
        found = measure_openings(options, Path(folder))
    shuffles = ("stored", "block 4", "block 16", "block 64", "full")
    mixed = {shuffle: measure_mixing(make_order(shuffle, IMAGENET * SHARD)) for shuffle in shuffles}
    return Report(
        tables=make_tables(orders, found, mixed),
        figures={
            f"{samples}, {name}, first batch": Figure([one.batch for one in rounds], "s", "lower")
            for samples, rows in found.items()
            for name, rounds in rows.items()
            if isinstance(rounds[0], Opening)
        },
    )


if __name__ == "__main__":
    start(OrderOptions, report, __doc__)
