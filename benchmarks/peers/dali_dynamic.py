"""DALI's dynamic mode: `ndd.readers.Webdataset` on the same shards; a thread a core.

The newest way of DALI 2.4 to write a loader: operators are called in a Python loop
(`nvidia.dali.experimental.dynamic`). With `capture=True`, which its `next_epoch` describes, the
calls of the first steps become a pipeline that works in advance; a state cannot be saved there
("Checkpointing is currently not supported in capture mode"). Operators are those of `dali_native`.
"""

from __future__ import annotations

from collections.abc import Iterator

import nvidia.dali.experimental.dynamic as ndd
import torch
from nvidia.dali import types

from peers.crops import CROP, RATIO, SCALE
from peers.work import Work, shards


def prepare(work: Work) -> None:
    """Do nothing: it reads the shards as they are."""


def batches(work: Work) -> Iterator[torch.Tensor]:
    """Yield batches without end."""
    ndd.set_num_threads(work.cores)
    paths = shards(work)
    reader = ndd.readers.Webdataset(
        paths=[str(path) for path in paths],
        index_paths=[str(path.with_suffix(".idx")) for path in paths],
        ext=["jpg", "cls"],
        random_shuffle=True,
    )
    while True:
        for jpegs, _ in reader.next_epoch(batch_size=work.batch_size, capture=True):
            pixels = ndd.crop_mirror_normalize(
                _cut(jpegs, work),
                mirror=ndd.random.coin_flip(batch_size=work.batch_size),
                mean=work.mean,
                dtype=types.FLOAT,
                output_layout="CHW",
            ).torch()
            if len(pixels) == work.batch_size:  # the last of an epoch may be short
                yield pixels


def _cut(jpegs: ndd.Batch, work: Work) -> ndd.Batch:
    """Return random crops, uint8 [224, 224, 3] each."""
    options = {"device": "cpu", "output_type": types.RGB}
    if work.crop == "resized":
        parts = ndd.decoders.image_random_crop(
            jpegs, random_area=SCALE, random_aspect_ratio=RATIO, **options
        )
        return ndd.resize(parts, size=(CROP, CROP), interp_type=types.INTERP_LINEAR, antialias=True)
    x = ndd.random.uniform(range=(0.0, 1.0), batch_size=work.batch_size)
    y = ndd.random.uniform(range=(0.0, 1.0), batch_size=work.batch_size)
    return ndd.decoders.image_crop(jpegs, crop=(CROP, CROP), crop_pos_x=x, crop_pos_y=y, **options)
