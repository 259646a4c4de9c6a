"""torch's `DataLoader` over one file an image, decoded by Pillow; a worker process a core.

Workers stay over epochs and keep two batches each in advance (torch's default). How bytes become
floats: `peers.work.Floats`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from peers.work import Floats, Work, pillow_crop, write_files


class _Files(Dataset[torch.Tensor]):
    def __init__(self, paths: list[Path], crop: str) -> None:
        self._paths, self._crop = paths, crop

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, place: int) -> torch.Tensor:
        return pillow_crop(self._paths[place].read_bytes(), self._crop)


def prepare(work: Work) -> None:
    """Write every image into a file of its own."""
    write_files(work)


def batches(work: Work) -> Iterator[torch.Tensor]:
    """Yield batches without end."""
    files = _Files(sorted(work.folder.glob("*.jpg")), work.crop)
    loader = DataLoader(
        files,
        work.batch_size,
        sampler=RandomSampler(files, num_samples=work.passes * len(files)),
        num_workers=work.cores,
        persistent_workers=True,
        drop_last=True,
    )
    floats = Floats(work.mean)
    while True:
        yield from map(floats, loader)
