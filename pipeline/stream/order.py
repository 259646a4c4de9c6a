"""Order of the samples of a data set: a pure function of shuffle, seed and position.

`position` counts the samples consumed by the whole job since step 0. Over N samples, position p
lies in epoch e = p // N, at place p % N of that epoch's order. Nothing else decides the order:
not the number of workers or threads, not the batch a rank gets, not a restart.

    FullShuffle   each epoch is a permutation of all samples
    BlockShuffle  each epoch permutes the shards, and the samples within windows of a few shards
    StoredOrder   as the samples lie in the shards (evaluation)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.stream.augment import DRAW_WORDS, random_uint64

Ids = npt.NDArray[np.int64]

SCANNED = 1 << 16
"""Samples whose order decides which shards `FullShuffle` needs first."""
PART = 1 << 21
"""Approximate number of samples in a part of a full shuffle."""
NEAR = 50
"""Substitutes that `BlockShuffle` chooses from the same window before others."""


class Slots(NamedTuple):
    """Consecutive positions of the stream: epoch and sample id of each, both int64 [count]."""

    epochs: Ids
    ids: Ids


class Order(ABC):
    """The endless sequence of samples over shards of given sizes."""

    def __init__(self, shards: Sequence[int], seed: int = 0) -> None:
        """Args: number of samples of each shard, in stored order; seed, 0 or more.

        Raises:
            ValueError: there is no sample, or the seed is negative.
        """
        self.seed = seed
        self.starts: Ids = np.concatenate(([0], np.cumsum(np.asarray(shards, np.int64))))
        """int64 [shards + 1]: id of the first sample of each shard, and N."""
        self.samples = int(self.starts[-1])
        """Number of samples, N."""
        if self.samples < 1 or seed < 0:
            raise ValueError(f"no order for samples={self.samples}, seed={seed}")

    def list_slots(self, position: int, count: int) -> Slots:
        """Return the slots at [position, position + count); they may cross any number of epochs.

        Raises:
            ValueError: a number is negative.
        """
        if position < 0 or count < 0:
            raise ValueError(f"no order for position={position}, count={count}")
        epochs, ids = np.empty(count, np.int64), np.empty(count, np.int64)
        done = 0
        while done < count:
            epoch, place = divmod(position + done, self.samples)
            run = self.list_ids(epoch, place, count - done)
            epochs[done : done + len(run)] = epoch
            ids[done : done + len(run)] = run
            done += len(run)
        return Slots(epochs, ids)

    @abstractmethod
    def list_ids(self, epoch: int, place: int, most: int) -> Ids:
        """Return the ids from `place` of `epoch` on, int64: at least 1, at most `most`."""

    def choose_substitute(self, position: int, due: int, turn: int) -> int:
        """Return the sample that replaces a damaged one: any of the split.

        Args:
            position: position of the slot.
            due: id of the damaged sample.
            turn: 0 for the first choice; 1 if that one is damaged too; and so on.
        """
        return self._random_below(position, due, turn, self.samples)

    @abstractmethod
    def list_shards(self, position: int) -> tuple[int, ...]:
        """Return the shards that are needed from `position` on, soonest first.

        The same tuple (the very object) is returned as long as nothing changes.
        """

    def _random_below(self, position: int, due: int, turn: int, limit: int) -> int:
        """Return a number 0..limit-1 that depends on seed, epoch, sample and turn alone."""
        epoch = position // self.samples
        (word,) = random_uint64(
            self.seed, np.array([epoch]), np.array([due]), 1, skip=DRAW_WORDS + turn
        )
        return int(word[0]) % limit


class FullShuffle(Order):
    """Each epoch is a permutation of all samples, each as likely as any other.

    In a large dataset each sample first draws a part of the epoch; a part is shuffled when it is
    reached, so a restart in the middle need not shuffle all samples.
    """

    _soonest: tuple[int, ...] = ()

    def __init__(self, shards: Sequence[int], seed: int = 0) -> None:
        """Args: as `Order`."""
        super().__init__(shards, seed)
        # Per-instance cache: a shared one would thrash when several streams are open.
        samples = self.samples
        self._parts = lru_cache(maxsize=2)(lambda epoch: _assign_parts(seed, epoch, samples))
        parts = self._parts
        self._part = lru_cache(maxsize=2)(
            lambda epoch, number: _shuffle_part(seed, epoch, samples, number, *parts(epoch))
        )

    def list_ids(self, epoch: int, place: int, most: int) -> Ids:
        """Return the ids from `place` of `epoch` on."""
        _, edges = self._parts(epoch)
        number = _find_interval(edges, place)
        first = place - int(edges[number])
        return self._part(epoch, number)[first : first + most]

    def list_shards(self, position: int) -> tuple[int, ...]:
        """Return all shards, in the order in which the position of the first call needs them."""
        if not self._soonest:
            epoch, place = divmod(position, self.samples)
            ids = self.list_ids(epoch, place, SCANNED)
            shards = np.searchsorted(self.starts, ids, side="right") - 1
            rest = range(len(self.starts) - 1)
            self._soonest = tuple(dict.fromkeys([*shards.tolist(), *rest]))
        return self._soonest


class BlockShuffle(Order):
    """Each epoch permutes the shards, and the samples within windows of shards."""

    def __init__(self, shards: Sequence[int], seed: int = 0, window: int = 16) -> None:
        """Args: as `Order`; number of shards in a window.

        Raises:
            ValueError: a number is out of range.
        """
        super().__init__(shards, seed)
        if window < 1:
            raise ValueError(f"no order for window={window}")
        self.window = window
        self._sizes = np.diff(self.starts)
        self._layouts = lru_cache(maxsize=2)(self._arrange)
        self._window_ids = lru_cache(maxsize=2)(self._shuffle_window)
        self._next_shards = lru_cache(maxsize=2)(self._list_next_shards)

    def list_ids(self, epoch: int, place: int, most: int) -> Ids:
        """Return the ids from `place` of `epoch` on, at most to the end of its window."""
        _, edges = self._layouts(epoch)
        number = _find_interval(edges, place)
        first = place - int(edges[number])
        return self._window_ids(epoch, number)[first : first + most]

    def choose_substitute(self, position: int, due: int, turn: int) -> int:
        """Return a sample of the same window, whose shards are on this node.

        A whole window may be lost (one truncated shard): after `NEAR` turns, any of the split.
        """
        if turn >= NEAR:
            return super().choose_substitute(position, due, turn)
        epoch, place = divmod(position, self.samples)
        number = _find_interval(self._layouts(epoch)[1], place)
        ids = self._window_ids(epoch, number)
        return int(ids[self._random_below(position, due, turn, len(ids))])

    def list_shards(self, position: int) -> tuple[int, ...]:
        """Return the shards of the window at `position` and of the one after it."""
        epoch, place = divmod(position, self.samples)
        return self._next_shards(epoch, _find_interval(self._layouts(epoch)[1], place))

    def _arrange(self, epoch: int) -> tuple[Ids, Ids]:
        """Return the shards in this epoch's order, and the place where each window starts, and N.

        Both int64: [shards] and [windows + 1].
        """
        order = _make_generator(self.seed, epoch).permutation(len(self._sizes))
        ends = np.cumsum(self._sizes[order])[self.window - 1 :: self.window]
        edges = np.concatenate(([0], ends))
        return order, edges if edges[-1] == self.samples else np.append(edges, self.samples)

    def _shuffle_window(self, epoch: int, number: int) -> Ids:
        """Return the ids of a window in their order."""
        shards = self._shards(epoch, number)
        ids = np.concatenate([np.arange(self.starts[s], self.starts[s + 1]) for s in shards])
        _make_generator(self.seed, epoch, number + 1).shuffle(ids)
        return ids

    def _shards(self, epoch: int, number: int) -> Ids:
        return self._layouts(epoch)[0][number * self.window : (number + 1) * self.window]

    def _list_next_shards(self, epoch: int, number: int) -> tuple[int, ...]:
        last = number + 2 == len(self._layouts(epoch)[1])
        following = self._shards(epoch + 1, 0) if last else self._shards(epoch, number + 1)
        return tuple(dict.fromkeys([*self._shards(epoch, number).tolist(), *following.tolist()]))


class StoredOrder(Order):
    """Every epoch in stored order."""

    PREFETCHED = 4
    """Shards prefetched before they are needed."""

    def list_ids(self, epoch: int, place: int, most: int) -> Ids:
        """Return the ids from `place` on."""
        return np.arange(place, min(place + most, self.samples))

    def list_shards(self, position: int) -> tuple[int, ...]:
        """Return the shard at `position` and the next few."""
        shard = _find_interval(self.starts, position % self.samples)
        return _make_range(shard, min(shard + 1 + self.PREFETCHED, len(self.starts) - 1))


def _assign_parts(seed: int, epoch: int, samples: int) -> tuple[npt.NDArray[np.uint16], Ids]:
    """Return the part of an epoch that each sample is in, and the places where parts start, and N.

    uint16 [samples] and int64 [parts + 1].
    """
    count = 1 + samples // PART
    if count == 1:
        return np.zeros(0, np.uint16), np.array([0, samples])
    drawn = _make_generator(seed, epoch).integers(0, count, samples, dtype=np.uint16)
    sizes = np.bincount(drawn, minlength=count)
    return drawn, np.concatenate(([0], np.cumsum(sizes)))


def _shuffle_part(
    seed: int, epoch: int, samples: int, number: int, drawn: npt.NDArray[np.uint16], edges: Ids
) -> Ids:
    """Return the ids of a part of an epoch in their order, int64 (read-only)."""
    if len(edges) == 2:
        ids = _make_generator(seed, epoch).permutation(samples)
    else:
        ids = np.flatnonzero(drawn == number)
        _make_generator(seed, epoch, number + 1).shuffle(ids)
    ids.flags.writeable = False
    return ids


def _find_interval(edges: Ids, place: int) -> int:
    """Return the number of the interval between `edges` that holds a place."""
    return int(np.searchsorted(edges, place, side="right")) - 1


def _make_generator(*key: int) -> np.random.Generator:
    # A SeedSequence makes neighbouring seeds and epochs independent; their sum would not.
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


@lru_cache(maxsize=4)
def _make_range(start: int, stop: int) -> tuple[int, ...]:
    return tuple(range(start, stop))
