"""Checks of the data set and of the places a run writes to.

The data set: that it is there and complete, without reading every byte; how fast it is read from
its disk or store, and through the stream. The run's folder and the store of its checkpoints: that
they can be written, and have room.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

from cluster.config import Config, fit_images
from cluster.doctor.finding import GB, Finding, fail, ok, warn
from cluster.doctor.job import checkpoint_bytes
from pipeline.dataset.manifest import NAME, Manifest, Shard, Split
from pipeline.remote.answers import describe_error
from pipeline.remote.dataset import default_cache, is_streamed, open_dataset
from pipeline.remote.filesystem import (
    EXTRAS,
    RetryPolicy,
    check_address,
    is_remote,
    local_path,
    open_filesystem,
)
from pipeline.remote.local import Dataset
from pipeline.remote.target import open_store
from pipeline.tools.errors import DataError, DuetError, UsageError
from pipeline.tools.files import drop_page_cache, ensure_writable
from pipeline.tools.packages import suggest_extra
from pipeline.tools.text import hide_credentials, human_bytes
from pipeline.tools.watchdog import BackgroundCall, NoAnswer

READ_BYTES = 64 * 2**20
"""Most bytes that one measurement of a speed reads."""
SECONDS = 3.0
"""Longest time that one measurement takes."""
PARALLEL = 4
"""Number of shards that a training downloads at a time (`THREADS` in pipeline/remote)."""
PART_BYTES = 4 * 2**20
"""Bytes that are read from each of them."""
STORE_SECONDS = 15.0
"""Timeout of a request to a store."""
MOST_SHARDS = 64
"""Number of shards of a store that are checked; a large data set has thousands."""
PROBE_BYTES = 2**24
"""Bytes that are written to the run folder to measure a speed."""
CREDENTIALS = {
    "s3": "export AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=...   # or AWS_PROFILE; "
    "AWS_ENDPOINT_URL if it is not Amazon's; FSSPEC_S3_ANON=true for a public bucket",
    "gs": "export GOOGLE_APPLICATION_CREDENTIALS=/path/key.json   # or gcloud auth "
    "application-default login",
}
CREDENTIALS |= {"s3a": CREDENTIALS["s3"], "gcs": CREDENTIALS["gs"]}


@dataclass(frozen=True)
class DiskSpeed:
    """Measurement of reading images in the config's order from a disk."""

    images: int
    bytes: int
    seconds: float
    cached: float
    """Share of the bytes that stayed in the page cache although the kernel was asked to drop them,
    0..1."""
    order: str
    """Order of reading, in words."""


def measure_disk(dataset: Dataset, manifest: Manifest, config: Config) -> DiskSpeed:
    """Read the training split of a local data set as a training does, by the order of `config`.

    Raises:
        OSError, DuetError: something cannot be read.
    """
    if config.shuffle == "block":
        return _read_shards(dataset, manifest.splits["train"])
    return _read_single_images(dataset, manifest)


def _read_shards(dataset: Dataset, split: Split) -> DiskSpeed:
    read = cached = 0
    seconds = 0.0
    for shard in split.shards:
        with dataset.open(shard) as file:
            cached += drop_page_cache(file.fileno())
            start = time.perf_counter()
            while block := file.read(2**20):
                read += len(block)
            seconds += time.perf_counter() - start
        if read >= READ_BYTES or seconds > SECONDS:
            break
    images = round(read / (split.bytes / split.samples))
    return DiskSpeed(images, read, seconds, cached / read, "shard after shard")


