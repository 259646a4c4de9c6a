"""The data set: there, whole as far as a look can tell, and how fast it is read.

How fast a data set is read: from its disk, from its store, and through the stream.

The run's folder, and the store of its checkpoints: writable, and with room.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from cluster.config import Config
from cluster.doctor.finding import GB, Finding, fail, ok, warn
from cluster.doctor.job import checkpoint_bytes
from pipeline.dataset.manifest import NAME, Manifest, Shard, Split
from pipeline.remote.dataset import CACHE_SIZE, Dataset, default_cache, is_remote, open_dataset
from pipeline.remote.filesystem import (
    BackgroundCall,
    RetryPolicy,
    TransferError,
    describe_error,
    hide_credentials,
    open_filesystem,
)
from pipeline.remote.target import local_path, open_store
from pipeline.tools.errors import DataError, DuetError
from pipeline.tools.files import drop_page_cache, ensure_writable

READ = 64 * 2**20
"""Most bytes that are read to tell a speed."""
SECONDS = 3.0
"""For which one measurement goes on, at most."""
PARALLEL = 4
"""Shards that a training fetches at a time (`stores.remote.THREADS`)."""
PART = 4 * 2**20
"""Bytes that are read of each of them."""
STORE_SECONDS = 15.0
"""For which a store may take to answer."""
LOOKED_AT = 64
"""Shards of a store that are looked for; a large set has thousands."""


@dataclass(frozen=True, kw_only=True)
class Disk:
    """What reading images in the config's order gave."""

    pictures: int
    bytes: int
    seconds: float
    cached: float
    """Share of what was read that lay in the page cache before, although it was asked to go."""
    order: str
    """How it was read."""

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.pictures / self.seconds


def disk(dataset: Dataset, name: str, split: Split, config: Config | None) -> Disk:
    """Read images of a local set as a training does: single ones, or a shard from end to end.

    Args:
        dataset: in a folder.
        name: of the split.
        split: to read.
        config: says the order; None: single images.

    Raises:
        OSError, DuetError: something cannot be read.
    """
    if config is not None and config.shuffle == "block":
        return _whole_shards(dataset, split)
    return _single_images(dataset, name, split)


def _whole_shards(dataset: Dataset, split: Split) -> Disk:
    read = here = 0
    start, aside = time.perf_counter(), 0.0
    for shard in split.shards:
        with dataset.open(shard) as file:
            before = time.perf_counter()
            here += drop_page_cache(file.fileno())
            aside += time.perf_counter() - before
            while block := file.read(2**20):
                read += len(block)
        if read >= READ or time.perf_counter() - start - aside > SECONDS:
            break
    seconds = time.perf_counter() - start - aside
    each = split.bytes / split.samples
    return Disk(pictures=round(read / each), bytes=read, seconds=seconds, cached=here / read,
                order="shard after shard")  # fmt: skip


