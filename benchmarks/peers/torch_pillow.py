"""torch's `DataLoader` over one file an image, decoded by Pillow; a worker process a core.

Workers stay over epochs and keep two batches each in advance (torch's default). How bytes become
floats: `peers.work.Floats`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from peers.work import Floats, Work, pillow_crop, stored


class _Files(Dataset[torch.Tensor]):
    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, place: int) -> torch.Tensor:
        return pillow_crop(self._paths[place].read_bytes())


def prepare(work: Work) -> None:
    """Write every image into a file of its own."""
    for number, jpeg in enumerate(stored(work)):
        (work.folder / f"{number:08}.jpg").write_bytes(jpeg)


def batches(work: Work) -> Iterator[torch.Tensor]:
    """Yield batches without end."""
    files = _Files(sorted(work.folder.glob("*.jpg")))
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
