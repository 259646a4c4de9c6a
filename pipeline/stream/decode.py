"""The DALI graphs: stored images and random draws -> pixels.

CPU and GPU graphs are the same two operators; `device` chooses where each runs:

    decode (only the 224x224 region of the crop) -> crop_mirror_normalize

Raw images need the second alone, which then crops as well.

The colour shift is folded into the mean that `crop_mirror_normalize` subtracts anyway (a mean of
its own for each sample), so the paper's PCA colour costs no pass over the pixels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.dlpack import from_dlpack

from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.images import ENDINGS, SIZE, Encoding
from pipeline.dataset.manifest import Manifest
from pipeline.stream import operators as dali
from pipeline.stream.config import Device, StreamConfig
from pipeline.tools.errors import SetupError
from pipeline.tools.units import cpu_count

# Small host buffers come from a pool of DALI's own instead of malloc: what is left to malloc, a few
# large blocks, then always fits where it was. The process keeps one size (where it wandered by a
# third) and takes no page faults, which were a third of the time (measured). DALI reads this when
# the first pipeline is built; a value that the user has set is kept.
os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "64k")


class DecoderInput(NamedTuple):
    """Input of one run of the graph: b samples."""

    images: list[npt.NDArray[np.uint8]]
    """JPEGs, [size] each, or raw images, [256, 256, 3] each. DALI reads them where they lie: they
    stay untouched until the batch after next has come out."""
    x: npt.NDArray[np.float32]
    """[b] left edge of the crop, as a fraction 0..1 of the free border."""
    y: npt.NDArray[np.float32]
    """[b] upper edge of the crop, as a fraction 0..1 of the free border."""
    flip: npt.NDArray[np.int32]
    """[b] 1 to mirror."""
    mean: npt.NDArray[np.float32]
    """[b, 3] what to subtract from each channel."""
    divisor: npt.NDArray[np.float32] | None = None
    """[b] what to divide by in the end; only read where the config divides."""


class Decoder:
    """A running DALI pipeline over a source of `DecoderInput`s."""

    def __init__(
        self, source: Callable[[], DecoderInput], config: StreamConfig, encoding: Encoding = "jpeg"
    ) -> None:
        """Build the graph.

        Args:
            source: called ahead of need, once a batch; raises StopIteration at the end.
            config: device, threads, prefetch and what is done to pixels. Pixels are float32 in
                host memory, or float16 on the current GPU; an input has at most `slice_size`
                samples.
            encoding: of the images.

        Raises:
            SetupError: device `gpu` without a CUDA device.
        """
        stored = (dali.types.UINT8, 3, "HWC") if encoding == "raw" else (dali.types.UINT8, 1, "")
        number, numbers = (dali.types.FLOAT, 0, ""), (dali.types.FLOAT, 1, "")
        inputs = [stored, number, number, (dali.types.INT32, 0, ""), numbers]
        if config.divides:
            inputs.append(number)
        kinds, dimensions, layouts = zip(*inputs, strict=True)
        self._pipe = open_pipeline(config)
        with self._pipe:
            nodes = dali.fn.external_source(
                source=lambda: source()[: len(inputs)],
                num_outputs=len(inputs),
                batch=True,
                dtype=list(kinds),
                ndim=list(dimensions),
                layout=list(layouts),
                no_copy=True,
            )
            self._pipe.set_outputs(make_pixels(config, encoding, *nodes))
        self._pipe.build()

    def run(self) -> torch.Tensor:
        """Return the next batch of pixels, [b, 3, height, width], in memory of its own.

        Raises:
            StopIteration: the source has ended.
            RuntimeError: most likely an image cannot be decoded (`TrialDecoder` finds it); its
                whole batch is lost, and this decoder with it.
        """
        return run_to_tensor(self._pipe)


class TrialDecoder:
    """Decodes one image at a time on the CPU, to find those that cannot be decoded.

    It judges for GPUs as well: what none of their decoders takes, DALI gives to libjpeg-turbo on
    the host in the end, which is what decodes here.
    """

    def __init__(self) -> None:
        self._pipe: dali.Pipeline | None = None

    def can_decode(self, image: npt.NDArray[np.uint8]) -> bool:
        """Return whether a JPEG (uint8 [size]) decodes to 256x256 pixels."""
        if self._pipe is None:
            self._pipe = dali.Pipeline(1, 1, None, prefetch_queue_depth=1)
            with self._pipe:
                jpeg = dali.fn.external_source(name="image", dtype=dali.types.UINT8, ndim=1)
                self._pipe.set_outputs(dali.fn.decoders.image(jpeg, output_type=dali.types.RGB))
            self._pipe.build()
        self._pipe.feed_input("image", [image])
        try:
            (pixels,) = self._pipe.run()
        except RuntimeError:
            self._pipe = None  # DALI calls it "no longer valid"
            return False
        return tuple(pixels[0].shape()) == (SIZE, SIZE, 3)


def select_gpu(device: Device) -> int | None:
    """Return the number of the GPU to decode on, the current one; None for the CPU.

    Raises:
        SetupError: device `gpu` without a CUDA device.
    """
    if device == "cpu":
        return None
    if not torch.cuda.is_available():
        raise SetupError("device gpu needs a CUDA device, and torch sees none; use cpu")
    return torch.cuda.current_device()


def run_on_current_stream(pipe: dali.Pipeline) -> Any:
    """Run a pipeline of one output and return it, a list of tensors of DALI's.

    On a GPU it may still be in the making: torch's current stream of that GPU waits for it, and the
    host only until DALI's threads have launched their work.
    """
    (output,) = pipe.run(_current_stream(pipe.device_id))  # positional only
    return output


def run_to_tensor(pipe: dali.Pipeline) -> torch.Tensor:
    """Run a pipeline of one dense output and return that as a tensor, on the pipeline's device."""
    return to_tensor(run_on_current_stream(pipe), pipe.device_id)


