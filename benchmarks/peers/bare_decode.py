"""The limit: libjpeg-turbo decodes the whole stored image to RGB, and does nothing else.

simplejpeg lets go of Python's lock while it decodes, so there is one thread a core; each writes
into one buffer again and again. No crop, no float, no batch in one piece, no order.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import simplejpeg

from peers.work import Work, stored

Pixels = npt.NDArray[np.uint8]

CHUNK = 32
"""Images that a thread decodes at a time."""


def prepare(work: Work) -> None:
    """Do nothing: the bytes are taken from the shards."""


def batches(work: Work) -> Iterator[Pixels]:
    """Yield, for every `batch_size` decoded images, the last of them; uint8 [h, w, 3]."""
    images = list(stored(work))
    sizes = [simplejpeg.decode_jpeg_header(jpeg)[:2] for jpeg in images]
    largest = 3 * max(height * width for height, width in sizes)
    jpegs = itertools.cycle(images)
    # As many images as are counted, whatever the batch.
    parts = [min(CHUNK, work.batch_size - done) for done in range(0, work.batch_size, CHUNK)]
    made = 0
    with ThreadPoolExecutor(work.cores) as pool:
        pending: deque[Future[Pixels]] = deque()
        while True:
            while len(pending) < 4 * work.cores + len(parts):
                count = parts[made % len(parts)]
                pending.append(pool.submit(_decode, list(itertools.islice(jpegs, count)), largest))
                made += 1
            yield [pending.popleft().result() for _ in parts][-1]


def _decode(jpegs: list[bytes], largest: int) -> Pixels:
    buffer = np.empty(largest, np.uint8)
    for jpeg in jpegs:
        pixels: Pixels = simplejpeg.decode_jpeg(jpeg, "RGB", buffer=buffer)
    return pixels
