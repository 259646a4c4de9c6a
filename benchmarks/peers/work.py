"""The work that every loader is given, and the parts of it that several adapters share."""

from __future__ import annotations

import io
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
    """Random 224x224 crops, half of them mirrored, float32 minus the mean, in shuffled batches."""

    data: Path
    """Sealed Duet data set that all loaders read or are converted from."""
    lane: Literal["jpeg", "raw"]
    """Encoding of the data set: JPEG bytes or pixels."""
    folder: Path
    """Empty folder for the loader's own format."""
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

    A sample is a JPEG file, or [256, 256, 3] pixels in C order. Only `tarfile` and NumPy read them,
    so that nothing of ours stands between the shards and another loader.
    """
    for shard in shards(work):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith((".jpg", ".npy")):
                    file = tar.extractfile(member)
                    assert file is not None, member.name
                    raw = member.name.endswith(".npy")
                    yield np.load(io.BytesIO(file.read())).tobytes() if raw else file.read()


def pillow_crop(jpeg: bytes) -> torch.Tensor:
    """Return a random crop of a JPEG file, every second one mirrored; uint8 [224, 224, 3].

    Pillow decodes the whole image (it cannot do less); the crop is cut out before NumPy copies.
    """
    image = Image.open(io.BytesIO(jpeg))
    x, y = random.randint(0, STORED - CROP), random.randint(0, STORED - CROP)
    pixels = np.asarray(image.crop((x, y, x + CROP, y + CROP)))
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
