"""Order of the samples of a data set: a pure function of shuffle, seed and position.

`position` counts the samples consumed by the whole job since step 0. Over N samples, position p
lies in epoch e = p // N, at place p % N of that epoch's order. Nothing else decides the order:
not the number of workers or threads, not the batch a rank gets, not a restart. Where only some
samples are selected, N is their number and a place counts them alone.

    FullShuffle     each epoch is a permutation of all samples
    BlockShuffle    each epoch permutes the shards, and the samples within windows of a few shards
    StoredOrder     as the samples lie in the shards (evaluation)
    WeightedOrder   each position draws a sample by weight, whatever was drawn before
    Mixture         several orders, interleaved in fixed shares
    SegmentedOrder  several orders, one after the other: a data set that grows
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.dataset.segments import Segments, find_segment
from pipeline.stream.augment import DRAW_WORDS, Uint64s, draw_below, random_uint64, to_unit

Ids = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float64]

SCANNED = 1 << 16
"""Samples whose order decides which shards `FullShuffle` needs first."""
PART = 1 << 21
"""Approximate number of samples in a part of a full shuffle."""
NEAR = 50
"""Substitutes that `BlockShuffle` chooses from the same window before others."""


PATTERN = 1000
"""Positions of a mixture that hold each dataset exactly as often as its share says."""


class Slots(NamedTuple):
    """Consecutive positions of the stream, all int64 [count]."""

    epochs: Ids
    """Epoch of each."""
    ids: Ids
    """Sample id of each: its place in the stored order of the split."""
    turns: Ids
    """Number that the random draws of pixels take in place of the epoch; it differs from `epochs`
    where a sample may come several times in one."""


class Order(ABC):
    """The endless sequence of samples over shards of given sizes."""

    def __init__(
        self, shards: Sequence[int], seed: int = 0, *, selected: Ids | None = None
    ) -> None:
        """Args: as the attributes; `shards` is the number of samples of each, in stored order.

        Raises:
            ValueError: there is no sample, or the seed is negative.
        """
        self.seed = seed
        """Seed, 0 or more."""
        self.selected = selected
        """int64 [N]: ids of the samples that take part, rising; None: all of them."""
        self.starts: Ids = np.concatenate(([0], np.cumsum(np.asarray(shards, np.int64))))
        """int64 [shards + 1]: place of the first sample of each shard, and N."""
        if selected is not None:
            self.starts = np.searchsorted(selected, self.starts).astype(np.int64)
        self.shards: Ids = np.flatnonzero(np.diff(self.starts))
        """int64 [n]: numbers of the shards that hold samples that take part."""
        self.samples = int(self.starts[-1])
        """Number of samples that take part, N."""
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
            run = self.list_places(epoch, place, count - done)
            epochs[done : done + len(run)] = epoch
            ids[done : done + len(run)] = run
            done += len(run)
        return Slots(epochs, ids if self.selected is None else self.selected[ids], epochs)

    @abstractmethod
    def list_places(self, epoch: int, place: int, most: int) -> Ids:
        """Return the samples from `place` of `epoch` on, int64: at least 1, at most `most`, and
        none of the next epoch.

        They are places among the samples that take part; without a selection these are their ids.
        """

    def choose_substitute(self, position: int, due: int, turn: int) -> int:
        """Return the sample that replaces a damaged one: any of the split.

        Args:
            position: position of the slot.
            due: id of the damaged sample.
            turn: 0 for the first choice; 1 if that one is damaged too; and so on.
        """
        return self._find_id(self._random_below(position, due, turn, self.samples))

    @abstractmethod
    def list_shards(self, position: int) -> tuple[int, ...]:
        """Return the shards that are needed from `position` on, soonest first.

        The same tuple (the very object) is returned as long as nothing changes.
        """

    def _find_id(self, place: int) -> int:
        """Return the id of the sample at a place among those that take part."""
        return place if self.selected is None else int(self.selected[place])

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

    def __init__(
        self, shards: Sequence[int], seed: int = 0, *, selected: Ids | None = None
    ) -> None:
        """Args: as `Order`."""
        super().__init__(shards, seed, selected=selected)
        # Per-instance cache: a shared one would thrash when several streams are open.
        samples = self.samples
        self._edges = lru_cache(maxsize=2)(lambda epoch: _find_edges(seed, epoch, samples))
        self._part = lru_cache(maxsize=2)(
            lambda epoch, number: _shuffle_part(seed, epoch, samples, number)
        )

    def list_places(self, epoch: int, place: int, most: int) -> Ids:
        """Return the samples from `place` of `epoch` on."""
        edges = self._edges(epoch)
        number = _find_interval(edges, place)
        first = place - int(edges[number])
        return self._part(epoch, number)[first : first + most]

    def list_shards(self, position: int) -> tuple[int, ...]:
        """Return all shards, in the order in which the position of the first call needs them."""
        if not self._soonest:
            epoch, place = divmod(position, self.samples)
            places = self.list_places(epoch, place, SCANNED)
            shards = np.searchsorted(self.starts, places, side="right") - 1
            self._soonest = tuple(dict.fromkeys([*shards.tolist(), *self.shards.tolist()]))
        return self._soonest


class BlockShuffle(Order):
    """Each epoch permutes the shards, and the samples within windows of shards."""

    def __init__(
        self,
        shards: Sequence[int],
        seed: int = 0,
        window: int = 16,
        *,
        selected: Ids | None = None,
    ) -> None:
        """Args: as `Order`; number of shards in a window.

        Raises:
            ValueError: a number is out of range.
        """
        super().__init__(shards, seed, selected=selected)
        if window < 1:
            raise ValueError(f"no order for window={window}")
        self.window = window
        self._sizes = np.diff(self.starts)
        self._layouts = lru_cache(maxsize=2)(self._arrange)
        self._window_places = lru_cache(maxsize=2)(self._shuffle_window)
        self._next_shards = lru_cache(maxsize=2)(self._list_next_shards)

    def list_places(self, epoch: int, place: int, most: int) -> Ids:
        """Return the samples from `place` of `epoch` on, at most to the end of its window."""
        _, edges = self._layouts(epoch)
        number = _find_interval(edges, place)
        first = place - int(edges[number])
        return self._window_places(epoch, number)[first : first + most]

    def choose_substitute(self, position: int, due: int, turn: int) -> int:
        """Return a sample of the same window, whose shards are on this node.

        A whole window may be lost (one truncated shard): after `NEAR` turns, any of the split.
        """
        if turn >= NEAR:
            return super().choose_substitute(position, due, turn)
        epoch, place = divmod(position, self.samples)
        number = _find_interval(self._layouts(epoch)[1], place)
        places = self._window_places(epoch, number)
        return self._find_id(int(places[self._random_below(position, due, turn, len(places))]))

    def list_shards(self, position: int) -> tuple[int, ...]:
        """Return the shards of the window at `position` and of the one after it."""
        epoch, place = divmod(position, self.samples)
        return self._next_shards(epoch, _find_interval(self._layouts(epoch)[1], place))

    def _arrange(self, epoch: int) -> tuple[Ids, Ids]:
        """Return the shards in this epoch's order, and the place where each window starts, and N.

        Both int64: [shards] and [windows + 1].
        """
        order = _make_generator(self.seed, epoch).permutation(self.shards)
        ends = np.cumsum(self._sizes[order])[self.window - 1 :: self.window]
        edges = np.concatenate(([0], ends))
        return order, edges if edges[-1] == self.samples else np.append(edges, self.samples)

    def _shuffle_window(self, epoch: int, number: int) -> Ids:
        """Return the samples of a window in their order."""
        shards = self._shards(epoch, number)
        places = np.concatenate([np.arange(self.starts[s], self.starts[s + 1]) for s in shards])
        _make_generator(self.seed, epoch, number + 1).shuffle(places)
        return places

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

    _next: tuple[int, ...] = ()

    def list_places(self, epoch: int, place: int, most: int) -> Ids:
        """Return the samples from `place` on."""
        return np.arange(place, min(place + most, self.samples))

    def list_shards(self, position: int) -> tuple[int, ...]:
        """Return the shard at `position` and the next few."""
        shard = _find_interval(self.starts, position % self.samples)
        if self._next[:1] != (shard,):
            first = int(np.searchsorted(self.shards, shard))
            self._next = tuple(self.shards[first : first + 1 + self.PREFETCHED].tolist())
        return self._next


class WeightedOrder(Order):
    """Each position draws a sample with replacement: by weight, whatever was drawn before.

    An epoch is N draws, as in `torch.utils.data.WeightedRandomSampler`. Each time that a sample
    comes, its pixels are drawn anew.
    """

    def __init__(
        self,
        shards: Sequence[int],
        seed: int,
        weights: Weights,
        *,
        selected: Ids | None = None,
    ) -> None:
        """Args: as `Order`; weight of each sample that takes part, float64 [N], 0 or more.

        Raises:
            ValueError: as `Order`, or there is not a weight for each, or all are 0.
        """
        super().__init__(shards, seed, selected=selected)
        if len(weights) != self.samples or not weights.any():
            raise ValueError(f"no order for {len(weights)} weights of {self.samples} samples")
        self._cumulative: Weights = np.cumsum(weights)
        self._last = int(np.flatnonzero(weights)[-1])
        self._all_shards = tuple(self.shards.tolist())

    def list_slots(self, position: int, count: int) -> Slots:
        """Return the slots at [position, position + count); each position is a turn of its own."""
        slots = super().list_slots(position, count)
        return slots._replace(turns=np.arange(position, position + count))

    def list_places(self, epoch: int, place: int, most: int) -> Ids:
        """Return the samples that the positions from `place` of `epoch` on draw."""
        start = epoch * self.samples + place
        positions = np.arange(start, start + min(most, self.samples - place))
        (words,) = random_uint64(self.seed, positions, np.zeros_like(positions), 1, name="weights")
        return self._draw_places(words)

    def choose_substitute(self, position: int, due: int, turn: int) -> int:
        """Return the sample that replaces a damaged one, drawn by weight as well."""
        at, of = np.array([position]), np.array([due])
        (word,) = random_uint64(self.seed, at, of, 1, skip=turn, name="substitute")
        return self._find_id(int(self._draw_places(word)[0]))

    def _draw_places(self, words: Uint64s) -> Ids:
        """Return the sample that each random number means, int64 [b]."""
        drawn = to_unit(words) * self._cumulative[-1]
        # The product may be rounded up to the sum of all.
        places: Ids = np.searchsorted(self._cumulative, drawn, side="right").clip(max=self._last)
        return places

    def list_shards(self, position: int) -> tuple[int, ...]:
        """Return all shards: each may be drawn at any position."""
        return self._all_shards


class Mixture:
    """Several orders, interleaved in fixed shares: an order over the samples of all of them.

    Ids count on from dataset to dataset. `PATTERN` positions together hold each dataset as often as
    its share says (rounded so that the error does not grow), in an order drawn from the seed. The
    samples of each follow its own order, in epochs of its own.
    """

    def __init__(self, orders: Sequence[Order], shares: Sequence[float], stored: Ids) -> None:
        """Args: order of each dataset, its share, and the ids it has (N, selected or not).

        Raises:
            ValueError: a share below 1 / `PATTERN` of their sum.
        """
        self.seed = orders[0].seed
        self.samples = sum(order.samples for order in orders)
        """Samples that take part, N: after so many positions an epoch is over."""
        self.selected = None
        self._orders = orders
        self._firsts = np.cumsum(stored) - stored
        self._shards = np.cumsum([len(order.starts) - 1 for order in orders])
        exact = [Fraction(repr(float(share))) for share in shares]  # 0.7, not 0.69999999999999996
        self._ends = [total / sum(exact) for total in accumulate(exact)]
        if min(exact) * PATTERN < sum(exact):
            least = f"the least is 1 of {PATTERN}"
            raise ValueError(f"a share of {min(shares):g} is too small; {least}")
        self._pattern = lru_cache(maxsize=4)(self._arrange)
        self._needs: tuple[tuple[tuple[int, ...], ...], tuple[int, ...]] = (), ()

    def list_slots(self, position: int, count: int) -> Slots:
        """Return the slots at [position, position + count); see `Order`."""
        datasets, places = self._locate(position, count)
        columns = np.empty((3, count), np.int64)
        for number, order in enumerate(self._orders):
            (mine,) = np.nonzero(datasets == number)
            if len(mine):
                slots = order.list_slots(int(places[mine[0]]), len(mine))
                columns[:, mine] = slots.epochs, slots.ids + self._firsts[number], slots.turns
        return Slots(*columns)

    def choose_substitute(self, position: int, due: int, turn: int) -> int:
        """Return the sample of the same dataset that replaces a damaged one; see `Order`."""
        datasets, places = self._locate(position, 1)
        number, first = int(datasets[0]), int(self._firsts[datasets[0]])
        return first + self._orders[number].choose_substitute(int(places[0]), due - first, turn)

    def list_shards(self, position: int) -> tuple[int, ...]:
        """Return the shards that are needed from `position` on, those of all datasets in turn."""
        before = self._count_before(position // PATTERN)
        needs = tuple(o.list_shards(n) for o, n in zip(self._orders, before, strict=True))
        if needs != self._needs[0]:
            firsts = (0, *self._shards.tolist())
            turns = [
                (k, first + shard)
                for first, one in zip(firsts, needs, strict=False)
                for k, shard in enumerate(one)
            ]
            self._needs = needs, tuple(shard for _, shard in sorted(turns))
        return self._needs[1]

    def _locate(self, position: int, count: int) -> tuple[Ids, Ids]:
        """Return the dataset of each position and its position in that one's order, [count]."""
        blocks = range(position // PATTERN, (position + count - 1) // PATTERN + 1)
        parts = [self._pattern(block) for block in blocks]
        skip = position - blocks.start * PATTERN if parts else 0
        both = np.concatenate(parts, axis=1) if parts else np.empty((2, 0), np.int64)
        datasets, places = both[:, skip : skip + count]
        return datasets, places

    def _arrange(self, block: int) -> Ids:
        """Return dataset, and position in its order, of each position of a block, [2, PATTERN]."""
        before, after = self._count_before(block), self._count_before(block + 1)
        datasets = np.repeat(np.arange(len(before)), np.subtract(after, before))
        _make_generator(self.seed, block, len(before)).shuffle(datasets)
        places = np.empty_like(datasets)
        for number, first in enumerate(before):
            mine = datasets == number
            places[mine] = first + np.arange(np.count_nonzero(mine))
        return np.stack([datasets, places])

    def _count_before(self, block: int) -> list[int]:
        """Return how many positions before a block belong to each dataset."""
        ends = [int(block * PATTERN * end) for end in self._ends]
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]


