"""FFCV 1.0.2: a .beton file of the stored JPEGs, or of the raw pixels; a thread a core.

The JPEGs go in byte for byte; FFCV's own writer would compress them once more. The pipeline is that
of its ImageNet example: decode with random crop (here of a fixed size, so that nothing is resized),
flip, look-up table to float32, channels-last view. The file is read through the page cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from ffcv.fields import RGBImageField
from ffcv.fields.rgb_image import IMAGE_MODES, RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage
from ffcv.writer import DatasetWriter

from peers.work import CROP, STORED, Work, stored


class _Stored(RGBImageField):
    """FFCV's image field, but what it is given is stored as it is."""

    def encode(self, destination: Any, image: bytes, malloc: Any) -> None:
        destination["mode"] = IMAGE_MODES[self.write_mode]
        destination["height"] = destination["width"] = STORED
        destination["data_ptr"], storage = malloc(len(image))
        storage[:] = np.frombuffer(image, np.uint8)


class _Pictures:
    """What FFCV's writer wants: an indexable of tuples."""

    def __init__(self, pictures: list[bytes]) -> None:
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, place: int) -> tuple[bytes]:
        return (self._pictures[place],)


def prepare(work: Work) -> None:
    """Write the .beton file."""
    mode = "jpg" if work.lane == "jpeg" else "raw"
    writer = DatasetWriter(
        str(work.folder / "train.beton"),
        {"image": _Stored(write_mode=mode)},
        num_workers=work.cores,
    )
    writer.from_indexed_dataset(_Pictures(list(stored(work))))


def batches(work: Work) -> Iterator[torch.Tensor]:
    """Yield batches without end."""
    area = (CROP / STORED) ** 2
    loader = Loader(
        str(work.folder / "train.beton"),
        batch_size=work.batch_size,
        num_workers=work.cores,
        os_cache=True,
        order=OrderOption.RANDOM,
        drop_last=True,
        custom_fields={"image": _Stored},
        indices=np.tile(np.arange(work.samples), work.passes),
        pipelines={
            "image": [
                RandomResizedCropRGBImageDecoder(
                    (CROP, CROP), scale=(area, area), ratio=(1.0, 1.0)
                ),
                RandomHorizontalFlip(),
                NormalizeImage(_array(work.mean), np.ones(3), np.float32),
                ToTensor(),
                ToTorchImage(),
            ]
        },
    )
    while True:
        for (images,) in loader:
            yield images


def _array(values: tuple[float, ...]) -> npt.NDArray[np.float64]:
    return np.array(values, np.float64)
