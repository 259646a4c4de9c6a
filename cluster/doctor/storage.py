"""The data set and the run's folder: there, whole as far as a look can tell, and how fast."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from cluster.config import Config
from cluster.doctor.finding import Finding, fail, ok, warn
from pipeline.dataset import DataSet, is_remote, open_dataset
from pipeline.errors import DataError, DuetError
from pipeline.files import writable_folder
from pipeline.manifest import Manifest
from pipeline.pixel_stats import Statistics
from pipeline.storage import Storage

READ = 64 * 2**20
"""Most bytes that are read to tell a speed."""
GB = 10**9
CHECKPOINT = 0.5 * GB
"""Weights and velocities of the full network."""


def judge_data(data: str, config: Config | None) -> Iterator[Finding]:
    """Yield what there is to say of a data set; every byte is for `pipeline.verify`."""
    cached = config.cached if config else {}
    try:
        dataset = open_dataset(data, **cached)
    except DuetError as error:
        yield fail("data", str(error), "python -m pipeline.build_shards ... , or another --data")
        return
    with closing(dataset):
        try:
            manifest = Manifest.load(dataset.folder)
            for split in manifest.splits:
                Storage(dataset, split)
            Statistics.load(dataset.folder, manifest.stats_sha256)
            shards = [shard for split in manifest.splits.values() for shard in split.shards]
            if not is_remote(data):
                for shard in shards:
                    size = dataset.shard(shard).stat().st_size
                    if size != shard.bytes:
                        raise DataError(f"{shard.name} has {size} bytes instead of {shard.bytes}")
        except DuetError as error:
            yield fail("data", str(error), f"python -m pipeline.verify {data}")
            return
        counts = ", ".join(f"{split.samples:,} {name}" for name, split in manifest.splits.items())
        yield ok("data", f"{counts}; {len(manifest.classes)} classes; {len(shards)} shards")
        if config and config.validate_every and "val" not in manifest.splits:
            yield fail("splits", "no val, and the config validates", "--validate-every 0")
        yield _speed(data, dataset, manifest)


def _speed(data: str, dataset: DataSet, manifest: Manifest) -> Finding:
    """Read some shards as if for the first time."""
    split = manifest.splits["train"]
    start, read = time.perf_counter(), 0
    try:
        for shard in split.shards:
            with dataset.open(shard) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while read < READ and (block := file.read(2**20)):
                    read += len(block)
            if read >= READ:
                break
    except (DuetError, OSError) as error:
        return fail("data speed", str(error), f"python -m pipeline.verify {data}")
    rate = read / (time.perf_counter() - start)
    each = sum(shard.bytes for shard in split.shards) / split.samples
    what = f"{rate / 1e6:,.0f} MB/s, {rate / each:,.0f} pictures/s of {each / 1000:.1f} kB"
    how = "from the store or its cache" if is_remote(data) else "one reader, page cache dropped"
    if rate / each < 500:
        mend = "--shuffle block, a local copy, or --cache on a faster disk"
        return warn("data speed", f"{what} ({how})", mend)
    return ok("data speed", f"{what} ({how})")


def judge_run(run: Path, config: Config | None) -> Iterator[Finding]:
    """Yield what there is to say of a run's folder."""
    try:
        writable_folder(run, "run folder")
    except DuetError as error:
        yield fail("run", str(error), "another --run")
        return
    start = time.perf_counter()
    probe = run / f".doctor.{os.getpid()}"
    try:
        with probe.open("wb") as file:
            file.write(os.urandom(2**24))
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - start
    except OSError as error:
        yield fail("run", f"{run}: {error.strerror}", "make room, or another --run")
        return
    finally:
        probe.unlink(missing_ok=True)
    free = shutil.disk_usage(run).free
    kept = config.keep + config.keep_best + 1 if config else 4
    width = config.width if config else 1.0
    need = kept * CHECKPOINT * width * width
    told = f"{run}: {2**24 / seconds / 1e6:,.0f} MB/s to the disk, {free / GB:.1f} GB free"
    if free < need:
        yield warn("run", f"{told}; its checkpoints take up to {need / GB:.1f} GB", "--keep 1")
    else:
        yield ok("run", told)
