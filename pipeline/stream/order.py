"""Which sample stands at which place of the stream: a pure function of numbers.

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

from pipeline.stream.augment import WORDS, words

Ids = npt.NDArray[np.int64]

SCANNED = 1 << 16
"""Samples by whose order `FullShuffle` says which shards are needed first."""
PART = 1 << 21
"""Samples in a part of a full shuffle, about."""

NEAR = 50
"""Substitutes that `BlockShuffle` looks for in the same window."""


class Slots(NamedTuple):
    """A run of places in the stream: epoch and sample id of each, both int64 [count]."""

    epochs: Ids
    ids: Ids


class Order(ABC):
    """The endless sequence of samples over shards of given sizes."""

    def __init__(self, shards: Sequence[int], seed: int = 0) -> None:
        """Take the number of samples of each shard, in stored order, and a seed, 0 or more.

        Raises:
            ValueError: there is no sample, or the seed is negative.
        """
        self.seed = seed
        self.starts: Ids = np.concatenate(([0], np.cumsum(np.asarray(shards, np.int64))))
        """int64 [shards + 1]: id of the first sample of each shard, and N."""
        self.samples = int(self.starts[-1])
        """N."""
        if self.samples < 1 or seed < 0:
            raise ValueError(f"no order for samples={self.samples}, seed={seed}")

    def slots(self, position: int, count: int) -> Slots:
        """Return the slots [position, position + count); they may cross any number of epochs.

        Raises:
            ValueError: a number is negative.
        """
        if position < 0 or count < 0:
            raise ValueError(f"no order for position={position}, count={count}")
        epochs, ids = np.empty(count, np.int64), np.empty(count, np.int64)
        done = 0
        while done < count:
            epoch, place = divmod(position + done, self.samples)
            run = self.run(epoch, place, count - done)
            epochs[done : done + len(run)] = epoch
            ids[done : done + len(run)] = run
            done += len(run)
        return Slots(epochs, ids)

    @abstractmethod
    def run(self, epoch: int, place: int, most: int) -> Ids:
        """Return the ids from `place` of `epoch` on, int64: at least 1, at most `most`."""

    @abstractmethod
    def substitute(self, position: int, due: int, turn: int) -> int:
        """Return which sample takes the place of a damaged one.

        Args:
            position: of the slot.
            due: the sample that is damaged.
            turn: 0 for the first choice; 1 if that one is damaged too; and so on.
        """

    @abstractmethod
    def needs(self, position: int) -> tuple[int, ...]:
        """Return the shards that will be read from `position` on, soonest first.

        The same tuple (the very object) is returned as long as nothing changes.
        """

    def _drawn(self, position: int, due: int, turn: int, limit: int) -> int:
        """Return a number 0..limit-1 that depends on seed, epoch, sample and turn alone."""
        epoch = position // self.samples
        (word,) = words(self.seed, np.array([epoch]), np.array([due]), 1, skip=WORDS + turn)
        return int(word[0]) % limit


class FullShuffle(Order):
    """Each epoch is a permutation of all samples, each as likely as any other.

    Of millions of samples each first draws a part of the epoch, and a part is shuffled when it is
    reached: a restart in the middle need not shuffle them all.
    """

    _soonest: tuple[int, ...] = ()

    def __init__(self, shards: Sequence[int], seed: int = 0) -> None:
        """Take shard sizes and seed as `Order` does."""
        super().__init__(shards, seed)
        # Its own: several streams would push each other's epochs out, and shuffle at every batch.
        samples = self.samples
        self._parts = lru_cache(maxsize=2)(lambda epoch: _parts(seed, epoch, samples))
        parts = self._parts
        self._part = lru_cache(maxsize=2)(
            lambda epoch, number: _part(seed, epoch, samples, number, *parts(epoch))
        )

    def run(self, epoch: int, place: int, most: int) -> Ids:
        """Return the ids from `place` of `epoch` on."""
        _, edges = self._parts(epoch)
        number = _window(edges, place)
        first = place - int(edges[number])
        return self._part(epoch, number)[first : first + most]

    def substitute(self, position: int, due: int, turn: int) -> int:
        """Return any sample of the split."""
        return self._drawn(position, due, turn, self.samples)

    def needs(self, position: int) -> tuple[int, ...]:
        """Return all shards, in the order in which the first call's position comes to need them."""
        if not self._soonest:
            epoch, place = divmod(position, self.samples)
            ids = self.run(epoch, place, SCANNED)
            shards = np.searchsorted(self.starts, ids, side="right") - 1
            rest = range(len(self.starts) - 1)
            self._soonest = tuple(dict.fromkeys([*shards.tolist(), *rest]))
        return self._soonest


