"""The DALI graphs: stored bytes and per-sample draws -> pixels. With `native`, all that knows DALI.

CPU and GPU graphs are the same two operators; `device` chooses where each runs:

    decode (only the 224x224 region of the crop) -> crop_mirror_normalize

Raw images need the second alone, which then crops as well.

The colour shift is folded into the mean that `crop_mirror_normalize` subtracts anyway (a mean of
its own for each sample), so the paper's PCA colour costs no pass over the pixels.

DALI's own WebDataset reader on the same shards and the same graph: the yardstick.

It has its own order (a shuffle buffer), its own random crops and no checks; it is here to measure
`pipeline.batches.Stream` against, not to train with.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from torch.utils.dlpack import from_dlpack

from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.images import ENDINGS, SIZE, Encoding
from pipeline.dataset.manifest import Manifest
from pipeline.stream.augment import BORDER, CROP
from pipeline.tools.errors import SetupError

Device = Literal["cpu", "gpu"]

# Small host buffers come from a pool of DALI's own instead of malloc: what is left to malloc, a few
# large blocks, then always fits where it was. The process keeps one size (where it wandered by a
# third) and takes no page faults, which were a third of the time (measured). DALI reads this when
# the first pipeline is built; whoever has set it knows better.
os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "64k")


class Feed(NamedTuple):
    """What one run of the graph takes, for b samples."""

    pictures: list[npt.NDArray[np.uint8]]
    """JPEGs, [size] each, or raw images, [256, 256, 3] each. DALI reads them where they lie: they
    stay untouched until the batch after next has come out."""
    x: npt.NDArray[np.float32]
    """[b] left edge of the crop, 0..1 of the free border."""
    y: npt.NDArray[np.float32]
    """[b] upper edge of the crop, 0..1 of the free border."""
    flip: npt.NDArray[np.int32]
    """[b] 1 to mirror."""
    mean: npt.NDArray[np.float32]
    """[b, 3] what to subtract from each channel."""
    divisor: npt.NDArray[np.float32] | None = None
    """[b] what to divide by in the end; only a decoder that divides looks at it."""


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
        encoding: Encoding = "jpeg",
        hw_decoder_load: float = 1.0,
        divide: bool = False,
    ) -> None:
        """Build the graph.

        Args:
            source: called ahead of need, once a batch; raises StopIteration at the end.
            batch_size: the most samples a feed may have.
            device: `cpu` gives float32 pixels in host memory, `gpu` float16 on the current GPU.
            threads: host threads that decode.
            prefetch: batches in flight.
            size: height and width to cut out at (x, y): 224, or 256 for the whole image.
            encoding: what the images are.
            hw_decoder_load: see `pixels_of`.
            divide: by the feed's divisor.
        """
        stored = (types.UINT8, 3, "HWC") if encoding == "raw" else (types.UINT8, 1, "")
        number, numbers = (types.FLOAT, 0, ""), (types.FLOAT, 1, "")
        inputs = [stored, number, number, (types.INT32, 0, ""), numbers]
        if divide:
            inputs.append(number)
        kinds, dimensions, layouts = zip(*inputs, strict=True)
        self._pipe = Pipeline(batch_size, threads, gpu_of(device), prefetch_queue_depth=prefetch)
        with self._pipe:
            pictures, x, y, flip, mean, *divisor = fn.external_source(
                source=lambda: source()[: len(inputs)],
                num_outputs=len(inputs),
                batch=True,
                dtype=list(kinds),
                ndim=list(dimensions),
                layout=list(layouts),
                no_copy=True,
            )
            self._pipe.set_outputs(
                pixels_of(
                    pictures,
                    x,
                    y,
                    flip,
                    mean,
                    device,
                    size,
                    encoding,
                    hw_decoder_load,
                    divisor[0] if divide else None,
                )
            )
        self._pipe.build()

    def run(self) -> torch.Tensor:
        """Return the next batch of pixels, [b, 3, height, width], in memory of its own.

        Raises:
            StopIteration: the source has ended.
            RuntimeError: most likely an image cannot be decoded (`Trial` says which); its whole
                batch is lost, and this decoder with it.
        """
        return run_on_current_stream(self._pipe)


class Trial:
    """Decodes images alone, to see whether it can be done."""

    def __init__(self, device: Device) -> None:
        self._gpu = gpu_of(device)  # now: the current device is a thread's own affair
        self._pipe: Pipeline | None = None

    def decodes(self, picture: npt.NDArray[np.uint8]) -> bool:
        """Whether a JPEG (uint8 [size]) gives 256x256 pixels."""
        if self._pipe is None:
            self._pipe = self._build()
        self._pipe.feed_input("picture", [picture])
        try:
            (pixels,) = self._pipe.run()
        except RuntimeError:
            self._pipe = None  # "no longer valid", says DALI
            return False
        return tuple(pixels[0].shape()) == (SIZE, SIZE, 3)

    def _build(self) -> Pipeline:
        pipe = Pipeline(1, 1, self._gpu, prefetch_queue_depth=1)
        with pipe:
            picture = fn.external_source(name="picture", dtype=types.UINT8, ndim=1)
            where = "cpu" if self._gpu is None else "mixed"
            pipe.set_outputs(fn.decoders.image(picture, device=where, output_type=types.RGB))
        pipe.build()
        return pipe


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
    pictures: Any,
    x: Any,
    y: Any,
    flip: Any,
    mean: Any,
    device: Device,
    size: int = CROP,
    encoding: Encoding = "jpeg",
    hw_decoder_load: float = 1.0,
    divisor: Any = None,
) -> Any:
    """Return the graph of decision 3: stored images -> [3, size, size] pixels.

    The first five arguments and `divisor` are DALI nodes (or constants) as in `Feed`; the result
    is one.
    `hw_decoder_load` is the share of a batch that the JPEG engines of a GPU decode, the rest being
    done by CUDA. Between 0 and 1 it is the batch that decides which images go where, and their
    pixels differ a little by that.
    """
    if encoding == "raw":
        pixels = pictures.gpu() if device == "gpu" else pictures
        return normalised(pixels, flip, mean, device, divisor, _where(x, y, size))
    pixels = decoded(pictures, x, y, device, size, hw_decoder_load)
    return normalised(pixels, flip, mean, device, divisor)


def decoded(
    jpegs: Any, x: Any, y: Any, device: Device, size: int = CROP, hw_decoder_load: float = 1.0
) -> Any:
    """Return the first half of that graph: JPEGs -> the crop, uint8 [size, size, 3]."""
    return fn.decoders.image_crop(
        jpegs,
        device="mixed" if device == "gpu" else "cpu",
        output_type=types.RGB,
        # GPU chroma upsampling then follows libjpeg-turbo's, which the CPU graph uses.
        jpeg_fancy_upsampling=True,
        hw_decoder_load=hw_decoder_load,
        **_where(x, y, size),
    )


def normalised(
    pixels: Any, flip: Any, mean: Any, device: Device, divisor: Any = None, where: Any = None
) -> Any:
    """Return its second half: uint8 HWC -> pixels; `where` to crop, in raw images, as well."""
    more = {} if divisor is None else {"std": divisor}
    return fn.crop_mirror_normalize(
        pixels,
        mirror=flip,
        mean=mean,
        dtype=types.FLOAT16 if device == "gpu" else types.FLOAT,
        output_layout="CHW",
        **more,
        **(where or {}),
    )


def _where(x: Any, y: Any, size: int) -> dict[str, Any]:
    return {"crop_pos_x": x, "crop_pos_y": y, "crop": (size, size), "rounding": "round"}


def fraction(corner: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Return crop corners 0..32 as DALI wants them, 0..1 of the free border."""
    return (corner / BORDER).astype(np.float32)


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
    """Return the graph from the files of raw images to their pixels, uint8 [256, 256, 3]."""
    shape = (SIZE, SIZE, 3)
    # The pixels are the end of the file, however long the header before them is.
    return fn.reshape(npy[-math.prod(shape) :], shape=shape, layout="HWC")
