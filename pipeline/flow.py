"""Batches under way: read in the background, decoded by DALI, taken one by one."""

from __future__ import annotations

import weakref
from collections import deque
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch

from pipeline.dataset.images import Encoding
from pipeline.stream.decode import Decoder, Device, Feed, Trial
from pipeline.stream.loader import Loaded, Reader
from pipeline.stream.prefetch import Background
from pipeline.stream.timing import Waits

Floats = npt.NDArray[np.float32]


class DecodeFailure(Exception):
    """DALI cannot decode some samples of a batch; no other batch comes after this."""

    def __init__(self, batch: Loaded, places: list[int]) -> None:
        super().__init__(f"samples {batch.ids[places].tolist()} cannot be decoded")
        self.batch = batch
        self.places = places


class Flow:
    """Batches from one position on, in order."""

    def __init__(
        self,
        reader: Reader,
        position: int,
        waits: Waits,
        *,
        prefetch: int,
        batch_size: int,
        device: Device,
        threads: int,
        size: int,
        encoding: Encoding,
        hw_decoder_load: float,
    ) -> None:
        """Start at once: `prefetch` batches are read and as many decoded before they are asked for.

        What `run` waits for is added to `waits`. The other arguments are those of `Decoder`.
        """
        self._reader = reader
        self._waits = waits
        self.ready = 0
        """Batches that were read, and waited to be decoded, when the last one was asked for."""
        self._device: Device = device
        self._raw = encoding == "raw"
        self._background = Background(reader.batches(position), depth=prefetch)
        self._decoding: deque[Loaded] = deque()
        self._done: deque[Loaded] = deque()
        self._keep = prefetch + 1
        self._error: BaseException | None = None
        self._read_wait = 0.0
        # DALI's graph is a tangle of cycles: if it knew `self`, all of this would stay until a
        # garbage collection.
        source = weakref.WeakMethod(self._source)
        self._decoder = Decoder(
            lambda: source()(),  # type: ignore[misc]
            batch_size=batch_size,
            device=device,
            threads=threads,
            prefetch=prefetch,
            size=size,
            encoding=encoding,
            hw_decoder_load=hw_decoder_load,
            divide=reader.recipe.divide,
        )
        self._picture = _at(reader.recipe.picture, device)

    def run(self) -> tuple[Loaded, torch.Tensor]:
        """Return the next batch and its pixels.

        Raises:
            StopIteration: there are no more.
            DecodeFailure: there are pictures in the batch that cannot be decoded.
            DuetError: what stopped the reader, after all batches before it.
        """
        start, read = perf_counter(), self._read_wait
        try:
            images = self._decoder.run()
        except StopIteration:
            if self._error is not None:
                raise self._error from None
            raise
        except RuntimeError as error:
            if self._raw:
                raise  # there is nothing in raw pictures that could fail to decode
            batch, trial = self._decoding[0], Trial(self._device)
            # DALI names at most the first bad one.
            failed = [i for i, jpeg in enumerate(batch.feed.pictures) if not trial.decodes(jpeg)]
            if not failed or len(failed) == len(batch.ids) > 1:
                raise  # not the pictures: memory, most likely
            raise DecodeFailure(batch, failed) from error
        loaded = self._decoding.popleft()
        # A GPU may still be reading the bytes of the last few batches.
        self._done.append(loaded)
        if len(self._done) > self._keep:
            self._reader.give_back(self._done.popleft())
        if self._picture is not None:
            _subtract(images, self._picture, loaded.feed.divisor)
        self._waits.decode += perf_counter() - start - (self._read_wait - read)
        return loaded, images

    def close(self) -> None:
        """Stop reading and decoding."""
        self._background.close()
        del self._decoder

    def _source(self) -> Feed:
        """DALI asks for the next batch; called ahead of need."""
        self.ready, start = self._background.made, perf_counter()
        try:
            loaded = self._background.take()
        except StopIteration:
            raise
        except Exception as error:
            self._error = error  # told when its turn comes: the batches before it are good
            raise StopIteration from None
        waited = perf_counter() - start
        self._read_wait += waited
        self._waits.on_reader(waited, loaded.spent)
        self._decoding.append(loaded)
        return loaded.feed


def _at(picture: Floats | None, device: Device) -> torch.Tensor | None:
    """Return a picture where the pixels are, and of their kind."""
    if picture is None:
        return None
    tensor = torch.from_numpy(picture)
    return tensor.to("cuda", torch.float16) if device == "gpu" else tensor


def _subtract(images: torch.Tensor, picture: torch.Tensor, divisor: Floats | None) -> None:
    """Subtract a picture from pixels that were divided already, in place.

    DALI's own arithmetic takes twice as long for it, three times with a divisor, on both cores
    where this keeps one busy; and it knows no float16.
    """
    if divisor is None:
        images.sub_(picture)
    else:
        share = torch.from_numpy(1 / divisor).to(images).view(-1, 1, 1, 1)
        images.addcmul_(picture, share, value=-1)