class SegmentedOrder:
    """The orders of the versions of a data set, one after the other.

    Ids count on from segment to segment, and so do epochs: a sample that is in two versions has an
    id in each. In its segment an order is what it would be alone, at its epochs.
    """

    def __init__(self, orders: Sequence[Order], segments: Segments) -> None:
        """Args: the order of each segment, over as many samples, and the segments."""
        self.seed = orders[0].seed
        self.samples = orders[-1].samples
        """Samples of an epoch of the last segment, N."""
        self.selected = None
        self._orders, self._segments = orders, segments
        self._ends = [*(segment.position for segment in segments[1:]), math.inf]
        self._firsts = [0, *accumulate(order.samples for order in orders)]
        self._shards = [0, *accumulate(len(order.starts) - 1 for order in orders)]
        self._needs: tuple[list[tuple[int, ...]], tuple[int, ...]] = [], ()

    def list_slots(self, position: int, count: int) -> Slots:
        """Return the slots at [position, position + count); see `Order`."""
        parts: list[Slots] = []
        end = position + count
        while position < end or not parts:
            number, place = self._locate(position)
            last = int(min(end, self._ends[number]))
            slots = self._orders[number].list_slots(place, last - position)
            parts.append(slots._replace(ids=slots.ids + self._firsts[number]))
            position = last
        return Slots(*map(np.concatenate, zip(*parts, strict=True)))

    def choose_substitute(self, position: int, due: int, turn: int) -> int:
        """Return the sample of the same version that replaces a damaged one; see `Order`."""
        number, place = self._locate(position)
        first = self._firsts[number]
        return first + self._orders[number].choose_substitute(place, due - first, turn)

    def list_shards(self, position: int) -> tuple[int, ...]:
        """Return the shards that are needed from `position` on, also those behind a near border."""
        number, place = self._locate(position)
        found = [(number, self._orders[number].list_shards(place))]
        if (end := self._ends[number]) <= position + SCANNED:
            following, place = self._locate(int(end))
            found.append((following, self._orders[following].list_shards(place)))
        needs = [shards for _, shards in found]
        if len(needs) != len(self._needs[0]) or any(map(operator.is_not, needs, self._needs[0])):
            every = tuple(self._shards[n] + shard for n, shards in found for shard in shards)
            self._needs = needs, every
        return self._needs[1]

    def _locate(self, position: int) -> tuple[int, int]:
        """Return the segment of a position, and the position in its order."""
        if position < 0:
            raise ValueError(f"no order for position={position}")
        number = find_segment(self._segments, position)
        segment = self._segments[number]
        return number, position - segment.position + segment.epoch * segment.samples


