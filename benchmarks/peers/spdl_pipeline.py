"""SPDL's `PipelineBuilder` in threads: images decoded by FFmpeg one by one, then put together.

The stages of its page "Design and best practices" ("Batch frames before converting to tensors"):
decode, aggregate, convert the frames of a batch at once; concurrency and threads are the cores. The
filter of the decoding crops, resizes and mirrors, as its page "Filter Graphs" does. Cropping
before the conversion to RGB was faster than after it. How bytes become floats: `peers.work.Floats`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import spdl.io
import torch
from spdl.pipeline import PipelineBuilder

from peers.crops import CROP, draw_box
from peers.work import Floats, Work, shuffle_files, write_files

PREFETCH = 3
"""Batches in the sink, as on that page."""


def prepare(work: Work) -> None:
    """Write every image into a file of its own, and read one.

    Without FFmpeg's libraries that fails at once; the threads of a pipeline would wait.
    """
    write_files(work)
    spdl.io.demux_image(str(next(work.folder.glob("*.jpg"))))


def batches(work: Work) -> Iterator[torch.Tensor]:
    """Yield batches without end."""

    def decode(path: Path) -> spdl.io.ImageFrames:
        packets = spdl.io.demux_image(str(path))
        x, y, width, height = draw_box(packets.width, packets.height, work.crop)
        steps = [f"crop={width}:{height}:{x}:{y}"]
        if work.crop == "resized":
            steps.append(f"scale={CROP}:{CROP}:flags=bilinear")
        if random.random() < 0.5:
            steps.append("hflip")
        filters = ",".join([*steps, "format=pix_fmts=rgb24"])
        return spdl.io.decode_packets(packets, filter_desc=filters)

    pipeline = (
        PipelineBuilder()
        .add_source(shuffle_files(work))
        .pipe(decode, concurrency=work.cores)
        .aggregate(work.batch_size)
        .pipe(lambda frames: spdl.io.to_torch(spdl.io.convert_frames(frames)))
        .add_sink(PREFETCH)
        .build(num_threads=work.cores)
    )
    with pipeline.auto_stop():
        yield from map(Floats(work.mean), pipeline)
