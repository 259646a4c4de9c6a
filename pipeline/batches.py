"""`Stream`: the whole pipeline as an iterator of batches, whose only state is one integer.

Whether the arguments of a public face can be right, told in one line that names them.

What a `Stream` is asked for: refused where it cannot be, and cut up for the parts that do it.

A split opened for a stream: its samples, their order, and what becomes of their pixels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Literal, get_args

import torch

from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.images import SIZE, Encoding
from pipeline.dataset.manifest import identity
from pipeline.remote.dataset import CACHE_SIZE, Dataset, is_remote, open_dataset
from pipeline.stream.augment import CROP
from pipeline.stream.decode import Device
from pipeline.stream.ledger.format import About
from pipeline.stream.ledger.writer import Ledger
from pipeline.stream.loader import DecodeFailure, Flow, Reader, Slice
from pipeline.stream.normalization import Colour, ColourPlan, Mean, Recipe, central, recipe_of
from pipeline.stream.order import Block, Full, Order, Shuffle, Stored, share
from pipeline.stream.quarantine import UNDECODABLE, Quarantine
from pipeline.stream.shard_reader import Damage, ShardReader
from pipeline.stream.timing import WaitTimes
from pipeline.tools.errors import UsageError


def check_words(known: Mapping[str, Any], **given: str) -> None:
    """Refuse words that a `Literal` does not have.

    Args:
        known: the `Literal` of each argument, by name.
        given: values by name.

    Raises:
        ValueError: names argument, value and the words there are.
    """
    for name, value in given.items():
        if value not in (words := get_args(known[name])):
            raise ValueError(f"{name} is {value!r}; it takes {', '.join(words)}")


def check_ranges(**given: tuple[float, float, float]) -> None:
    """Refuse a value that is not between two others (a NaN is between none).

    Args:
        given: value, lowest and highest, by name.

    Raises:
        ValueError: names argument, value and borders.
    """
    for name, (value, low, high) in given.items():
        if not low <= value <= high:
            borders = f"{low} or more" if high == math.inf else f"{low} to {high}"
            raise ValueError(f"out of range: {name}={value}; it takes {borders}")


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

    def starter(self, reader: Reader, encoding: Encoding) -> Callable[[int, WaitTimes], Flow]:
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


class Opened:
    """What a `Stream` of some arguments is made of, before anything flows."""

    def __init__(self, asked: Asked, dataset: Dataset) -> None:
        """Open the split; `storage.close` closes it.

        Raises:
            UsageError: no such split.
            DataError: the set is not what its manifest says.
        """
        self.asked = asked
        self.dataset = dataset
        self.storage = ShardReader(dataset, asked.split)
        self.statistics = Statistics.load(dataset.folder, self.storage.manifest.stats_sha256)
        self.recipe: Recipe = asked.recipe(self.statistics)
        self.order: Order = asked.order([shard.samples for shard in self.storage.shards])

    @property
    def view_mean(self) -> torch.Tensor | None:
        """float32 [3, 224, 224]: the mean image, where `recipe` leaves it to be subtracted."""
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


__all__ = ["Batch", "Stream", "View"]


@dataclass(frozen=True)
class Batch:
    """One rank's slice of a global batch: b samples."""

    ids: torch.Tensor
    """int64 [b], on the host: places in the split's stored order."""
    images: torch.Tensor
    """[b, 3, 224, 224] (view "whole": 256x256) on the device; float32 on the CPU, float16 on a
    GPU; RGB, 0..255 minus the training set's mean and the sample's colour shift."""
    labels: torch.Tensor
    """int64 [b], on the device: places in the manifest's class list."""
    weights: torch.Tensor
    """float32 [b], on the device: 1, or 0 for the rows that pad the last batch of an evaluation."""
    replaced: torch.Tensor
    """bool [b], on the host: another sample stands here, because the one that is due is damaged."""
    position: int
    """Samples consumed by the whole job after this batch; give it to a new Stream to go on."""


