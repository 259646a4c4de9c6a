"""TorchCodec's `decode_jpeg` in threads, a thread a core; cropped, and resized, by torch.

The function that its README names for images ("Image decoding"), which lets go of Python's lock.
Its tensors lie channels last, for which torch has a fast antialiased `interpolate` of bytes: what
torchvision's v2 transforms use, whose page "Performance considerations" asks for uint8 and
channels last. Each thread makes whole batches, some in advance. How bytes become floats:
`peers.work.Floats`.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch.nn.functional import interpolate
from torchcodec.decoders import decode_jpeg

from peers.crops import CROP, draw_box
from peers.work import Floats, Work, shuffle_files, write_files


def prepare(work: Work) -> None:
    """Write every image into a file of its own."""
    write_files(work)


def batches(work: Work) -> Iterator[torch.Tensor]:
    """Yield batches without end."""
    paths, floats = shuffle_files(work), Floats(work.mean)
    pending: deque[Future[torch.Tensor]] = deque()
    with ThreadPoolExecutor(work.cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        while True:
            while len(pending) < 2 * work.cores:
                some = [next(paths) for _ in range(work.batch_size)]
                pending.append(pool.submit(_make_batch, some, work.crop))
            yield floats(pending.popleft().result())


def _make_batch(paths: list[Path], crop: str) -> torch.Tensor:
    """Return uint8 [b, 224, 224, 3]."""
    batch = torch.empty(len(paths), CROP, CROP, 3, dtype=torch.uint8)
    for path, target in zip(paths, batch, strict=True):
        image = decode_jpeg(path.read_bytes(), mode="RGB")
        x, y, width, height = draw_box(image.shape[2], image.shape[1], crop)
        pixels = image[:, y : y + height, x : x + width]
        if crop == "resized":
            pixels = interpolate(pixels[None], (CROP, CROP), mode="bilinear", antialias=True)[0]
        if random.random() < 0.5:
            pixels = pixels.flip(2)
        target.copy_(pixels.permute(1, 2, 0))
    return batch