AnyOrder = Order | Mixture | SegmentedOrder


def _find_edges(seed: int, epoch: int, samples: int) -> Ids:
    """Return the places of an epoch where its parts start, and N, int64 [parts + 1]."""
    if (count := 1 + samples // PART) == 1:
        return np.array([0, samples])
    drawn = draw_below(_make_generator(seed, epoch), count, samples)
    sizes = sum(np.bincount(block, minlength=count) for block in drawn)
    return np.concatenate(([0], np.cumsum(sizes)))


def _shuffle_part(seed: int, epoch: int, samples: int, number: int) -> Ids:
    """Return the ids of a part of an epoch in their order, int64 (read-only)."""
    if (count := 1 + samples // PART) == 1:
        ids = _make_generator(seed, epoch).permutation(samples)
    else:
        # Drawn anew for each part: 2 bytes a sample would be 2 GB for a billion.
        drawn, start, found = draw_below(_make_generator(seed, epoch), count, samples), 0, []
        for block in drawn:
            found.append(np.flatnonzero(block == number) + start)
            start += len(block)
        ids = np.concatenate(found)
        _make_generator(seed, epoch, number + 1).shuffle(ids)
    ids.flags.writeable = False
    return ids


def _find_interval(edges: Ids, place: int) -> int:
    """Return the number of the interval between `edges` that holds a place."""
    return int(np.searchsorted(edges, place, side="right")) - 1


def _make_generator(*key: int) -> np.random.Generator:
    # A SeedSequence makes neighbouring seeds and epochs independent; their sum would not.
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
