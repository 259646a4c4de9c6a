"""Settings of a stream: which samples it delivers, how their pixels are made, what it runs on."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from pipeline.tools.units import CACHE_SIZE

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

View = Literal["random", "centre", "whole"]
Shuffle = Literal["full", "block"]
Mean = Literal["channel", "picture"]
Device = Literal["cpu", "gpu"]
Color = float | Sequence[tuple[int, float]]
"""Standard deviation of the colour draws, in those of the training images, 0 or more: one for all
epochs, or pairs (first epoch, deviation) whose epochs rise from 0."""

CHOICES = {"view": View, "shuffle": Shuffle, "mean": Mean, "device": Device}
MAX_THREADS = 1024
"""Largest number of host threads a stream accepts."""
MAX_BATCH = 2**20
"""Most samples in a batch of the whole job."""
MAX_PREFETCH = 1000
"""Most batches that are read, or decoded, ahead of need."""
MAX_WINDOW = 10**6
"""Most shards in a window of the block shuffle."""
MAX_POSITION = 2**62
"""Largest position of a stream."""
MAX_COLOR = 1000.0
"""Largest standard deviation of the colour draws."""


@dataclass(frozen=True)
class ColorPlan:
    """Standard deviation of the colour draws in each epoch."""

    starts: tuple[int, ...]
    """First epoch of each stretch of epochs, rising from 0."""
    values: tuple[float, ...]
    """Standard deviation in each stretch, 0 or more."""

    @classmethod
    def of(cls, color: Color) -> ColorPlan:
        """Read a number, or pairs (epoch, number).

        Raises:
            ValueError: a number that is negative or not finite, or epochs that do not rise from 0.
        """
        pairs = ((0, color),) if isinstance(color, int | float) else color
        try:
            starts, values = zip(*((start, float(value)) for start, value in pairs), strict=True)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"colour is {color!r}; it takes a number, or pairs such as ((0, 0.1), (67, 0.0))"
            ) from error
        if not all(math.isfinite(value) and value >= 0 for value in values):
            raise ValueError(f"out of range: colour={color}; it takes finite numbers, 0 or more")
        rising = all(a < b for a, b in itertools.pairwise(starts))
        if any(type(start) is not int for start in starts) or starts[0] != 0 or not rising:
            raise ValueError(
                f"out of range: colour={color}; its epochs are whole numbers that rise from 0"
            )
        if max(values) > MAX_COLOR or starts[-1] > MAX_POSITION:
            raise ValueError(
                f"out of range: colour={color}; it takes numbers up to {MAX_COLOR:g}, in epochs "
                f"up to {MAX_POSITION}"
            )
        return cls(starts, values)

    @property
    def given(self) -> float | tuple[tuple[int, float], ...]:
        """The plan as `Color`: a number, or pairs."""
        if len(self.starts) == 1:
            return self.values[0]
        return tuple(zip(self.starts, self.values, strict=True))

    def find_stretches(self, epochs: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the number of the stretch, from 0, that each of `epochs` (int64 [b]) lies in."""
        import numpy as np  # here: the settings are read where no pixel is

        return np.searchsorted(self.starts, epochs, side="right") - 1


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """Settings of one rank's stream, checked when it is made.

    The mean image, the colours by epoch and `colour_divide` follow the released source of 2012
    (convdata_jpeg.py); the defaults are those that cost nothing. The source's own are

        mean="picture", colour=((0, 0.1), (67, 0.0)), colour_divide=True

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    split: str = "train"
    """`train` or `val`."""
    batch_size: int = 128
    """Samples in a batch of the whole job; each rank gets its contiguous slice of every batch."""
    seed: int = 0
    """Seed of order and augmentation, 0..2**63-1."""
    position: int = 0
    """Samples that the whole job has consumed before (`Batch.position`)."""
    rank: int = 0
    """This rank, 0..world_size-1."""
    world_size: int = 1
    """Ranks that share each batch."""
    device: Device = "cpu"
    """Device on which pixels are made and left: `cpu`, or `gpu` for the current CUDA device."""
    view: View = "random"
    """`random` crop, flip and colour (training); `centre` crop (evaluation); `whole` 256x256 image
    (for ten views)."""
    once: bool = False
    """Deliver each sample exactly once in stored order, pad the last batch with rows of weight 0,
    then end. Otherwise the stream is shuffled and endless, and every batch is full."""
    shuffle: Shuffle = "full"
    """`full`: each epoch is a permutation of all samples, each read by itself. `block`: each epoch
    is a permutation of the shards, with samples mixed within windows of `window` shards, so that
    only two windows of shards are needed on this node at a time."""
    window: int = 16
    """Shards in a window of the block shuffle, at least 1."""
    colour: Color = 0.1
    """Standard deviation of the paper's PCA colour draws (0 turns them off), or pairs (first epoch,
    deviation): the source draws colours in epochs 0..66 only. Used in view `random` only."""
    colour_divide: bool = False
    """Divide pixels by 1 + colour at the end, which keeps their scale near that of test images.
    Used in view `random` only."""
    mean: Mean = "channel"
    """Mean that is subtracted: the training set's of each `channel`, or its mean `picture` (paper,
    section 2: "the mean activity over the training set from each pixel"). The mean image's center
    is subtracted from every crop, wherever it was cut and whether flipped or not. In view `whole`
    nothing is subtracted: subtract `Stream.view_mean` from each 224x224 view that is cut out."""
    threads: int | None = None
    """Host threads that decode; None: one per core this process may use."""
    prefetch: int = 2
    """Batches that are read, and batches that are decoded, ahead of need; at least 1."""
    hw_decoder_load: float = 1.0
    """Fraction 0..1 of a batch that the JPEG engines of a GPU decode, where it has some; CUDA
    decodes the rest. Between 0 and 1 the batch decides which images go where, and their pixels
    differ a little by that."""
    strict: bool = False
    """Raise at the first damaged sample instead of replacing it."""
    quarantine: str | os.PathLike[str] | None = None
    """File that lists damaged samples, one JSON object a line; the ranks of a job and later runs
    on the same dataset may share it."""
    ledger: str | os.PathLike[str] | None = None
    """Folder in which the stream records what it delivers, for `pipeline.verify --ledger`; ranks
    and restarts share it."""
    cache: str | os.PathLike[str] | None = None
    """Folder for the shards of a remote dataset, shared by all processes of the node; None:
    `duet` in the user's cache."""
    cache_size: int = CACHE_SIZE
    """Largest size of the cache in bytes."""

    def __post_init__(self) -> None:
        """Check every setting that has a range or a choice."""
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in (words := get_args(choices)):
                raise ValueError(f"{name} is {value!r}; it takes {', '.join(words)}")
        for name, value, low, high in (
            ("batch_size", self.batch_size, self.world_size, MAX_BATCH),
            ("prefetch", self.prefetch, 1, MAX_PREFETCH),
            ("position", self.position, 0, MAX_POSITION),
            ("hw_decoder_load", self.hw_decoder_load, 0, 1),
            ("threads", self.threads or 0, 0, MAX_THREADS),
            ("window", self.window, 1, MAX_WINDOW),
            ("seed", self.seed, 0, 2**63 - 1),
        ):
            if not low <= value <= high:  # a NaN is in no range
                raise ValueError(f"{name} is {value!r:.40}; it must be from {low} to {high}")
        _ = self.color_plan, self.span

    @property
    def span(self) -> tuple[int, int]:
        """This rank's part of each batch: a half-open range within 0..batch_size."""
        return split_batch(self.batch_size, self.rank, self.world_size)

    @property
    def slice_size(self) -> int:
        """Samples in this rank's part of a batch."""
        first, last = self.span
        return last - first

    @property
    def color_plan(self) -> ColorPlan:
        """`colour` by epoch."""
        return ColorPlan.of(self.colour)

    @property
    def divides(self) -> bool:
        """True if pixels are divided by 1 + colour."""
        return self.colour_divide and self.view == "random"

    @property
    def image_size(self) -> int:
        """Height and width of the delivered images in pixels: 224, or 256 for whole images."""
        from pipeline.dataset.images import SIZE
        from pipeline.stream.augment import CROP

        return SIZE if self.view == "whole" else CROP


def split_batch(count: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the half-open range of a global batch of `count` that rank `rank` gets.

    The ranges of all ranks are disjoint, in rank order, cover the batch, and differ in length by
    at most one.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in a world of {world_size}")
    return count * rank // world_size, count * (rank + 1) // world_size
