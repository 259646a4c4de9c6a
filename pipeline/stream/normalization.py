"""Normalization of pixels: the mean that is subtracted, the colour shift, the divisors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.dataset.image_stats import Statistics, pool_statistics
from pipeline.dataset.manifest import Manifest
from pipeline.remote.local import Dataset
from pipeline.stream.augment import compute_color_shift
from pipeline.stream.config import ColorPlan, StreamConfig

Epochs = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Normalization:
    """All numbers that the pixels of a sample follow from, besides its random draws."""

    channel_mean: Doubles
    """[3]: subtracted from every pixel."""
    std: Doubles | None
    """[3]: what every pixel is divided by after that; None for nothing."""
    mean_image: Floats | None
    """[3, height, width]: subtracted besides from every crop, wherever it was cut and whether
    flipped or not. Its channels have a mean near 0: float16 holds it to a hundredth of a grey
    level."""
    plan: ColorPlan
    """Standard deviation of the colour draws by epoch."""
    color_shifts: Doubles
    """[stretches, 3, 3]: for each stretch of `plan`, the RGB shift of a draw of 1 along each
    principal component, in columns."""

    @classmethod
    def of(cls, statistics: Statistics, config: StreamConfig) -> Normalization:
        """Return what `config` makes of a training set's statistics."""
        channels, mean_image, std = statistics.channel_mean, None, None
        if config.mean is None or (config.mean == "image" and config.crop == "whole"):
            channels = np.zeros(3)
        elif config.mean == "image":
            image = crop_mean_image(statistics, config.image_size) - channels.reshape(3, 1, 1)
            mean_image = image.astype(np.float32)
        elif config.mean != "channel":
            channels = np.array(config.mean, np.float64)
        if config.std is not None:
            known = np.sqrt(np.diag(statistics.covariance))
            std = known if config.std == "channel" else np.array(config.std, np.float64)
        plan = config.color_plan
        vectors, deviations = statistics.eigenvectors, np.sqrt(statistics.eigenvalues)
        return cls(
            channel_mean=channels,
            std=std,
            mean_image=mean_image,
            plan=plan,
            color_shifts=np.stack([value * vectors * deviations for value in plan.values]),
        )

    @property
    def subtracted(self) -> Floats:
        """Mean that an image without colour loses: [3, 1, 1] or [3, height, width]."""
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
        """Return 1 + colour, which divides the pixels of b samples, [b]; `epochs` is int64 [b]."""
        return 1 + np.asarray(self.plan.values)[self.plan.find_stretches(epochs)]


def crop_mean_image(statistics: Statistics, size: tuple[int, int]) -> Floats:
    """Return the centre of the mean image, [3, height, width], laid out as a crop.

    The source subtracts this part from every crop, those from the corners and the flipped ones too
    (convdata_jpeg.py, `data_mean_crop`).
    """
    image = statistics.mean_picture
    rows, columns = (
        slice((all_ - part) // 2, (all_ - part) // 2 + part)
        for all_, part in zip(image.shape, size, strict=False)
    )
    return np.ascontiguousarray(image[rows, columns].transpose(2, 0, 1))


def load_statistics(datasets: Sequence[Dataset], shares: Sequence[float]) -> Statistics:
    """Return the statistics of the training images; of several datasets, those of the mixture."""
    found = [Statistics.load(dataset.folder, Manifest.load(dataset.folder)) for dataset in datasets]
    return found[0] if len(found) == 1 else pool_statistics(found, shares)
