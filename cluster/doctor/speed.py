"""How fast a data set is read: from its disk, from its store, and through the stream."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cluster.config import Config
from pipeline.dataset.manifest import NAME, Shard, Split
from pipeline.page_cache import forget
from pipeline.remote.dataset import DataSet
from pipeline.remote.download import Policy
from pipeline.remote.filesystem import Call, file_system
from pipeline.stores.errors import TransferError, describe, without_secrets
from pipeline.tools.errors import DuetError

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
    """What reading pictures in the config's order gave."""

    pictures: int
    bytes: int
    seconds: float
    cached: float
    """Share of what was read that lay in the page cache before, although it was asked to go."""
    order: str
    """How it was read."""

    @property
    def rate(self) -> float:
        """Pictures a second."""
        return self.pictures / self.seconds


def disk(dataset: DataSet, name: str, split: Split, config: Config | None) -> Disk:
    """Read pictures of a local set as a training does: single ones, or a shard from end to end.

    Args:
        dataset: in a folder.
        name: of the split.
        split: to read.
        config: says the order; None: single pictures.

    Raises:
        OSError, DuetError: something cannot be read.
    """
    if config is not None and config.shuffle == "block":
        return _whole_shards(dataset, split)
    return _single_pictures(dataset, name, split)


def _whole_shards(dataset: DataSet, split: Split) -> Disk:
    read = here = 0
    start, aside = time.perf_counter(), 0.0
    for shard in split.shards:
        with dataset.open(shard) as file:
            before = time.perf_counter()
            here += forget(file.fileno())
            aside += time.perf_counter() - before
            while block := file.read(2**20):
                read += len(block)
        if read >= READ or time.perf_counter() - start - aside > SECONDS:
            break
    seconds = time.perf_counter() - start - aside
    each = split.bytes / split.samples
    return Disk(pictures=round(read / each), bytes=read, seconds=seconds, cached=here / read,
                order="shard after shard")  # fmt: skip


def _single_pictures(dataset: DataSet, name: str, split: Split) -> Disk:
    import numpy as np

    from pipeline.dataset.index import load_index

    index = load_index(dataset.folder, name, split)
    rows = index[np.random.default_rng().permutation(len(index))[:1024]]
    numbers = sorted({int(row["shard"]) for row in rows})[:256]
    rows = rows[np.isin(rows["shard"], numbers)]
    files = {number: os.open(dataset.shard(split.shards[number]), os.O_RDONLY)
             for number in numbers}  # fmt: skip
    try:
        here = sum(map(forget, files.values()))
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
                order="single pictures at random")  # fmt: skip


def stream(data: str, config: Config | None) -> float:
    """Return the pictures a second that the stream gives on this machine's CPU.

    Raises:
        DuetError: it does not run.
    """
    from pipeline.batches import Stream

    config = config or Config()
    options: dict[str, Any] = {"shuffle": config.shuffle, "window": config.window}
    if config.threads:
        options["threads"] = config.threads
    with Stream(data, batch_size=config.batch_size, **options) as batches:
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
    system, root = file_system(address, Policy(stall=STORE_SECONDS))
    ask = partial(system.info, f"{root.rstrip('/')}/{NAME}")
    Call(ask).result(STORE_SECONDS)  # connects
    start = time.perf_counter()
    Call(ask).result(STORE_SECONDS)
    return time.perf_counter() - start


def store(address: str, shards: Sequence[Shard]) -> Remote:
    """Ask a store for shards, and read from some; nothing is kept.

    Raises:
        Exception: it does not answer, or says no; `told` says it in a line.
    """
    latency = answers(address)
    system, root = file_system(address, Policy(stall=STORE_SECONDS))
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
        asked = [Call(partial(size, shard)) for shard in some[begun : begun + 16]]
        wrong += filter(None, (call.result(STORE_SECONDS) for call in asked))
    rate, less = 0.0, False
    if not wrong:
        start = time.perf_counter()
        calls = [Call(partial(part, shard)) for shard in some[:PARALLEL]]
        try:
            read = sum(call.result(STORE_SECONDS) for call in calls)
        except TransferError:
            read, less = PARALLEL * PART, True
        rate = read / (time.perf_counter() - start)
    return Remote(latency=latency, rate=rate, less=less, looked_at=len(some), wrong=tuple(wrong))


def told(error: Exception) -> str:
    """What a store or a disk said, in a line without secrets."""
    return without_secrets(str(error) if isinstance(error, DuetError) else describe(error))


def free_below(folder: Path) -> int:
    """Free bytes on the disk of a folder that need not be there yet."""
    while not folder.exists():
        folder = folder.parent
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
