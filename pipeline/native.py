"""DALI's own WebDataset reader on the same shards and the same graph: the yardstick.

It has its own order (a shuffle buffer), its own random crops and no checks; it is here to measure
`pipeline.batches.Stream` against, not to train with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline

from pipeline.decode import Device, gpu_of, pixels_of, run_on_current_stream
from pipeline.manifest import Manifest
from pipeline.pixel_stats import Statistics


class NativeReader:
    """Endless batches from `fn.readers.webdataset`."""

    def __init__(
        self, data: Path, *, split: str, batch_size: int, device: Device, threads: int
    ) -> None:
        """Open `split` of a data set; `threads` host threads decode.

        Raises:
            UsageError: no data set, or no such split.
        """
        shards = [data / s.name for s in Manifest.load(data).split(split, data).shards]
        mean = [float(value) for value in Statistics.load(data).channel_mean]
        self._pipe = Pipeline(batch_size, threads, gpu_of(device), seed=0)
        with self._pipe:
            parts: Any = fn.readers.webdataset(
                paths=[str(path) for path in shards],
                index_paths=[str(path.with_suffix(".idx")) for path in shards],
                ext=["jpg", "cls"],
                random_shuffle=True,
                name="reader",
            )
            x, y = (fn.random.uniform(range=(0.0, 1.0)) for _ in range(2))
            flip = fn.random.coin_flip()
            self._pipe.set_outputs(pixels_of(parts[0], x, y, flip, mean, device))
        self._pipe.build()

    def __next__(self) -> torch.Tensor:
        """Return the next batch of pixels, [b, 3, 224, 224]."""
        return run_on_current_stream(self._pipe)