def to_tensor(output: Any, gpu: int | None) -> torch.Tensor:
    """Return a dense output of DALI as a tensor whose memory nobody else uses while it lives.

    On the CPU it is DALI's memory, without a copy: DALI makes each output in memory of its own, to
    which the tensor then holds the last reference.

    On a GPU it is a copy in torch's memory, made in the order of torch's current stream without a
    wait of the host. DALI frees an output in the order of its own stream, as soon as Python lets go
    of it: an alias could be overwritten while kernels that read it are still queued in torch's. A
    copy is safe because DALI's stream waits for it (`CopyToExternalImplGPU` in its
    backend_impl.cc), and torch frees its own memory in the order of the stream that uses it.

    Args:
        output: a list of tensors of one shape, as `run_on_current_stream` returns it.
        gpu: number of the GPU that it is on; None for the CPU.
    """
    pixels = output.as_tensor()
    if gpu is None:
        tensor: torch.Tensor = from_dlpack(pixels)
        return tensor
    tensor = torch.empty(
        pixels.shape(), dtype=dali.to_torch_type[pixels.dtype], device=torch.device("cuda", gpu)
    )
    # A stream makes it a copy that is not waited for.
    dali.feed_ndarray(pixels, tensor, cuda_stream=_current_stream(gpu))
    return tensor


def _current_stream(gpu: int | None) -> torch.cuda.Stream | None:
    return None if gpu is None else torch.cuda.current_stream(gpu)


def open_pipeline(config: StreamConfig, **options: Any) -> dali.Pipeline:
    """Return an empty DALI pipeline with the batch, threads, device and prefetch of a config.

    Raises:
        SetupError: device `gpu` without a CUDA device.
    """
    return dali.Pipeline(
        config.slice_size,
        config.threads or cpu_count(),
        select_gpu(config.device),
        prefetch_queue_depth=config.prefetch,
        **options,
    )


def make_pixels(
    config: StreamConfig,
    encoding: Encoding,
    images: Any,
    x: Any,
    y: Any,
    flip: Any,
    mean: Any,
    divisor: Any = None,
) -> Any:
    """Return the whole graph: stored images -> [3, size, size] pixels.

    `images` and what follows are DALI nodes (or constants) as in `DecoderInput`; the result is one.
    """
    if encoding == "raw":
        pixels = images.gpu() if config.device == "gpu" else images
        return normalize_crops(config, pixels, flip, mean, divisor, _crop(config, x, y))
    return normalize_crops(config, decode_crops(config, images, x, y), flip, mean, divisor)


