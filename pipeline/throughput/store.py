"""What a store gives: shards fetched as the stream fetches them, into a cache that is empty."""

from __future__ import annotations

import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

from pipeline.dataset.manifest import Manifest
from pipeline.remote.dataset import open_dataset
from pipeline.throughput.clock import Load
from pipeline.throughput.setting import Setting

TOGETHER = 4
"""Shards that are wished for beyond the one waited for, as a window of the block shuffle does."""
BEGIN = 4
"""Shards that arrive before the clock starts: as many as are under way at a time."""


@dataclass(frozen=True, kw_only=True)
class Fetching:
    """How shards arrive."""

    alone: float
    """Bytes a second of one shard with nothing beside it, connecting included."""
    together: float
    """Bytes a second of several at a time: what an epoch gets."""
    shards: int
    """That were fetched."""
    cpu: float
    """Cores that it kept busy."""
    others: float


def fetching(setting: Setting, seconds: float) -> Fetching | None:
    """Fetch shards for some seconds; nothing is kept.

    Returns:
        None for a set of too few shards to tell.

    Raises:
        StoreError: the store does not answer.
    """
    with (
        tempfile.TemporaryDirectory(prefix="duet-fetch-") as cache,
        closing(open_dataset(setting.data, cache=cache, cache_size=setting.cache_size)) as dataset,
    ):
        manifest = Manifest.load(dataset.folder)
        shards = manifest.split(setting.split, dataset.folder).shards
        if len(shards) < BEGIN + 4:
            return None
        start = time.perf_counter()
        dataset.shard(shards[0])
        alone = shards[0].bytes / (time.perf_counter() - start)
        done = begun = 0.0
        fetched, load = 0, Load()
        for number, shard in enumerate(islice(shards, 1, None)):
            dataset.ahead(shards[1 + number : 2 + number + TOGETHER])
            dataset.shard(shard)
            if number + 1 == BEGIN:
                begun, load = time.perf_counter(), Load()
            elif number + 1 > BEGIN:
                done, fetched = done + shard.bytes, fetched + 1
                if fetched >= 2 and time.perf_counter() - begun > seconds:
                    break
        took = time.perf_counter() - begun
        return Fetching(alone=alone, together=done / took, shards=fetched,
                        cpu=load.cores(), others=load.others())  # fmt: skip
