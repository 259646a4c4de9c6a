"""A split opened for a stream: its samples, their order, and what becomes of their pixels."""

from __future__ import annotations

import torch

from pipeline.asked import Asked
from pipeline.dataset.image_stats import Statistics
from pipeline.remote.dataset import DataSet
from pipeline.stream.loader import Reader
from pipeline.stream.normalization import Recipe, central
from pipeline.stream.order import Order
from pipeline.stream.quarantine import Quarantine
from pipeline.stream.shard_reader import Storage
from pipeline.tools.errors import UsageError


class Opened:
    """What a `Stream` of some arguments is made of, before anything flows."""

    def __init__(self, asked: Asked, dataset: DataSet) -> None:
        """Open the split; `storage.close` closes it.

        Raises:
            UsageError: no such split.
            DataError: the set is not what its manifest says.
        """
        self.asked = asked
        self.dataset = dataset
        self.storage = Storage(dataset, asked.split)
        self.statistics = Statistics.load(dataset.folder, self.storage.manifest.stats_sha256)
        self.recipe: Recipe = asked.recipe(self.statistics)
        self.order: Order = asked.order([shard.samples for shard in self.storage.shards])

    @property
    def view_mean(self) -> torch.Tensor | None:
        """float32 [3, 224, 224]: the mean picture, where `recipe` leaves it to be subtracted."""
        apart = self.asked.mean == "picture" and self.asked.view == "whole"
        return torch.from_numpy(central(self.statistics)) if apart else None

    def reader(self, quarantine: Quarantine | None = None, *, strict: bool = False) -> Reader:
        """Return what loads batches; without a quarantine it keeps one of its own, in memory."""
        return Reader(
            self.storage, self.order, self.recipe, self.asked.slice,
            quarantine or Quarantine(self.asked.split, None), strict=strict,
        )  # fmt: skip

    def check_cache(self, cache_size: int) -> None:
        """Refuse a cache from which shards would be fetched again and again.

        Raises:
            UsageError: says how much it should hold.
        """
        needed = self.order.needs(self.asked.position)
        # A pass in stored order reads shard after shard; the others are only fetched ahead.
        needed = needed[:1] if self.asked.once else needed
        size = sum(self.storage.shards[number].bytes for number in needed)
        about = sum(  # not *.partial: another process's, gone the next moment
            path.stat().st_size
            for path in self.dataset.folder.iterdir()
            if path.suffix in (".json", ".npy", ".npz")
        )
        if size + about > cache_size:
            raise UsageError(
                f"a cache of {cache_size:,} bytes cannot hold the {len(needed)} shards "
                f"({size:,} bytes) that are read at a time, and the index; "
                "give a larger --cache-size, or --shuffle block with a smaller --window"
            )
