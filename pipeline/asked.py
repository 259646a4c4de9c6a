"""What a `Stream` is asked for: refused where it cannot be, and cut up for the parts that do it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

from pipeline.arguments import check_ranges, check_words
from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.images import SIZE, Encoding
from pipeline.flow import Flow
from pipeline.stream.augment import CROP
from pipeline.stream.decode import Device
from pipeline.stream.ledger.writer import About
from pipeline.stream.loader import Reader, Slice
from pipeline.stream.normalization import Colour, ColourPlan, Mean, Recipe, recipe_of
from pipeline.stream.order import Block, Full, Order, Shuffle, Stored, share
from pipeline.stream.timing import Waits

View = Literal["random", "centre", "whole"]
WORDS = {"view": View, "shuffle": Shuffle, "device": Device, "mean": Mean}
MOST_THREADS = 1024
"""Host threads that may be asked for."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The arguments of a `Stream` that say which samples, which pixels and how; see there.

    Raises:
        ValueError: one is out of range; names it.
    """

    split: str
    batch_size: int
    seed: int
    position: int
    rank: int
    world_size: int
    device: Device
    view: View
    once: bool
    shuffle: Shuffle
    window: int
    colour: Colour
    colour_divide: bool
    mean: Mean
    threads: int | None
    prefetch: int
    hw_decoder_load: float

    def __post_init__(self) -> None:
        check_words(WORDS, view=self.view, shuffle=self.shuffle, device=self.device, mean=self.mean)
        check_ranges(
            batch_size=(self.batch_size, self.world_size, math.inf),
            prefetch=(self.prefetch, 1, math.inf),
            position=(self.position, 0, math.inf),
            hw_decoder_load=(self.hw_decoder_load, 0, 1),
            threads=(self.threads or 0, 0, MOST_THREADS),
            window=(self.window, 1, math.inf),
            seed=(self.seed, 0, 2**63 - 1),
        )
        ColourPlan.of(self.colour)
        _ = self.slice

    @cached_property
    def slice(self) -> Slice:
        """This rank's share of every batch."""
        first, last = share(self.batch_size, self.rank, self.world_size)
        return Slice(batch_size=self.batch_size, first=first, last=last, once=self.once)

    def order(self, shards: list[int]) -> Order:
        """The order of the samples, given those of each shard."""
        if self.once:
            return Stored(shards, self.seed)
        full = self.shuffle == "full"
        return Full(shards, self.seed) if full else Block(shards, self.seed, self.window)

    def recipe(self, statistics: Statistics) -> Recipe:
        """What is done to pixels, given those of the training set."""
        return recipe_of(
            statistics,
            random=self.view == "random",
            colour=self.colour,
            mean=self.mean,
            divide=self.colour_divide,
            whole=self.view == "whole",
        )

    def starter(self, reader: Reader, encoding: Encoding) -> Callable[[int, Waits], Flow]:
        """Return what begins to decode at a position, however often."""
        return partial(
            Flow,
            reader,
            batch_size=self.slice.last - self.slice.first,
            device=self.device,
            threads=self.threads or len(os.sched_getaffinity(0)),
            prefetch=self.prefetch,
            size=SIZE if self.view == "whole" else CROP,
            encoding=encoding,
            hw_decoder_load=self.hw_decoder_load,
        )

    def about(self, data_sha256: str, samples: int, recipe: Recipe) -> About:
        """What a ledger says of it, given the data set, its samples and what is done to them."""
        shuffled = f"block {self.window}" if self.shuffle == "block" else "full"
        return About(
            data_sha256=data_sha256,
            split=self.split,
            samples=samples,
            seed=self.seed,
            shuffle="stored" if self.once else shuffled,
            view=self.view,
            colour=recipe.plan.given,
            colour_divide=self.colour_divide,
            mean=self.mean,
            position=self.position,
            batch_size=self.batch_size,
            rank=self.rank,
            world_size=self.world_size,
            device=self.device,
        )
