"""FFCV 1.0.2: a .beton file of the stored JPEGs, or of the raw pixels; a thread a core.

The JPEGs go in byte for byte; FFCV's own writer would compress them once more. The pipeline is that
of its ImageNet example: decode with random resized crop (for `random` of a fixed size, so that
nothing is resized), flip, look-up table to float32, channels-last view. With `planes` the bytes are
put into planes first and torch converts them into memory that is used again: of several ways to
contiguous [b, 3, 224, 224] memory the fastest here. The file is read through the page cache. FFCV
decodes with libjpeg-turbo's fast, less exact DCT, the whole image, and resizes with OpenCV's
`INTER_AREA`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from ffcv.fields import RGBImageField
from ffcv.fields.rgb_image import IMAGE_MODES, RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage
from ffcv.writer import DatasetWriter
from PIL import Image

from peers.crops import CROP, RATIO, SCALE
from peers.work import STORED, Work, stored

PREFETCH = 3
"""Batches prefetched (FFCV's default)."""


class _Stored(RGBImageField):  # type: ignore[misc]
    """FFCV's image field that stores the given bytes as they are."""

    def encode(self, destination: Any, image: bytes, malloc: Any) -> None:
        destination["mode"] = IMAGE_MODES[self.write_mode]
        height = width = STORED
        if self.write_mode == "jpg":
            width, height = Image.open(io.BytesIO(image)).size
        destination["height"], destination["width"] = height, width
        destination["data_ptr"], storage = malloc(len(image))
        storage[:] = np.frombuffer(image, np.uint8)


class _Images:
    """Images as FFCV's writer takes them: an indexable of tuples."""

    def __init__(self, images: list[bytes]) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, place: int) -> tuple[bytes]:
        return (self._images[place],)


def prepare(work: Work) -> None:
    """Write the .beton file."""
    mode = "jpg" if work.lane == "jpeg" else "raw"
    writer = DatasetWriter(
        str(work.folder / "train.beton"),
        {"image": _Stored(write_mode=mode)},
        num_workers=work.cores,
    )
    writer.from_indexed_dataset(_Images(list(stored(work))))


def batches(work: Work) -> Iterator[torch.Tensor]:
    """Yield batches without end."""
    area = (CROP / STORED) ** 2
    scale, ratio = (SCALE, RATIO) if work.crop == "resized" else ((area, area), (1.0, 1.0))
    loader = Loader(
        str(work.folder / "train.beton"),
        batch_size=work.batch_size,
        num_workers=work.cores,
        os_cache=True,
        order=OrderOption.RANDOM,
        drop_last=True,
        batches_ahead=PREFETCH,
        custom_fields={"image": _Stored},
        indices=np.tile(np.arange(work.samples), work.passes),
        pipelines={
            "image": [
                RandomResizedCropRGBImageDecoder((CROP, CROP), scale=scale, ratio=ratio),
                RandomHorizontalFlip(),
                *(_planes(work) if work.planes else _channels_last(work)),
            ]
        },
    )
    while True:
        for (images,) in loader:
            yield images


def _channels_last(work: Work) -> list[Any]:
    table = NormalizeImage(np.array(work.mean), np.ones(3), np.float32)
    return [table, ToTensor(), ToTorchImage()]


def _planes(work: Work) -> list[Any]:
    return [ToTensor(), ToTorchImage(channels_last=False), _Floats(work.mean)]


class _Floats(torch.nn.Module):
    """Bytes -> float32 minus the mean, into as many buffers as FFCV has batches on the way."""

    def __init__(self, mean: tuple[float, ...]) -> None:
        super().__init__()
        self._mean = torch.tensor(mean).view(3, 1, 1)
        self._memory: list[torch.Tensor] = []
        self._turn = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not self._memory:
            self._memory = [torch.empty(images.shape) for _ in range(PREFETCH + 2)]
        self._turn = (self._turn + 1) % len(self._memory)
        return self._memory[self._turn].copy_(images).sub_(self._mean)
