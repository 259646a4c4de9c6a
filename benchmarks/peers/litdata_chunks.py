"""litData: 64 MB chunks of the stored JPEGs, `StreamingDataset`, Pillow; a worker process a core.

Chunks lie on the local disk already. The loader's workers stay over epochs. Its own JPEG decoding
(torchvision's) is not used: Pillow was faster here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from litdata import StreamingDataLoader, StreamingDataset, optimize

from peers.work import Floats, Work, pillow_crop, stored


class _Images(StreamingDataset):  # type: ignore[misc]
    crop = ""

    def __getitem__(self, place: Any) -> torch.Tensor:
        return pillow_crop(super().__getitem__(place), self.crop)


def _same(jpeg: bytes) -> bytes:
    return jpeg


def prepare(work: Work) -> None:
    """Write the chunks; a small set several times over, since an epoch is one pass over them."""
    optimize(
        fn=_same,
        inputs=list(stored(work)) * work.passes,
        output_dir=str(work.folder / "chunks"),
        chunk_bytes="64MB",
        num_workers=work.cores,
        start_method="fork",
        verbose=False,
    )


def batches(work: Work) -> Iterator[torch.Tensor]:
    """Yield batches without end."""
    images = _Images(str(work.folder / "chunks"), shuffle=True, drop_last=True)
    images.crop = work.crop
    loader = StreamingDataLoader(
        images,
        batch_size=work.batch_size,
        num_workers=work.cores,
        persistent_workers=True,
    )
    floats = Floats(work.mean)
    while True:
        yield from map(floats, loader)
