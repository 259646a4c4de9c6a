"""Position -> a batch ready to be decoded: planned, read, checked, damaged samples replaced.

Batches under way: read in the background, decoded by DALI, taken one by one.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch

from pipeline.dataset.images import SIZE, Encoding
from pipeline.stream.augment import BORDER, draw
from pipeline.stream.decode import Decoder, Device, Feed, Trial, fraction
from pipeline.stream.normalization import Recipe
from pipeline.stream.order import Ids, Order, Slots
from pipeline.stream.prefetch import Background
from pipeline.stream.quarantine import UNDECODABLE, Quarantine, Screen
from pipeline.stream.shard_reader import Bytes, Damage, ShardReader
from pipeline.stream.timing import Spent, WaitTimes
from pipeline.tools.errors import REBUILD, DataError

LOOKAHEAD = 4
"""Batches whose bytes the kernel is told to fetch before they are read."""
TURNS = 100
"""Substitutes tried for one damaged sample; if all are damaged too, the data set is lost."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A rank's slice of a batch before it is decoded: b samples."""

    feed: Feed
    due: Ids
    """int64 [b]: the samples that the order has here."""
    ids: Ids
    """int64 [b]: the samples that are here; others only where those due are damaged."""
    labels: Ids
    """int64 [b]: of `ids`."""
    weights: npt.NDArray[np.float32]
    """[b]: 0 for rows that are in nobody's account."""
    start: int
    """Samples consumed by the whole job before this batch."""
    position: int
    """... and after it."""
    first: int
    """Position of the first sample of this slice."""
    memory: Bytes
    """Where the images of the feed lie, unless in their shards."""
    spent: Spent
    """What it cost the thread that made it."""


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Which part of the stream a rank gets."""

    batch_size: int
    """Of the whole job."""
    first: int
    """This rank's part of each batch, a half-open range."""
    last: int
    once: bool
    """One epoch; what the last batch lacks is made up by rows of weight 0."""


