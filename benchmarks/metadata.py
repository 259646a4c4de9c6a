"""Time and memory of what Duet does with a data set before its first image, at any size.

    python benchmarks/metadata.py [--samples 14e6] [--shard 10000] [--folder DIR]

The set is made up: a manifest and an index of so many images in shards of that size, whose tars are
not there. The steps are those of commands, each in a process of its own: what the index says is
checked (`load_index`, as every command does), counted (`describe`), compared (`verify`, without its
shards), and an order is made and asked for a batch in the middle of an epoch. Memory is what the
process has for itself at most (RssAnon): pages of the mapped index are the kernel's to drop.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from harness.memory import MemoryPeak, read_memory
from harness.report import Figure, Options, Report, Table, start
from harness.rounds import measure_seconds

from pipeline.dataset.check import check_index
from pipeline.dataset.index import INDEX_DTYPE, index_name, load_index
from pipeline.dataset.manifest import Manifest, Shard, Split
from pipeline.dataset.members import write_npy_header
from pipeline.describe.facts import _count_split
from pipeline.remote.local import LocalDataset
from pipeline.stream.order import BlockShuffle, FullShuffle
from pipeline.tools.errors import UsageError

IMAGE = 100_000
"""Bytes of an image: 400 million of them are 40 TB."""
CLASSES = 1_000


@dataclass(frozen=True, kw_only=True)
class MetadataOptions(Options):
    """Measure what a set of made-up images costs."""

    samples: float = 14e6
    """Images."""
    shard: int = 10_000
    """Images of a shard."""
    folder: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder for the temporary one: 24 bytes an image."""


def make_set(folder: Path, samples: int, size: int) -> None:
    """Write manifest and index of `samples` images, in shards of `size`."""
    digest, count = hashlib.sha256(), samples // size
    with (folder / index_name("train")).open("wb") as file:
        write_npy_header(file, digest, INDEX_DTYPE, samples)
        rows = np.zeros(size, INDEX_DTYPE)
        rows["offset"] = np.arange(size, dtype=np.uint64) * IMAGE
        rows["size"] = np.random.default_rng(1).integers(IMAGE // 2, IMAGE - 1024, size)
        rows["label"] = np.arange(size) % CLASSES
        for number in range(count):
            rows["shard"] = number
            data = rows.tobytes()
            file.write(data)
            digest.update(data)
    none = "0" * 64
    shards = tuple(
        Shard(
            name=f"train-{number:06d}.tar",
            samples=size,
            bytes=size * IMAGE,
            sha256=hashlib.sha256(b"%d" % number).hexdigest(),
            idx_sha256=none,
        )
        for number in range(count)
    )
    Manifest(
        splits={"train": Split(shards=shards, index_sha256=digest.hexdigest())},
        classes=tuple(f"class {number}" for number in range(CLASSES)),
        seed=0,
        sources={},
        plan="",
        stats_sha256=none,
        quality=96,
    ).save(folder)


def read_manifest(folder: Path) -> None:
    """Read the manifest alone."""
    Manifest.load(folder)


def check_rows(folder: Path) -> None:
    """Check the index as every command does that opens the set."""
    load_index(folder, "train", Manifest.load(folder))


def describe(folder: Path) -> None:
    """Count classes and sizes."""
    found = _count_split("train", LocalDataset(folder), Manifest.load(folder))
    assert len(found.image_bytes) == found.per_class.sum()


def verify(folder: Path) -> None:
    """Compare the index with its hash."""
    assert not check_index(folder, "train", Manifest.load(folder))


def order_full(folder: Path) -> None:
    """Make a full shuffle, in the middle of an epoch."""
    sizes = [shard.samples for shard in Manifest.load(folder).splits["train"].shards]
    order = FullShuffle(sizes, seed=1)
    order.list_shards(37 * order.samples + order.samples // 3)
    order.list_slots(37 * order.samples + order.samples // 3, 1024)


def order_block(folder: Path) -> None:
    """Make a block shuffle, in the middle of an epoch."""
    sizes = [shard.samples for shard in Manifest.load(folder).splits["train"].shards]
    order = BlockShuffle(sizes, seed=1)
    order.list_slots(37 * order.samples + order.samples // 3, 1024)


STEPS = (read_manifest, check_rows, describe, verify, order_full, order_block)


def measure(step: Callable[[Path], None], folder: Path) -> tuple[float, int]:
    """Return seconds, and the bytes that the process had for itself at most."""
    with MemoryPeak(lambda: read_memory("RssAnon")) as peak:
        seconds = measure_seconds(lambda: step(folder))
    return seconds, peak.bytes


def report(options: MetadataOptions) -> Report:
    """Measure every step."""
    samples = int(options.samples) // options.shard * options.shard
    if samples < options.shard or options.shard < 1:
        raise UsageError(f"--samples {options.samples:g} is not one shard of {options.shard}")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="duet-scale-", dir=options.folder) as name:
        folder = Path(name)
        make_set(folder, samples, options.shard)
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
            found = {step.__name__: pool.submit(measure, step, folder).result() for step in STEPS}
    title = f"{samples:,} images: " + ", ".join(f"{k} {v / 1e6:,.1f} MB" for k, v in sizes.items())
    rows = [
        (name, f"{took:.2f} s", f"{size / 1e6:,.0f} MB") for name, (took, size) in found.items()
    ]
    figures = {name: Figure([took], "s", "lower") for name, (took, _) in found.items()}
    figures |= {
        f"{name}, memory": Figure([m / 1e6], "MB", "lower") for name, (_, m) in found.items()
    }
    return Report(
        tables={"metadata": Table(("step", "time", "memory"), rows, title)}, figures=figures
    )


if __name__ == "__main__":
    start(MetadataOptions, report, __doc__)