def _read_single_images(dataset: Dataset, manifest: Manifest) -> DiskSpeed:
    import numpy as np

    from pipeline.dataset.index import load_index

    index, split = load_index(dataset.folder, "train", manifest), manifest.splits["train"]
    rows = index[np.random.default_rng().permutation(len(index))[:1024]]
    numbers = sorted({int(row["shard"]) for row in rows})[:256]
    rows = rows[np.isin(rows["shard"], numbers)]
    images = read = 0
    with ExitStack() as stack:
        files: dict[int, int] = {}
        for number in numbers:
            files[number] = os.open(dataset.fetch_shard(split.shards[number]), os.O_RDONLY)
            stack.callback(os.close, files[number])
        cached = sum(map(drop_page_cache, files.values()))
        whole = sum(os.fstat(file).st_size for file in files.values())
        start = time.perf_counter()
        for batch in np.array_split(rows, max(1, len(rows) // 128)):
            places = [
                (files[int(shard)], int(size), int(offset))
                for shard, size, offset in batch[["shard", "size", "offset"]]
            ]
            for file, size, offset in places:  # as the stream does: asks for a batch at once
                os.posix_fadvise(file, offset, size, os.POSIX_FADV_WILLNEED)
            read += sum(len(os.pread(*place)) for place in places)
            images += len(batch)
            if read >= READ_BYTES or time.perf_counter() - start > SECONDS:
                break
        seconds = time.perf_counter() - start
    return DiskSpeed(images, read, seconds, cached / whole, "single images at random")


def measure_stream(data: str, config: Config) -> float:
    """Return the images per second of the stream on this machine's CPU.

    Raises:
        DuetError: it does not run.
    """
    from pipeline.batches import Stream

    with Stream.from_config(data, config.stream) as batches:
        next(batches)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < SECONDS:
            next(batches)
            count += config.batch_size
        return count / (time.perf_counter() - start)


class StoreProbe:
    """Requests to a store that holds a data set; it keeps nothing.

    Raises:
        Exception: it does not answer, or refuses; `describe` makes one line of it.
    """

    def __init__(self, address: str) -> None:
        check_address(address, "data set")
        self._system, root = open_filesystem(address, RetryPolicy(stall=STORE_SECONDS))
        self._root = root.rstrip("/")

    def measure_latency(self, name: str = NAME) -> float:
        """Return the seconds that the store takes to answer a request about a file."""
        ask = partial(self._system.info, f"{self._root}/{name}")
        BackgroundCall(ask).result(STORE_SECONDS)  # connects
        start = time.perf_counter()
        BackgroundCall(ask).result(STORE_SECONDS)
        return time.perf_counter() - start

    def find_faults(self, shards: Sequence[Shard]) -> list[str]:
        """Return a sentence about each shard that is missing or of another size."""
        faults: list[str] = []
        for first in range(0, len(shards), 16):
            some = shards[first : first + 16]
            requests = [BackgroundCall(partial(self._find_fault, shard)) for shard in some]
            faults += filter(None, (call.result(STORE_SECONDS) for call in requests))
        return faults

    def _find_fault(self, shard: Shard) -> str:
        try:
            size = self._system.info(f"{self._root}/{shard.name}").get("size")
        except FileNotFoundError:
            return f"{shard.name} is not there"
        if size is None or size == shard.bytes:  # None: a server that does not say
            return ""
        return f"{shard.name} has {size} bytes instead of {shard.bytes}"

    def measure_rate(self, shards: Sequence[Shard]) -> tuple[float, bool]:
        """Read parts of PARALLEL shards at a time.

        Returns:
            bytes per second; whether they did not arrive within STORE_SECONDS, so that this is an
            upper bound.
        """
        start = time.perf_counter()
        parts = [BackgroundCall(partial(self._read_part, shard)) for shard in shards[:PARALLEL]]
        try:
            read, timed_out = sum(call.result(STORE_SECONDS) for call in parts), False
        except NoAnswer:
            read, timed_out = PARALLEL * PART_BYTES, True
        return read / (time.perf_counter() - start), timed_out

    def _read_part(self, shard: Shard) -> int:
        end = min(shard.bytes, PART_BYTES)
        return len(self._system.cat_file(f"{self._root}/{shard.name}", start=0, end=end))


def describe(error: Exception) -> str:
    """Describe an error of a store or a disk in one line without credentials."""
    return hide_credentials(str(error) if isinstance(error, DuetError) else describe_error(error))


class DatasetCheck:
    """Checks of a data set: `judge` yields findings, and sets `classes`.

    Args:
        data: folder or address.
        config: settings of the training; None: defaults.
    """

    def __init__(self, data: str, config: Config | None) -> None:
        self.data = data
        self.config, self._has_config = config or Config(), config is not None
        self.validates = config is not None and config.validate_every > 0
        self.classes: int | None = None
        """Number of classes; None: the data set cannot be read."""
        self._safe, self._streams = hide_credentials(data), is_streamed(data)

    def judge(self) -> Iterator[Finding]:
        """Yield the findings. Only `pipeline.verify` reads every byte."""
        try:
            if is_remote(self.data):
                StoreProbe(self.data).measure_latency()  # fails sooner than a training's retries
            dataset = open_dataset(self.data, **self.config.cached)
        except Exception as error:  # a store's library raises what it pleases
            yield fail("data", describe(error), self._suggest_access(error))
            return
        with closing(dataset):
            try:
                manifest = self._check_files(dataset)
            except DuetError as error:
                yield fail("data", str(error), f"duet verify {self._safe}")
                return
            self.classes = len(manifest.classes)
            splits = manifest.splits
            counts = ", ".join(f"{split.samples:,} {name}" for name, split in splits.items())
            shards = sum(len(split.shards) for split in splits.values())
            sizes = "" if self._streams else ", each of its size"
            text = f"{counts}; {self.classes} classes; {shards} shards{sizes}"
            yield ok("data", f"{text} (duet verify reads every byte)")
            if not manifest.classes:
                text = "it has no classes to train for"
                yield fail("classes", text, "duet build-shards OUT --train SRC, with labels")
                return
            if "train" not in splits:
                text = f"no train; there are {', '.join(splits)}"
                yield fail("splits", text, "duet build-shards OUT --train SRC")
                return
            if self.validates and "val" not in splits:
                mend = "--validate-every 0, or build the set with --val or --holdout"
                yield fail("splits", "no val, and the config validates", mend)
            try:
                self.config = fit_images(self.config, manifest.side, self._safe)
            except UsageError as error:
                if self._has_config:
                    yield fail("size", str(error), "another data set, or another network")
                else:
                    yield warn("speed", f"not measured: {error}", "name the CONFIG of the training")
                return
            if self._streams:
                yield from self._judge_store(manifest)
            else:
                yield from self._judge_speed(dataset, manifest)

    def _check_files(self, dataset: Dataset) -> Manifest:
        """Check all that can be checked without reading every byte.

        Raises:
            DataError: a file is missing, damaged or of another size.
        """
        from pipeline.dataset.image_stats import Statistics
        from pipeline.stream.shard_reader import ShardReader

        manifest = Manifest.load(dataset.folder)
        for split in manifest.splits:
            ShardReader(dataset, split).close()
        Statistics.load(dataset.folder, manifest)
        if not self._streams:
            for shard in chain.from_iterable(s.shards for s in manifest.splits.values()):
                size = dataset.fetch_shard(shard).stat().st_size
                if size != shard.bytes:
                    path = dataset.locate_shard(shard)
                    raise DataError(f"{path} has {size} bytes instead of {shard.bytes}")
        return manifest

    def _suggest_access(self, error: Exception) -> str:
        """Return a remedy for a data set that cannot be opened."""
        scheme = self.data.partition("://")[0]
        text = str(error)
        if not is_remote(self.data):
            return f"duet build-shards {self.data} --train SRC, or another --data"
        if "pip install" in text:
            return suggest_extra(EXTRAS.get(scheme, scheme))
        if scheme in CREDENTIALS and ("redential" in text or "denied" in text or "40" in text):
            return CREDENTIALS[scheme]
        return "look at the address, and whether this machine reaches it (curl, aws s3 ls)"

    def _judge_speed(self, dataset: Dataset, manifest: Manifest) -> Iterator[Finding]:
        try:
            disk = measure_disk(dataset, manifest, self.config)
            rate = measure_stream(self.data, self.config)
        except (DuetError, OSError) as error:
            yield fail("data speed", describe(error), f"duet verify {self.data}")
            return
        disk_rate = disk.images / disk.seconds
        text = (
            f"{disk_rate:,.0f} images/s from the disk ({human_bytes(disk.bytes / disk.seconds)}/s, "
            f"{disk.order}), {self._format_batch_time(disk_rate)}"
        )
        if disk.cached > 0.1:
            text += f"; {disk.cached:.0%} of it stayed in the page cache, so the disk is slower"
        elif disk.bytes < READ_BYTES / 8:
            text += f"; only {human_bytes(disk.bytes)} were there to be read"
        if disk_rate < rate:
            text += "; the decoder waits for it"
        mend = "--shuffle block, or a copy on a local SSD (once in memory, the page cache serves)"
        yield warn("data speed", text, mend, unless=disk_rate >= rate)
        cores = self.config.threads or "all"
        text = f"{rate:,.0f} images/s decoded here on {cores} cores"
        yield ok("stream", f"{text}, {self._format_batch_time(rate)}")

    def _format_batch_time(self, rate: float) -> str:
        size = self.config.batch_size
        return f"a batch of {size} in {size / rate * 1000:,.0f} ms"

    def _judge_store(self, manifest: Manifest) -> Iterator[Finding]:
        shards = list(chain.from_iterable(split.shards for split in manifest.splits.values()))
        train = manifest.splits["train"]
        some = shards[:: max(1, len(shards) // MOST_SHARDS)][:MOST_SHARDS]
        try:
            store = StoreProbe(manifest.shards_at or self.data)
            latency = store.measure_latency(some[0].name)
            faults = store.find_faults(some)
            speed, timed_out = (0.0, False) if faults else store.measure_rate(some)
        except Exception as error:
            text = f"{self._safe}: {describe(error)}"
            yield fail("store", text, self._suggest_access(error))
            return
        if faults:
            more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
            text = f"{faults[0]}{more}, of {len(some)} looked at"
            yield fail("store", text, f"copy the set there again   # {self._safe}")
            return
        rate = speed / (train.bytes / train.samples)
        text = (
            f"answers in {latency * 1000:,.0f} ms, {'less than ' * timed_out}"
            f"{human_bytes(speed)}/s with {PARALLEL} at a time = {rate:,.0f} images/s, "
            f"{self._format_batch_time(rate)}; {len(some)} of {len(shards)} shards looked at"
        )
        mend = "a store nearer to this machine, or a copy of the set on a local disk"
        yield warn("store", text, mend, unless=not timed_out)
        yield self._judge_cache(train.bytes)

    def _judge_cache(self, whole: int) -> Finding:
        """Judge the folder of the shard cache; `whole` is the size of the split in bytes."""
        cached = self.config.cached
        folder, size = Path(cached["cache"] or default_cache()).absolute(), cached["cache_size"]
        disk = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(disk).free
        text = f"{folder}: {human_bytes(free)} free, {human_bytes(size)} allowed, the set has "
        text += human_bytes(whole)
        if free < min(size, whole):
            mend = f"--cache /a/larger/disk, or --cache-size {max(1, int(free * 0.9 / GB))}GB"
            return warn("cache", f"{text}: its disk fills up first", mend)
        if self.config.shuffle == "full" and size < whole:
            mend = "--shuffle block, or a larger --cache-size"
            text += ": every epoch downloads all again, image by image"
            return warn("cache", text, mend)
        return ok("cache", text)


def judge_run(run: Path, config: Config | None, classes: int | None) -> Iterator[Finding]:
    """Judge whether a run's folder can be written and has room; makes the folder if need be."""
    try:
        ensure_writable(run, "run folder")
    except DuetError as error:
        yield fail("run", str(error), "another --run")
        return
    probe, noise = run / f".doctor.{secrets.token_hex(8)}", os.urandom(PROBE_BYTES)
    start = time.perf_counter()
    try:
        with probe.open("wb") as file:
            file.write(noise)
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
    need = 0 if config and config.store else kept * checkpoint_bytes(config, classes)
    text = f"{run}: {human_bytes(PROBE_BYTES / seconds)}/s to the disk, {human_bytes(free)} free"
    if free < need:
        text += f"; its checkpoints take up to {human_bytes(need)}"
    mend = "--keep 1 --keep-best 0, make room, or another --run or --store"
    yield warn("run", text, mend, unless=free >= need)


def judge_store(store: str) -> Finding:
    """Judge the store of a config: write a small file, read it back and remove it."""
    safe = hide_credentials(store)
    try:
        if not is_remote(store):
            ensure_writable(local_path(store), "store")
            return ok("store of run", f"{safe} can be written")
        target = replace(open_store(store, ""), policy=RetryPolicy(attempts=2, stall=5))
        name, mark = f".doctor.{secrets.token_hex(8)}", secrets.token_bytes(32)
        start = time.perf_counter()
        with target.create(name) as file:
            file.write(mark)
        try:
            is_same = target.read(name) == mark
        finally:
            target.remove([name])
    except (DuetError, OSError) as error:
        mend = CREDENTIALS.get(store.partition("://")[0], "another --store")
        return fail("store of run", describe(error), f"{mend}; it must allow writing")
    seconds = time.perf_counter() - start
    if not is_same:
        return fail("store of run", f"{safe} gives back other bytes", "another --store")
    return ok("store of run", f"{safe}: written, read and removed in {seconds * 1000:,.0f} ms")
