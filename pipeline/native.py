"""DALI's own WebDataset reader on the same shards and the same graph: the yardstick.

It has its own order (a shuffle buffer), its own random crops and no checks; it is here to measure
`pipeline.batches.Stream` against, not to train with.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline

from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.images import ENDINGS, SIZE
from pipeline.dataset.manifest import Manifest
from pipeline.stream.augment import CROP
from pipeline.stream.decode import Device, gpu_of, pixels_of, run_on_current_stream

_ENDINGS = {**ENDINGS, "jpeg": "jpg;jpeg;JPG;JPEG;Jpeg"}
"""As DALI matches them: shards of other tools (`pipeline.index_shards`) have any of these."""


class NativeReader:
    """Endless batches from `fn.readers.webdataset`."""

    def __init__(
        self, data: Path, *, split: str, batch_size: int, device: Device, threads: int
    ) -> None:
        """Open `split` of a data set; `threads` host threads decode.

        Raises:
            UsageError: no data set, or no such split.
        """
        manifest = Manifest.load(data)
        shards = [data / s.name for s in manifest.split(split, data).shards]
        mean = [float(value) for value in Statistics.load(data).channel_mean]
        self._pipe = Pipeline(batch_size, threads, gpu_of(device), seed=0)
        with self._pipe:
            parts: Any = fn.readers.webdataset(
                paths=[str(path) for path in shards],
                index_paths=[str(path.with_suffix(".idx")) for path in shards],
                ext=[_ENDINGS[manifest.encoding], "cls"],
                random_shuffle=True,
                name="reader",
            )
            x, y = (fn.random.uniform(range=(0.0, 1.0)) for _ in range(2))
            flip = fn.random.coin_flip()
            stored = parts[0] if manifest.encoding == "jpeg" else _behind_header(parts[0])
            self._pipe.set_outputs(
                pixels_of(stored, x, y, flip, mean, device, CROP, manifest.encoding)
            )
        self._pipe.build()

    def __next__(self) -> torch.Tensor:
        """Return the next batch of pixels, [b, 3, 224, 224]."""
        return run_on_current_stream(self._pipe)


def _behind_header(npy: Any) -> Any:
    """Return the graph from the files of raw pictures to their pixels, uint8 [256, 256, 3]."""
    shape = (SIZE, SIZE, 3)
    # The pixels are the end of the file, however long the header before them is.
    return fn.reshape(npy[-math.prod(shape) :], shape=shape, layout="HWC")