def _single_images(dataset: Dataset, name: str, split: Split) -> Disk:
    import numpy as np

    from pipeline.dataset.index import load_index

    index = load_index(dataset.folder, name, split)
    rows = index[np.random.default_rng().permutation(len(index))[:1024]]
    numbers = sorted({int(row["shard"]) for row in rows})[:256]
    rows = rows[np.isin(rows["shard"], numbers)]
    files = {number: os.open(dataset.fetch_shard(split.shards[number]), os.O_RDONLY)
             for number in numbers}  # fmt: skip
    try:
        here = sum(map(drop_page_cache, files.values()))
        whole = sum(os.fstat(file).st_size for file in files.values())
        done = read = 0
        start = time.perf_counter()
        for batch in np.array_split(rows, max(1, len(rows) // 128)):
            for row in batch:  # as the stream does: the disk is asked for a batch at once
                os.posix_fadvise(files[int(row["shard"])], int(row["offset"]), int(row["size"]),
                                 os.POSIX_FADV_WILLNEED)  # fmt: skip
            for row in batch:
                read += len(os.pread(files[int(row["shard"])], int(row["size"]), row["offset"]))
            done += len(batch)
            if read >= READ or time.perf_counter() - start > SECONDS:
                break
        seconds = time.perf_counter() - start
    finally:
        for file in files.values():
            os.close(file)
    return Disk(pictures=done, bytes=read, seconds=seconds, cached=here / whole,
                order="single images at random")  # fmt: skip


def stream(data: str, config: Config | None) -> float:
    """Return the images a second that the stream gives on this machine's CPU.

    Raises:
        DuetError: it does not run.
    """
    from pipeline.batches import Stream

    config = config or Config()
    with Stream(data, config.stream) as batches:
        next(batches)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < SECONDS:
            next(batches)
            count += config.batch_size
        return count / (time.perf_counter() - start)


@dataclass(frozen=True, kw_only=True)
class Remote:
    """What a store said."""

    latency: float
    """Seconds for an answer about a shard."""
    rate: float
    """Bytes a second, PARALLEL shards at a time; 0: not measured, as some are wrong."""
    less: bool
    """It is less than that: not all came in STORE_SECONDS."""
    looked_at: int
    wrong: tuple[str, ...]
    """Shards that are missing or of another size, and how."""


def answers(address: str) -> float:
    """Ask a store for a set's manifest; return the seconds that an answer takes.

    Raises:
        Exception: it does not answer, or says no; `told` says it in a line.
    """
    system, root = open_filesystem(address, RetryPolicy(stall=STORE_SECONDS))
    ask = partial(system.info, f"{root.rstrip('/')}/{NAME}")
    BackgroundCall(ask).result(STORE_SECONDS)  # connects
    start = time.perf_counter()
    BackgroundCall(ask).result(STORE_SECONDS)
    return time.perf_counter() - start


def store(address: str, shards: Sequence[Shard]) -> Remote:
    """Ask a store for shards, and read from some; nothing is kept.

    Raises:
        Exception: it does not answer, or says no; `told` says it in a line.
    """
    latency = answers(address)
    system, root = open_filesystem(address, RetryPolicy(stall=STORE_SECONDS))
    some = shards[:: max(1, len(shards) // LOOKED_AT)][:LOOKED_AT]

    def size(shard: Shard) -> str:
        try:
            found = system.info(f"{root.rstrip('/')}/{shard.name}").get("size")
        except FileNotFoundError:
            return f"{shard.name} is not there"
        if found is None or found == shard.bytes:  # None: a server that does not say
            return ""
        return f"{shard.name} has {found} bytes instead of {shard.bytes}"

    def part(shard: Shard) -> int:
        end = min(shard.bytes, PART)
        return len(system.cat_file(f"{root.rstrip('/')}/{shard.name}", start=0, end=end))

    wrong: list[str] = []
    for begun in range(0, len(some), 16):
        asked = [BackgroundCall(partial(size, shard)) for shard in some[begun : begun + 16]]
        wrong += filter(None, (call.result(STORE_SECONDS) for call in asked))
    rate, less = 0.0, False
    if not wrong:
        start = time.perf_counter()
        calls = [BackgroundCall(partial(part, shard)) for shard in some[:PARALLEL]]
        try:
            read = sum(call.result(STORE_SECONDS) for call in calls)
        except TransferError:
            read, less = PARALLEL * PART, True
        rate = read / (time.perf_counter() - start)
    return Remote(latency=latency, rate=rate, less=less, looked_at=len(some), wrong=tuple(wrong))


def told(error: Exception) -> str:
    """What a store or a disk said, in a line without secrets."""
    return hide_credentials(str(error) if isinstance(error, DuetError) else describe_error(error))


def free_below(folder: Path) -> int:
    """Free bytes on the disk of a folder that need not be there yet."""
    while not folder.exists():
        folder = folder.parent
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


CREDENTIALS = {
    "s3": "export AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=...   # or AWS_PROFILE; "
    "AWS_ENDPOINT_URL if it is not Amazon's; FSSPEC_S3_ANON=true for a public bucket",
    "gs": "export GOOGLE_APPLICATION_CREDENTIALS=/path/key.json   # or gcloud auth "
    "application-default login",
}
CREDENTIALS |= {"s3a": CREDENTIALS["s3"], "gcs": CREDENTIALS["gs"]}


class Data:
    """A data set under examination: `judge` yields findings, then `classes` is known."""

    def __init__(self, data: str, config: Config | None) -> None:
        self.data = data
        self.config = config
        self.classes: int | None = None
        """Number of them; None: the set cannot be read."""
        self._safe = hide_credentials(data)

    def judge(self) -> Iterator[Finding]:
        """Yield what there is to say; every byte is for `pipeline.verify`."""
        cached = self.config.cached if self.config else {}
        try:
            if is_remote(self.data):
                answers(self.data)  # sooner than a training, which is patient, would say it
            dataset = open_dataset(self.data, **cached)
        except Exception as error:  # a store's library raises what it pleases
            yield fail("data", told(error), self._way_to_data(error))
            return
        with closing(dataset):
            try:
                manifest = self._check(dataset)
            except DuetError as error:
                yield fail("data", str(error), f"python -m pipeline.verify {self._safe}")
                return
            self.classes = len(manifest.classes)
            yield self._described(manifest)
            if split := self._missing_split(manifest):
                yield split
            if "train" not in manifest.splits:
                return
            if is_remote(self.data):
                yield from self._store(manifest)
            else:
                yield from self._disk(dataset, manifest)

    def _check(self, dataset: Dataset) -> Manifest:
        """Look at all that can be looked at without reading every byte.

        Raises:
            DataError: a file is missing, damaged or of another size.
        """
        from pipeline.dataset.image_stats import Statistics
        from pipeline.stream.shard_reader import ShardReader

        manifest = Manifest.load(dataset.folder)
        for split in manifest.splits:
            ShardReader(dataset, split).close()
        Statistics.load(dataset.folder, manifest.stats_sha256)
        if not is_remote(self.data):
            for shard in (shard for split in manifest.splits.values() for shard in split.shards):
                size = dataset.fetch_shard(shard).stat().st_size
                if size != shard.bytes:
                    raise DataError(
                        f"{dataset.folder / shard.name} has {size} bytes instead of {shard.bytes}"
                    )
        return manifest

    def _described(self, manifest: Manifest) -> Finding:
        counts = ", ".join(f"{split.samples:,} {name}" for name, split in manifest.splits.items())
        shards = sum(len(split.shards) for split in manifest.splits.values())
        sizes = "" if is_remote(self.data) else ", each of its size"
        return ok("data", f"{counts}; {len(manifest.classes)} classes; {shards} shards{sizes} "
                  "(pipeline.verify reads every byte)")  # fmt: skip

    def _missing_split(self, manifest: Manifest) -> Finding | None:
        if "train" not in manifest.splits:
            return fail("splits", f"no train; there are {', '.join(manifest.splits)}",
                        "python -m pipeline.build_shards OUT --train SRC")  # fmt: skip
        if self.config and self.config.validate_every and "val" not in manifest.splits:
            return fail("splits", "no val, and the config validates",
                        "--validate-every 0, or build the set with --val or --holdout")  # fmt: skip
        return None

    def _way_to_data(self, error: Exception) -> str:
        scheme = self.data.partition("://")[0]
        said = str(error)
        if not is_remote(self.data):
            return f"python -m pipeline.build_shards {self.data} --train SRC, or another --data"
        if "pip install" in said:
            return f"pip install 'duet[{'gs' if scheme == 'gcs' else scheme.removesuffix('a')}]'"
        if scheme in CREDENTIALS and ("redential" in said or "denied" in said or "40" in said):
            return CREDENTIALS[scheme]
        return "look at the address, and whether this machine reaches it (curl, aws s3 ls)"

    def _disk(self, dataset: Dataset, manifest: Manifest) -> Iterator[Finding]:
        split = manifest.splits["train"]
        verify = f"python -m pipeline.verify {self.data}"
        try:
            reading = disk(dataset, "train", split, self.config)
            rate = stream(self.data, self.config)
        except (DuetError, OSError) as error:
            yield fail("data speed", told(error), verify)
            return
        text = (
            f"{reading.rate:,.0f} pictures/s from the disk "
            f"({reading.bytes / reading.seconds / 1e6:,.0f} "
            f"MB/s, {reading.order}), {self._batch(reading.rate)}"
        )
        if reading.cached > 0.1:
            text += f"; {reading.cached:.0%} of it stayed in the page cache, so the disk is slower"
        elif reading.bytes < READ / 8:
            text += f"; only {reading.bytes / 1e6:.1f} MB were there to be read"
        if reading.rate < rate:
            yield warn(
                "data speed", f"{text}; it keeps the decoder waiting",
                "--shuffle block, or a copy on a local SSD (once in memory, the page cache serves)",
            )  # fmt: skip
        else:
            yield ok("data speed", text)
        threads = self.config.threads if self.config and self.config.threads else "all"
        yield ok("stream", f"{rate:,.0f} pictures/s decoded here on {threads} cores, "
                 f"{self._batch(rate)}")  # fmt: skip

    def _batch(self, rate: float) -> str:
        size = (self.config or Config()).batch_size
        return f"a batch of {size} in {size / rate * 1000:,.0f} ms"

    def _store(self, manifest: Manifest) -> Iterator[Finding]:
        shards = [shard for split in manifest.splits.values() for shard in split.shards]
        train = manifest.splits["train"]
        try:
            found = store(self.data, shards)
        except Exception as error:
            said = told(error)
            yield fail("store", f"{self._safe}: {said}", self._way_to_data(error))
            return
        if found.wrong:
            more = f" and {len(found.wrong) - 1} more" if len(found.wrong) > 1 else ""
            yield fail("store", f"{found.wrong[0]}{more}, of {found.looked_at} looked at",
                       f"copy the set there again   # {self._safe}")  # fmt: skip
            return
        rate = found.rate / (train.bytes / train.samples)
        text = (
            f"answers in {found.latency * 1000:,.0f} ms, {'less than ' * found.less}"
            f"{found.rate / 1e6:,.1f} MB/s with "
            f"{PARALLEL} at a time = {rate:,.0f} pictures/s, {self._batch(rate)}; "
            f"{found.looked_at} of {len(shards)} shards looked at"
        )
        if found.less:
            mend = "a store nearer to this machine, or a copy of the set on a local disk"
            yield warn("store", text, mend)
        else:
            yield ok("store", text)
        yield self._cache(manifest)

    def _cache(self, manifest: Manifest) -> Finding:
        cached = (self.config or Config()).cached
        folder = Path(cached["cache"] or default_cache()).absolute()
        size = cached["cache_size"] if self.config else CACHE_SIZE
        free, whole = free_below(folder), manifest.splits["train"].bytes
        told = f"{folder}: {free / GB:.1f} GB free, {size / GB:.1f} allowed, the set has "
        told += f"{whole / GB:.1f}"
        if free < min(size, whole):
            mend = f"--cache /a/larger/disk, or --cache-size {max(1, int(free * 0.9 / GB))}GB"
            return warn("cache", f"{told}: its disk fills up first", mend)
        full = (self.config or Config()).shuffle == "full"
        if full and size < whole:
            return warn("cache", f"{told}: every epoch fetches all anew, image by image",
                        "--shuffle block, or a larger --cache-size")  # fmt: skip
        return ok("cache", told)


def judge_data(data: str, config: Config | None) -> Iterator[Finding]:
    """Yield what there is to say of a data set."""
    return Data(data, config).judge()


PROBE = 2**24
"""Bytes that are written to tell a speed."""


def judge_run(run: Path, config: Config | None, classes: int | None) -> Iterator[Finding]:
    """Yield what there is to say of a run's folder; makes it if need be."""
    try:
        ensure_writable(run, "run folder")
    except DuetError as error:
        yield fail("run", str(error), "another --run")
        return
    probe, noise = run / f".doctor.{secrets.token_hex(8)}", os.urandom(PROBE)
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
    said = f"{run}: {PROBE / seconds / 1e6:,.0f} MB/s to the disk, {free / GB:.1f} GB free"
    if free < need:
        mend = "--keep 1 --keep-best 0, make room, or another --run or --store"
        yield warn("run", f"{said}; its checkpoints take up to {need / GB:.1f} GB", mend)
    else:
        yield ok("run", said)


def judge_store(store: str) -> Finding:
    """Write a small file to the store of a config, read it back and remove it."""
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
            right = target.read(name) == mark
        finally:
            target.remove([name])
    except (DuetError, OSError) as error:
        scheme = store.partition("://")[0]
        mend = CREDENTIALS.get(scheme, "another --store")
        return fail("store of run", f"{told(error)}", f"{mend}; it must allow writing")
    seconds = time.perf_counter() - start
    if not right:
        return fail("store of run", f"{safe} gives back other bytes", "another --store")
    return ok("store of run", f"{safe}: written, read and removed in {seconds * 1000:,.0f} ms")
