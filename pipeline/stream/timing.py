"""Times of a stream: seconds the reading thread spent, and seconds that `next` waited, by stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Spent(NamedTuple):
    """Seconds the reading thread spent, by stage."""

    fetch: float = 0.0
    """Opening shards; for a dataset in a store, waiting until a shard is fetched and checked."""
    storage: float = 0.0
    """Reading from the disk or the page cache."""
    checksum: float = 0.0
    """Computing the CRC-32 of what was read."""
    feed: float = 0.0
    """Everything else: order, draws, views, headers."""

    @property
    def total(self) -> float:
        """Sum of all stages, in seconds."""
        return sum(self)

    def add(self, other: Spent) -> Spent:
        """Return the sum, stage by stage."""
        return Spent(*(a + b for a, b in zip(self, other, strict=True)))

    def scale_to(self, seconds: float) -> Spent:
        """Return `seconds` divided in the same proportions; all of it is `feed` if all are 0."""
        if not (total := self.total):
            return Spent(feed=seconds)
        return Spent(*(part * seconds / total for part in self))


@dataclass
class WaitTimes:
    """Seconds that `next` has waited, by the stage that was not ready.

    The wait for a batch that is not read yet is divided in the proportions of its `Spent`.

    On a GPU nothing in `next` waits for what the trainer has launched: pixels, labels and weights
    are copies in the order of its stream. `decode` is then the wait for DALI's threads, which
    themselves wait for their GPU decoder: a GPU that is busy with the network decodes later, and
    that part of the wait is the stream's and the trainer's together.
    """

    fetch: float = 0.0
    storage: float = 0.0
    checksum: float = 0.0
    feed: float = 0.0
    decode: float = 0.0
    """Making pixels: decode, crop, mirror, normalize; on a GPU, until DALI has launched that."""
    handover: float = 0.0
    """Making tensors of a decoded batch, and recording it in the ledger."""

    def add_read_wait(self, seconds: float, spent: Spent) -> None:
        """Add `seconds` waited for a batch on which the reading thread spent `spent`."""
        for stage, part in spent.scale_to(seconds)._asdict().items():
            setattr(self, stage, getattr(self, stage) + part)

    @property
    def total(self) -> float:
        """Sum of all stages, in seconds."""
        return float(sum(vars(self).values()))

    def copy(self) -> WaitTimes:
        """Return a copy."""
        return WaitTimes(**vars(self))

    def since(self, before: WaitTimes) -> WaitTimes:
        """Return the seconds added since `before`, an earlier `copy`."""
        return WaitTimes(
            **{name: value - getattr(before, name) for name, value in vars(self).items()}
        )
