"""Random draws of crop, flip, colour and whatever else: pure functions of (seed, epoch, sample id).

Each sample of each epoch has its own SplitMix64 generator (Steele, Lea, Flood 2014: "Fast
splittable pseudorandom number generators"), whose state is hashed from seed, epoch and sample id.
So the pixels of a sample do not depend on the batch, the rank or the thread that makes them.
A draw with a name has a generator of its own, hashed from those and the name.
`loader.BatchReader` hands the draws to the DALI graphs of `decode`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Uint64s = npt.NDArray[np.uint64]
Ids = npt.NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_WORDS = 1 << 14
"""Words that `draw_below` takes at a time: its arrays stay in a CPU's cache."""


def random_uint64(
    seed: int, epochs: Ids, ids: Ids, count: int, skip: int = 0, name: str = ""
) -> Uint64s:
    """Return numbers `skip` .. `skip + count` of each sample's generator: uniform [count, b].

    Args:
        seed: 0 or more.
        epochs: int64 [b].
        ids: int64 [b].
        count: how many numbers.
        skip: how many numbers to skip, at no cost.
        name: of the draw; each name has numbers of its own.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is the point
        start = _mix(np.array([seed], np.uint64) + _GOLDEN)
        state = _mix(_mix(start + epochs.astype(np.uint64)) + ids.astype(np.uint64))
        if name:
            word = hashlib.sha256(name.encode()).digest()[:8]
            state = _mix(state + np.uint64(int.from_bytes(word, "little")))
        steps = np.arange(skip + 1, skip + count + 1, dtype=np.uint64) * _GOLDEN
        return _mix(state + steps[:, None])  # one by one they took five times as long


def scale_to_range(word: Uint64s, limit: int | Ids) -> Ids:
    """Return whole numbers 0..limit-1 (limit at most 2**32), uniform to within limit / 2**32."""
    most = np.asarray(limit).astype(np.uint64)
    return ((word >> np.uint64(32)) * most >> np.uint64(32)).astype(np.int64)


def to_unit(word: Uint64s) -> npt.NDArray[np.float64]:
    """Return numbers 0 <= u < 1, uniform over the multiples of 2**-53."""
    return (word >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(word: Uint64s) -> Uint64s:
    """SplitMix64's finalizer: a bijection of 64-bit words in which every bit matters."""
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


DRAW_WORDS = 7
"""Random numbers that the draws of a sample take. `order.choose_substitute` uses the numbers that
follow: a change of this changes which samples replace damaged ones."""

Floats = npt.NDArray[np.float64]


class Draws(NamedTuple):
    """The random choices of a batch of b samples."""

    x: Ids
    """[b] left edge of the crop in pixels, 0 to the border's width."""
    y: Ids
    """[b] upper edge of the crop in pixels, 0 to the border's height."""
    flip: npt.NDArray[np.bool_]
    """[b] mirror left to right."""
    color: Floats
    """[b, 3] standard normal, one per principal component (the paper's alpha / 0.1)."""


def draw(
    seed: int,
    epochs: Ids,
    ids: Ids,
    border: tuple[int | Ids, int | Ids] = (32, 32),
    flip: float = 0.5,
) -> Draws:
    """Return the draws of samples `ids` in `epochs` (both int64 [b]).

    Paper, section 4.1: random 224x224 patches and their reflections, and three colour draws
    "each alpha is drawn only once for all the pixels of a particular training image until that
    image is used for training again".

    Args:
        seed: 0 or more.
        epochs: int64 [b].
        ids: int64 [b].
        border: height and width by which the stored image is larger than the crop, of all samples
            or int64 [b].
        flip: probability of a reflection.
    """
    drawn = random_uint64(seed, epochs, ids, DRAW_WORDS)
    return Draws(
        x=scale_to_range(drawn[0], border[1] + 1),
        y=scale_to_range(drawn[1], border[0] + 1),
        flip=to_unit(drawn[2]) >= 1 - flip,
        color=np.stack([_normal(*drawn[3:5])[0], *_normal(*drawn[5:7])], axis=1),
    )


ATTEMPTS = 10
"""Regions that `draw_regions` tries, as torchvision does."""


class Regions(NamedTuple):
    """Parts of stored images, in pixels."""

    start: npt.NDArray[np.int32]
    """[b, 2] upper and left edge."""
    shape: npt.NDArray[np.int32]
    """[b, 2] height and width, 1 or more."""


