"""Where the time of a stream goes: what a batch cost its reader, and what its taker waited for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Spent(NamedTuple):
    """Seconds of the reading thread, by what it did."""

    fetch: float = 0.0
    """Opening shards: for a set in a store, waiting until one is there and checked."""
    storage: float = 0.0
    """Reading from the disk, or the kernel's cache of it."""
    checksum: float = 0.0
    """CRC-32 of what was read."""
    feed: float = 0.0
    """All else: order, draws, views, headers."""

    @property
    def total(self) -> float:
        """Seconds in all."""
        return sum(self)

    def plus(self, other: Spent) -> Spent:
        """The sum, part by part."""
        return Spent(*(a + b for a, b in zip(self, other, strict=True)))

    def scaled(self, seconds: float) -> Spent:
        """The same shares of another total; all of it `feed` where nothing was spent."""
        if not (total := self.total):
            return Spent(feed=seconds)
        return Spent(*(part * seconds / total for part in self))


@dataclass
class WaitTimes:
    """Seconds that whoever takes batches has stood still, by what was not ready.

    A batch that is not read yet is waited for; how its reader spent its time on it says for what.
    """

    fetch: float = 0.0
    storage: float = 0.0
    checksum: float = 0.0
    feed: float = 0.0
    decode: float = 0.0
    """Pixels: decoding, cropping, mirroring, normalising, and on a GPU the copy to it."""
    handover: float = 0.0
    """Making tensors of what is ready, the ledger included."""

    def on_reader(self, seconds: float, spent: Spent) -> None:
        """Add seconds waited for a batch that cost its reader `spent`."""
        part = spent.scaled(seconds)
        self.fetch += part.fetch
        self.storage += part.storage
        self.checksum += part.checksum
        self.feed += part.feed

    @property
    def total(self) -> float:
        """Seconds in all."""
        return self.fetch + self.storage + self.checksum + self.feed + self.decode + self.handover

    def copy(self) -> WaitTimes:
        """As they are now."""
        return WaitTimes(**vars(self))

    def since(self, before: WaitTimes) -> WaitTimes:
        """What has been added since `before`, an earlier `copy`."""
        return WaitTimes(
            **{name: value - getattr(before, name) for name, value in vars(self).items()}
        )
