"""The judge of a resumed run: what its trainer saw, against a run that was never cut.

**What a trainer sees.** A consumer process (one for each rank) notes every batch that its loader
hands over, before anything else is done with it: epoch and step as the trainer counts them, and of
each sample its identity and a CRC-32 of the pixels. A trainer that dies goes back to its newest
saved state, weights included; what it was handed after that state was saved is undone. So the
trainer's view of a run of several attempts is built in their order: each attempt first takes back
all batches of the attempts before it from the place on at which the loaded state was saved, and
then adds its own. A place is an epoch and a step: the batch with which the resumed trainer, which
knows from its own checkpoint how many batches it has consumed, counts on. A state that was saved
after the last batch of an epoch, but inside the loop, resumes in that epoch, of which nothing is
left; one that was saved after the loop resumes in the next.

**What is counted.** Epochs are the trainer's, one `for batch in loader` each. Within an epoch the
two views are compared as sets with multiplicity:

- missing: deliveries of the uncut view that the other lacks;
- repeated: deliveries of the other view that the uncut one lacks;
- reordered: of the deliveries that both have, those that must be moved to have the order of the
  uncut view. The order within a global step is nothing, as a gradient is a sum over it: the
  deliveries of a step come sorted, and what lies outside the longest non-decreasing sequence of
  the uncut view's steps is counted;
- pixels: of the deliveries that both have, those whose CRC-32 the uncut view does not have for
  that sample in that epoch.

The uncut view is the loader's own, with its own settings: a loader that pads or drops by design
is judged by what it does without a cut. Where the world changes, padding may change with it: then
missing is what neither the uncut view of the world before nor that of the world after would lack,
and repeated what neither would have; the order is that of the world before. `coverage` says beside
it how the uncut view covers the data set.
"""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

Place = tuple[int, int]
"""Epoch and step, both from 0, of a batch."""


@dataclass(frozen=True)
class Delivery:
    """One batch that a rank was handed."""

    epoch: int
    """Epoch as the trainer counts them, from 0."""
    step: int
    """Batches that this rank was handed in this epoch before, in the trainer's view."""
    rank: int
    """Rank in the world of its attempt."""
    ids: tuple[int, ...]
    """Identities of the samples."""
    crcs: tuple[int, ...]
    """CRC-32 of the pixels of each."""

    @property
    def place(self) -> Place:
        """Epoch and step."""
        return self.epoch, self.step


@dataclass(frozen=True)
class Attempt:
    """One start of the job: all that its ranks were handed."""

    start: Place
    """Place at which the state was saved that it loaded; (0, 0) for the first."""
    deliveries: tuple[Delivery, ...]
    """All batches, also those that a later attempt takes back."""


@dataclass(frozen=True)
class Verdict:
    """Counts of deliveries; all 0 if the cut changed nothing."""

    missing: int = 0
    repeated: int = 0
    reordered: int = 0
    pixels: int = 0

    @property
    def outcome(self) -> str:
        """`exact`, `order` (but other pixels), `samples` (but another order), or `wrong`."""
        if self.missing or self.repeated:
            return "wrong"
        if self.reordered:
            return "samples"
        return "order" if self.pixels else "exact"

    @property
    def kept(self) -> bool:
        """True if samples and order are those of the uncut view."""
        return self.outcome in ("exact", "order")

    def counts(self) -> dict[str, int]:
        """Return the counts by name."""
        return asdict(self)


def trainer_view(attempts: Iterable[Attempt]) -> list[Delivery]:
    """Return the batches that count, sorted by place and rank."""
    view: list[Delivery] = []
    for attempt in attempts:
        view = [one for one in view if one.place < attempt.start]
        view += attempt.deliveries
    return sorted(view, key=lambda one: (one.place, one.rank))


def compare(
    uncut: Sequence[Delivery],
    other: Sequence[Delivery],
    after: Sequence[Delivery] | None = None,
) -> Verdict:
    """Return what another view has otherwise than the uncut one.

    Args:
        uncut: view of the run that was not cut.
        other: view to judge.
        after: uncut view in the world after the cut, where that is another.
    """
    due, seen = _by_sample(uncut), _by_sample(other)
    then = due if after is None else _by_sample(after)
    missing = repeated = pixels = 0
    moves: list[tuple[Place, Place]] = []
    for sample in due.keys() | seen.keys():
        wanted, got = due.get(sample, []), seen.get(sample, [])
        both = min(len(wanted), len(got))
        counts = len(wanted), len(then.get(sample, []))
        missing += max(0, min(counts) - len(got))
        repeated += max(0, len(got) - max(counts))
        crcs = Counter(crc for _, crc in wanted) & Counter(crc for _, crc in got)
        pixels += max(0, both - crcs.total())
        moves += [(at, was) for (at, _), (was, _) in zip(got, wanted, strict=False)]
    order = [was for _, was in sorted(moves)]
    return Verdict(missing, repeated, len(order) - longest_sorted(order), pixels)


def longest_sorted(values: Sequence[Place]) -> int:
    """Return the length of the longest non-decreasing subsequence."""
    ends: list[Place] = []  # least last value of a subsequence of each length
    for value in values:
        at = bisect.bisect_right(ends, value)
        ends[at : at + 1] = [value]
    return len(ends)


def coverage(uncut: Sequence[Delivery], samples: int) -> dict[str, int]:
    """Return how often samples are missing from, and repeated in, the epochs of an uncut view."""
    epochs = {one.epoch for one in uncut}
    found = _by_sample(uncut)
    return {
        "missing": samples * len(epochs) - len(found),
        "repeated": sum(len(places) - 1 for places in found.values()),
    }


def _by_sample(view: Sequence[Delivery]) -> dict[tuple[int, int], list[tuple[Place, int]]]:
    """Return place and CRC of each delivery of a sample in an epoch, in the order of the view."""
    found = defaultdict(list)
    for one in view:
        for sample, crc in zip(one.ids, one.crcs, strict=True):
            found[one.epoch, sample].append((one.place, crc))
    return found
