"""Lanes that are measured: each is an endless generator of batches for one setting.

Lanes over a data set:      ours, native, feed_alone
Lanes over memory, no disk: recipe (our graph), decode_alone, split, codec (nvImageCodec, no DALI)
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline, pipeline_def

from parts.copies import read_samples
from pipeline.batches import Stream
from pipeline.dataset.images import SIZE
from pipeline.dataset.manifest import Manifest
from pipeline.remote.local import LocalDataset
from pipeline.stream.config import CROP, Device, StreamConfig
from pipeline.stream.decode import (
    Decoder,
    DecoderInput,
    open_pipeline,
    run_to_tensor,
)
from pipeline.stream.loader import BatchReader
from pipeline.stream.prefetch import Prefetcher
from pipeline.stream.transfer import select_gpu
from pipeline.throughput.dali_reader import DaliReader

MEMORY = 4096
"""Images that lanes over memory go round in, at most."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Settings that the sweep varies."""

    threads: int
    """Host threads of DALI."""
    load: float
    """Share of a batch for the JPEG engines, 0..1; without a meaning on the CPU."""
    prefetch: int
    """Batches in flight."""
    batch: int
    """Images in a batch."""


Lane = Callable[[Setting], Generator[Any]]


def ours(data: Path, device: Device, setting: Setting) -> Generator[torch.Tensor]:
    """Yield the batches of `Stream`, with the full recipe."""
    with Stream.from_config(data, _config(device, setting)) as stream:
        for batch in stream:
            yield batch.images


def native(data: Path, device: Device, setting: Setting) -> Generator[torch.Tensor]:
    """Yield the batches of DALI's own reader with our graph and the same setting."""
    reader = DaliReader(data, _config(device, setting))
    while True:
        yield next(reader)


def feed_alone(data: Path, setting: Setting) -> Generator[DecoderInput]:
    """Yield what our reader gives the graph: ordered, read, checked, drawn, and not decoded."""
    config = replace(_config("cpu", setting), strict=True)
    with closing(BatchReader([LocalDataset(data)], config)) as reader:
        prefetcher = Prefetcher(reader.read_batches(0), depth=setting.prefetch)
        with closing(prefetcher):
            while True:
                batch = prefetcher.take()
                yield batch.input
                reader.recycle(batch)


def recipe(data: Path, device: Device, setting: Setting) -> Generator[torch.Tensor]:
    """Yield batches of our graph from images in memory: what our feed could at best lead to."""
    encoding = Manifest.load(data).encoding
    decoder = Decoder(lambda: next(feeds), _config(device, setting), encoding)
    feeds = _feeds(data, setting)
    while True:
        yield decoder.run().images


def decode_alone(
    data: Path, device: Device, whole: bool, setting: Setting
) -> Generator[torch.Tensor]:
    """Yield decoded images from memory, uint8: bare nvJPEG on a GPU, whole or their crops."""
    where: dict[str, Any] = {
        "device": "mixed" if device == "gpu" else "cpu",
        "output_type": types.RGB,
        "jpeg_fancy_upsampling": True,
        "hw_decoder_load": setting.load,
    }
    pipe = open_pipeline(_config(device, setting), seed=0)
    with pipe:
        stored, x, y, _, _ = _from_memory(data, setting)
        if whole:
            pipe.set_outputs(fn.decoders.image(stored, **where))
        else:
            crop = {"crop": (CROP, CROP), "crop_pos_x": x, "crop_pos_y": y, "rounding": "round"}
            pipe.set_outputs(fn.decoders.image_crop(stored, **where, **crop))
    yield from _run(pipe)


def split(
    data: Path, device: Device, host_share: float, setting: Setting
) -> Generator[torch.Tensor]:
    """Yield batches of our graph from memory, a share of each decoded by libjpeg-turbo.

    The rest goes to CUDA and the JPEG engines as `setting.load` says. With a share of 1 this is
    the host's decoder, and float arithmetic on the GPU. Which sample goes where is drawn here; a
    stream could take it from the sample's own draws.
    """
    pipe = _split_graph(
        data,
        device,
        host_share,
        setting,
        batch_size=setting.batch,
        num_threads=setting.threads,
        device_id=select_gpu(device),
        prefetch_queue_depth=setting.prefetch,
        seed=0,
    )
    yield from _run(pipe)


@pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]
def _split_graph(data: Path, device: Device, host_share: float, setting: Setting) -> Any:
    stored, x, y, flip, mean = _from_memory(data, setting)
    common = {"output_type": types.RGB, "crop": (CROP, CROP), "rounding": "round"}
    on_host = fn.random.uniform(range=(0.0, 1.0)) < host_share
    if on_host:
        pixels = fn.decoders.image_crop(stored, device="cpu", crop_pos_x=x, crop_pos_y=y, **common)
        if device == "gpu":
            pixels = pixels.gpu()
    else:
        pixels = fn.decoders.image_crop(
            stored,
            device="mixed" if device == "gpu" else "cpu",
            crop_pos_x=x,
            crop_pos_y=y,
            jpeg_fancy_upsampling=True,
            hw_decoder_load=setting.load,
            **common,
        )
    dtype = types.FLOAT16 if device == "gpu" else types.FLOAT
    return fn.crop_mirror_normalize(
        pixels, mirror=flip, mean=mean, dtype=dtype, output_layout="CHW"
    )


def codec(data: Path, device: Device, setting: Setting) -> Generator[list[Any]]:
    """Yield whole images from nvImageCodec's own decoder, without DALI; waits for each batch."""
    from nvidia import nvimgcodec  # it comes with DALI, and is not needed for any other lane

    kinds = nvimgcodec.BackendKind
    backends = [nvimgcodec.Backend(kinds.CPU_ONLY)]
    if device == "gpu":
        rest = [nvimgcodec.Backend(kind) for kind in (kinds.GPU_ONLY, kinds.HYBRID_CPU_GPU)]
        backends = [nvimgcodec.Backend(kinds.HW_GPU_ONLY, load_hint=setting.load), *rest, *backends]
    decoder = nvimgcodec.Decoder(
        device_id=select_gpu(device) if device == "gpu" else nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
        max_num_cpu_threads=setting.threads,
        backends=backends,
        options=":fancy_upsampling=1",
    )
    stored = itertools.cycle(jpeg.tobytes() for jpeg in read_samples(data, MEMORY))
    while True:
        streams = [nvimgcodec.CodeStream(next(stored)) for _ in range(setting.batch)]
        decoded = decoder.decode(streams)
        if any(image is None for image in decoded):
            raise RuntimeError("nvImageCodec could not decode an image")
        if device == "gpu":
            torch.cuda.synchronize()
        yield decoded


def _config(device: Device, setting: Setting) -> StreamConfig:
    """Return the settings of our stream."""
    return StreamConfig(
        batch_size=setting.batch,
        device=device,
        threads=setting.threads,
        prefetch=setting.prefetch,
        hw_decoder_load=setting.load,
    )


def _run(pipe: Pipeline) -> Generator[torch.Tensor]:
    pipe.build()
    while True:
        yield run_to_tensor(pipe)


def _from_memory(data: Path, setting: Setting) -> Any:
    feeds = _feeds(data, setting)
    return fn.external_source(
        source=lambda: next(feeds),
        num_outputs=len(DecoderInput._fields),
        batch=True,
        dtype=[types.UINT8, types.FLOAT, types.FLOAT, types.INT32, types.FLOAT],
        ndim=[1, 0, 0, 0, 1],
        no_copy=True,
    )


def _feeds(data: Path, setting: Setting) -> Iterator[DecoderInput]:
    """Yield feeds of images that stay in memory, without end."""
    stored = read_samples(data, MEMORY)
    if Manifest.load(data).encoding == "raw":
        stored = [image.reshape(SIZE, SIZE, 3) for image in stored]
    count, draws = setting.batch, np.random.default_rng(0)
    endless, kept = itertools.cycle(stored), deque[DecoderInput](maxlen=setting.prefetch + 3)
    while True:  # DALI reads the arrays after the next were asked for: some are kept
        x, y = draws.random((2, count), np.float32)
        flip = draws.integers(0, 2, count, np.int32)
        mean = np.full((count, 3), 110, np.float32)
        kept.append(DecoderInput(list(itertools.islice(endless, count)), x, y, flip, mean))
        yield kept[-1]
