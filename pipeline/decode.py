"""The DALI graphs: JPEG bytes and per-sample draws -> pixels. With `native`, all that knows DALI.

CPU and GPU graphs are the same two operators; `device` chooses where each runs:

    decode (only the 224x224 region of the crop) -> crop_mirror_normalize

The colour shift is folded into the mean that `crop_mirror_normalize` subtracts anyway (a mean of
its own for each sample), so the paper's PCA colour costs no pass over the pixels.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from torch.utils.dlpack import from_dlpack

from pipeline.augment import BORDER, CROP
from pipeline.errors import SetupError

Device = Literal["cpu", "gpu"]


class Feed(NamedTuple):
    """What one run of the graph takes, for b samples."""

    jpegs: list[npt.NDArray[np.uint8]]
    x: npt.NDArray[np.float32]
    """[b] left edge of the crop, 0..1 of the free border."""
    y: npt.NDArray[np.float32]
    """[b] upper edge of the crop, 0..1 of the free border."""
    flip: npt.NDArray[np.int32]
    """[b] 1 to mirror."""
    mean: npt.NDArray[np.float32]
    """[b, 3] what to subtract from each channel."""


class DecodeFailure(Exception):
    """DALI could not decode the sample at `place` of a batch."""

    def __init__(self, place: int) -> None:
        super().__init__(f"sample #{place} of a batch cannot be decoded")
        self.place = place


class Decoder:
    """A running DALI pipeline over a source of `Feed`s."""

    def __init__(
        self,
        source: Callable[[], Feed],
        *,
        batch_size: int,
        device: Device,
        threads: int,
        prefetch: int,
        size: int,
    ) -> None:
        """Build the graph.

        Args:
            source: called ahead of need, once a batch; raises StopIteration at the end.
            batch_size: the most samples a feed may have.
            device: `cpu` gives float32 pixels in host memory, `gpu` float16 on the current GPU.
            threads: host threads that decode.
            prefetch: batches in flight.
            size: height and width to cut out at (x, y): 224, or 256 for the whole picture.
        """
        self._pipe = Pipeline(batch_size, threads, gpu_of(device), prefetch_queue_depth=prefetch)
        with self._pipe:
            jpegs, x, y, flip, mean = fn.external_source(
                source=source,
                num_outputs=len(Feed._fields),
                batch=True,
                dtype=[types.UINT8, types.FLOAT, types.FLOAT, types.INT32, types.FLOAT],
                ndim=[1, 0, 0, 0, 1],
            )
            self._pipe.set_outputs(pixels_of(jpegs, x, y, flip, mean, device, size))
        self._pipe.build()

    def run(self) -> torch.Tensor:
        """Return the next batch of pixels, [b, 3, height, width], in memory of its own.

        Raises:
            StopIteration: the source has ended.
            DecodeFailure: a picture could not be decoded; its whole batch is lost.
        """
        try:
            return run_on_current_stream(self._pipe)
        except RuntimeError as error:
            if (place := re.search(r"[Ff]ailed to decode sample #(\d+)", str(error))) is None:
                raise
            raise DecodeFailure(int(place.group(1))) from error


def gpu_of(device: Device) -> int | None:
    """Return the number of the GPU to decode on, the current one; None for the CPU.

    Raises:
        SetupError: device `gpu` without a CUDA device.
    """
    if device == "cpu":
        return None
    if not torch.cuda.is_available():
        raise SetupError("device gpu needs a CUDA device, and torch sees none; use cpu")
    return torch.cuda.current_device()


def run_on_current_stream(pipe: Pipeline) -> torch.Tensor:
    """Run a pipeline of one output and return it without a copy.

    GPU memory goes back to DALI when the tensor dies, while kernels that read it may still be
    queued: DALI waits for those on torch's current stream, because it is told of that stream here.
    """
    stream = None if pipe.device_id is None else torch.cuda.current_stream()
    (output,) = pipe.run(stream)  # positional only
    tensor: torch.Tensor = from_dlpack(output.as_tensor())
    return tensor


def pixels_of(
    jpegs: Any, x: Any, y: Any, flip: Any, mean: Any, device: Device, size: int = CROP
) -> Any:
    """Return the graph of decision 3: encoded pictures -> [3, size, size] pixels.

    All arguments but the last two are DALI nodes (or constants) as in `Feed`; the result is one.
    """
    pixels = fn.decoders.image_crop(
        jpegs,
        device="mixed" if device == "gpu" else "cpu",
        crop=(size, size),
        crop_pos_x=x,
        crop_pos_y=y,
        rounding="round",
        output_type=types.RGB,
        # GPU chroma upsampling then follows libjpeg-turbo's, which the CPU graph uses.
        jpeg_fancy_upsampling=True,
    )
    return fn.crop_mirror_normalize(
        pixels,
        mirror=flip,
        mean=mean,
        dtype=types.FLOAT16 if device == "gpu" else types.FLOAT,
        output_layout="CHW",
    )


def fraction(corner: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Return crop corners 0..32 as DALI wants them, 0..1 of the free border."""
    return (corner / BORDER).astype(np.float32)
