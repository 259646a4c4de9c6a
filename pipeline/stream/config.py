"""Settings of a stream: which samples it delivers, how their pixels are made, what it runs on."""

from __future__ import annotations

import itertools
import math
import operator
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, get_args

from pipeline.dataset.segments import Segments, parse_versions
from pipeline.tools.units import CACHE_SIZE

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from pipeline.stream.augment import Draw

Crop = Literal["random", "resized", "center", "whole"]
Shuffle = Literal["full", "block"]
Mean = Literal["channel", "image"]
Device = Literal["cpu", "gpu"]
Dtype = Literal["float32", "float16", "bfloat16", "uint8"]
Layout = Literal["NCHW", "NHWC"]
Triple = tuple[float, float, float]
Range = tuple[float, float]
Augmentation = Callable[[Any, "Draw"], Any]
"""Graph of DALI nodes: from images, uint8 [height, width, 3], and random draws to images of the
same shape, uint8 or float32."""
Color = float | Sequence[tuple[int, float]]
"""Standard deviation of the colour draws, in those of the training images, 0 or more: one for all
epochs, or pairs (first epoch, deviation) whose epochs rise from 0."""

COUNTS = (
    "batch_size", "seed", "split_seed", "position", "rank", "world_size", "window", "threads",
    "prefetch",
)  # fmt: skip
"""Settings that are whole numbers."""
CHOICES = {"crop": Crop, "shuffle": Shuffle, "dtype": Dtype, "layout": Layout}
CROP = 224
"""Height and width of a training crop in the paper, in pixels."""
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
MAX_SIZE = 4096
"""Largest height and width of a delivered image, in pixels."""


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

        mean="image", colour=((0, 0.1), (67, 0.0)), colour_divide=True

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    split: str = "train"
    """Split that is delivered: `train`, `val`, or a part that `split_by` names."""
    version: int | str | Segments | None = None
    """Version of the data set, by its number, or its identity or eight digits of that; None: the
    newest. Or several as `segments` has them: one after the other, each from the border of an epoch
    on, normalized by the statistics of the first; with `once` the last one alone."""
    where: Mapping[str, Any] | npt.NDArray[np.bool_] | None = field(default=None, compare=False)
    """Samples that take part: a mask, bool [N] in stored order; or what all of them have, each one
    value, several, or a function that gets the values of all N samples and returns bool [N]:

        {"class": ["tench", "goldfish"]}        names or titles of classes
        {"label": [0, 1]}                       or labels
        {"key": "00001*"}                       keys, by patterns of `fnmatch`
        {"name": "*/n01440764/*"}               original file names, by such patterns
        {"height": lambda height: height > 300} height or width of the stored image, in pixels
        {"year": lambda year: year > 2010}      any other name is a column of `table`
    """
    table: str | os.PathLike[str] | None = None
    """Table with columns for `where` and `group`: CSV, TSV, JSON lines or Parquet, with a row for
    each sample, which is found by the column `id`, `key` or `name`."""
    split_by: Mapping[str, float] | None = None
    """Parts drawn from the stored split `train`, with their shares: {"train": 0.9, "val": 0.1};
    `split` then names one of them. A sample's part follows from `split_seed`, the sample, and the
    shares in the order of the mapping."""
    split_seed: int = 0
    """Seed of `split_by`, apart from `seed`: runs with other seeds keep their parts."""
    group: str | None = None
    """Column of `table`: samples with the same value get the same part of `split_by`."""
    weights: Literal["balanced"] | npt.ArrayLike | None = field(default=None, compare=False)
    """Draw samples with replacement, N to an epoch: by numbers, 0 or more, [N] in stored order; or
    `balanced`: each class as likely as any other. None: each sample once an epoch."""
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
    device: str = "cpu"
    """Device on which pixels are made and left: `cpu`; `gpu` or `cuda` for the current CUDA device,
    `cuda:1` for that one; or a `torch.device`."""
    crop: Crop = "random"
    """Part of an image that is delivered.

    random    a square anywhere, flipped and coloured (training, as in the paper)
    resized   a part of random area and aspect ratio, resized to `size`; flipped and coloured
              (training, as in torchvision's RandomResizedCrop)
    center    the middle (evaluation)
    whole     all of the stored image (for ten views, of `size` each); only where images are squares
              of one size
    """
    size: int | tuple[int, int] = CROP
    """Height and width of a delivered image in pixels, or one number for both."""
    scale: Range = (0.08, 1.0)
    """Smallest and largest share of an image's area in crop `resized`, above 0 and at most 1."""
    ratio: Range = (3 / 4, 4 / 3)
    """Smallest and largest width of a crop `resized` by its height, before it is resized."""
    flip: float = 0.5
    """Probability of a mirrored image in crops `random` and `resized`."""
    augment: Augmentation | None = None
    """Augmentation of your own: a function of DALI nodes that gets the crop, uint8 [height, width,
    3], before it is flipped and normalized, and a `Draw` of random numbers by name. Python's `if`
    on a node acts on each sample (DALI's conditional execution)."""
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
    deviation): the source draws colours in epochs 0..66 only. Used in crops `random` and `resized`
    only."""
    colour_divide: bool = False
    """Divide pixels by 1 + colour at the end, which keeps their scale near that of test images.
    Used in crops `random` and `resized` only."""
    mean: Mean | Triple | None = "channel"
    """Mean that is subtracted: the training set's of each `channel`; three numbers, in grey levels
    0..255; None for nothing; or the training set's mean `image` (paper, section 2: "the mean
    activity over the training set from each pixel"). The mean image's center is subtracted from
    every crop, wherever it was cut and whether flipped or not. With crop `whole` nothing is
    subtracted then: subtract `Stream.view_mean` from each view that is cut out."""
    std: Literal["channel"] | Triple | None = None
    """Divisor of what the mean leaves: the training set's standard deviation of each
    `channel`; three numbers, in grey levels; None for nothing."""
    dtype: Dtype | None = None
    """Type of the pixels, also as a `torch.dtype`; None: float32 on a CPU, float16 on a GPU.
    `uint8` needs mean=None, std=None and colour=0: pixels as they were stored."""
    layout: Layout = "NCHW"
    """Order of the pixels in memory: NHWC is torch's `channels_last`. The shape of a batch is
    [b, 3, height, width] in either."""
    fields: Sequence[str] = ()
    """Other members of each sample that come with it, by their endings: `("json", "txt")`. The set
    needs a table of each (`--fields` of the command that made it)."""
    masks: Sequence[str] = ()
    """Members that are masks, PNGs of one channel and 8 bits as large as the image, by their
    endings: `("seg.png",)`. They are cut, resized (to the nearest pixel) and flipped with it."""
    labels: Any = field(default="class", compare=False)
    """Labels: `class`, places in the list of classes; an array float32 or int64, [N] or [N, k], by
    sample id, or the path of a `.npy` with one; None for no labels (each is -1)."""
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
        """Bring settings to one spelling, and check every one that has a range or a choice."""
        self._convert()
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in (words := get_args(choices)) and (name, value) != ("dtype", None):
                raise ValueError(f"{name} is {value!r}; it takes {', '.join(words)}")
        for name, value, low, high in (
            ("batch_size", self.batch_size, self.world_size, MAX_BATCH),
            ("prefetch", self.prefetch, 1, MAX_PREFETCH),
            ("position", self.position, 0, MAX_POSITION),
            ("hw_decoder_load", self.hw_decoder_load, 0, 1),
            ("threads", self.threads or 0, 0, MAX_THREADS),
            ("window", self.window, 1, MAX_WINDOW),
            ("seed", self.seed, 0, 2**63 - 1),
            ("split_seed", self.split_seed, 0, 2**63 - 1),
            ("flip", self.flip, 0, 1),
        ):
            if not low <= value <= high:  # a NaN is in no range
                raise ValueError(f"{name} is {value!r:.40}; it must be from {low} to {high}")
        _ = self.color_plan, self.span
        self._check_version()
        self._check_fields()
        self._check_shape()
        self._check_normalization()
        self._check_selection()

    def _convert(self) -> None:
        """Bring settings to one spelling: numbers and arrays of other libraries, names of devices.

        Raises:
            ValueError: one is no whole number, or no device.
        """
        for name in COUNTS:
            if (value := getattr(self, name)) is None and name == "threads":
                continue
            try:
                self._set(name, operator.index(value))
            except TypeError as error:
                raise ValueError(f"{name} is {value!r:.40}; it is a whole number") from error
        device = str(self.device)
        self._set("device", {"cuda": "gpu", "cpu:0": "cpu"}.get(device, device))
        if not re.fullmatch("cpu|gpu|cuda:[0-9]+", self.device):
            raise ValueError(f"device is {self.device!r}; it takes cpu, gpu, cuda, or cuda:NUMBER")
        self._set("dtype", self.dtype and str(self.dtype).removeprefix("torch."))
        for name in ("mean", "std", "scale", "ratio", "size", "fields", "masks"):
            value = getattr(self, name)
            value = value.tolist() if hasattr(value, "tolist") else value  # an array
            if isinstance(value, Sequence) and not isinstance(value, str):
                value = tuple(value)
            self._set(name, value)
        if isinstance(self.size, tuple) and len(set(self.size)) == 1 and len(self.size) == 2:
            self._set("size", self.size[0])
        if self.dtype == ("float16" if self.on_gpu else "float32"):
            self._set("dtype", None)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # only while it is being made

    def _check_version(self) -> None:
        """Bring the version to one spelling.

        Raises:
            ValueError: it is none, or its segments do not go with another setting.
        """
        self._set("version", parse_versions(self.version))
        for name in ("where", "split_by", "weights"):
            if self.segments and getattr(self, name) is not None:
                raise ValueError(
                    f"version has {len(self.segments)} segments, which do not go with {name}; "
                    "name one version"
                )
        if self.segments and not isinstance(self.labels, str | None):
            raise ValueError("version has segments, which do not go with labels of your own")

    def _check_shape(self) -> None:
        """Check the settings that say which part of an image is delivered, and how large.

        Raises:
            ValueError: one is out of range; the message names it.
        """
        sides = self.size if isinstance(self.size, tuple) else (self.size, self.size)
        if len(sides) != 2 or not all(type(n) is int and 1 <= n <= MAX_SIZE for n in sides):
            raise ValueError(
                f"size is {self.size!r}; it takes one number of pixels, or height and width, "
                f"from 1 to {MAX_SIZE}"
            )
        for name, given, most in (("scale", self.scale, 1.0), ("ratio", self.ratio, math.inf)):
            low, high = given if isinstance(given, tuple) and len(given) == 2 else (0, 0)
            if not 0 < low <= high <= most or math.isinf(high):
                raise ValueError(
                    f"{name} is {given!r}; it takes two rising numbers above 0"
                    + (f", up to {most:g}" if most < math.inf else "")
                )
        if self.mean == "image" and self.crop == "resized":
            raise ValueError(
                "mean is 'image', which does not fit parts of other sizes: crop resized takes "
                "mean='channel', three numbers or None"
            )

    def _check_fields(self) -> None:
        """Check the names of other members.

        Raises:
            ValueError: one is no ending; the message names it.
        """
        from pipeline.dataset.samples import is_field

        for name in ("fields", "masks"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(map(is_field, value)):
                raise ValueError(
                    f"{name} is {value!r}; it takes endings in small letters, as ('json', 'txt')"
                )
        if wrong := [name for name in self.masks if not f".{name}".endswith(".png")]:
            raise ValueError(f"masks has {wrong[0]!r}; a mask is a PNG, as 'seg.png'")

    def _check_normalization(self) -> None:
        """Check mean and divisor, and that they go with the type of the pixels.

        Raises:
            ValueError: one is out of range; the message names it.
        """
        for name, words in (("mean", ("channel", "image")), ("std", ("channel",))):
            value = getattr(self, name)
            if value is None or value in words:
                continue
            numbers = isinstance(value, tuple) and all(isinstance(n, Real) for n in value)
            if not numbers or len(value) != 3 or not all(map(math.isfinite, value)):
                known = " or ".join(map(repr, words))
                raise ValueError(f"{name} is {value!r}; it takes {known}, three numbers, or None")
            if name == "std" and min(value) <= 0:
                raise ValueError(f"std is {value}; it takes numbers above 0")
            if name == "mean" and 0 < max(value) <= 1:
                levels = ", ".join(f"{255 * one:.2f}" for one in value)
                raise ValueError(f"mean is {value}; it is in grey levels 0..255: ({levels})?")
        color = self.augments and max(self.color_plan.values) > 0
        if self.pixel_dtype == "uint8" and (self.mean, self.std, color) != (None, None, False):
            raise ValueError(
                "dtype uint8 holds pixels as they were stored: it goes with mean=None, std=None "
                "and colour=0"
            )

    def _check_selection(self) -> None:
        """Check which samples are asked for, as far as that goes without a dataset.

        Raises:
            ValueError: a setting that is none, or two that do not go together.
        """
        if isinstance(self.weights, str) and self.weights != "balanced":
            raise ValueError(f"weights is {self.weights!r}; it takes 'balanced', or an array")
        for name, value in (("shuffle", self.shuffle == "block"), ("once", self.once)):
            if self.weights is not None and value:
                raise ValueError(
                    f"weights draws any sample at any time: it does not go with {name}="
                    f"{getattr(self, name)!r}"
                )
        if self.split_by is None:
            for name in ("group", "split_seed"):
                if getattr(self, name):
                    raise ValueError(f"{name} is {getattr(self, name)!r}, and split_by is not set")
            return
        shares = list(self.split_by.values()) if isinstance(self.split_by, Mapping) else [0]
        if not all(isinstance(share, Real) and 0 < share < math.inf for share in shares):
            raise ValueError(f"split_by is {self.split_by!r}; it takes names with shares above 0")
        if self.split not in self.split_by:
            names = ", ".join(map(repr, self.split_by))
            raise ValueError(f"split is {self.split!r}, and split_by names {names}")

    @property
    def segments(self) -> Segments:
        """Segments, if `version` has several."""
        return self.version if isinstance(self.version, tuple) else ()

    @property
    def stored_split(self) -> str:
        """Split of the dataset that is read."""
        return self.split if self.split_by is None else "train"

    @property
    def order_name(self) -> str:
        """Name of the order with its settings: `full`, `block 16`, or `stored` for one pass."""
        if self.once:
            return "stored"
        return f"block {self.window}" if self.shuffle == "block" else "full"

    @property
    def on_gpu(self) -> bool:
        """True if pixels are made on a GPU."""
        return self.device != "cpu"

    @property
    def pixel_dtype(self) -> Dtype:
        """Type of the delivered pixels."""
        return self.dtype or ("float16" if self.on_gpu else "float32")

    @property
    def augments(self) -> bool:
        """True if crops are random, flipped and coloured."""
        return self.crop in ("random", "resized")

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
    def is_divided(self) -> bool:
        """True if pixels are divided by 1 + colour."""
        return self.colour_divide and self.augments

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the delivered images in pixels.

        For crop `whole` the reader of a data set takes the size of its images in place of `size`.
        """
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)

    @property
    def pixels(self) -> str:
        """Settings that change pixels besides crop, colour and mean, where they are no defaults.

        An augmentation is known by its name alone.
        """
        names = ("size", "scale", "ratio", "flip", "augment", "std", "dtype", "layout")
        defaults = {one.name: one.default for one in fields(self)}
        values = {name: getattr(self, name) for name in names}
        return " ".join(
            f"{name}={getattr(value, '__qualname__', value)}"
            for name, value in values.items()
            if value != defaults[name] and (name, self.crop) != ("size", "whole")
        )


def split_batch(count: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the half-open range of a global batch of `count` that rank `rank` gets.

    The ranges of all ranks are disjoint, in rank order, cover the batch, and differ in length by
    at most one.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in a world of {world_size}")
    return count * rank // world_size, count * (rank + 1) // world_size
