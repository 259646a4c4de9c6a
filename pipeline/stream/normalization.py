"""Normalization of pixels: the mean that is subtracted, the colour shift, the divisor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.dataset.image_stats import Statistics
from pipeline.stream.augment import BORDER, CROP, compute_color_shift
from pipeline.stream.config import ColorPlan, StreamConfig

Epochs = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Normalization:
    """All numbers that the pixels of a sample follow from, besides its random draws."""

    channel_mean: Doubles
    """[3]: subtracted from every pixel."""
    mean_image: Floats | None
    """[3, 224, 224]: subtracted besides from every crop, wherever it was cut and whether flipped
    or not. Its channels have a mean near 0: float16 holds it to a hundredth of a grey level."""
    plan: ColorPlan
    """Standard deviation of the colour draws by epoch."""
    color_shifts: Doubles
    """[stretches, 3, 3]: for each stretch of `plan`, the RGB shift of a draw of 1 along each
    principal component, in columns."""

    @classmethod
    def of(cls, statistics: Statistics, config: StreamConfig) -> Normalization:
        """Return what `config` makes of a training set's statistics."""
        channels, mean_image = statistics.channel_mean, None
        if config.mean == "picture" and config.view == "whole":
            channels = np.zeros(3)
        elif config.mean == "picture":
            image = crop_mean_image(statistics) - channels.reshape(3, 1, 1)
            mean_image = image.astype(np.float32)
        plan = config.color_plan
        vectors, deviations = statistics.eigenvectors, np.sqrt(statistics.eigenvalues)
        return cls(
            channel_mean=channels,
            mean_image=mean_image,
            plan=plan,
            color_shifts=np.stack([value * vectors * deviations for value in plan.values]),
        )

    @property
    def subtracted(self) -> Floats:
        """Mean that an image without colour loses: [3, 1, 1] or [3, 224, 224]."""
        mean = self.channel_mean.reshape(3, 1, 1)
        return (mean if self.mean_image is None else mean + self.mean_image).astype(np.float32)

    def compute_means(self, color: Doubles, epochs: Epochs) -> Doubles:
        """Return what to subtract from the channels of b samples, [b, 3], colour included.

        Args:
            color: [b, 3] colour draws of the samples.
            epochs: int64 [b].
        """
        # Subtracting (mean - shift) adds the colour shift.
        return self.channel_mean - compute_color_shift(
            color, self.color_shifts[self.plan.find_stretches(epochs)]
        )

    def compute_divisors(self, epochs: Epochs) -> Doubles:
        """Return what to divide the pixels of b samples by, [b]; `epochs` is int64 [b]."""
        return 1 + np.asarray(self.plan.values)[self.plan.find_stretches(epochs)]


def crop_mean_image(statistics: Statistics) -> Floats:
    """Return the centre of the mean image, [3, 224, 224], laid out as a crop.

    The source subtracts this part from every crop, those from the corners and the flipped ones too
    (convdata_jpeg.py, `data_mean_crop`).
    """
    inner = slice(BORDER // 2, BORDER // 2 + CROP)
    return np.ascontiguousarray(statistics.mean_picture[inner, inner].transpose(2, 0, 1))