def decode_crops(config: StreamConfig, jpegs: Any, x: Any, y: Any) -> Any:
    """Return the first half of the graph: JPEGs -> the crop, uint8 [size, size, 3]."""
    return dali.fn.decoders.image_crop(
        jpegs,
        device="mixed" if config.device == "gpu" else "cpu",
        output_type=dali.types.RGB,
        # GPU chroma upsampling then follows libjpeg-turbo's, which the CPU graph uses.
        jpeg_fancy_upsampling=True,
        hw_decoder_load=config.hw_decoder_load,
        # True, DALI's default, ties its GPU decoder's threads to cores near the GPU of this number
        # in the driver's count: another one wherever CUDA_VISIBLE_DEVICES leaves some out.
        affine=False,
        **_crop(config, x, y),
    )


def normalize_crops(
    config: StreamConfig,
    pixels: Any,
    flip: Any,
    mean: Any,
    divisor: Any = None,
    crop: dict[str, Any] | None = None,
) -> Any:
    """Add the second half of `make_pixels`: flip, mean, divisor and layout; cut raw images."""
    more = {} if divisor is None else {"std": divisor}
    return dali.fn.crop_mirror_normalize(
        pixels,
        mirror=flip,
        mean=mean,
        dtype=dali.types.FLOAT16 if config.device == "gpu" else dali.types.FLOAT,
        output_layout="CHW",
        **more,
        **(crop or {}),
    )


def _crop(config: StreamConfig, x: Any, y: Any) -> dict[str, Any]:
    size = config.image_size
    return {"crop_pos_x": x, "crop_pos_y": y, "crop": (size, size), "rounding": "round"}


_ENDINGS = {**ENDINGS, "jpeg": "jpg;jpeg;JPG;JPEG;Jpeg"}
"""Member name endings in DALI's syntax; shards of other tools may have any of these."""


class DaliReader:
    """Endless batches from `fn.readers.webdataset`: the yardstick for `pipeline.batches.Stream`.

    DALI's reader has an order of its own (a shuffle buffer), its own random crops and no checks.
    """

    def __init__(self, data: Path, config: StreamConfig) -> None:
        """Open the split of a local dataset.

        Batch, device, threads, prefetch and decoder load are the config's, as in `Stream`.

        Raises:
            UsageError: no dataset, or no such split.
            SetupError: device `gpu` without a CUDA device.
        """
        manifest = Manifest.load(data)
        shards = [data / s.name for s in manifest.split(config.split, data).shards]
        mean = [float(value) for value in Statistics.load(data, manifest.stats_sha256).channel_mean]
        self._pipe = open_pipeline(config, seed=0)
        with self._pipe:
            parts: Any = dali.fn.readers.webdataset(
                paths=list(map(str, shards)),
                index_paths=[str(path.with_suffix(".idx")) for path in shards],
                ext=[_ENDINGS[manifest.encoding], "cls"],
                random_shuffle=True,
                name="reader",
            )
            x, y = (dali.fn.random.uniform(range=(0.0, 1.0)) for _ in range(2))
            flip = dali.fn.random.coin_flip()
            stored = parts[0] if manifest.encoding == "jpeg" else _skip_header(parts[0])
            self._pipe.set_outputs(make_pixels(config, manifest.encoding, stored, x, y, flip, mean))
        self._pipe.build()

    def __next__(self) -> torch.Tensor:
        """Return the next batch of pixels, [b, 3, 224, 224]."""
        return run_to_tensor(self._pipe)


def _skip_header(npy: Any) -> Any:
    """Return the graph from the files of raw images to their pixels, uint8 [256, 256, 3]."""
    shape = (SIZE, SIZE, 3)
    # The pixels are the end of the file, however long the header before them is.
    return dali.fn.reshape(npy[-math.prod(shape) :], shape=shape, layout="HWC")
