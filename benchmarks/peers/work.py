"""The work that every loader is given, and the parts of it that several adapters share."""

from __future__ import annotations

import io
import os
import random
import tarfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from peers.crops import CROP, crop_jpeg
from pipeline.dataset.manifest import Manifest

STORED = 256
SHARD = 1_000
"""Samples in a shard of a made-up set for resumes."""


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


def pillow_crop(jpeg: bytes, crop: str) -> torch.Tensor:
    """Return `crop_jpeg` as a tensor."""
    return torch.from_numpy(crop_jpeg(jpeg, crop))


def repeat_files(folder: Path, name: str, count: int, form: str) -> list[str]:
    """Return the names of `count` hard links to a file of a folder, numbered by `form`."""
    names = [form.format(number) for number in range(count)]
    for one in names:
        if one != name:
            os.link(folder / name, folder / one)
    return names


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