def draw_regions(
    seed: int,
    epochs: Ids,
    ids: Ids,
    stored: tuple[int | Ids, int | Ids],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Regions:
    """Return a random part of each sample: Inception's crop, in the words of torchvision.

    Szegedy et al. 2015 ("Going deeper with convolutions", section 6) draw a share of the area and
    an aspect ratio; `torchvision.transforms.RandomResizedCrop.get_params` draws up to ten times
    until the region lies inside, and takes the largest central one of an allowed ratio then.

    Args:
        seed: 0 or more.
        epochs: int64 [b].
        ids: int64 [b].
        stored: height and width of the stored images in pixels, of all samples or int64 [b].
        scale: smallest and largest share of the area, of 1.
        ratio: smallest and largest width of a region by its height; its logarithm is uniform.
    """
    rows, columns = (np.broadcast_to(np.asarray(side, np.int64), len(ids)) for side in stored)
    drawn = random_uint64(seed, epochs, ids, 2 * ATTEMPTS + 2, name="resized crop")
    units = to_unit(drawn[: 2 * ATTEMPTS])
    area = rows * columns * (scale[0] + units[0::2] * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    # exp differs in the last bit between processors: keep only bits that do not.
    aspect = _coarsen(np.exp(low + units[1::2] * (high - low)))
    widths = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    heights = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (widths > 0) & (widths <= columns) & (heights > 0) & (heights <= rows)
    first, every = fits.argmax(0), np.arange(len(ids))
    width, height = widths[first, every], heights[first, every]
    top = scale_to_range(drawn[-2], rows - height + 1)
    left = scale_to_range(drawn[-1], columns - width + 1)
    if (lost := ~fits.any(0)).any():
        rows, columns = rows[lost], columns[lost]
        width[lost], height[lost] = _fit_ratio(rows, columns, ratio)
        top[lost], left[lost] = (rows - height[lost]) // 2, (columns - width[lost]) // 2
    start, shape = np.stack([top, left], 1), np.stack([height, width], 1)
    return Regions(start.astype(np.int32), shape.astype(np.int32))


def _fit_ratio(rows: Ids, columns: Ids, ratio: tuple[float, float]) -> tuple[Ids, Ids]:
    """Return width and height of the largest region of an allowed ratio, int64 [n] each."""
    shape = columns / rows
    widths = np.where(shape > ratio[1], np.rint(rows * ratio[1]), columns)
    heights = np.where(shape < ratio[0], np.rint(columns / ratio[0]), rows)
    # 1 at least: the largest region of an image one pixel high may round to none.
    widths, heights = np.maximum(widths, 1), np.maximum(heights, 1)
    return np.minimum(columns, widths).astype(np.int64), np.minimum(rows, heights).astype(np.int64)


@dataclass(frozen=True)
class NamedDraw:
    """A random number of each sample, which an augmentation has asked for by a name."""

    name: str
    kind: Literal["uniform", "normal", "choice", "index", "boolean"]
    values: tuple[float, ...]
    """Lowest and highest value; mean and deviation; what is chosen from; number of places; or
    probability of true."""
    count: int = 0
    """Numbers of a sample; 0: one number, not a vector."""

    @property
    def dtype(self) -> type[np.float32 | np.int32 | np.bool_]:
        """Type of the values."""
        return {"boolean": np.bool_, "index": np.int32}.get(self.kind, np.float32)

    def compute(self, seed: int, epochs: Ids, ids: Ids) -> npt.NDArray[Any]:
        """Return the values of samples `ids` in `epochs` (both int64 [b]): [b] or [b, count]."""
        count = self.count or 1
        words = random_uint64(seed, epochs, ids, 2 * count, name=f"augment {self.name}")
        columns: list[npt.NDArray[Any]]
        if self.kind == "normal":
            mean, deviation = self.values
            pairs = zip(words[0::2], words[1::2], strict=True)
            columns = [mean + deviation * _normal(*pair)[0] for pair in pairs]
        elif self.kind == "uniform":
            low, high = self.values
            columns = [low + (high - low) * to_unit(word) for word in words[0::2]]
        elif self.kind == "index":
            columns = [scale_to_range(word, int(self.values[0])) for word in words[0::2]]
        elif self.kind == "choice":
            among = np.array(self.values)
            columns = [among[scale_to_range(word, len(among))] for word in words[0::2]]
        else:
            columns = [to_unit(word) >= 1 - self.values[0] for word in words[0::2]]
        return (np.stack(columns, 1) if self.count else columns[0]).astype(self.dtype)


class Draw:
    """Random numbers for an augmentation: one value a sample for each name.

    A value is a pure function of (seed, epoch, sample, name), so it is the same for any number of
    ranks and threads and after any restart. Each method returns a DALI node: a scalar for each
    sample, or a vector of `count` of them. The same name twice gives the same node.

    Raises:
        ValueError: a range that is none, or a name that was used for another draw.
    """

    def __init__(self, make_node: Callable[[NamedDraw], Any]) -> None:
        """Args: what makes the node of a draw, called once for each name."""
        self._make_node = make_node
        self.drawn: dict[str, tuple[NamedDraw, Any]] = {}
        """Draw and node of each name that was asked for."""

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0, *, count: int = 0) -> Any:
        """Return numbers between `low` and `high`, float32."""
        if not low <= high or not math.isfinite(high - low):
            raise ValueError(f"draw {name!r} is from {low} to {high}; the first must be lower")
        return self._find(name, "uniform", (low, high), count)

    def normal(self, name: str, mean: float = 0.0, std: float = 1.0, *, count: int = 0) -> Any:
        """Return normally distributed numbers, float32."""
        if not (std >= 0 and math.isfinite(mean + std)):
            raise ValueError(f"draw {name!r} has mean {mean} and std {std}; std is 0 or more")
        return self._find(name, "normal", (mean, std), count)

    def choice(self, name: str, options: Sequence[float] | int, *, count: int = 0) -> Any:
        """Return one of `options`, float32, each as likely; of a number n, 0..n-1, int32."""
        values: tuple[float, ...]
        if isinstance(options, int | np.integer):
            kind, values, places = "index", (float(options),), int(options)
        else:
            kind, values, places = "choice", tuple(map(float, options)), len(options)
        if places < 1:
            raise ValueError(f"draw {name!r} has nothing to choose from")
        return self._find(name, kind, values, count)

    def boolean(self, name: str, probability: float = 0.5, *, count: int = 0) -> Any:
        """Return true with a probability, else false: bool."""
        if not 0 <= probability <= 1:
            raise ValueError(f"draw {name!r} has probability {probability}; it must be from 0 to 1")
        return self._find(name, "boolean", (probability,), count)

    def _find(self, name: str, kind: Any, values: tuple[float, ...], count: int) -> Any:
        """Return the node of a name."""
        if type(count) is not int or count < 0:
            raise ValueError(
                f"draw {name!r} has count {count!r}; it is a whole number, 0 for a scalar"
            )
        new = NamedDraw(name, kind, values, count)
        known, node = self.drawn.get(name, (None, None))
        if known is None:
            node = self._make_node(new)
            self.drawn[name] = new, node
        elif known != new:
            raise ValueError(f"draw {name!r} is asked for twice, and differently; name one anew")
        return node


def compute_color_shift(color: Floats, basis: Floats) -> Floats:
    """Return the RGB shift [b, 3] of draws [b, 3].

    Args:
        color: the draws.
        basis: components in columns, [3, 3], or [b, 3, 3] for a basis of each sample.
    """
    # A sum in a fixed order: a matrix product may round otherwise for another batch size.
    shift: Floats = color[:, :1] * basis[..., 0]
    shift += color[:, 1:2] * basis[..., 1]
    shift += color[:, 2:3] * basis[..., 2]
    return shift


def _normal(first: Uint64s, second: Uint64s) -> tuple[Floats, Floats]:
    """Return two standard normals per pair of numbers (Box and Muller 1958)."""
    unit = 2.0**-53
    radius = np.sqrt(-2 * np.log(((first >> np.uint64(11)).astype(np.float64) + 0.5) * unit))
    angle = 2 * np.pi * to_unit(second)
    # log and cos differ in the last bit between processors: keep only bits that do not.
    return _coarsen(radius * np.cos(angle)), _coarsen(radius * np.sin(angle))


def _coarsen(numbers: Floats) -> Floats:
    """Return numbers rounded to a millionth (2**-20)."""
    coarse = 2.0**20
    return np.round(numbers * coarse) / coarse


def draw_below(
    generator: np.random.Generator, limit: int, count: int
) -> Iterator[npt.NDArray[np.uint16]]:
    """Yield the numbers of `generator.integers(0, limit, count, np.uint16)`, a block at a time.

    NumPy's generator makes them all at once, two bytes each; blocks cannot be asked of it one after
    the other, for it drops the rest of a word at the end of each call. Lemire's method, as
    docs/format.md has it: about 2 ns a number.

    Args:
        generator: a new one, of PCG64.
        limit: 1 above the largest number, at most 2**16 - 1.
        count: of numbers.
    """
    least = 2**16 % limit
    while count:
        words = generator.bit_generator.random_raw(min(_WORDS, count // 4 + 1))
        halves = words.astype("<u8", copy=False).view("<u2")
        products = halves * np.uint32(limit)
        kept = products.astype(np.uint16) >= least
        drawn = (products >> np.uint32(16)).astype(np.uint16)
        drawn = (drawn if kept.all() else drawn[kept])[:count]
        count -= len(drawn)
        yield drawn
