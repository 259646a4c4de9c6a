"""`Stream`: the whole pipeline as an iterator of batches, whose only state is one integer."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from pipeline.augment import BORDER, CROP, draw, tint
from pipeline.decode import DecodeFailure, Decoder, Device, Feed, fraction
from pipeline.errors import DataError
from pipeline.order import Slots, share, shuffled
from pipeline.picture import SIZE
from pipeline.pixel_stats import Statistics
from pipeline.storage import Storage

View = Literal["random", "centre", "whole"]


@dataclass(frozen=True)
class Batch:
    """One rank's slice of a global batch: b samples."""

    ids: torch.Tensor
    """int64 [b], on the host: places in the split's stored order."""
    images: torch.Tensor
    """[b, 3, 224, 224] (view "whole": 256x256) on the device; float32 on the CPU, float16 on a
    GPU; RGB, 0..255 minus the training set's channel mean and the sample's colour shift."""
    labels: torch.Tensor
    """int64 [b], on the device: places in the manifest's class list."""
    weights: torch.Tensor
    """float32 [b], on the device: 1, or 0 for the rows that pad the last batch of an evaluation."""
    position: int
    """Samples consumed by the whole job after this batch; give it to a new Stream to go on."""


@dataclass(frozen=True)
class _Plan:
    """What a batch on its way through the graph will be, but for its pixels."""

    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    position: int


class Stream:
    """An endless stream of training batches, or one pass for evaluation.

    The samples of a global batch, their order, crops, flips and colours follow from `seed` and
    `position` alone: ranks, threads and restarts change nothing.

        with Stream(DATA, split="train", batch_size=128, seed=0, rank=0, world_size=1) as stream:
            batch = next(stream)
    """

    def __init__(
        self,
        data: str | os.PathLike[str],
        *,
        split: str = "train",
        batch_size: int = 128,
        seed: int = 0,
        position: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: Device = "cpu",
        view: View = "random",
        once: bool = False,
        colour: float = 0.1,
        threads: int | None = None,
        prefetch: int = 2,
    ) -> None:
        """Open a split of a data set.

        Args:
            data: folder that `pipeline.build_shards` sealed.
            split: `train` or `val`.
            batch_size: of the whole job; this rank gets its contiguous slice of every batch.
            seed: of order and augmentation, 0 or more.
            position: samples consumed before (a batch's `.position`).
            rank: this rank, 0..world_size-1.
            world_size: ranks that share the batch.
            device: where pixels are made and left: `cpu`, or `gpu` for the current CUDA device.
            view: `random` crop, flip and colour (training); `centre` crop (evaluation); `whole`
                256x256 picture (for ten views).
            once: each sample exactly once in stored order, the last batch padded with rows of
                weight 0, then the end. Otherwise shuffled and endless, every batch full.
            colour: standard deviation of the paper's PCA colour draws (0.1; 0 turns it off).
                Applied in view `random` only.
            threads: host threads that decode; the default is one per core this process may use.
            prefetch: batches in flight.

        Raises:
            UsageError: no data set, or no such split.
            DataError: the set is not what its manifest says.
            SetupError: device `gpu` without a CUDA device.
            ValueError: a number out of range.
        """
        if batch_size < world_size or prefetch < 1 or position < 0 or seed < 0 or colour < 0:
            raise ValueError(
                f"out of range: batch_size={batch_size} (at least world_size={world_size}), "
                f"prefetch={prefetch}, position={position}, seed={seed}, colour={colour}"
            )
        path = Path(data)
        self._storage = Storage(path, split)
        statistics = Statistics.load(path)
        self.channel_mean = statistics.channel_mean
        """float64 [3]: what was subtracted, for showing pictures."""
        self._basis = colour * statistics.eigenvectors * np.sqrt(statistics.eigenvalues)
        self._view: View = view
        self._once = once
        self._seed = seed
        self._batch_size = batch_size
        self._position = position
        self._first, self._last = share(batch_size, rank, world_size)
        self._device = torch.device("cuda" if device == "gpu" else "cpu")
        self._plans: deque[_Plan] = deque()
        self._decoder: Decoder | None = Decoder(
            self._feed,
            batch_size=self._last - self._first,
            device=device,
            threads=threads or len(os.sched_getaffinity(0)),
            prefetch=prefetch,
            size=SIZE if view == "whole" else CROP,
        )

    @property
    def samples(self) -> int:
        """Samples in the split, N."""
        return len(self._storage)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Batch:
        """Return the next batch.

        Raises:
            StopIteration: the one pass has ended.
            DataError: a sample is damaged.
            ValueError: the stream was closed.
        """
        if self._decoder is None:
            raise ValueError("this stream was closed")
        try:
            images = self._decoder.run()
        except DecodeFailure as failure:
            raise DataError(self._undecodable(failure)) from failure
        plan = self._plans.popleft()
        return Batch(
            ids=torch.from_numpy(plan.ids),
            images=images,
            labels=torch.from_numpy(plan.labels).to(self._device),
            weights=torch.from_numpy(plan.weights).to(self._device),
            position=plan.position,
        )

    def close(self) -> None:
        """Stop decoding and let the memory go."""
        self._decoder = None
        self._plans.clear()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _feed(self) -> Feed:
        """Plan the next batch and return what the graph needs for it; called ahead of need."""
        slots, weights = self._slots()
        ids = slots.ids
        jpegs = self._storage.read(ids)
        feed = self._draws(slots, jpegs)
        self._position += self._batch_size
        end = min(self._position, self.samples) if self._once else self._position
        self._plans.append(_Plan(ids, self._storage.labels(ids), weights, end))
        return feed

    def _slots(self) -> tuple[Slots, npt.NDArray[np.float32]]:
        """Return this rank's slots of the next global batch, and their weights."""
        count = self._last - self._first
        start = self._position + self._first
        if not self._once:
            return shuffled(self.samples, self._seed, start, count), np.ones(count, np.float32)
        if self._position >= self.samples:
            raise StopIteration
        places = np.arange(start, start + count)
        real = places < self.samples
        # Padding rows repeat the last sample; their weight of 0 keeps them out of every sum.
        ids = np.minimum(places, self.samples - 1)
        return Slots(np.zeros(count, np.int64), ids), real.astype(np.float32)

    def _draws(self, slots: Slots, jpegs: list[npt.NDArray[np.uint8]]) -> Feed:
        mean = np.tile(self.channel_mean, (len(jpegs), 1))
        if self._view == "random":
            draws = draw(self._seed, slots.epochs, slots.ids)
            x, y, flip = draws.x, draws.y, draws.flip
            mean -= tint(draws.colour, self._basis)  # what is not subtracted is added
        else:
            x = y = np.full(len(jpegs), BORDER // 2)
            flip = np.zeros(len(jpegs), bool)
        return Feed(jpegs, fraction(x), fraction(y), flip.astype(np.int32), mean.astype(np.float32))

    def _undecodable(self, failure: DecodeFailure) -> str:
        sample = int(self._plans[0].ids[failure.place])
        return f"{self._storage.name(sample)} cannot be decoded; pack the set again without it"