class Stream:
    """An endless stream of training batches, or one pass for evaluation.

    The samples of a global batch, their order, crops, flips and colours follow from `seed` and
    `position` alone: ranks, threads, batches read ahead and restarts change nothing, to the bit
    (on a GPU to what its decoder gives). Every epoch holds every sample once.

        with Stream(DATA, split="train", batch_size=128, seed=0, rank=0, world_size=1) as stream:
            batch = next(stream)

    Every sample is checked against its CRC-32. One that is damaged, or cannot be decoded, is
    replaced by another that follows from seed, epoch and sample alone (in an evaluation: gets no
    weight), and is found in `damaged`, and in the file `quarantine` if one is named.

    It holds threads and open files: open it after a fork, not before.

    Args:
        data: folder that `pipeline.build_shards` sealed, or the address of one in a store
            (`https://`, `s3://`, `gs://`, anything fsspec knows).
        split: `train` or `val`.
        batch_size: of the whole job; this rank gets its contiguous slice of every batch.
        seed: of order and augmentation, 0 or more.
        position: samples consumed before (a batch's `.position`).
        rank: this rank, 0..world_size-1.
        world_size: ranks that share the batch.
        device: where pixels are made and left: `cpu`, or `gpu` for the current CUDA device.
        view: `random` crop, flip and colour (training); `centre` crop (evaluation); `whole`
            256x256 image (for ten views).
        once: each sample exactly once in stored order, the last batch padded with rows of
            weight 0, then the end. Otherwise shuffled and endless, every batch full.
        shuffle: `full`: each epoch a permutation of all samples, each read by itself; `block`:
            each epoch a permutation of the shards, the samples mixed within windows of
            `window` shards, so that only those and the next ones need be at hand.
        window: shards in a window of the block shuffle, at least 1.
        colour: standard deviation of the paper's PCA colour draws (0.1; 0 turns it off), or pairs
            (epoch from which on it holds, deviation): the original draws colours in epochs 0..66
            only, ((0, 0.1), (67, 0.0)). Applied in view `random` only.
        colour_divide: divide pixels by 1 + colour after that, as the original does to keep their
            scale near that of test images (convdata_jpeg.py). In view `random` only.
        mean: what is subtracted from the pixels of the training set: the mean of each `channel`,
            or the mean `picture` (paper, section 2: "the mean activity over the training set from
            each pixel"). As in the original (convdata_jpeg.py) it is the centre of the mean
            image for every crop, wherever it was cut, and never flipped. In view `whole` none is
            subtracted: subtract `view_mean` from each 224x224 view that is cut out.
        threads: host threads that decode; the default is one per core this process may use.
        prefetch: batches in flight.
        hw_decoder_load: share of a batch that the JPEG engines of a GPU decode, where it has
            some. With 0 or 1 an image's pixels do not depend on its batch; between, they do.
        strict: stop at the first damaged sample instead of replacing it.
        quarantine: file that lists damaged samples, one JSON object a line; the ranks of a
            job and later runs on the same data set may name the same one.
        ledger: folder in which this stream writes down what it delivers, for
            `pipeline.verify --ledger`; ranks and restarts name the same one.
        cache: folder for the shards of a remote set, shared by all processes of the node.
        cache_size: most bytes in it.

    Raises:
        UsageError: no data set, no such split, or a cache that cannot work.
        DataError: the set is not what its manifest says.
        SetupError: device `gpu` without a CUDA device, or a package for the store is missing.
        StoreError: the store does not answer.
        ValueError: a number out of range.
    """

    def __init__(
        self,
        data: str | os.PathLike[str], *, split: str = "train", batch_size: int = 128,
        seed: int = 0, position: int = 0, rank: int = 0, world_size: int = 1,
        device: Device = "cpu", view: View = "random", once: bool = False,
        shuffle: Shuffle = "full", window: int = 16,
        colour: Colour = 0.1, colour_divide: bool = False, mean: Mean = "channel",
        threads: int | None = None, prefetch: int = 2, hw_decoder_load: float = 1.0,
        strict: bool = False, quarantine: str | os.PathLike[str] | None = None,
        ledger: str | os.PathLike[str] | None = None,
        cache: str | os.PathLike[str] | None = None, cache_size: int = CACHE_SIZE,
    ) -> None:  # fmt: skip
        """Open a split of a data set; the arguments are explained above."""
        asked = Asked(
            split=split, batch_size=batch_size, seed=seed, position=position, rank=rank,
            world_size=world_size, device=device, view=view, once=once, shuffle=shuffle,
            window=window, colour=colour, colour_divide=colour_divide, mean=mean,
            threads=threads, prefetch=prefetch, hw_decoder_load=hw_decoder_load,
        )  # fmt: skip
        self._dataset = open_dataset(data, cache=cache, cache_size=cache_size)
        parts = Opened(asked, self._dataset)
        if is_remote(os.fspath(data)):
            parts.check_cache(cache_size)
        self._storage = parts.storage
        self.channel_mean = parts.statistics.channel_mean
        """float64 [3]: the mean of each channel over the training set."""
        self.mean = parts.recipe.subtracted
        """float32 [3, 1, 1] or [3, 224, 224]: what was subtracted, for showing images."""
        self.view_mean = parts.view_mean
        """float32 [3, 224, 224] on the host: what has yet to be subtracted from each view cut out
        of a whole image; None where all is done."""
        self.waits = WaitTimes()
        """Seconds for which `next` has been waited so far, by what was not ready. Read ahead as it
        is, a stream that is quick enough has next to none."""
        self._quarantine = Quarantine(split, Path(quarantine) if quarantine else None)
        self._reader = parts.reader(self._quarantine, strict=strict)
        self._device = torch.device("cuda" if device == "gpu" else "cpu")
        self._start = asked.starter(self._reader, self._storage.encoding)
        self._flow: Flow | None = self._start(position, self.waits)
        self._ledger: Ledger | None = None
        if ledger:
            self._ledger = self._opened(Path(ledger), parts)

    @property
    def samples(self) -> int:
        """Samples in the split, N."""
        return len(self._storage)

    @property
    def damaged(self) -> Mapping[int, Damage]:
        """The damaged samples this stream has come upon, by id."""
        return self._quarantine.known

    @property
    def read_ahead(self) -> int:
        """Batches that lay ready to be decoded when the last one was asked for, 0..prefetch.

        0: storage, checksums or the feed hold the stream back.
        """
        return self._flow.ready if self._flow else 0

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Batch:
        """Return the next batch.

        Raises:
            StopIteration: the one pass has ended.
            DataError: a sample is damaged and `strict`, or more than replacing can mend.
            StoreError: a shard could not be fetched.
            ValueError: the stream was closed.
        """
        while True:
            if self._flow is None:
                raise ValueError("this stream was closed")
            try:
                loaded, images = self._flow.run()
                break
            except DecodeFailure as failure:
                self._flow = self._without(self._flow, failure)
        start = perf_counter()
        if self._ledger is not None:
            self._ledger.record(loaded.first, loaded.due, loaded.ids, images)
        batch = Batch(
            ids=torch.from_numpy(loaded.ids),
            images=images,
            labels=torch.from_numpy(loaded.labels).to(self._device),
            weights=torch.from_numpy(loaded.weights).to(self._device),
            replaced=torch.from_numpy(loaded.ids != loaded.due),
            position=loaded.position,
        )
        self.waits.handover += perf_counter() - start
        return batch

    def close(self) -> None:
        """Stop reading and decoding, and let files and memory go. Batches stay valid."""
        if self._flow is not None:
            self._dataset.close()  # first: the reader may be waiting for a shard
            self._flow.close()
            self._flow = None
            if self._ledger is not None:
                self._ledger.close()
            self._reader.close()
            self._storage.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _opened(self, ledger: Path, parts: Opened) -> Ledger:
        """Open the ledger, or leave nothing of this stream open."""
        try:
            about = parts.asked.about(identity(self._dataset.folder), self.samples, parts.recipe)
            return Ledger(ledger, about)
        except BaseException:
            self.close()
            raise

    def _without(self, flow: Flow, failure: DecodeFailure) -> Flow:
        """Start anew at the batch that failed, without the samples that cannot be decoded."""
        samples = failure.batch.ids[failure.places].tolist()
        self._reader.report([self._storage.damage(sample, UNDECODABLE) for sample in samples])
        flow.close()
        return self._start(failure.batch.start, self.waits)
