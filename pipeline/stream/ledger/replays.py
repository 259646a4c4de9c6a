"""Deliveries of the same positions, by several attempts of a run: the first one, and differences.

A sample that was withdrawn between two attempts is replaced in the later one: that is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.stream.ledger.findings import LedgerFinding, pluralize
from pipeline.stream.ledger.format import Deliveries, LedgerFile
from pipeline.stream.order import Ids

Flags = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int32]


class Stretch(NamedTuple):
    """The positions of one segment, and its ids."""

    first: int
    """First position."""
    last: int
    """Position after the last that was delivered, or at which the next segment begins."""
    epoch: int
    """First epoch."""
    samples: int
    """Samples of an epoch, N."""
    offset: int
    """Id of its first sample in the ledgers, where ids count on over all segments."""

    def find_epoch(self, position: int) -> int:
        """Return the epoch of a position."""
        return self.epoch + (position - self.first) // self.samples


class DeliveryWindow:
    """The first delivery of each position in [first, last), in the order of the files."""

    def __init__(self, stretch: Stretch, first: int, last: int, stored: int) -> None:
        """Start with nothing delivered; `stored` is the number of all ids."""
        size = last - first
        ids = np.uint32 if stored <= 1 << 32 else np.int64
        self.stretch = stretch
        """Segment that the window lies in; it begins and ends with epochs."""
        self.first, self.last = first, last
        self.owner: Numbers = np.full(size, -1, np.int32)
        """Number of the file with the first delivery; -1 where there is none."""
        self.due: npt.NDArray[np.integer[Any]] = np.zeros(size, ids)
        self.delivered: npt.NDArray[np.integer[Any]] = np.zeros(size, ids)
        self.compared = 0
        """Number of deliveries whose pixels were compared with those of an earlier one."""
        self._sums: dict[object, tuple[Numbers, npt.NDArray[np.uint32]]] = {}

    def add_ids(
        self, number: int, deliveries: Deliveries, withdrawn: Ids
    ) -> tuple[Flags, Flags, Numbers]:
        """Add the ids of file `number`.

        Args:
            number: of the file.
            deliveries: of the file.
            withdrawn: ids of samples that may have been delivered, and then no more.

        Returns:
            Where they differ from an earlier delivery and should not, where they differ at all, and
            the number of that one's file; all [n].
        """
        at = deliveries.positions - self.first
        new = self.owner[at] < 0
        self.owner[at[new]] = number
        self.due[at[new]] = deliveries.due[new]
        self.delivered[at[new]] = deliveries.delivered[new]
        other = self.due[at] != deliveries.due
        differ = other | (self.delivered[at] != deliveries.delivered)
        wrong = differ
        if len(withdrawn):
            wrong = other | (differ & ~np.isin(self.delivered[at], withdrawn))
            self.delivered[at[~other]] = deliveries.delivered[~other]
        return wrong, differ, self.owner[at]

    def add_pixels(
        self, number: int, kind: object, deliveries: Deliveries
    ) -> tuple[Flags, Numbers]:
        """Add the checksums of file `number`; only those of the same `kind` are compared.

        Returns:
            As `add_ids`.
        """
        if kind not in self._sums:
            size = self.last - self.first
            self._sums[kind] = np.full(size, -1, np.int32), np.zeros(size, np.uint32)
        owner, sums = self._sums[kind]
        at = deliveries.positions - self.first
        new = owner[at] < 0
        self.compared += len(at) - int(new.sum())
        owner[at[new]] = number
        sums[at[new]] = deliveries.checksums[new]
        return sums[at] != deliveries.checksums, owner[at]


@dataclass
class _ReplayDifference:
    """The first difference between two files, and the number of differences."""

    position: int
    epoch: int
    sample: int
    text: str
    count: int = 0


class Replays:
    """Collects the differences between deliveries of the same positions, by pair of files."""

    def __init__(self, files: Sequence[LedgerFile], withdrawn: Ids) -> None:
        self._files = files
        self._withdrawn = withdrawn
        self._found: dict[tuple[str, int, int], _ReplayDifference] = {}

    def compare(self, window: DeliveryWindow, number: int, deliveries: Deliveries) -> None:
        """Add the deliveries of file `number` to a window, and record where they differ."""
        header = self._files[number].header
        wrong_ids, other_ids, owner = window.add_ids(number, deliveries, self._withdrawn)
        self._record("ids", number, deliveries, wrong_ids, owner, window)
        # Pixels differ between devices, crops, means and colours: those are not compared.
        color = header.colour, header.colour_divide
        kind = header.checksum, header.device, header.crop, header.mean, color, header.pixels
        other_pixels, owner = window.add_pixels(number, kind, deliveries)
        self._record("pixels", number, deliveries, other_pixels & ~other_ids, owner, window)

    def list_findings(self) -> list[LedgerFinding]:
        """Return one finding for each pair of files that differ."""
        return [self._make_finding(*key, difference) for key, difference in self._found.items()]

    def _record(
        self,
        what: str,
        number: int,
        deliveries: Deliveries,
        wrong: Flags,
        owner: Numbers,
        window: DeliveryWindow,
    ) -> None:
        for other in np.unique(owner[wrong]).tolist():
            places = np.flatnonzero(wrong & (owner == other))
            first = int(places[0])
            position, sample = int(deliveries.positions[first]), int(deliveries.due[first])
            text = f"the pixels of sample {deliveries.delivered[first]} differ"
            if what == "ids":
                slot = position - window.first
                text = (
                    f"sample {window.due[slot]} was due and {window.delivered[slot]} delivered, "
                    f"and the second time {sample} and {deliveries.delivered[first]}"
                )
            new = _ReplayDifference(position, window.stretch.find_epoch(position), sample, text)
            self._found.setdefault((what, other, number), new).count += len(places)

    def _make_finding(
        self, what: str, one: int, other: int, difference: _ReplayDifference
    ) -> LedgerFinding:
        names = self._files[one].path.name, self._files[other].path.name
        positions = pluralize(difference.count, "position")
        return LedgerFinding(
            kind="replay",
            reason=(
                f"{names[0]} and {names[1]} tell of other {what} at {positions}: at position "
                f"{difference.position:,} (epoch {difference.epoch}), {difference.text}"
            ),
            epoch=difference.epoch,
            position=difference.position,
            count=difference.count,
            ids=(difference.sample,),
            files=names,
        )
