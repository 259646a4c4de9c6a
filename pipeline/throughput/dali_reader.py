"""`DaliReader`: DALI's own reader of WebDataset shards, the yardstick of the stream."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.images import ENDINGS
from pipeline.dataset.manifest import Manifest, find_root
from pipeline.stream import operators as dali
from pipeline.stream.config import StreamConfig
from pipeline.stream.decode import (
    decoder_options,
    make_pixels,
    normalize_crops,
    open_pipeline,
    resize_crops,
    run_to_tensor,
    to_batch,
)
from pipeline.tools.errors import UsageError

_ENDINGS = {**ENDINGS, "jpeg": "jpg;jpeg;JPG;JPEG;Jpeg"}
"""Member name endings in DALI's syntax; shards of other tools may have any of these."""


class DaliReader:
    """Endless batches from `fn.readers.webdataset`: the yardstick for `pipeline.batches.Stream`.

    DALI's reader has an order of its own (a shuffle buffer), its own random crops and no checks.
    """

    def __init__(self, data: Path, config: StreamConfig) -> None:
        """Open the split of a local dataset, or of one of its versions.

        Batch, device, threads, prefetch and decoder load are the config's, as in `Stream`.

        Raises:
            UsageError: no dataset, no such split, or no labels.
            SetupError: device `gpu` without a CUDA device.
        """
        manifest = Manifest.load(data)
        if not manifest.classes:
            raise UsageError(
                f"DALI's reader takes labels, too, and {data} has none; use the stream"
            )
        root = find_root(data)
        shards = [root / shard.name for shard in manifest.split(config.split, data).shards]
        mean = [float(value) for value in Statistics.load(data, manifest).channel_mean]
        self._config = config
        self._pipe = open_pipeline(config, seed=0)
        with self._pipe:
            parts: Any = dali.fn.readers.webdataset(
                paths=list(map(str, shards)),
                index_paths=[str(path.with_suffix(".idx")) for path in shards],
                ext=[_ENDINGS[manifest.encoding], "cls"],
                random_shuffle=True,
                name="reader",
            )
            flip = dali.fn.random.coin_flip()
            stored = parts[0]
            if manifest.encoding == "raw":
                stored = _skip_header(stored, manifest.mean_side)
            if config.crop == "resized":
                pixels = normalize_crops(config, _cut_regions(config, manifest, stored), flip, mean)
            else:
                x, y = (dali.fn.random.uniform(range=(0.0, 1.0)) for _ in range(2))
                pixels = make_pixels(
                    config, manifest.encoding, images=stored, x=x, y=y, flip=flip, mean=mean
                )
            self._pipe.set_outputs(pixels)
        self._pipe.build()

    def __next__(self) -> torch.Tensor:
        """Return the next batch of pixels, [b, 3, height, width]."""
        return to_batch(self._config, run_to_tensor(self._pipe))


def _cut_regions(config: StreamConfig, manifest: Manifest, stored: Any) -> Any:
    """Return the graph from stored images to parts that DALI draws, resized."""
    drawn: dict[str, Any] = {"random_area": config.scale, "random_aspect_ratio": config.ratio}
    if manifest.encoding == "jpeg":
        options = decoder_options(config)
        return resize_crops(config, dali.fn.decoders.image_random_crop(stored, **drawn, **options))
    pixels = stored.gpu() if config.on_gpu else stored
    return dali.fn.random_resized_crop(pixels, size=list(config.image_size), **drawn)


def _skip_header(npy: Any, side: int) -> Any:
    """Return the graph from the files of raw images to their pixels, uint8 [side, side, 3]."""
    shape = (side, side, 3)
    # The pixels are the end of the file, however long the header before them is.
    return dali.fn.reshape(npy[-math.prod(shape) :], shape=shape, layout="HWC")
