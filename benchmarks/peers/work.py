"""The work that every loader is given, and the parts of it that several adapters share."""

from __future__ import annotations

import io
import math
import random
import tarfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from pipeline.dataset.manifest import Manifest

CROP = 224
STORED = 256


@dataclass(frozen=True, kw_only=True)
class Work:
    """224x224 crops, half of them mirrored, float32 minus the mean, in shuffled batches."""

    data: Path
    """Sealed Duet data set that all loaders read or are converted from."""
    lane: Literal["jpeg", "raw"]
    """Encoding of the data set: JPEG bytes or pixels."""
    folder: Path
    """Empty folder for the loader's own format."""
    crop: Literal["random", "resized"] = "random"
    """A random square of 224 pixels; or a part of random area and aspect ratio, resized to that."""
    mean: tuple[float, float, float]
    """Mean of red, green, blue in the training set; grey levels 0..255."""
    samples: int
    """Images in the train split."""
    passes: int
    """Passes over the images that make one epoch of a loader: a small set would else be measured
    by how long a loader takes to begin an epoch."""
    cores: int
    """Cores that this process may use: threads or worker processes of a loader."""
    batch_size: int = 128
    """Images in a batch."""
    planes: bool = False
    """Contiguous planes are wanted where the library's own way is channels-last memory."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Device on which `duet_stream` and `dali_native` decode; all others know the CPU only."""


def shards(work: Work) -> list[Path]:
    """Return the tars of the train split, in stored order."""
    return [work.data / s.name for s in Manifest.load(work.data).split("train", work.data).shards]


def stored(work: Work) -> Iterator[bytes]:
    """Yield the bytes of the samples of the train split, in stored order.

    A sample is a JPEG file, or [side, side, 3] pixels in C order. Only `tarfile` and NumPy read
    them, so that nothing of ours stands between the shards and another loader.
    """
    for shard in shards(work):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith((".jpg", ".npy")):
                    file = tar.extractfile(member)
                    assert file is not None, member.name
                    raw = member.name.endswith(".npy")
                    yield np.load(io.BytesIO(file.read())).tobytes() if raw else file.read()


def write_files(work: Work) -> None:
    """Write every image into a file of its own, in the folder of the loader."""
    for number, jpeg in enumerate(stored(work)):
        (work.folder / f"{number:08}.jpg").write_bytes(jpeg)


def shuffle_files(work: Work) -> Iterator[Path]:
    """Yield the files of `write_files` without end, each pass in another random order."""
    paths = sorted(work.folder.glob("*.jpg"))
    while True:
        yield from random.sample(paths, len(paths))


SCALE, RATIO, ATTEMPTS = (0.08, 1.0), (3 / 4, 4 / 3), 10
"""Share of the area and aspect ratio of a resized crop, and draws before the centre is taken:
those of torchvision's RandomResizedCrop."""


def draw_box(width: int, height: int, crop: str) -> tuple[int, int, int, int]:
    """Return left and upper edge, width and height of a random crop of an image."""
    if crop == "random":
        return random.randint(0, width - CROP), random.randint(0, height - CROP), CROP, CROP
    for _ in range(ATTEMPTS):
        area = width * height * random.uniform(*SCALE)
        ratio = math.exp(random.uniform(*map(math.log, RATIO)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, width - w), random.randint(0, height - h), w, h
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def pillow_crop(jpeg: bytes, crop: str) -> torch.Tensor:
    """Return a random crop of a JPEG file, every second one mirrored; uint8 [224, 224, 3].

    Pillow decodes the whole image (it cannot do less exactly); only the crop is copied or resized.
    """
    image = Image.open(io.BytesIO(jpeg))
    x, y, width, height = draw_box(*image.size, crop)
    image = image.crop((x, y, x + width, y + height))
    if crop == "resized":
        image = image.resize((CROP, CROP), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return torch.from_numpy(np.array(pixels[:, ::-1] if random.random() < 0.5 else pixels))


class Floats:
    """Batches of crops, uint8 [b, 224, 224, 3] -> float32 [b, 3, 224, 224] minus the mean.

    The fastest of seven ways tried for loaders with worker processes: these hand over bytes (a
    quarter of the memory), and all pixels of a batch are converted at once in the training process,
    by torch's threads. Memory is used again every second batch (new pages for each cost as much as
    the arithmetic) and stays in channels-last order, a view.
    """

    def __init__(self, mean: Sequence[float]) -> None:
        self._row = torch.tensor(mean, dtype=torch.float32).repeat(CROP)
        self._buffers: deque[torch.Tensor] = deque(maxlen=2)

    def __call__(self, crops: torch.Tensor) -> torch.Tensor:
        """Return the batch; it is overwritten by the one after the next."""
        rows = crops.view(len(crops), CROP, CROP * 3)
        if len(self._buffers) < 2 or self._buffers[0].shape != rows.shape:
            self._buffers.append(torch.empty(rows.shape))
        else:
            self._buffers.rotate()
        batch = self._buffers[-1].copy_(rows).sub_(self._row)
        return batch.view(*crops.shape).permute(0, 3, 1, 2)
