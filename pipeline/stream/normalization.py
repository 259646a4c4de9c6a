"""What becomes of an image on its way to the network: what is subtracted, how strong colours are.

Defaults are those that cost nothing; the recipe behind the paper's numbers, as the released source
has it, is

    mean="picture", colour=((0, 0.1), (67, 0.0)), colour_divide=True
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipeline.dataset.image_stats import Statistics
from pipeline.stream.augment import BORDER, CROP, tint

Mean = Literal["channel", "picture"]
Colour = float | Sequence[tuple[int, float]]
"""Standard deviation of the colour draws, in those of the training images, 0 or more: one for all
epochs, or pairs (epoch from which on it holds, deviation), the first of them from epoch 0 on."""


@dataclass(frozen=True)
class ColourPlan:
    """How strong the colour draws are, epoch by epoch."""

    starts: tuple[int, ...]
    """First epoch of each stretch, rising from 0."""
    values: tuple[float, ...]
    """Standard deviation in each."""

    @classmethod
    def of(cls, colour: Colour) -> ColourPlan:
        """Read a number, or pairs (epoch, number).

        Raises:
            ValueError: a number that is negative or not finite, or epochs that do not rise from 0.
        """
        pairs = ((0, colour),) if isinstance(colour, int | float) else colour
        try:
            starts, values = zip(*((start, float(value)) for start, value in pairs), strict=True)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"colour is {colour!r}; it takes a number, or pairs such as ((0, 0.1), (67, 0.0))"
            ) from error
        if not all(math.isfinite(value) and value >= 0 for value in values):
            raise ValueError(f"out of range: colour={colour}; it takes finite numbers, 0 or more")
        rising = all(a < b for a, b in itertools.pairwise(starts))
        if any(type(start) is not int for start in starts) or starts[0] != 0 or not rising:
            raise ValueError(
                f"out of range: colour={colour}; its epochs are whole numbers that rise from 0"
            )
        return cls(starts, values)

    @property
    def given(self) -> float | tuple[tuple[int, float], ...]:
        """The plan as one would write it: a number, or pairs."""
        if len(self.starts) == 1:
            return self.values[0]
        return tuple(zip(self.starts, self.values, strict=True))

    def stretches(self, epochs: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return in which stretch each of `epochs` (int64 [b]) lies, counted from 0."""
        return np.searchsorted(self.starts, epochs, side="right") - 1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All numbers that the pixels of a sample follow from, besides its draws."""

    random: bool
    """Random crop, flip and colour; otherwise the centre."""
    channel_mean: npt.NDArray[np.float64]
    """[3]: subtracted from every pixel."""
    picture: npt.NDArray[np.float32] | None
    """[3, 224, 224]: subtracted besides from every crop, wherever it was cut and whether flipped
    or not. Its channels have a mean near 0: float16 holds it to a hundredth of a grey level."""
    plan: ColourPlan
    """How strong the colour draws are."""
    colours: npt.NDArray[np.float64]
    """[stretches, 3, 3]: for each stretch of `plan`, the RGB shift of a draw of 1 along each
    principal component, in columns."""
    divide: bool
    """Divide by 1 + the deviation of the colour draws, after all else."""

    @property
    def subtracted(self) -> npt.NDArray[np.float32]:
        """What is subtracted from an image without colour: [3, 1, 1] or [3, 224, 224]."""
        mean = self.channel_mean.reshape(3, 1, 1)
        return (mean if self.picture is None else mean + self.picture).astype(np.float32)

    def means(
        self, colour: npt.NDArray[np.float64], epochs: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """Return what to subtract from the channels of b samples, [b, 3], colour included.

        Args:
            colour: [b, 3] draws of the samples.
            epochs: int64 [b].
        """
        # What is not subtracted is added.
        return self.channel_mean - tint(colour, self.colours[self.plan.stretches(epochs)])

    def divisors(self, epochs: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Return what to divide the pixels of b samples by, [b]; `epochs` is int64 [b]."""
        return 1 + np.asarray(self.plan.values)[self.plan.stretches(epochs)]


def recipe_of(
    statistics: Statistics,
    *,
    random: bool,
    colour: Colour,
    mean: Mean = "channel",
    divide: bool = False,
    whole: bool = False,
) -> Recipe:
    """Return the recipe of the paper over a training set's statistics.

    Args:
        statistics: of the training set.
        random: crop, flip and colour by chance.
        colour: standard deviation of the colour draws, or pairs: see `Colour`.
        mean: what to subtract from the pixels, the mean of each channel or the mean image.
        divide: divide by 1 + colour, if `random`.
        whole: images are not cut to crops; with a mean image nothing is subtracted then.

    Raises:
        ValueError: a colour out of range.
    """
    plan = ColourPlan.of(colour)
    channels = statistics.channel_mean
    picture = None
    if mean == "picture" and whole:
        channels = np.zeros(3)
    elif mean == "picture":
        picture = (central(statistics) - channels.reshape(3, 1, 1)).astype(np.float32)
    deviations = np.sqrt(statistics.eigenvalues)
    return Recipe(
        random=random,
        channel_mean=channels,
        picture=picture,
        plan=plan,
        colours=np.stack([value * statistics.eigenvectors * deviations for value in plan.values]),
        divide=divide and random,
    )


def central(statistics: Statistics) -> npt.NDArray[np.float32]:
    """Return the centre of the mean image, [3, 224, 224], laid out as a crop.

    The original subtracts this part from every crop, those from the corners and the flipped ones
    too (convdata_jpeg.py, `data_mean_crop`).
    """
    inner = slice(BORDER // 2, BORDER // 2 + CROP)
    return np.ascontiguousarray(statistics.mean_picture[inner, inner].transpose(2, 0, 1))