class Reader:
    """Loads one rank's slices of the batches of a stream."""

    def __init__(
        self,
        storage: ShardReader,
        order: Order,
        recipe: Recipe,
        part: Slice,
        quarantine: Quarantine,
        *,
        strict: bool,
    ) -> None:
        """Take the parts together; `strict` stops at the first damaged sample."""
        self._screen = Screen(len(storage)) if storage.encoding == "jpeg" else None
        self._storage = storage
        self._order = order
        self.recipe = recipe
        """What becomes of the images."""
        self._part = part
        self._quarantine = quarantine
        self._strict = strict
        self._needs: tuple[int, ...] = ()
        self._free: deque[Bytes] = deque()

    def batches(self, position: int) -> Iterator[Loaded]:
        """Yield the batches from `position` on.

        Raises:
            DataError: a damaged sample, and `strict`; or damage beyond mending.
            DuetError: a shard cannot be had.
        """
        planned: deque[tuple[int, Slots]] = deque()
        while True:
            start = perf_counter()
            while len(planned) <= LOOKAHEAD and not self._past_end(position):
                slots = self._plan(position)
                self._storage.advise(slots.ids)
                planned.append((position, slots))
                position += self._part.batch_size
            if not planned:
                return
            yield self._load(*planned.popleft(), start)

    def give_back(self, loaded: Loaded) -> None:
        """Say that nothing looks at the memory of a batch any more: the next may have it."""
        self._free.append(loaded.memory)

    def close(self) -> None:
        """Let go of what tries images; nothing may be read any more."""
        self._screen = None

    def _past_end(self, position: int) -> bool:
        return self._part.once and position >= self._order.samples

    def _plan(self, position: int) -> Slots:
        """Return this rank's slots of the global batch at `position`."""
        count = self._part.last - self._part.first
        slots = self._order.slots(position + self._part.first, count)
        if not self._part.once:
            return slots
        # Rows past the end repeat the last sample; their weight of 0 keeps them out of every sum.
        last = self._order.samples - 1
        ids = np.where(slots.epochs == 0, slots.ids, last)
        return Slots(np.zeros(count, np.int64), ids)

    def _load(self, start: int, slots: Slots, begun: float) -> Loaded:
        needs = self._order.needs(start)
        if needs is not self._needs:
            self._needs = needs
            self._storage.ahead(needs)
        first = start + self._part.first
        ids, pictures, memory = self._sound(first, slots)
        weights = np.ones(len(ids), np.float32)
        position = start + self._part.batch_size
        if self._part.once:
            position = min(position, self._order.samples)
            counted = np.arange(first, first + len(ids)) < self._order.samples
            weights = (counted & (ids == slots.ids)).astype(np.float32)
        feed = self._feed(slots, pictures)
        spent = self._storage.spent()
        return Loaded(
            feed=feed,
            due=slots.ids,
            ids=ids,
            labels=self._storage.labels(ids),
            weights=weights,
            start=start,
            position=position,
            first=first,
            memory=memory,
            spent=spent._replace(feed=perf_counter() - begun - spent.total),
        )

    def _sound(self, first: int, slots: Slots) -> tuple[Ids, list[Bytes], Bytes]:
        """Read the samples of `slots`, or for damaged ones their substitutes."""
        ids = slots.ids.copy()
        for place in self._quarantine.places(ids):
            if self._strict:  # listed by a stream that was not
                self.report([self._quarantine.known[int(ids[place])]])
            ids[place] = self._substitute(first + place, int(slots.ids[place]))
        memory = self._take(self._storage.room(ids))
        pictures, damaged = self._checked(ids, memory)
        while damaged:
            self.report(damaged.values())
            places = list(damaged)
            for place in places:
                ids[place] = self._substitute(first + place, int(slots.ids[place]))
            others = ids[places]
            room = np.empty(self._storage.room(others), np.uint8)
            views, again = self._checked(others, room)
            for place, view in zip(places, views, strict=True):
                pictures[place] = view
            damaged = {places[index]: damage for index, damage in again.items()}
        return ids, pictures, memory

    def _checked(self, ids: Ids, memory: Bytes) -> tuple[list[Bytes], dict[int, Damage]]:
        """Read samples; return them, and the damage at each place where there is some."""
        pictures, damaged = self._storage.read(ids, memory)
        if self._screen is not None:
            for place in self._screen.refused(ids, pictures):
                damaged.setdefault(place, self._storage.damage(int(ids[place]), UNDECODABLE))
        return pictures, damaged

    def report(self, damages: Collection[Damage]) -> None:
        """Put samples into quarantine: from now on others take their places.

        Raises:
            DataError: `strict`.
        """
        if self._strict:
            raise DataError(f"{next(iter(damages))}; python -m pipeline.verify lists all damage")
        self._quarantine.add(damages)

    def _substitute(self, position: int, due: int) -> int:
        """Return the first sound sample of those that may take the place of `due`."""
        for turn in range(TURNS):
            if (sample := self._order.substitute(position, due, turn)) not in self._quarantine:
                return sample
        raise DataError(
            f"{self._quarantine.known[due]}, and so are {TURNS} others that might take its place; "
            f"{REBUILD}"
        )

    def _take(self, size: int) -> Bytes:
        """Return memory of at least `size` bytes, used before if possible: it is mapped then."""
        memory = self._free.popleft() if self._free else np.empty(0, np.uint8)
        return memory if len(memory) >= size else np.empty(size + size // 4, np.uint8)

    def _feed(self, slots: Slots, pictures: list[Bytes]) -> Feed:
        if self._storage.encoding == "raw":
            pictures = [picture.reshape(SIZE, SIZE, 3) for picture in pictures]
        divisor = None
        if self.recipe.random:
            # By the sample that is due: its substitute may also come in its own turn.
            draws = draw(self._order.seed, slots.epochs, slots.ids)
            x, y, flip = draws.x, draws.y, draws.flip
            mean = self.recipe.means(draws.colour, slots.epochs)
            if self.recipe.divide:
                divisor = self.recipe.divisors(slots.epochs).astype(np.float32)
        else:
            x = y = np.full(len(pictures), BORDER // 2)
            flip = np.zeros(len(pictures), bool)
            mean = np.tile(self.recipe.channel_mean, (len(pictures), 1))
        return Feed(
            pictures,
            fraction(x),
            fraction(y),
            flip.astype(np.int32),
            mean.astype(np.float32),
            divisor,
        )


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
        waits: WaitTimes,
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
            DecodeFailure: there are images in the batch that cannot be decoded.
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
                raise  # there is nothing in raw images that could fail to decode
            batch, trial = self._decoding[0], Trial(self._device)
            # DALI names at most the first bad one.
            failed = [i for i, jpeg in enumerate(batch.feed.pictures) if not trial.decodes(jpeg)]
            if not failed or len(failed) == len(batch.ids) > 1:
                raise  # not the images: memory, most likely
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
    """Return an image where the pixels are, and of their kind."""
    if picture is None:
        return None
    tensor = torch.from_numpy(picture)
    return tensor.to("cuda", torch.float16) if device == "gpu" else tensor


def _subtract(images: torch.Tensor, picture: torch.Tensor, divisor: Floats | None) -> None:
    """Subtract an image from pixels that were divided already, in place.

    DALI's own arithmetic takes twice as long for it, three times with a divisor, on both cores
    where this keeps one busy; and it knows no float16.
    """
    if divisor is None:
        images.sub_(picture)
    else:
        share = torch.from_numpy(1 / divisor).to(images).view(-1, 1, 1, 1)
        images.addcmul_(picture, share, value=-1)