class BlockShuffle(Order):
    """Shards in an order of their own each epoch; samples mixed within windows of shards."""

    def __init__(self, shards: Sequence[int], seed: int = 0, window: int = 16) -> None:
        """Take shard sizes and seed as `Order` does, and the number of shards in a window.

        Raises:
            ValueError: a number is out of range.
        """
        super().__init__(shards, seed)
        if window < 1:
            raise ValueError(f"no order for window={window}")
        self.window = window
        self._sizes = np.diff(self.starts)
        self._layouts = lru_cache(maxsize=2)(self._layout)
        self._mixed = lru_cache(maxsize=2)(self._mix)
        self._soon = lru_cache(maxsize=2)(self._next_two)

    def run(self, epoch: int, place: int, most: int) -> Ids:
        """Return the ids from `place` of `epoch` on, at most to the end of its window."""
        _, edges = self._layouts(epoch)
        number = _window(edges, place)
        first = place - int(edges[number])
        return self._mixed(epoch, number)[first : first + most]

    def substitute(self, position: int, due: int, turn: int) -> int:
        """Return any sample of the same window: its shards are at hand.

        A window may be lost as a whole (one shard, cut off): after `NEAR` turns, of the split.
        """
        if turn >= NEAR:
            return self._drawn(position, due, turn, self.samples)
        epoch, place = divmod(position, self.samples)
        number = _window(self._layouts(epoch)[1], place)
        ids = self._mixed(epoch, number)
        return int(ids[self._drawn(position, due, turn, len(ids))])

    def needs(self, position: int) -> tuple[int, ...]:
        """Return the shards of the window at `position` and of the one after it."""
        epoch, place = divmod(position, self.samples)
        return self._soon(epoch, _window(self._layouts(epoch)[1], place))

    def _layout(self, epoch: int) -> tuple[Ids, Ids]:
        """Return the shards in this epoch's order, and the place where each window starts, and N.

        Both int64: [shards] and [windows + 1].
        """
        order = _generator(self.seed, epoch).permutation(len(self._sizes))
        ends = np.cumsum(self._sizes[order])[self.window - 1 :: self.window]
        edges = np.concatenate(([0], ends))
        return order, edges if edges[-1] == self.samples else np.append(edges, self.samples)

    def _mix(self, epoch: int, number: int) -> Ids:
        """Return the ids of a window in their order."""
        shards = self._shards(epoch, number)
        ids = np.concatenate([np.arange(self.starts[s], self.starts[s + 1]) for s in shards])
        _generator(self.seed, epoch, number + 1).shuffle(ids)
        return ids

    def _shards(self, epoch: int, number: int) -> Ids:
        return self._layouts(epoch)[0][number * self.window : (number + 1) * self.window]

    def _next_two(self, epoch: int, number: int) -> tuple[int, ...]:
        last = number + 2 == len(self._layouts(epoch)[1])
        following = self._shards(epoch + 1, 0) if last else self._shards(epoch, number + 1)
        return tuple(dict.fromkeys([*self._shards(epoch, number).tolist(), *following.tolist()]))


class StoredOrder(Order):
    """Every epoch in stored order."""

    AHEAD = 4
    """Shards fetched before their turn."""

    def run(self, epoch: int, place: int, most: int) -> Ids:
        """Return the ids from `place` on."""
        return np.arange(place, min(place + most, self.samples))

    def substitute(self, position: int, due: int, turn: int) -> int:
        """Return any sample; an evaluation gives it no weight."""
        return self._drawn(position, due, turn, self.samples)

    def needs(self, position: int) -> tuple[int, ...]:
        """Return the shard at `position` and the next few."""
        shard = _window(self.starts, position % self.samples)
        return _range(shard, min(shard + 1 + self.AHEAD, len(self.starts) - 1))


def _parts(seed: int, epoch: int, samples: int) -> tuple[npt.NDArray[np.uint16], Ids]:
    """Return the part of an epoch that each sample drew, and the places where parts start, and N.

    uint16 [samples] and int64 [parts + 1].
    """
    count = 1 + samples // PART
    if count == 1:
        return np.zeros(0, np.uint16), np.array([0, samples])
    drawn = _generator(seed, epoch).integers(0, count, samples, dtype=np.uint16)
    sizes = np.bincount(drawn, minlength=count)
    return drawn, np.concatenate(([0], np.cumsum(sizes)))


def _part(
    seed: int,
    epoch: int,
    samples: int,
    number: int,
    drawn: npt.NDArray[np.uint16],
    edges: Ids,
) -> Ids:
    """Return the ids of a part of an epoch in their order, int64 (read-only)."""
    if len(edges) == 2:
        ids = _generator(seed, epoch).permutation(samples)
    else:
        ids = np.flatnonzero(drawn == number)
        _generator(seed, epoch, number + 1).shuffle(ids)
    ids.flags.writeable = False
    return ids


def _window(edges: Ids, place: int) -> int:
    """Return which of the stretches between `edges` holds a place."""
    return int(np.searchsorted(edges, place, side="right")) - 1


def _generator(*key: int) -> np.random.Generator:
    # PCG64 on a SeedSequence: neighbouring seeds and epochs have nothing in common (a sum of the
    # two would).
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


@lru_cache(maxsize=4)
def _range(start: int, stop: int) -> tuple[int, ...]:
    return tuple(range(start, stop))


def share(count: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the half-open range of a global batch of `count` that rank `rank` gets.

    The ranges of all ranks are disjoint, in rank order, cover the batch, and differ in length by
    at most one.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in a world of {world_size}")
    return count * rank // world_size, count * (rank + 1) // world_size
